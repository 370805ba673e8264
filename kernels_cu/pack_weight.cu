// pack_weight - stored weights to the types that product kernels read, and which rows hold something that is no number.
//
// A block per row. pack: blocks to a packed type (common/packed.cuh), a thread per 32-bit word. convert: to a float type.
#include "common/stored.cuh"
#include "generated/pack_weight_args.h"

constexpr int kPackThreads = 256;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// The least of the block's numbers, or -1 if that is `none`.
__device__ __forceinline__ void store_first(int *first, int none, int mine, int *out) {
  if (threadIdx.x == 0) *first = none;
  __syncthreads();
  if (mine < none) atomicMin(first, mine);
  __syncthreads();
  if (threadIdx.x == 0) *out = *first < none ? *first : -1;
}

extern "C" __global__ void __launch_bounds__(kPackThreads) pack_weight__pack(const __grid_constant__ PackWeightArgs a) {
  SHARED(int, first, 1);
  const PackedFormat format(a.out_dtype);
  const int64_t n = blockIdx.x;
  const auto *raw = static_cast<const unsigned char *>(a.raw) + n * stored_row_nbytes(a.raw_dtype, a.K);
  auto *out = static_cast<unsigned char *>(a.out) + n * format.row_nbytes(a.K);

  const int fields = 32 / format.bits, words_of_segment = kPackedSegment / fields, words = format.segments(a.K) * words_of_segment;
  const unsigned center = 1u << (format.bits - 1);
  for (int w = threadIdx.x; w < words; w += kPackThreads) {
    const PackedWord place(format.bits, w % words_of_segment);
    uint32_t word = 0;
    for (int f = 0; f < fields; f++) {
      const int k = w / words_of_segment * kPackedSegment + place.element(format.bits, f);
      word |= (k < a.K ? stored_integer(raw, a.raw_dtype, k) : center) << f * format.bits;
    }
    reinterpret_cast<uint32_t *>(out)[w] = word;
  }

  auto *scales = reinterpret_cast<__half *>(out + format.quants_nbytes(a.K));
  const int groups = format.segments(a.K) * (kPackedSegment >> format.group_shift), each = format.scale_nbytes() / 2;
  const int all = static_cast<int>((format.row_nbytes(a.K) - format.quants_nbytes(a.K)) / 2);
  int bad = a.K;
  for (int g = threadIdx.x; g < groups; g += kPackThreads) {
    const int k = g << format.group_shift;
    const StoredScale scale = k < a.K ? stored_scale(raw, a.raw_dtype, k) : StoredScale{0.f, 0.f};
    const __half d = from_f32<__half>(scale.d), least = from_f32<__half>(scale.a);
    scales[g * each] = d;
    if (each == 2) scales[g * 2 + 1] = least;
    if (!is_finite(to_f32(d)) || (each == 2 && !is_finite(to_f32(least)))) bad = min(bad, k);
  }
  for (int i = groups * each + threadIdx.x; i < all; i += kPackThreads) scales[i] = from_f32<__half>(0.f);
  store_first(first, a.K, bad, a.bad + n);
}

template <class D>
__device__ __forceinline__ float float_at(const void *row, int k) { return to_f32(static_cast<const typename D::Element *>(row)[k]); }

__device__ __forceinline__ float weight_at(const unsigned char *row, int code, int k) {
  switch (code) {
    case kCodeF32: return float_at<F32>(row, k);
    case kCodeF16: return float_at<F16>(row, k);
    case kCodeBF16: return float_at<BF16>(row, k);
    default: return stored_weight(row, code, k);
  }
}

extern "C" __global__ void __launch_bounds__(kPackThreads) pack_weight__convert(const __grid_constant__ PackWeightArgs a) {
  SHARED(int, first, 1);
  const int64_t n = blockIdx.x;
  const auto *raw = static_cast<const unsigned char *>(a.raw) + n * stored_row_nbytes(a.raw_dtype, a.K);
  int bad = a.K;
  for (int k = threadIdx.x; k < a.K; k += kPackThreads) {
    const float v = weight_at(raw, a.raw_dtype, k);
    if (!is_finite(v)) bad = min(bad, k);
    const int64_t i = n * a.K + k;
    if (a.out_dtype == kCodeF32) {
      static_cast<float *>(a.out)[i] = v;
    } else if (a.out_dtype == kCodeF16) {
      static_cast<__half *>(a.out)[i] = from_f32<__half>(v);
    } else {
      static_cast<bf16 *>(a.out)[i] = from_f32<bf16>(v);
    }
  }
  store_first(first, a.K, bad, a.bad + n);
}
