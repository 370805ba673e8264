// fused_qkv_rope on sm_90a: the products of many tokens by warpgroups. flat_rows_*, which normalizes, then wgmma_*, which
// writes them as they are, then `place` of the op's other binary.
//
// Scratch as there: k and v as they are, f32 [T, 2 KD], then the rows of activations at a multiple of 256 bytes.
#include "../common/flat_rows.cuh"
#include "../common/wgmma_gemm.cuh"
#include "../common/wgmma_variants.cuh"
#include "../generated/fused_qkv_rope_args.h"

__device__ __forceinline__ void *rows_scratch(const FusedQkvRopeArgs &a, void *scratch) {
  return byte_offset(scratch, ceil_div(static_cast<int64_t>(a.T) * a.KD * 8, static_cast<int64_t>(256)) * 256);
}

struct WideQkv {
  const FusedQkvRopeArgs &a;
  const TensorMap &wq, &wk, &wv;
  float *const raw;  // [T, 2 KD]
  const int T, K, rows;

  __device__ __forceinline__ int row_tiles() const { return ceil_div(a.QD, rows) + 2 * ceil_div(a.KD, rows); }

  // Which projection a tile is of (0 q, 1 k, 2 v); `tile` becomes its number there.
  __device__ __forceinline__ int part_of(int &tile) const {
    const int q = ceil_div(a.QD, rows), k = ceil_div(a.KD, rows);
    if (tile < q) return 0;
    tile -= q;
    if (tile < k) return 1;
    tile -= k;
    return 2;
  }

  __device__ __forceinline__ void copy(unsigned char *to, int tile, int k, uint64_t *barrier) const {
    const int part = part_of(tile);
    if (part == 0) copy_box(to, wq, k, tile * rows, barrier);
    if (part == 1) copy_box(to, wk, k, tile * rows, barrier);
    if (part == 2) copy_box(to, wv, k, tile * rows, barrier);
  }

  template <int kRows, int kHalf>
  __device__ __forceinline__ void store(int token, int tile, int t, const float (&d)[kRows / 2], float unscale) const {
    const int part = part_of(tile), first = tile * kRows + 2 * t;
    float *out = part == 0 ? a.q + static_cast<int64_t>(token) * a.QD : raw + (static_cast<int64_t>(token) * 2 + (part - 1)) * a.KD;
    struct Nothing {};
    for_pairs<kRows, kHalf, Nothing>(d, unscale, (part == 0 ? a.QD : a.KD) - first, [](int, Nothing &) {},
                                     [&](int column, float x, float y, const Nothing &) { *reinterpret_cast<float2 *>(out + first + column) = make_float2(x, y); });
  }
};

#define ROWS(name, Half)                                                                      \
  extern "C" __global__ void __launch_bounds__(kRowThreads) fused_qkv_rope__flat_rows_##name( \
      const __grid_constant__ FusedQkvRopeArgs a, void *scratch) {                            \
    overlap_launches();                                                                       \
    prepare_flat_row<Half, true>(a.x, RowNorm(a), a.T, a.D, rows_scratch(a, scratch));        \
  }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define WGMMA(name, Half, tokens, rows, stages)                                                                                 \
  extern "C" __global__ void __launch_bounds__(WgmmaShape<tokens, rows, stages>::kThreads, 1)                                   \
      fused_qkv_rope__wgmma_##name##_##tokens##x##rows(const __grid_constant__ FusedQkvRopeArgs a,                              \
                                                       const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap wq, \
                                                       const __grid_constant__ TensorMap wk, const __grid_constant__ TensorMap wv, \
                                                       void *scratch) {                                                         \
    const WideQkv op{a, wq, wk, wv, static_cast<float *>(scratch), a.T, a.D, rows};                                             \
    wgmma_gemm<Half, WgmmaShape<tokens, rows, stages>>(op, x, FlatRows<Half>(rows_scratch(a, scratch), a.T, a.D).unscale);      \
  }
WGMMA_VARIANTS(WGMMA)
