// flat_rows.cuh - activations as rows of 16-bit floats one after another: what the copy engine of sm_90 can take boxes of.
#pragma once

#include "activation_rows.cuh"

// Prepared rows one after another, for the copy engine: [T, K] 16-bit floats, then at a multiple of 256 bytes an f32 per token.
template <class Half>
struct FlatRows {
  Half *rows;
  float *unscale;

  __device__ __forceinline__ FlatRows(void *scratch, int T, int K) : rows(static_cast<Half *>(scratch)) {
    unscale = static_cast<float *>(byte_offset(scratch, ceil_div(static_cast<int64_t>(T) * K * 2, static_cast<int64_t>(256)) * 256));
  }
};

// One block per token; K is a multiple of 8.
template <class Half, bool kNorm>
__device__ __forceinline__ void prepare_flat_row(const float *x, const RowNorm &norm, int T, int K, void *scratch) {
  SHARED(float, reduction, kRowThreads / 32);
  const FlatRows<Half> out(scratch, T, K);
  const int64_t t = blockIdx.x;
  x += t * K;
  const RowFactors f = row_factors<Half, kNorm>(x, norm, K, reduction);
  auto *words = reinterpret_cast<uint32_t *>(out.rows + t * K);
  for (int k = 2 * threadIdx.x; k < K; k += 2 * kRowThreads) {
    const float lo = normalized<kNorm>(x, norm, k, f.mean, f.factor) * f.scale, hi = normalized<kNorm>(x, norm, k + 1, f.mean, f.factor) * f.scale;
    words[k / 2] = pack_pair<Half>(lo, hi);
  }
  if (threadIdx.x == 0) out.unscale[t] = f.unscale;
}
