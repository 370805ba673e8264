// plain_gemm.cuh - products with weights of any type at any address, by f32 multiply-adds: f32 weights, rows that the
// tensor-core kernels cannot take (16-bit rows of odd length, unaligned memory), mixed types, and devices before sm_80.
//
// A warp computes a weight row for eight tokens; lanes take eight elements at a time and are summed in a fixed order, so
// a result does not depend on the other tokens.
#pragma once

#include "packed.cuh"
#include "quant.cuh"

constexpr int kPlainThreads = 256;
constexpr int kPlainTokens = 8;

template <class D>
__device__ __forceinline__ float element(const void *row, int k) {
  if constexpr (!kIsQuantized<D>) return load_one<D>(row, k);
  const auto *block = static_cast<const unsigned char *>(row) + static_cast<int64_t>(k / 32) * D::kBlockNbytes;
  int value;
  if constexpr (D::kCode == kCodeQ8_0) {
    value = static_cast<int8_t>(block[2 + k % 32]);
  } else {
    value = (block[2 + k % 16] >> (k % 32 < 16 ? 0 : 4) & 15) - 8;
  }
  return static_cast<float>(value) * block_scale(block);
}

// Rows of eight and more at multiples of 16 bytes.
template <class D>
__device__ __forceinline__ void aligned_dot(const void *row, const float *x, int tokens, int K, float (&sum)[kPlainTokens]) {
#pragma unroll 1
  for (int k = threadIdx.x % 32 * 8; k < K; k += 256) {
    float w[8];
    dequantize8<D, true>(row, k, w);
#pragma unroll
    for (int t = 0; t < kPlainTokens; t++) {
      if (t >= tokens) break;
      float y[8];
      load8_aligned(x + static_cast<int64_t>(t) * K + k, y);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[t] = fmaf(w[i], y[i], sum[t]);
    }
  }
}

template <class D>
__device__ __forceinline__ void any_dot(const void *row, const float *x, int tokens, int K, float (&sum)[kPlainTokens]) {
#pragma unroll 1
  for (int k = threadIdx.x % 32; k < K; k += 32) {
    const float w = element<D>(row, k);
#pragma unroll
    for (int t = 0; t < kPlainTokens; t++) {
      if (t < tokens) sum[t] = fmaf(w, x[static_cast<int64_t>(t) * K + k], sum[t]);
    }
  }
}

template <class D>
__device__ __forceinline__ void plain_row_of(const void *weight, int row, const float *x, int tokens, int K, float (&sum)[kPlainTokens]) {
  const void *data = byte_offset(weight, row * row_nbytes<D>(K));
  if (is_aligned(weight, 16) && is_aligned(x, 16) && K % 8 == 0) {
    aligned_dot<D>(data, x, tokens, K, sum);
  } else {
    any_dot<D>(data, x, tokens, K, sum);
  }
}

// Rows of packed weights.
__device__ __forceinline__ void packed_dot(const void *weight, int dtype, int row, const float *x, int tokens, int K, float (&sum)[kPlainTokens]) {
  const PackedRow data(PackedFormat(dtype), weight, row, K);
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++) {
    if (t >= tokens) break;
#pragma unroll 1
    for (int k = threadIdx.x % 32; k < K; k += 32) sum[t] = fmaf(data.element(k), x[static_cast<int64_t>(t) * K + k], sum[t]);
  }
}

// sum[t] = x[t] . weight[row] for the tokens from x on, at most kPlainTokens; all lanes of the warp get it.
__device__ __forceinline__ void plain_row(const void *weight, int dtype, int row, const float *x, int tokens, int K, float (&sum)[kPlainTokens]) {
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++) sum[t] = 0;
  switch (dtype) {
    case kCodeF32: plain_row_of<F32>(weight, row, x, tokens, K, sum); break;
    case kCodeF16: plain_row_of<F16>(weight, row, x, tokens, K, sum); break;
    case kCodeBF16: plain_row_of<BF16>(weight, row, x, tokens, K, sum); break;
    default: packed_dot(weight, dtype, row, x, tokens, K, sum); break;
  }
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++) sum[t] = warp_sum(sum[t]);
}

// All units of `op` for all tokens: op.plain(unit_row, x, first token, tokens) per warp. A unit row is one row of output.
template <class Op>
__device__ __forceinline__ void plain_gemm(const Op &op, const float *x, int rows) {
  const int row = static_cast<int>(blockIdx.x) * (kPlainThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  for (int first = blockIdx.y * kPlainTokens; first < op.T; first += gridDim.y * kPlainTokens) {
    const int tokens = min(kPlainTokens, op.T - first);
    op.plain(row, x + static_cast<int64_t>(first) * op.K, first, tokens);
  }
}
