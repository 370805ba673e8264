// rope_table - cos_sin[t] = cos, sin(positions[t] * inv_freq) * scale. The angle is f64: at two million tokens f32 is off by
// 0.1 rad. T * R sincos per step, for all layers, so their cost does not show even where f64 runs at 1/64 of the rate.
#include "common/dev.cuh"
#include "generated/rope_table_args.h"

constexpr int kRopeThreads = 128;

extern "C" __global__ void __launch_bounds__(kRopeThreads) rope_table__f64(const __grid_constant__ RopeTableArgs a) {
  overlap_launches();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(a.T) * a.R) return;
  const int64_t t = i / a.R;
  const int pair = static_cast<int>(i % a.R);
  double sine, cosine;
  sincos(static_cast<double>(a.positions[t]) * a.inv_freq[pair], &sine, &cosine);
  float *row = a.cos_sin + t * 2 * a.R;
  row[pair] = static_cast<float>(cosine) * a.scale;
  row[a.R + pair] = static_cast<float>(sine) * a.scale;
}
