// packed.cuh - the layout of packed weights (gllm_driver/packed_types.py), as integers of a type's code.
#pragma once

#include "dtype.cuh"

constexpr int kPackedFlag = 256;        // set in the code of packed types only
constexpr int kPackedSegment = 256;     // elements of K that lie together
constexpr int kPackedRowAlignment = 32;

struct PackedFormat {
  int bits;
  int group_shift;  // log2 of the elements that share a scale: 4 to 7
  int kind;         // 0 symmetric, 1 zero point, 2 minimum

  __device__ __forceinline__ PackedFormat() : bits(8), group_shift(5), kind(0) {}
  __device__ __forceinline__ explicit PackedFormat(int code) : bits(1 << (code & 3)), group_shift(4 + (code >> 2 & 3)), kind(code >> 4 & 3) {}

  __device__ __forceinline__ int scale_nbytes() const { return kind == 0 ? 2 : 4; }
  __device__ __forceinline__ int segments(int K) const { return ceil_div(K, kPackedSegment); }
  __device__ __forceinline__ int64_t quants_nbytes(int K) const { return static_cast<int64_t>(segments(K)) * (kPackedSegment / 8) * bits; }
  __device__ __forceinline__ int64_t row_nbytes(int K) const {
    const int64_t nbytes = quants_nbytes(K) + (segments(K) * (kPackedSegment >> group_shift)) * scale_nbytes();
    return ceil_div(nbytes, static_cast<int64_t>(kPackedRowAlignment)) * kPackedRowAlignment;
  }
};

__device__ __forceinline__ bool is_packed(int code) { return (code & kPackedFlag) != 0; }

// Word `at` of a segment of quants: which lane's it is, and which of that lane's words.
struct PackedWord {
  int lane, word;

  __device__ __forceinline__ PackedWord(int bits, int at) {
    const int per_piece = min(4, 2 * bits), piece = at / per_piece;
    lane = piece % 4;
    word = piece / 4 * per_piece + at % per_piece;
  }

  // The element of the segment that field `f` of the word holds.
  __device__ __forceinline__ int element(int bits, int f) const {
    const int fields = 32 / bits, half = fields / 2;
    const int of_lane = word * fields + 2 * (f % half) + f / half;
    return of_lane / 4 * 16 + lane * 4 + of_lane % 4;
  }
};

// The other way round: field `field` of word `at` of its segment holds element e.
struct PackedPlace {
  int at, field;

  __device__ __forceinline__ PackedPlace(int bits, int e) {
    const int fields = 32 / bits, per_piece = min(4, 2 * bits), of_lane = e / 16 * 4 + e % 4, word = of_lane / fields, place = of_lane % fields;
    at = (word / per_piece * 4 + e % 16 / 4) * per_piece + word % per_piece;
    field = place % 2 * (fields / 2) + place / 2;
  }
};

// A group's f16 numbers as a factor and an offset in f32: weight = factor * q + offset with q = u - 2^(bits-1) for 8 and
// 4 bits, q = 2u - (2^bits - 1) for 2 and 1 bits: integers that f16 holds, for tensor cores to multiply with.
struct GroupScale {
  float factor, offset;

  __device__ __forceinline__ GroupScale() : factor(0), offset(0) {}
  __device__ __forceinline__ GroupScale(const PackedFormat &format, float d, float a) {
    const bool is_wide = format.bits >= 4;
    const float center = is_wide ? static_cast<float>(1 << (format.bits - 1)) : 0.5f * static_cast<float>((1 << format.bits) - 1);
    factor = is_wide || format.kind == 0 ? d : 0.5f * d;
    offset = format.kind == 0 ? 0.f : format.kind == 1 ? d * (center - a) : fmaf(d, center, a);
  }
};

// One row, an element at a time.
struct PackedRow {
  PackedFormat format;
  const uint32_t *words;
  const __half *scales;

  __device__ __forceinline__ PackedRow(const PackedFormat &f, const void *weight, int64_t row, int K) : format(f) {
    const void *data = byte_offset(weight, row * f.row_nbytes(K));
    words = static_cast<const uint32_t *>(data);
    scales = static_cast<const __half *>(byte_offset(data, f.quants_nbytes(K)));
  }
  __device__ __forceinline__ float element(int k) const {
    const PackedPlace place(format.bits, k % kPackedSegment);
    const uint32_t word = words[k / kPackedSegment * (8 * format.bits) + place.at];
    const int u = static_cast<int>(word >> place.field * format.bits & ((1u << format.bits) - 1)), group = k >> format.group_shift;
    const int q = format.bits >= 4 ? u - (1 << (format.bits - 1)) : 2 * u - ((1 << format.bits) - 1);
    if (format.kind == 0) return to_f32(scales[group]) * static_cast<float>(q);
    const float d = to_f32(scales[2 * group]), a = to_f32(scales[2 * group + 1]);
    return format.kind == 1 ? d * (static_cast<float>(u) - a) : fmaf(d, static_cast<float>(u), a);
  }
};
