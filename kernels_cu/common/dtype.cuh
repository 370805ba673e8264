// dtype.cuh - the element types arrays are stored in, as types: F32, F16, BF16.
//
// Codes come from gllm_driver/types.py by way of the generated header, so they are said once.
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

// A storage type: `Element` is what memory holds per element; `Half` is the 16-bit type that tensor cores take.
struct F32 {
  using Element = float;
  static constexpr int kCode = kCodeF32;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};
struct F16 {
  using Element = __half;
  using Half = __half;
  static constexpr int kCode = kCodeF16;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};
struct BF16 {
  using Element = bf16;
  using Half = bf16;
  static constexpr int kCode = kCodeBF16;
  static __device__ __forceinline__ bool holds(int code) { return code == kCode; }
};

// Either 16-bit float: which one, a weight's code says at run time.
struct AnyHalf {
  using Element = uint16_t;
  static __device__ __forceinline__ bool holds(int code) { return code == kCodeF16 || code == kCodeBF16; }
};

// Bytes of a row of n elements.
template <class D>
__device__ __forceinline__ int64_t row_nbytes(int n) {
  return static_cast<int64_t>(n) * static_cast<int>(sizeof(typename D::Element));
}
