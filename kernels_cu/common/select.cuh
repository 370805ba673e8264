// select.cuh - thresholds without sorting: which bin of a histogram a running sum reaches a wanted amount in.
//
// Amounts are integers (tokens, or probability in units of 2^-40), so no result depends on the order of additions.
#pragma once

#include "dev.cuh"

using u64 = unsigned long long;  // the type of CUDA's 64-bit atomics

struct Bin {
  int index;
  u64 before;  // sum of the bins before it
};

template <int kThreads>
struct SelectScratch {
  u64 warp_totals[kThreads / 32];
  Bin found;
};

// Sum of v over the threads before this one; every thread of the block calls.
template <int kThreads>
__device__ __forceinline__ u64 sum_before(u64 v, u64 *warp_totals) {
  const int lane = threadIdx.x % 32, warp = warp_index();
  u64 inclusive = v;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const u64 other = __shfl_up_sync(kFullMask, inclusive, o);
    if (lane >= o) inclusive += other;
  }
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  u64 before = inclusive - v;
#pragma unroll 4
  for (int w = 0; w < warp; w++) before += warp_totals[w];
  return before;
}

// The first bin at which bins[0] + ... + bins[index] >= wanted, the last one if the sum never gets there. bins is shared
// memory, complete (a barrier has passed); after the call it may be overwritten.
template <int kThreads, int kBins>
__device__ __forceinline__ Bin find_bin(const u64 *bins, u64 wanted, SelectScratch<kThreads> &scratch) {
  static_assert(kBins % kThreads == 0, "every thread takes as many bins");
  constexpr int kEach = kBins / kThreads;
  u64 mine = 0;
  for (int j = 0; j < kEach; j++) mine += bins[threadIdx.x * kEach + j];
  u64 before = sum_before<kThreads>(mine, scratch.warp_totals);
  const bool is_last = threadIdx.x == kThreads - 1;
  if (before < wanted && (before + mine >= wanted || is_last)) {  // exactly one thread, as wanted >= 1
    int j = 0;
    while (j < kEach - 1 && before + bins[threadIdx.x * kEach + j] < wanted) before += bins[threadIdx.x * kEach + j++];
    scratch.found = {static_cast<int>(threadIdx.x) * kEach + j, before};
  }
  __syncthreads();
  return scratch.found;  // the next call has a barrier before it writes this again
}

// A value and an id as one integer: the larger the better, of equal values the lowest id. 0 is nobody.
__device__ __forceinline__ u64 pack_best(float value, int id) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 becomes +0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ float best_value(u64 best) {
  const uint32_t ordered = static_cast<uint32_t>(best >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int best_id(u64 best) { return static_cast<int>(0xffffffffu - static_cast<uint32_t>(best)); }

template <int kThreads>
__device__ __forceinline__ u64 block_best(u64 best, u64 *warp_bests) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(kFullMask, best, o);
    if (other > best) best = other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_bests[threadIdx.x / 32] = best;
  __syncthreads();
#pragma unroll 8
  for (int w = 0; w < kThreads / 32; w++) best = warp_bests[w] > best ? warp_bests[w] : best;
  return best;
}
