// rms_norm - out[s] = x[r] / sqrt(mean(x[r]^2) + eps) * weight + bias, r = rows[s]; with a residual, x[r] += residual[r]
// first; with `center`, x[r] - mean(x[r]) stands for x[r] (LayerNorm).
//
// A block per output row. The row is read from memory once: what fits stays in registers between the two passes. The sum
// has one order, whatever the batch.
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "generated/rms_norm_args.h"

constexpr int kNormThreads = 256;
constexpr int kNormVectors = 8;  // float4 per thread in registers: rows up to 8192

struct NormRow {
  float *x;
  const float *residual;  // null: x stays as it is
  const float *weight;
  const float *bias;  // or null
  float *out;
};

// x[i] + residual[i], stored back where there is a residual.
__device__ __forceinline__ float norm_input(const NormRow &row, int i) {
  float v = row.x[i];
  if (row.residual) {
    v += row.residual[i];
    row.x[i] = v;
  }
  return v;
}

__device__ __forceinline__ float4 norm_input4(const NormRow &row, int i) {
  float4 v = load_f32x4(row.x + i);
  if (row.residual) {
    const float4 r = load_f32x4(row.residual + i);
    v.x += r.x, v.y += r.y, v.z += r.z, v.w += r.w;
    store_f32x4(row.x + i, v);
  }
  return v;
}

__device__ __forceinline__ float add(float4 v, float sum) { return sum + v.x + v.y + v.z + v.w; }

__device__ __forceinline__ float4 minus(float4 v, float mean) { return make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean); }

__device__ __forceinline__ float squares(float4 v, float sum) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

__device__ __forceinline__ float inverse_rms(float sum, int D, float eps) { return 1.0f / sqrtf(sum / static_cast<float>(D) + eps); }

__device__ __forceinline__ void norm_output4(const NormRow &row, int i, float4 v, float inverse) {
  const float4 w = load_f32x4(row.weight + i);
  const float4 b = row.bias ? load_f32x4(row.bias + i) : make_float4(0, 0, 0, 0);
  store_f32x4(row.out + i, make_float4(v.x * inverse * w.x + b.x, v.y * inverse * w.y + b.y, v.z * inverse * w.z + b.z,
                                       v.w * inverse * w.w + b.w));
}

extern "C" __global__ void __launch_bounds__(kNormThreads) rms_norm__row(const __grid_constant__ RmsNormArgs a) {
  SHARED(float, scratch, kNormThreads / 32);
  overlap_launches();
  const int64_t s = blockIdx.x, r = a.rows ? a.rows[s] : s;
  const NormRow row{a.x + r * a.D, a.residual ? a.residual + r * a.D : nullptr, a.weight, a.bias, a.out + s * a.D};
  const uintptr_t addresses =
      address_of(row.x) | address_of(row.residual) | address_of(row.weight) | address_of(row.bias) | address_of(row.out);
  float sum = 0, mean = 0;
  const auto find_mean = [&] {
    mean = block_sum<kNormThreads>(sum, scratch) / static_cast<float>(a.D);
    sum = 0;
  };
  if (a.D % 4 == 0 && addresses % 16 == 0) {
    float4 kept[kNormVectors];
#pragma unroll
    for (int j = 0; j < kNormVectors; j++) {
      const int i = (j * kNormThreads + threadIdx.x) * 4;
      if (i < a.D) {
        kept[j] = norm_input4(row, i);
        sum = a.center ? add(kept[j], sum) : squares(kept[j], sum);
      }
    }
    constexpr int kRest = kNormVectors * kNormThreads * 4;
    for (int i = kRest + threadIdx.x * 4; i < a.D; i += kNormThreads * 4) {
      const float4 v = norm_input4(row, i);
      sum = a.center ? add(v, sum) : squares(v, sum);
    }
    if (a.center) {
      find_mean();
#pragma unroll
      for (int j = 0; j < kNormVectors; j++) {
        kept[j] = minus(kept[j], mean);
        if ((j * kNormThreads + threadIdx.x) * 4 < a.D) sum = squares(kept[j], sum);
      }
      for (int i = kRest + threadIdx.x * 4; i < a.D; i += kNormThreads * 4) sum = squares(minus(load_f32x4(row.x + i), mean), sum);
    }
    const float inverse = inverse_rms(block_sum<kNormThreads>(sum, scratch), a.D, a.eps);
#pragma unroll
    for (int j = 0; j < kNormVectors; j++) {
      const int i = (j * kNormThreads + threadIdx.x) * 4;
      if (i < a.D) norm_output4(row, i, kept[j], inverse);
    }
    for (int i = kRest + threadIdx.x * 4; i < a.D; i += kNormThreads * 4) norm_output4(row, i, minus(load_f32x4(row.x + i), mean), inverse);
  } else {
    for (int i = threadIdx.x; i < a.D; i += kNormThreads) {
      const float v = norm_input(row, i);
      sum = a.center ? sum + v : fmaf(v, v, sum);
    }
    if (a.center) {
      find_mean();
      for (int i = threadIdx.x; i < a.D; i += kNormThreads) sum = fmaf(row.x[i] - mean, row.x[i] - mean, sum);
    }
    const float inverse = inverse_rms(block_sum<kNormThreads>(sum, scratch), a.D, a.eps);
    for (int i = threadIdx.x; i < a.D; i += kNormThreads) {
      const float v = (row.x[i] - mean) * inverse * row.weight[i];
      row.out[i] = row.bias ? v + row.bias[i] : v;
    }
  }
}
