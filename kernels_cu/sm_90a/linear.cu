// linear on sm_90a: the products of many tokens by warpgroups. flat_rows_*, then wgmma_*.
#include "../common/flat_rows.cuh"
#include "../common/wgmma_gemm.cuh"
#include "../common/wgmma_variants.cuh"
#include "../generated/linear_args.h"

struct Added {
  float2 bias = make_float2(0.f, 0.f), residual = make_float2(0.f, 0.f);
};

struct WideLinear {
  const LinearArgs &a;
  const TensorMap &weight;
  const int T, K, rows;  // weight rows of a tile

  __device__ __forceinline__ int row_tiles() const { return ceil_div(a.N, rows); }

  __device__ __forceinline__ void copy(unsigned char *to, int tile, int k, uint64_t *barrier) const { copy_box(to, weight, k, tile * rows, barrier); }

  template <int kRows, int kHalf>
  __device__ __forceinline__ void store(int token, int tile, int t, const float (&d)[kRows / 2], float unscale) const {
    if (token >= T) return;
    const int first = tile * kRows + 2 * t;
    const int64_t at = static_cast<int64_t>(token) * a.N + first;
    const auto load = [&](int column, Added &added) {
      if (a.bias != nullptr) added.bias = *reinterpret_cast<const float2 *>(a.bias + first + column);
      if (a.residual != nullptr) added.residual = *reinterpret_cast<const float2 *>(a.residual + at + column);
    };
    for_pairs<kRows, kHalf, Added>(d, unscale, a.N - first, load, [&](int column, float x, float y, const Added &added) {
      const float2 b = added.bias, r = added.residual;
      *reinterpret_cast<float2 *>(a.out + at + column) = make_float2(x + b.x + r.x, y + b.y + r.y);
    });
  }
};

#define ROWS(name, Half) \
  extern "C" __global__ void __launch_bounds__(kRowThreads) linear__flat_rows_##name(const __grid_constant__ LinearArgs a, void *scratch) { \
    overlap_launches();                                                                                                                      \
    prepare_flat_row<Half, false>(a.x, RowNorm(), a.T, a.K, scratch);                                                                        \
  }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define WGMMA(name, Half, tokens, rows, stages, alternate)                                                                                             \
  extern "C" __global__ void __launch_bounds__(WgmmaShape<tokens, rows, stages, alternate>::kThreads, 1) linear__wgmma_##name##_##tokens##x##rows(     \
      const __grid_constant__ LinearArgs a, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, void *scratch) { \
    wgmma_gemm<Half, WgmmaShape<tokens, rows, stages, alternate>>(WideLinear{a, weight, a.T, a.K, rows}, x, FlatRows<Half>(scratch, a.T, a.K).unscale); \
  }
WGMMA_VARIANTS(WGMMA)
