// quant.cuh - stored weights to f32 registers, eight consecutive elements of a row at a time.
//
// Block layouts are GGUF's: Q8_0 is an f16 scale and 32 signed bytes; Q4_0 an f16 scale and 16 bytes whose low nibbles are
// elements 0..15 and high nibbles 16..31, value (nibble - 8) * scale. Blocks are 34 and 18 bytes, so they are aligned to 2
// bytes only and are read in 16-bit units.
#pragma once

#include "dtype.cuh"
#include "vec.cuh"

__device__ __forceinline__ float block_scale(const void *block) { return __half2float(*static_cast<const __half *>(block)); }

// 32 bits from an address aligned to 2 bytes.
__device__ __forceinline__ uint32_t load_2x16(const void *p) {
  const uint16_t *h = static_cast<const uint16_t *>(p);
  return h[0] | static_cast<uint32_t>(h[1]) << 16;
}

// Four signed bytes of a word as floats. Written as shifts, which nvcc turns into byte-permuting conversions.
__device__ __forceinline__ void unpack_i8x4(uint32_t word, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
}

// One nibble of each of four bytes, minus 8, as floats; `shift` is 0 for the low nibbles and 4 for the high ones.
__device__ __forceinline__ void unpack_u4x4(uint32_t word, int shift, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = static_cast<float>(static_cast<int>(word >> (8 * i + shift) & 15) - 8);
}

// out = elements k .. k+7 of a stored row; k is a multiple of 8, the row has at least k+8 elements. kAligned says that
// every such group of a float row starts at a multiple of its size (16 bytes for 16-bit types, twice 16 for f32).
template <class D, bool kAligned>
__device__ __forceinline__ void dequantize8(const void *row, int k, float (&out)[8]) {
  if constexpr (!kIsQuantized<D>) {
    const auto *x = static_cast<const typename D::Element *>(row) + k;
    if constexpr (kAligned) {
      load8_aligned(x, out);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] = to_f32(x[i]);
    }
    return;
  } else {
    const auto *block = static_cast<const unsigned char *>(row) + static_cast<int64_t>(k / 32) * D::kBlockNbytes;
    const float scale = block_scale(block);
    const int j = k % 32;  // 0, 8, 16 or 24
    float lo[4], hi[4];
    if constexpr (D::kCode == kCodeQ8_0) {
      unpack_i8x4(load_2x16(block + 2 + j), lo);
      unpack_i8x4(load_2x16(block + 6 + j), hi);
    } else {
      const int shift = j < 16 ? 0 : 4;
      unpack_u4x4(load_2x16(block + 2 + j % 16), shift, lo);
      unpack_u4x4(load_2x16(block + 6 + j % 16), shift, hi);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[i] = lo[i] * scale;
      out[i + 4] = hi[i] * scale;
    }
  }
}

// One element, for the ends of float rows.
template <class D>
__device__ __forceinline__ float load_one(const void *row, int k) {
  static_assert(!kIsQuantized<D>, "rows of block formats have no ends: they are whole blocks");
  return to_f32(static_cast<const typename D::Element *>(row)[k]);
}
