// reduce.cuh - sums and maxima over a block in one fixed order: lanes by the xor tree, then warps one after another.
//
// `scratch` is shared memory with one entry per warp. Every thread of the block calls, and every thread gets the result.
// The first barrier lets a caller use one scratch for several reductions in a row.
#pragma once

#include "dev.cuh"

template <int kThreads>
__device__ __forceinline__ float block_sum(float v, float *scratch) {
  static_assert(kThreads % 32 == 0, "whole warps");
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) total += scratch[w];
  return total;
}

template <int kThreads>
__device__ __forceinline__ float block_max(float v, float *scratch) {  // a NaN loses to any number
  static_assert(kThreads % 32 == 0, "whole warps");
  v = warp_max(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float top = scratch[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; w++) top = fmaxf(top, scratch[w]);
  return top;
}

// Sums of integers do not depend on the order.
template <class I>
__device__ __forceinline__ I warp_sum_integer(I v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
  return v;
}

template <int kThreads, class I>
__device__ __forceinline__ I block_sum_integer(I v, I *scratch) {
  static_assert(kThreads % 32 == 0, "whole warps");
  v = warp_sum_integer(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  I total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; w++) total += scratch[w];
  return total;
}
