// The wrappers of common/dev.cuh one by one, each lane's inputs and outputs in memory: checked against numpy on the
// simulated device and on real ones. One warp unless said otherwise; arrays are [lane][register].
#include "common/dev.cuh"

struct MmaCase {
  const uint32_t *a;  // [32][4]
  const uint32_t *b;  // [32][2]
  const float *c;     // [32][4]
  float *d;           // [32][4]
};

template <bool kBf16>
__device__ __forceinline__ void mma_case(const MmaCase &t) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = t.a[lane * 4 + i];
  for (int i = 0; i < 2; i++) b[i] = t.b[lane * 2 + i];
  for (int i = 0; i < 4; i++) d[i] = t.c[lane * 4 + i];
  if (kBf16) {
    mma_m16n8k16_bf16(d, a, b);
  } else {
    mma_m16n8k16_f16(d, a, b);
  }
  for (int i = 0; i < 4; i++) t.d[lane * 4 + i] = d[i];
}
extern "C" __global__ void __launch_bounds__(32) conformance__mma_f16(const MmaCase t) { mma_case<false>(t); }
extern "C" __global__ void __launch_bounds__(32) conformance__mma_bf16(const MmaCase t) { mma_case<true>(t); }

// `rows`: byte offset of each lane's row in 2 kB of shared memory, which is filled from `in`.
struct LdmatrixCase {
  const uint32_t *in;  // [512]
  const int32_t *rows;  // [32]
  uint32_t *out;        // [32][4]
};

template <bool kTrans>
__device__ __forceinline__ void ldmatrix_case(const LdmatrixCase &t) {
  SHARED(uint4, tile, 128);
  const int lane = threadIdx.x;
  uint32_t *words = reinterpret_cast<uint32_t *>(tile);
  for (int i = lane; i < 512; i += 32) words[i] = t.in[i];
  __syncthreads();
  uint32_t r[4];
  const unsigned char *row = reinterpret_cast<const unsigned char *>(tile) + t.rows[lane];
  if (kTrans) {
    ldmatrix_x4_trans(r, row);
  } else {
    ldmatrix_x4(r, row);
  }
  for (int i = 0; i < 4; i++) t.out[lane * 4 + i] = r[i];
}
extern "C" __global__ void __launch_bounds__(32) conformance__ldmatrix(const LdmatrixCase t) { ldmatrix_case<false>(t); }
extern "C" __global__ void __launch_bounds__(32) conformance__ldmatrix_trans(const LdmatrixCase t) { ldmatrix_case<true>(t); }

// Copies in three groups, read back in reverse; copy i is valid when i < num_valid. 96 threads, 16 bytes each.
struct CopyCase {
  const uint4 *in;  // [3][96]
  uint4 *out;       // [3][96]
  int num_valid;
};
extern "C" __global__ void __launch_bounds__(96) conformance__cp_async(const CopyCase t) {
  SHARED(uint4, s, 3 * 96);
  const int thread = threadIdx.x;
  for (int g = 0; g < 3; g++) {
    const int i = g * 96 + thread;
    cp_async16(&s[i], t.in + (i < t.num_valid ? i : 0), i < t.num_valid);
    cp_async_commit();
  }
  const int mirror = 95 - thread;
  cp_async_wait<2>();
  __syncthreads();
  t.out[thread] = s[mirror];
  cp_async_wait<0>();
  __syncthreads();
  t.out[96 + thread] = s[96 + mirror];
  t.out[192 + thread] = s[192 + mirror];
}

// Every shuffle form and vote over one warp; `argument` is the lane, distance or bits asked for by each form.
struct ShuffleCase {
  const int32_t *in;  // [32]
  int32_t *out;       // [8][32]: sync, xor, up, down, sync of width 8, ballot, any of the warp, all of the warp
  int argument;
};
extern "C" __global__ void __launch_bounds__(32) conformance__shuffles(const ShuffleCase t) {
  const int lane = threadIdx.x, v = t.in[lane];
  t.out[lane] = __shfl_sync(kFullMask, v, t.argument);
  t.out[32 + lane] = __shfl_xor_sync(kFullMask, v, t.argument);
  t.out[64 + lane] = __shfl_up_sync(kFullMask, v, t.argument);
  t.out[96 + lane] = __shfl_down_sync(kFullMask, v, t.argument);
  t.out[128 + lane] = __shfl_sync(kFullMask, v, t.argument, 8);
  t.out[160 + lane] = static_cast<int32_t>(__ballot_sync(kFullMask, v > 0));
  t.out[192 + lane] = __any_sync(kFullMask, v > 1000) != 0;
  t.out[224 + lane] = __all_sync(kFullMask, v > -1000) != 0;
}

