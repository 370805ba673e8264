// fused_gate_up_silu on sm_90a: the products of many tokens by warpgroups. flat_rows_*, which normalizes, then wgmma_*.
//
// A tile is half of gate and half of up, the same rows of both, so one thread holds both sides of every product. SiLU, or GELU
// in its tanh form; no biases.
#include "../common/flat_rows.cuh"
#include "../common/wgmma_gemm.cuh"
#include "../common/wgmma_variants.cuh"
#include "../generated/fused_gate_up_silu_args.h"

struct WideGateUp {
  const FusedGateUpSiluArgs &a;
  const TensorMap &gate, &up;
  const int T, K, half;  // half of a tile's rows

  __device__ __forceinline__ int row_tiles() const { return ceil_div(a.F, half); }

  __device__ __forceinline__ void copy(unsigned char *to, int tile, int k, uint64_t *barrier) const {
    copy_box(to, gate, k, tile * half, barrier);
    copy_box(to + half * kSwizzleSpan, up, k, tile * half, barrier);
  }

  // x * sigmoid(x), or x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3). The quick forms err by 2^-21, rounding on the way
  // to the next product by 2^-9 or 2^-12.
  __device__ __forceinline__ float activated(float x) const {
    const float exponent = a.activation == 1 ? -1.5957691216057308f * (x + 0.044715f * x * x * x) : -x;
    return __fdividef(x, 1.f + __expf(exponent));
  }

  template <int kRows, int kHalf>
  __device__ __forceinline__ void store(int token, int tile, int t, const float (&d)[kRows / 2], float unscale) const {
    if (token >= T) return;
    const int first = tile * half + 2 * t;
    float *out = a.out + static_cast<int64_t>(token) * a.F + first;
#pragma unroll
    for (int j = 0; j < kRows / 16; j++) {
      const int i = 4 * j + 2 * kHalf, up_at = i + kRows / 4;
      const float x = activated(d[i] * unscale) * (d[up_at] * unscale), y = activated(d[i + 1] * unscale) * (d[up_at + 1] * unscale);
      if (first + 8 * j < a.F) *reinterpret_cast<float2 *>(out + 8 * j) = make_float2(x, y);
    }
  }
};

#define ROWS(name, Half)                                                                          \
  extern "C" __global__ void __launch_bounds__(kRowThreads) fused_gate_up_silu__flat_rows_##name( \
      const __grid_constant__ FusedGateUpSiluArgs a, void *scratch) {                             \
    overlap_launches();                                                                           \
    prepare_flat_row<Half, true>(a.x, RowNorm(a), a.T, a.D, scratch);                             \
  }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define WGMMA(name, Half, tokens, rows, stages, alternate)                                                                                    \
  extern "C" __global__ void __launch_bounds__(WgmmaShape<tokens, rows, stages, alternate>::kThreads, 1)                                      \
      fused_gate_up_silu__wgmma_##name##_##tokens##x##rows(const __grid_constant__ FusedGateUpSiluArgs a,                          \
                                                           const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap gate, \
                                                           const __grid_constant__ TensorMap up, void *scratch) {                  \
    const WideGateUp op{a, gate, up, a.T, a.D, (rows) / 2};                                                                        \
    wgmma_gemm<Half, WgmmaShape<tokens, rows, stages, alternate>>(op, x, FlatRows<Half>(scratch, a.T, a.D).unscale);                          \
  }
WGMMA_VARIANTS(WGMMA)
