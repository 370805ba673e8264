// stored.cuh - block formats as files store them (gllm_driver/quant/formats), one element or one group that shares a scale at
// a time. Every weight is read this way once, when it is packed: plain code, no matter how fast.
//
// A packed weight is made of an unsigned integer and one or two numbers per group, see packed_types.py.
#pragma once

#include "packed.cuh"

struct StoredScale {
  float d, a;
};

__device__ __forceinline__ float stored_f16(const unsigned char *p) { return __half2float(*reinterpret_cast<const __half *>(p)); }

// The native formats have consecutive codes, in the order of bits 8, 4, 2, 1, blocks of 32, 64, 128 and kinds "", z, m.
struct NativeFormat {
  int bits, block_shift, kind;

  __device__ __forceinline__ explicit NativeFormat(int code) {
    const int index = code - kCodeINT8_32;
    bits = 8 >> index / 9, block_shift = 5 + index / 3 % 3, kind = index % 3;
  }
  __device__ __forceinline__ int header_nbytes() const { return kind == 0 ? 2 : 4; }
  __device__ __forceinline__ int block_nbytes() const { return header_nbytes() + (bits << block_shift) / 8; }

  __device__ __forceinline__ unsigned integer(const unsigned char *row, int k) const {
    const int j = k & ((1 << block_shift) - 1);
    const auto *data = row + static_cast<int64_t>(k >> block_shift) * block_nbytes() + header_nbytes();
    if (bits == 8) return data[j] ^ (kind == 0 ? 0x80u : 0u);
    if (bits == 1) return data[j / 8] >> j % 8 & 1u;
    const int nbytes = (bits << block_shift) / 8;
    return data[j % nbytes] >> j / nbytes * bits & ((1u << bits) - 1);
  }
  __device__ __forceinline__ StoredScale scale(const unsigned char *row, int k) const {
    const auto *block = row + static_cast<int64_t>(k >> block_shift) * block_nbytes();
    return {stored_f16(block), kind == 0 ? 0.f : stored_f16(block + 2)};
  }
};
static_assert(kCodeINT4_32 == kCodeINT8_32 + 9 && kCodeINT1_128M == kCodeINT8_32 + 35, "the native formats follow each other");

__device__ __forceinline__ bool is_native(int code) { return code >= kCodeINT8_32 && code <= kCodeINT1_128M; }

// The packed type's bits, group and kind for blocks of a stored type, as a code without the flag.
__device__ __forceinline__ constexpr int packed_code(int log2_bits, int group_shift, int kind) { return log2_bits | (group_shift - 4) << 2 | kind << 4; }

__device__ __forceinline__ PackedFormat stored_format(int code) {
  if (is_native(code)) {
    const NativeFormat native(code);
    return PackedFormat(packed_code(native.bits == 8 ? 3 : native.bits / 2, native.block_shift, native.kind));
  }
  switch (code) {
    case kCodeQ4_0: return PackedFormat(packed_code(2, 5, 0));
    case kCodeQ4_1:
    case kCodeQ4_K: return PackedFormat(packed_code(2, 5, 2));
    case kCodeQ5_1:
    case kCodeQ5_K: return PackedFormat(packed_code(3, 5, 2));
    case kCodeQ2_K: return PackedFormat(packed_code(1, 4, 2));
    case kCodeQ3_K: return PackedFormat(packed_code(2, 4, 0));
    case kCodeQ6_K: return PackedFormat(packed_code(3, 4, 0));
    default: return PackedFormat(packed_code(3, 5, 0));  // q8_0, q5_0, iq4_nl, iq4_xs
  }
}

__device__ __forceinline__ int stored_block_nbytes(int code) {
  switch (code) {
    case kCodeQ8_0: return kBlockNbytesQ8_0;
    case kCodeQ4_0: return kBlockNbytesQ4_0;
    case kCodeQ4_1: return kBlockNbytesQ4_1;
    case kCodeQ5_0: return kBlockNbytesQ5_0;
    case kCodeQ5_1: return kBlockNbytesQ5_1;
    case kCodeQ2_K: return kBlockNbytesQ2_K;
    case kCodeQ3_K: return kBlockNbytesQ3_K;
    case kCodeQ4_K: return kBlockNbytesQ4_K;
    case kCodeQ5_K: return kBlockNbytesQ5_K;
    case kCodeQ6_K: return kBlockNbytesQ6_K;
    case kCodeIQ4_NL: return kBlockNbytesIQ4_NL;
    default: return kBlockNbytesIQ4_XS;
  }
}

__device__ __forceinline__ bool has_large_blocks(int code) { return (code >= kCodeQ2_K && code <= kCodeQ6_K) || code == kCodeIQ4_XS; }
static_assert(kCodeQ6_K == kCodeQ2_K + 4, "the K formats follow each other");

// Bytes of a row of K elements of any stored type.
__device__ __forceinline__ int64_t stored_row_nbytes(int code, int K) {
  if (code == kCodeF32) return row_nbytes<F32>(K);
  if (code == kCodeF16 || code == kCodeBF16) return row_nbytes<F16>(K);
  if (is_native(code)) {
    const NativeFormat native(code);
    return static_cast<int64_t>(K >> native.block_shift) * native.block_nbytes();
  }
  return static_cast<int64_t>(K / (has_large_blocks(code) ? 256 : 32)) * stored_block_nbytes(code);
}

