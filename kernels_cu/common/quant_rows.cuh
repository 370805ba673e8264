// quant_rows.cuh - activations for packed weights: f32 rows as slots of f16, in the order in which tensor cores take them.
//
// A slot is a token's row in one plane (activation_rows.cuh): slot p * T + t. For step s of 32 elements stand, slot by slot,
// 64 bytes: of lane t of four the elements 4t .. 4t+3 of both halves of the step. That order is the same in device memory
// (`SlotRows`, for several tokens) and in shared memory, and zeros follow up to a whole segment.
#pragma once

#include "activation_rows.cuh"
#include "packed.cuh"

constexpr int kSlotThreads = 256;
constexpr int kSlotNbytes = 64;  // of a step

struct SlotRows {
  unsigned char *steps;
  float *unscale;  // [T]: what results are multiplied with
  int slots;

  __device__ __forceinline__ SlotRows(void *scratch, int T, int K, int planes) : steps(static_cast<unsigned char *>(scratch)), slots(T * planes) {
    unscale = reinterpret_cast<float *>(steps + static_cast<int64_t>(ceil_div(K, kPackedSegment)) * kPackedSegment * 2 * slots);
  }
};

// Where elements 4i .. 4i+3 of a slot stand, in bytes.
__device__ __forceinline__ int64_t slot_place(int i, int slot, int slots) {
  const int step = i / 8, half = i / 4 % 2, lane = i % 4;
  return (static_cast<int64_t>(step) * slots + slot) * kSlotNbytes + lane * 16 + half * 8;
}

// Four elements of a row, zeros behind K (a multiple of 4).
__device__ __forceinline__ float4 row_load4(const float *x, int i, int K, bool aligned) {
  if (4 * i >= K) return make_float4(0, 0, 0, 0);
  return aligned ? load_f32x4(x + 4 * i) : make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

// A row's elements as a kernel reads them: normalized if asked.
template <bool kNorm>
struct SlotRow {
  const float *x;
  const RowNorm &norm;
  int K;
  bool aligned;

  __device__ __forceinline__ SlotRow(const float *row, const RowNorm &n, int length) : x(row), norm(n), K(length), aligned(is_aligned(row, 16)) {
    if constexpr (kNorm) aligned = aligned && (address_of(n.weight) | address_of(n.bias)) % 16 == 0;
  }
  __device__ __forceinline__ float4 normalized4(int i, float mean, float factor) const {
    float4 v = row_load4(x, i, K, aligned);
    if constexpr (kNorm) {
      const float4 w = row_load4(norm.weight, i, K, aligned);
      v = make_float4((v.x - mean) * factor * w.x, (v.y - mean) * factor * w.y, (v.z - mean) * factor * w.z, (v.w - mean) * factor * w.w);
      if (norm.bias != nullptr) {
        const float4 b = row_load4(norm.bias, i, K, aligned);
        v.x += b.x, v.y += b.y, v.z += b.z, v.w += b.w;
      }
    }
    return v;
  }

  // All kThreads threads of the block; `scratch` has an entry per warp.
  template <int kThreads = kSlotThreads>
  __device__ __forceinline__ RowFactors factors(float *scratch) const {
    float mean = 0, factor = 1, top = 0;
    if constexpr (kNorm) {
      if (norm.center) {
        float sum = 0;
#pragma unroll 4
        for (int i = threadIdx.x; 4 * i < K; i += kThreads) {
          const float4 v = row_load4(x, i, K, aligned);
          sum += v.x + v.y + v.z + v.w;
        }
        mean = block_sum<kThreads>(sum, scratch) / static_cast<float>(K);
      }
      float sum = 0;
#pragma unroll 4
      for (int i = threadIdx.x; 4 * i < K; i += kThreads) {
        float4 v = row_load4(x, i, K, aligned);
        v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
        const float4 w = row_load4(norm.weight, i, K, aligned);
        sum = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
        top = fmaxf(top, top4(make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w)));
      }
      factor = 1.f / sqrtf(block_sum<kThreads>(sum, scratch) / static_cast<float>(K) + norm.eps);
      top *= factor;
    }
    if (!kNorm || norm.bias != nullptr) {
      top = 0;
#pragma unroll 8
      for (int i = threadIdx.x; 4 * i < K; i += kThreads) top = fmaxf(top, top4(normalized4(i, mean, factor)));
    }
    const int exponent = scale_exponent(block_max<kThreads>(top, scratch));
    return {mean, factor, power_of_two(exponent), power_of_two(-exponent)};
  }
  static __device__ __forceinline__ float top4(float4 v) {
    return fmaxf(fmaxf(finite_magnitude(v.x), finite_magnitude(v.y)), fmaxf(finite_magnitude(v.z), finite_magnitude(v.w)));
  }

  // Elements 4i .. 4i+3 as kPlanes times two words.
  template <int kPlanes>
  __device__ __forceinline__ void planes(int i, const RowFactors &f, uint2 (&out)[kPlanes]) const {
    const float4 v = normalized4(i, f.mean, f.factor);
    uint32_t lo[kPlanes], hi[kPlanes];
    split_pair<__half, kPlanes>(v.x * f.scale, v.y * f.scale, lo);
    split_pair<__half, kPlanes>(v.z * f.scale, v.w * f.scale, hi);
#pragma unroll
    for (int p = 0; p < kPlanes; p++) out[p] = make_uint2(lo[p], hi[p]);
  }
};

// One block per token: its slots.
template <int kPlanes, bool kNorm>
__device__ __forceinline__ void prepare_slots(const float *x, const RowNorm &norm, int T, int K, void *scratch) {
  overlap_launches();
  SHARED(float, reduction, kSlotThreads / 32);
  const SlotRows out(scratch, T, K, kPlanes);
  const int t = blockIdx.x;
  const SlotRow<kNorm> row(x + static_cast<int64_t>(t) * K, norm, K);
  const RowFactors f = row.factors(reduction);
  for (int i = threadIdx.x; i < ceil_div(K, kPackedSegment) * (kPackedSegment / 4); i += kSlotThreads) {
    uint2 words[kPlanes];
    row.template planes<kPlanes>(i, f, words);
#pragma unroll
    for (int p = 0; p < kPlanes; p++) *reinterpret_cast<uint2 *>(out.steps + slot_place(i, p * T + t, out.slots)) = words[p];
  }
  if (threadIdx.x == 0) out.unscale[t] = f.unscale;
}
