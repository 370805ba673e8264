// dtype.cuh - the element types arrays are stored in, as types: F32, F16, BF16 and the block formats Q8_0, Q4_0.
//
// Codes and block sizes come from gllm_driver/types.py by way of the generated header, so they are said once.
#pragma once

#include "dev.cuh"
#include "../generated/dtypes.h"

using bf16 = __nv_bfloat16;

template <class T>
__device__ __forceinline__ float to_f32(T x);
template <>
__device__ __forceinline__ float to_f32<float>(float x) { return x; }
template <>
__device__ __forceinline__ float to_f32<__half>(__half x) { return __half2float(x); }
template <>
__device__ __forceinline__ float to_f32<bf16>(bf16 x) { return __bfloat162float(x); }

// Rounded to nearest, ties to even; beyond f16 is infinity.
template <class T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_f32<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16_rn(x); }

// A storage type: `Element` is what memory holds per element (bytes for block formats); `Half` is the 16-bit type that
// tensor cores take its values in.
struct F32 {
  using Element = float;
  static constexpr int kCode = kCodeF32, kBlockSize = kBlockSizeF32, kBlockNbytes = kBlockNbytesF32;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};
struct F16 {
  using Element = __half;
  using Half = __half;
  static constexpr int kCode = kCodeF16, kBlockSize = kBlockSizeF16, kBlockNbytes = kBlockNbytesF16;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};
struct BF16 {
  using Element = bf16;
  using Half = bf16;
  static constexpr int kCode = kCodeBF16, kBlockSize = kBlockSizeBF16, kBlockNbytes = kBlockNbytesBF16;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};
struct Q8_0 {
  using Element = unsigned char;
  using Half = __half;
  static constexpr int kCode = kCodeQ8_0, kBlockSize = kBlockSizeQ8_0, kBlockNbytes = kBlockNbytesQ8_0;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};
struct Q4_0 {
  using Element = unsigned char;
  using Half = __half;
  static constexpr int kCode = kCodeQ4_0, kBlockSize = kBlockSizeQ4_0, kBlockNbytes = kBlockNbytesQ4_0;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};

template <class D>
constexpr bool kIsQuantized = D::kBlockSize > 1;

// Bytes of a stored row of n elements (whole blocks).
template <class D>
__device__ __forceinline__ int64_t row_nbytes(int n) {
  return static_cast<int64_t>(n / D::kBlockSize) * D::kBlockNbytes;
}
