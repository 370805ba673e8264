// One planted bug per kernel in the use of common/hopper.cuh. 160 threads: four warps multiply what the fifth has copied, four
// tiles of a [64, 256] and b [64, 256] through one stage, as d [128][32].
#include "common/hopper.cuh"

enum Bug {
  kNone,
  kNoWait,           // the tile is read before it has landed
  kWrongPhase,       // the wait is for the phase before
  kNoEmptyWait,      // the stage is filled while it is read
  kEarlyRelease,     // the stage is handed back before its products are waited for
  kNoProductWait,    // results are read before they are there
  kNoFence,          // registers were touched since the last product
  kHalfAsk,          // two of the four warps ask for a product the others do not
  kTooManyArrivals,  // two, where one was said
  kNothingComes,     // a wait for bytes nobody copies
  kBoxNotAwaited,
  kProductNotAwaited,
  kNoInit,
  kMisaligned,
};

template <Bug kBug>
__device__ __forceinline__ void multiply(float *out, const TensorMap &a, const TensorMap &b) {
  constexpr int kTile = 64 * kSwizzleSpan, kTiles = 4;
  DYN_SHARED(unsigned char, shared);
  auto *full = reinterpret_cast<uint64_t *>(shared + 2 * kTile), *empty = full + 1;
  if (threadIdx.x == 0 && kBug != kNoInit) mbarrier_init(full, 1), mbarrier_init(empty, 4), mbarrier_init_fence();
  __syncthreads();
  if (threadIdx.x >= 128) {
    for (int i = 0; i < kTiles + (kBug == kBoxNotAwaited) && threadIdx.x == 128; i++) {
      if (kBug != kNoEmptyWait) mbarrier_wait(empty, i % 2 ^ 1);
      mbarrier_arrive_expect(full, 2 * kTile);
      if (kBug == kTooManyArrivals) mbarrier_arrive(full);
      copy_box(shared + (kBug == kMisaligned ? 128 : 0), a, i * 64, 0, full);
      if (kBug != kNothingComes) copy_box(shared + kTile, b, i * 64, 0, full);
    }
    return;
  }
  float d[32] = {};
  for (int i = 0; i < kTiles; i++) {
    if (kBug != kNoWait) mbarrier_wait(full, kBug == kWrongPhase ? i % 2 ^ 1 : i % 2);
    if (kBug != kNoFence) wgmma_fence();
    for (int step = 0; step < 4; step++) {
      if (kBug == kHalfAsk && step == 3 && threadIdx.x >= 64) continue;
      wgmma<64, bf16>(d, wgmma_descriptor(shared) + step * 2, wgmma_descriptor(shared + kTile) + step * 2, true);
    }
    wgmma_commit();
    if (kBug != kEarlyRelease && kBug != kNoProductWait && kBug != kProductNotAwaited) wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
    if (kBug == kEarlyRelease && i > 0) wgmma_wait<1>();
  }
  if (kBug == kEarlyRelease) wgmma_wait<0>();
  for (int i = 0; i < 32; i++) out[threadIdx.x * 32 + i] = d[i];
  if (kBug == kNoProductWait) wgmma_wait<0>();
}

#define BUG(name, bug)                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(160) hopperbugs__##name(float *out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b) { \
    multiply<bug>(out, a, b);                                                                                                             \
  }
BUG(none, kNone)
BUG(no_wait, kNoWait)
BUG(wrong_phase, kWrongPhase)
BUG(no_empty_wait, kNoEmptyWait)
BUG(early_release, kEarlyRelease)
BUG(no_product_wait, kNoProductWait)
BUG(no_fence, kNoFence)
BUG(half_ask, kHalfAsk)
BUG(too_many_arrivals, kTooManyArrivals)
BUG(nothing_comes, kNothingComes)
BUG(box_not_awaited, kBoxNotAwaited)
BUG(product_not_awaited, kProductNotAwaited)
BUG(no_init, kNoInit)
BUG(misaligned, kMisaligned)
