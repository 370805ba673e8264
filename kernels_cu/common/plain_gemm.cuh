// plain_gemm.cuh - products with weights of any type at any address, by f32 multiply-adds: f32 weights, rows that the
// tensor-core kernels cannot take (16-bit rows of odd length, unaligned memory), mixed types, and devices before sm_80.
//
// A warp computes a weight row for eight tokens; lanes take eight elements at a time and are summed in a fixed order, so
// a result does not depend on the other tokens.
#pragma once

#include "packed.cuh"
#include "vec.cuh"

constexpr int kPlainThreads = 256;
constexpr int kPlainTokens = 8;

// Elements k .. k+7 of a row of floats at a multiple of 16 bytes, and one element of any row of floats.
__device__ __forceinline__ void load8_of(const void *row, int dtype, int k, float (&out)[8]) {
  switch (dtype) {
    case kCodeF32: load8_aligned(static_cast<const float *>(row) + k, out); break;
    case kCodeF16: load8_aligned(static_cast<const __half *>(row) + k, out); break;
    default: load8_aligned(static_cast<const bf16 *>(row) + k, out); break;
  }
}
__device__ __forceinline__ float load_of(const void *row, int dtype, int k) {
  switch (dtype) {
    case kCodeF32: return static_cast<const float *>(row)[k];
    case kCodeF16: return to_f32(static_cast<const __half *>(row)[k]);
    default: return to_f32(static_cast<const bf16 *>(row)[k]);
  }
}

// sum[t] = x[t] . weight[row] for the tokens from x on, at most kPlainTokens; all lanes of the warp get it.
__device__ __forceinline__ void plain_row(const void *weight, int dtype, int row, const float *x, int tokens, int K, float (&sum)[kPlainTokens]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++) sum[t] = 0;
  const auto add = [&](float w, int k) {
#pragma unroll
    for (int t = 0; t < kPlainTokens; t++) {
      if (t < tokens) sum[t] = fmaf(w, x[static_cast<int64_t>(t) * K + k], sum[t]);
    }
  };
  const void *data = byte_offset(weight, static_cast<int64_t>(row) * K * (dtype == kCodeF32 ? 4 : 2));
  if (is_packed(dtype)) {
    const PackedRow packed(PackedFormat(dtype), weight, row, K);
#pragma unroll 1
    for (int k = lane; k < K; k += 32) add(packed.element(k), k);
  } else if (is_aligned(weight, 16) && is_aligned(x, 16) && K % 8 == 0) {
#pragma unroll 1
    for (int k = lane * 8; k < K; k += 256) {
      float w[8];
      load8_of(data, dtype, k, w);
#pragma unroll
      for (int t = 0; t < kPlainTokens; t++) {
        if (t >= tokens) break;
        float y[8];
        load8_aligned(x + static_cast<int64_t>(t) * K + k, y);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[t] = fmaf(w[i], y[i], sum[t]);
      }
    }
  } else {
#pragma unroll 1
    for (int k = lane; k < K; k += 32) add(load_of(data, dtype, k), k);
  }
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++) sum[t] = warp_sum(sum[t]);
}

// The sum of token `lane`, where there is one: what a lane stores.
__device__ __forceinline__ float lane_sum(const float (&sum)[kPlainTokens]) {
  float mine = 0;
#pragma unroll
  for (int t = 0; t < kPlainTokens; t++) mine = threadIdx.x % 32 == t ? sum[t] : mine;
  return mine;
}

// All units of `op` for all tokens: op.plain(unit_row, x, first token, tokens) per warp. A unit row is one row of output.
template <class Op>
__device__ __forceinline__ void plain_gemm(const Op &op, const float *x, int rows) {
  const int row = static_cast<int>(blockIdx.x) * (kPlainThreads / 32) + warp_index();
  if (row >= rows) return;
#pragma unroll 1
  for (int first = blockIdx.y * kPlainTokens; first < op.T; first += gridDim.y * kPlainTokens) {
    const int tokens = min(kPlainTokens, op.T - first);
    op.plain(row, x + static_cast<int64_t>(first) * op.K, first, tokens);
  }
}
