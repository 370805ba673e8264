// The wrappers of common/hopper.cuh one by one, checked against numpy on the simulated device and on real ones of sm_90a.
#include "common/hopper.cuh"

// One box as it lies in shared memory. 32 threads.
struct BoxCase {
  unsigned char *out;  // [nbytes]
  int x, y, nbytes;
};
__device__ __forceinline__ void box_case(const BoxCase &t, const TensorMap &map) {
  DYN_SHARED(unsigned char, shared);
  auto *barrier = reinterpret_cast<uint64_t *>(shared + t.nbytes);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    prefetch_map(map);
    mbarrier_arrive_expect(barrier, t.nbytes);
    copy_box(shared, map, t.x, t.y, barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < t.nbytes; i += 32) t.out[i] = shared[i];
}
extern "C" __global__ void __launch_bounds__(32) hopper__copy_box(const BoxCase t, const __grid_constant__ TensorMap map) { box_case(t, map); }

// d = c + a . b^T over 64 elements of K, a [64, 64], b [N, 64], in two groups; registers as they are. 128 threads.
struct ProductCase {
  const float *c;  // [128][N / 2], or null: from zero
  float *d;        // [128][N / 2]
};
template <int N, class Half>
__device__ __forceinline__ void product_case(const ProductCase &t, const TensorMap &a, const TensorMap &b) {
  DYN_SHARED(unsigned char, shared);
  unsigned char *tile_b = shared + 64 * kSwizzleSpan;
  auto *barrier = reinterpret_cast<uint64_t *>(tile_b + N * kSwizzleSpan);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, (64 + N) * kSwizzleSpan);
    copy_box(shared, a, 0, 0, barrier);
    copy_box(tile_b, b, 0, 0, barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = t.c != nullptr ? t.c[threadIdx.x * (N / 2) + i] : 7.f;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    wgmma<N, Half>(d, wgmma_descriptor(shared) + step * 2, wgmma_descriptor(tile_b) + step * 2, t.c != nullptr || step > 0);
    if (step % 2) wgmma_commit();
  }
  wgmma_wait<1>();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; i++) t.d[threadIdx.x * (N / 2) + i] = d[i];
}
#define PRODUCT(N, name, Half)                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) hopper__wgmma_##name##_##N(const ProductCase t, const __grid_constant__ TensorMap a, \
                                                                              const __grid_constant__ TensorMap b) {          \
    product_case<N, Half>(t, a, b);                                                                                           \
  }
#define PRODUCTS(N) PRODUCT(N, f16, __half) PRODUCT(N, bf16, bf16)
PRODUCTS(64) PRODUCTS(128) PRODUCTS(192) PRODUCTS(256)

// A warp fills a ring of two stages with boxes of 8 rows, four warps hand them on: out is the array, rows in order. 160 threads.
struct RingCase {
  uint32_t *out;  // [boxes][256]: what is stored of each box, 1024 bytes
  int boxes;
};
__device__ __forceinline__ void ring_case(const RingCase &t, const TensorMap &map) {
  DYN_SHARED(unsigned char, shared);
  auto *full = reinterpret_cast<uint64_t *>(shared + 2048), *empty = full + 2;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 4);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    give_registers<24>();
    for (int i = 0; i < t.boxes && threadIdx.x == 128; i++) {
      mbarrier_wait(empty + i % 2, i / 2 % 2 ^ 1);
      mbarrier_arrive_expect(full + i % 2, 1024);
      copy_box(shared + i % 2 * 1024, map, 0, i * 8, full + i % 2);
    }
  } else {
    take_registers<32>();
    for (int i = 0; i < t.boxes; i++) {
      mbarrier_wait(full + i % 2, i / 2 % 2);
      for (int j = threadIdx.x; j < 256; j += 128) t.out[i * 256 + j] = reinterpret_cast<uint32_t *>(shared + i % 2 * 1024)[j];
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + i % 2);
    }
  }
}
extern "C" __global__ void __launch_bounds__(160, 1) hopper__ring(const RingCase t, const __grid_constant__ TensorMap map) { ring_case(t, map); }
