// pool_rows - for each piece (row, first, count, begins): sums[row] = x[first] + ... + x[first + count - 1], on top of what
// sums[row] was unless it begins. A thread adds up one column in the order of the rows; eight loads are under way at a time.
#include "common/dev.cuh"
#include "generated/pool_rows_args.h"

constexpr int kPoolThreads = 128, kPoolUnroll = 8;

extern "C" __global__ void __launch_bounds__(kPoolThreads) pool_rows__f32(const __grid_constant__ PoolRowsArgs a) {
  overlap_launches();
  const int column = blockIdx.y * kPoolThreads + threadIdx.x;
  if (column >= a.D) return;
  const int *piece = a.pieces + static_cast<int64_t>(blockIdx.x) * 4;
  const int count = piece[2];
  if (count == 0) return;  // padding, whose row may be another block's
  const int64_t D = a.D;
  const float *x = a.x + piece[1] * D + column;
  float *sum = a.sums + piece[0] * D + column;
  float total = piece[3] ? 0.0f : *sum;
  int i = 0;
  for (; i + kPoolUnroll <= count; i += kPoolUnroll) {
    float v[kPoolUnroll];
#pragma unroll
    for (int j = 0; j < kPoolUnroll; j++) v[j] = x[(i + j) * D];
#pragma unroll
    for (int j = 0; j < kPoolUnroll; j++) total += v[j];
  }
  for (; i < count; i++) total += x[i * D];
  *sum = total;
}