// The values of iq4_nl and iq4_xs: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113, plus 128.
__device__ __forceinline__ unsigned nonlinear(unsigned nibble) {
  const uint64_t low = 0x766a5d4f3f2d1801ull, high = 0xf1d9c5b5a6998d81ull;
  return static_cast<unsigned>((nibble < 8 ? low : high) >> nibble % 8 * 8) & 255u;
}

// Element j of a block of 32 whose nibbles are those of the first half, low, and of the second, high.
__device__ __forceinline__ unsigned nibble_of_32(const unsigned char *data, int j) { return data[j % 16] >> j / 16 * 4 & 15u; }

// The unsigned integer of element k of a row, as packed rows hold it.
__device__ __forceinline__ unsigned stored_integer(const unsigned char *row, int code, int k) {
  if (is_native(code)) return NativeFormat(code).integer(row, k);
  const int j = k % 32, e = k % 256, eighth = e / 32;  // of a small block, of a large one, which 32 of that
  const auto *block = row + static_cast<int64_t>(k / (has_large_blocks(code) ? 256 : 32)) * stored_block_nbytes(code);
  switch (code) {
    case kCodeQ8_0: return block[2 + j] ^ 0x80u;
    case kCodeQ4_0: return nibble_of_32(block + 2, j);
    case kCodeQ4_1: return nibble_of_32(block + 4, j);
    case kCodeQ5_0: return (nibble_of_32(block + 6, j) | (block[2 + j / 8] >> j % 8 & 1u) << 4) + (128 - 16);
    case kCodeQ5_1: return nibble_of_32(block + 8, j) | (block[4 + j / 8] >> j % 8 & 1u) << 4;
    case kCodeQ2_K: return block[16 + e / 128 * 32 + j] >> eighth % 4 * 2 & 3u;
    case kCodeQ3_K: return (block[32 + e / 128 * 32 + j] >> eighth % 4 * 2 & 3u) + (block[j] >> eighth & 1u) * 4 + (8 - 4);
    case kCodeQ4_K: return block[16 + e / 64 * 32 + j] >> eighth % 2 * 4 & 15u;
    case kCodeQ5_K: return (block[48 + e / 64 * 32 + j] >> eighth % 2 * 4 & 15u) | (block[16 + j] >> eighth & 1u) << 4;
    case kCodeQ6_K: {
      const unsigned low = block[e / 128 * 64 + e % 64] >> e % 128 / 64 * 4 & 15u;
      return (low | (block[128 + e / 128 * 32 + j] >> eighth % 4 * 2 & 3u) << 4) + (128 - 32);
    }
    case kCodeIQ4_NL: return nonlinear(nibble_of_32(block + 2, j));
    default: return nonlinear(nibble_of_32(block + 8 + eighth * 16, j));  // iq4_xs
  }
}

// Scale or minimum i of eight of 6 bits in the twelve bytes of q4_k and q5_k; `low` has the first four and the high bits.
__device__ __forceinline__ unsigned six_bits(const unsigned char *packed, int i, bool is_minimum) {
  const int first = is_minimum ? 4 : 0;
  if (i < 4) return packed[first + i] & 63u;
  return (packed[4 + i] >> first & 15u) | static_cast<unsigned>(packed[first + i - 4] >> 6) << 4;
}

// The scale of the group that element k belongs to. Factors that a format stores apart are multiplied in f32.
__device__ __forceinline__ StoredScale stored_scale(const unsigned char *row, int code, int k) {
  if (is_native(code)) return NativeFormat(code).scale(row, k);
  const int e = k % 256, sixteenth = e / 16, eighth = e / 32;
  const auto *block = row + static_cast<int64_t>(k / (has_large_blocks(code) ? 256 : 32)) * stored_block_nbytes(code);
  const auto *tail = block + stored_block_nbytes(code);
  switch (code) {
    case kCodeQ4_1:
    case kCodeQ5_1: return {stored_f16(block), stored_f16(block + 2)};
    case kCodeQ2_K: {
      const unsigned both = block[sixteenth];
      return {stored_f16(tail - 4) * static_cast<float>(both & 15u), -(stored_f16(tail - 2) * static_cast<float>(both >> 4))};
    }
    case kCodeQ3_K: {
      const unsigned low = block[96 + sixteenth % 8] >> sixteenth / 8 * 4 & 15u, high = block[104 + sixteenth % 4] >> sixteenth / 4 * 2 & 3u;
      return {stored_f16(tail - 2) * static_cast<float>(static_cast<int>(low | high << 4) - 32), 0.f};
    }
    case kCodeQ4_K:
    case kCodeQ5_K:
      return {stored_f16(block) * static_cast<float>(six_bits(block + 4, eighth, false)),
              -(stored_f16(block + 2) * static_cast<float>(six_bits(block + 4, eighth, true)))};
    case kCodeQ6_K: return {stored_f16(tail - 2) * static_cast<float>(static_cast<int8_t>(block[192 + sixteenth])), 0.f};
    case kCodeIQ4_XS: {
      const unsigned high = (block[2] | static_cast<unsigned>(block[3]) << 8) >> 2 * eighth & 3u, low = block[4 + eighth / 2] >> eighth % 2 * 4 & 15u;
      return {stored_f16(block) * static_cast<float>(static_cast<int>(low | high << 4) - 32), 0.f};
    }
    default: return {stored_f16(block), 0.f};
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