struct ReduceCase {
  const float *in;  // [32]
  float *out;       // [2][32]: sum, max
};
extern "C" __global__ void __launch_bounds__(32) conformance__reductions(const ReduceCase t) {
  const int lane = threadIdx.x;
  t.out[lane] = warp_sum(t.in[lane]);
  t.out[32 + lane] = warp_max(t.in[lane]);
}

struct BytesCase {
  const uint32_t *a, *b;  // [32]
  const int32_t *c;       // [32]
  int32_t *out;           // [2][32]: b's bytes with a sign, and without
};
extern "C" __global__ void __launch_bounds__(32) conformance__byte_products(const BytesCase t) {
  const int lane = threadIdx.x;
  t.out[lane] = dp4a_u32_s32(t.a[lane], t.b[lane], t.c[lane]);
  t.out[32 + lane] = dp4a_u32_u32(t.a[lane], t.b[lane], t.c[lane]);
}

// Two halves of a block meet at barriers of their own, then all at one: out[i] = in[mirror within its half], twice.
struct BarrierCase {
  const int32_t *in;  // [128]
  int32_t *out;       // [128]
};
extern "C" __global__ void __launch_bounds__(128) conformance__named_barrier(const BarrierCase t) {
  SHARED(int32_t, s, 128);
  const int thread = threadIdx.x, half = thread / 64, first = half * 64;
  s[thread] = t.in[thread];
  named_barrier_sync(1 + half, 64);
  const int v = s[first + 63 - (thread - first)];
  __syncthreads();
  s[thread] = v + 1;
  __syncthreads();
  t.out[thread] = s[127 - thread];
}

// Conversions: out[i] = the 16 bits of in[i], and back. 64 threads, grid-stride.
struct ConvertCase {
  const float *in;      // [n]
  unsigned short *out;  // [2][n]: f16, bf16
  float *back;          // [2][n]
  int n;
};
extern "C" __global__ void __launch_bounds__(64) conformance__convert(const ConvertCase t) {
  for (int i = blockIdx.x * 64 + threadIdx.x; i < t.n; i += gridDim.x * 64) {
    const __half h = __float2half_rn(t.in[i]);
    const __nv_bfloat16 b = __float2bfloat16_rn(t.in[i]);
    t.out[i] = *reinterpret_cast<const unsigned short *>(&h);
    t.out[t.n + i] = *reinterpret_cast<const unsigned short *>(&b);
    t.back[i] = __half2float(h);
    t.back[t.n + i] = __bfloat162float(b);
  }
}

// What memory and launches need: out[i] = in[i] * factor + block. Any grid, 128 threads, dynamic shared memory used whole.
struct ScaleCase {
  const float *in;
  float *out;
  int n, shared_floats;
  float factor;
};
extern "C" __global__ void __launch_bounds__(128) conformance__scale(const ScaleCase t) {
  DYN_SHARED(float, s);
  const int thread = threadIdx.x;
  for (int i = thread; i < t.shared_floats; i += 128) s[i] = 1.0f;
  __syncthreads();
  const int i = blockIdx.x * 128 + thread;
  const float one = t.shared_floats ? s[(i * 7) % t.shared_floats] : 1.0f;
  if (i < t.n) t.out[i] = t.in[i] * t.factor * one;
}

// Two parameters, the second an address: counts blocks with an atomic.
extern "C" __global__ void __launch_bounds__(32) conformance__count(const ReduceCase t, void *counter) {
  if (threadIdx.x == 0) atomicAdd(static_cast<int *>(counter), 1);
  t.out[threadIdx.x] = t.in[threadIdx.x];
}
