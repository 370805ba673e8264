// stored.cuh - block formats as files store them, one element or one group of elements that share a scale at a time. Every
// weight is read this way once, when it is packed: plain code, no matter how fast.
//
// A weight is d * (u - z) for formats without `a`, z being what makes u unsigned, and d * u + a or d * (u - a) otherwise.
#pragma once

#include "packed.cuh"

struct StoredScale {
  float d, a;
};

__device__ __forceinline__ float stored_f16(const unsigned char *p) { return __half2float(*reinterpret_cast<const __half *>(p)); }

// The packed type's code of a stored type's blocks without flag: what its elements are.
__device__ __forceinline__ PackedFormat stored_format(int code) {
  switch (code) {
    case kCodeQ8_0: return PackedFormat(3 | 1 << 2);
    default: return PackedFormat(2 | 1 << 2);  // q4_0
  }
}

// The unsigned integer of element k of a row, as packed rows hold it.
__device__ __forceinline__ unsigned stored_integer(const unsigned char *row, int code, int k) {
  const int j = k % 32, nibble = j < 16 ? 0 : 4;
  const int64_t block = k / 32;
  switch (code) {
    case kCodeQ8_0: return row[block * kBlockNbytesQ8_0 + 2 + j] ^ 0x80u;
    default: return row[block * kBlockNbytesQ4_0 + 2 + j % 16] >> nibble & 15u;
  }
}

// The scale of the group that element k belongs to. Factors that a format stores apart are multiplied in f32.
__device__ __forceinline__ StoredScale stored_scale(const unsigned char *row, int code, int k) {
  const int64_t block = k / 32;
  switch (code) {
    case kCodeQ8_0: return {stored_f16(row + block * kBlockNbytesQ8_0), 0.f};
    default: return {stored_f16(row + block * kBlockNbytesQ4_0), 0.f};
  }
}

__device__ __forceinline__ float stored_weight(const unsigned char *row, int code, int k) {
  const PackedFormat format = stored_format(code);
  const StoredScale scale = stored_scale(row, code, k);
  const int u = static_cast<int>(stored_integer(row, code, k));
  if (format.kind == 1) return scale.d * (static_cast<float>(u) - scale.a);
  if (format.kind == 2) return fmaf(scale.d, static_cast<float>(u), scale.a);
  return scale.d * static_cast<float>(format.bits >= 4 ? u - (1 << (format.bits - 1)) : 2 * u - ((1 << format.bits) - 1));
}

// Bytes of a row of K elements of any stored type.
__device__ __forceinline__ int64_t stored_row_nbytes(int code, int K) {
  switch (code) {
    case kCodeF32: return row_nbytes<F32>(K);
    case kCodeF16: return row_nbytes<F16>(K);
    case kCodeBF16: return row_nbytes<BF16>(K);
    case kCodeQ8_0: return row_nbytes<Q8_0>(K);
    default: return row_nbytes<Q4_0>(K);
  }
}
