// activation_rows.cuh - f32 activations as rows of 16-bit floats for tensor cores, normalized on the way if asked.
//
// A 16-bit float has 8 (bf16) or 11 (f16) bits of a value. `Planes` rows together hold more: the first is the value rounded,
// the second what that left out, rounded, and so on; their products are summed in f32. One plane is what other engines
// compute with; two of f16 or three of bf16 lose nothing an f32 sum would keep. f16 has little range, so a row is first
// multiplied by a power of two that puts its largest magnitude between 2^14 and 2^15.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

template <class Half>
constexpr bool kIsBF16 = false;
template <>
constexpr bool kIsBF16<bf16> = true;

constexpr int kRowThreads = 128;  // every kernel reduces a row with as many threads, so all get the same bits

// How rows are normalized: RMSNorm, or LayerNorm where `center` says so. The struct of every op with a norm has these fields.
struct RowNorm {
  const float *weight = nullptr, *bias = nullptr;  // bias may be null
  float eps = 0;
  bool center = false;

  __device__ __forceinline__ RowNorm() {}
  template <class Args>
  __device__ __forceinline__ explicit RowNorm(const Args &a) : weight(a.norm), bias(a.norm_bias), eps(a.eps), center(a.center != 0) {}
};

// What turns x[k] into what is multiplied: ((x - mean) * factor * weight[k] + bias[k]) * scale.
struct RowFactors {
  float mean;     // 0 unless the row is centered
  float factor;   // 1 / rms, or 1 without norm
  float scale;    // a power of two
  float unscale;  // 1 / scale
};

__device__ __forceinline__ float finite_magnitude(float x) { return fabsf(x) < INFINITY ? fabsf(x) : 0.f; }

__device__ __forceinline__ int scale_exponent(float top) {
  const int exponent = static_cast<int>(__float_as_uint(top) >> 23 & 255) - 127;
  return top > 0 && top < INFINITY ? max(-126, min(126, 14 - exponent)) : 0;
}

__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23); }

template <bool kNorm>
__device__ __forceinline__ float normalized(const float *x, const RowNorm &norm, int k, float mean, float factor) {
  if constexpr (!kNorm) return x[k];
  const float value = (x[k] - mean) * factor * norm.weight[k];
  return norm.bias != nullptr ? value + norm.bias[k] : value;
}

// The mean of a row. All kRowThreads threads of the block.
__device__ __forceinline__ float row_mean(const float *x, int K, float *scratch) {
  float sum = 0;
  for (int k = threadIdx.x; k < K; k += kRowThreads) sum += x[k];
  return block_sum<kRowThreads>(sum, scratch) / static_cast<float>(K);
}

// All kRowThreads threads of the block; `scratch` has an entry per warp.
template <class Half, bool kNorm>
__device__ __forceinline__ RowFactors row_factors(const float *x, const RowNorm &norm, int K, float *scratch) {
  const float mean = kNorm && norm.center ? row_mean(x, K, scratch) : 0.f;
  float sum = 0, top = 0;
  for (int k = threadIdx.x; k < K; k += kRowThreads) {
    const float v = x[k] - mean;
    sum = fmaf(v, v, sum);
    top = fmaxf(top, finite_magnitude(kNorm ? v * norm.weight[k] : v));
  }
  float factor = 1.f;
  if constexpr (kNorm) factor = 1.f / sqrtf(block_sum<kRowThreads>(sum, scratch) / static_cast<float>(K) + norm.eps);
  if constexpr (kIsBF16<Half>) {
    return {mean, factor, 1.f, 1.f};
  } else {
    if (kNorm && norm.bias != nullptr) {
      top = 0;
      for (int k = threadIdx.x; k < K; k += kRowThreads) top = fmaxf(top, finite_magnitude(normalized<kNorm>(x, norm, k, mean, factor)));
    } else {
      top *= factor;
    }
    const int exponent = scale_exponent(block_max<kRowThreads>(top, scratch));
    return {mean, factor, power_of_two(exponent), power_of_two(-exponent)};
  }
}

// The planes of two neighbouring values, each plane as a word of two 16-bit floats. An infinity or NaN is whole in the
// first plane and zero in the others.
template <class Half, int kPlanes>
__device__ __forceinline__ void split_pair(float lo, float hi, uint32_t (&words)[kPlanes]) {
#pragma unroll
  for (int p = 0; p < kPlanes; p++) {
    words[p] = pack_pair<Half>(lo, hi);
    if (p + 1 < kPlanes) {
      const float2 kept = unpack_pair(words[p], static_cast<const Half *>(nullptr));
      lo = fabsf(kept.x) < INFINITY ? lo - kept.x : 0.f;
      hi = fabsf(kept.y) < INFINITY ? hi - kept.y : 0.f;
    }
  }
}

// The sum of a value's planes. Where the first is not finite the rest says nothing: a zero left over times an infinite
// weight would be NaN.
__device__ __forceinline__ float join_planes(float first, float rest) { return fabsf(first) < INFINITY ? first + rest : first; }

// Prepared rows in device memory, for kernels of many tokens: pairs of tokens as LaneActivations reads them, K rounded up to
// a whole segment with zeros behind, then an f32 per token to multiply results with.
struct PreparedRows {
  unsigned char *pairs;
  float *unscale;
  int64_t pair_nbytes;

  __device__ __forceinline__ PreparedRows(void *scratch, int T, int K) {
    pair_nbytes = static_cast<int64_t>(ceil_div(K, 256) * 256) * 4;
    pairs = static_cast<unsigned char *>(scratch);
    unscale = reinterpret_cast<float *>(pairs + ceil_div(T, 2) * pair_nbytes);
  }
};

// One block per token. An odd one at the end also writes zeros for the token it lacks.
template <class Half, bool kNorm>
__device__ __forceinline__ void prepare_row(const float *x, const RowNorm &norm, int T, int K, void *scratch) {
  SHARED(float, reduction, kRowThreads / 32);
  const PreparedRows out(scratch, T, K);
  const int64_t t = blockIdx.x;
  x += t * K;
  const RowFactors f = row_factors<Half, kNorm>(x, norm, K, reduction);
  auto *words = reinterpret_cast<uint32_t *>(out.pairs + t / 2 * out.pair_nbytes) + t % 2;
  const bool alone = t % 2 == 0 && t + 1 == T;
  for (int k = 2 * threadIdx.x; k < out.pair_nbytes / 4; k += 2 * kRowThreads) {
    const float lo = k < K ? normalized<kNorm>(x, norm, k, f.mean, f.factor) * f.scale : 0.f;
    const float hi = k + 1 < K ? normalized<kNorm>(x, norm, k + 1, f.mean, f.factor) * f.scale : 0.f;
    words[k] = pack_pair<Half>(lo, hi);
    if (alone) words[k + 1] = 0;
  }
  if (threadIdx.x == 0) out.unscale[t] = f.unscale;
}

// The same in f32, for the kernels that take any weights: T rows of K, one after another.
__device__ __forceinline__ void normalize_row(const float *x, const RowNorm &norm, int K, float *out) {
  SHARED(float, reduction, kRowThreads / 32);
  const int64_t t = blockIdx.x;
  const RowFactors f = row_factors<bf16, true>(x + t * K, norm, K, reduction);
  for (int k = threadIdx.x; k < K; k += kRowThreads) out[t * K + k] = normalized<true>(x + t * K, norm, k, f.mean, f.factor);
}
