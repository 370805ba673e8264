// vec.cuh - 16-byte accesses. Addresses are multiples of 16; callers take another path where rows are not.
#pragma once

#include "dtype.cuh"

__device__ __forceinline__ uint4 load16(const void *p) { return *static_cast<const uint4 *>(p); }
__device__ __forceinline__ void store16(void *p, uint4 v) { *static_cast<uint4 *>(p) = v; }

__device__ __forceinline__ float4 load_f32x4(const float *p) { return *reinterpret_cast<const float4 *>(p); }
__device__ __forceinline__ void store_f32x4(float *p, float4 v) { *reinterpret_cast<float4 *>(p) = v; }

// The two 16-bit floats of a word.
__device__ __forceinline__ float2 unpack_pair(uint32_t word, const bf16 *) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack_pair(uint32_t word, const __half *) {
  __half2 pair;
  memcpy(&pair, &word, sizeof word);
  return __half22float2(pair);
}

// Two floats rounded to 16 bits, the first in the low half.
template <class H>
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi) {
  const H pair[2] = {from_f32<H>(lo), from_f32<H>(hi)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// Eight 16-bit floats of 16 bytes already in registers.
template <class H>
__device__ __forceinline__ void unpack8(uint4 v, float (&out)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack_pair(words[i], static_cast<const H *>(nullptr));
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void load8_aligned(const float *p, float (&out)[8]) {
  const float4 a = load_f32x4(p), b = load_f32x4(p + 4);
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
  out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
__device__ __forceinline__ void load8_aligned(const __half *p, float (&out)[8]) { unpack8<__half>(load16(p), out); }
__device__ __forceinline__ void load8_aligned(const bf16 *p, float (&out)[8]) { unpack8<bf16>(load16(p), out); }
