// One planted bug per kernel, to prove that the simulated device sees it. 128 threads, out and in hold 128 floats.
#include "common/dev.cuh"

extern "C" __global__ void __launch_bounds__(128) bugs__none(float *out, const float *in) {
  SHARED(float, s, 128);
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__no_syncthreads(float *out, const float *in) {
  SHARED(float, s, 128);
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[127 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__no_syncwarp(float *out, const float *in) {
  SHARED(float, s, 128);
  const int first = threadIdx.x & ~31, lane = threadIdx.x & 31;
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[first + 31 - lane];
}

// The second write races with other threads' reads of the first round.
extern "C" __global__ void __launch_bounds__(128) bugs__write_after_read(float *out, const float *in) {
  SHARED(float, s, 128);
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float next = s[(threadIdx.x + 1) % 128];
  s[threadIdx.x] = next * 2;
  __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__shared_overrun(float *out, const float *in) {
  SHARED(float, s, 128);
  s[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

extern "C" __global__ void __launch_bounds__(128) bugs__global_overrun(float *out, const float *in) {
  out[threadIdx.x + 1] = in[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__uninitialized_shared(float *out, const float *in) {
  SHARED(float, s, 128);
  if (threadIdx.x & 1) s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x] + 1;
}

extern "C" __global__ void __launch_bounds__(128) bugs__divergent_barrier(float *out, const float *in) {
  if (threadIdx.x < 64) {
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    out[threadIdx.x] = in[threadIdx.x] + 1;
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(128) bugs__exit_before_barrier(float *out, const float *in) {
  if (threadIdx.x >= 96) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__exit_before_shuffle(float *out, const float *in) {
  if (threadIdx.x >= 100) return;
  out[threadIdx.x] = __shfl_xor_sync(kFullMask, in[threadIdx.x], 1);
}

extern "C" __global__ void __launch_bounds__(128) bugs__divergent_shuffle(float *out, const float *in) {
  float v = in[threadIdx.x];
  if (threadIdx.x & 1) {
    v = __shfl_xor_sync(kFullMask, v, 2);
  } else {
    v += __shfl_xor_sync(kFullMask, v, 4);
  }
  out[threadIdx.x] = v;
}

extern "C" __global__ void __launch_bounds__(128) bugs__copy_read_before_wait(float *out, const float *in) {
  SHARED(float4, s, 32);
  if (threadIdx.x < 32) {
    cp_async16(&s[threadIdx.x], in + threadIdx.x * 4);
    cp_async_commit();
  }
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float *>(s)[threadIdx.x];
  if (threadIdx.x < 32) cp_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(128) bugs__copy_never_waited(float *out, const float *in) {
  SHARED(float4, s, 32);
  if (threadIdx.x < 32) {
    cp_async16(&s[threadIdx.x], in + threadIdx.x * 4);
    cp_async_commit();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__misaligned_copy(float *out, const float *in) {
  SHARED(float, s, 130);
  if (threadIdx.x < 32) {
    cp_async16(&s[threadIdx.x * 4 + 1], in + threadIdx.x * 4);
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

// out[0] depends on which of two blocks comes first.
extern "C" __global__ void __launch_bounds__(128) bugs__block_order(float *out, const float *in) {
  if (threadIdx.x == 0) out[0] = out[0] * 2 + in[blockIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bugs__null_pointer(float *out, const float *in) {
  const float *nothing = pointer_at<const float>(in[0] > 0 ? 0 : 1);
  out[threadIdx.x] = nothing[threadIdx.x];
}
