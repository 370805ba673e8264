// fused_gate_up_silu - out = act(h . gate^T + gate_bias) * (h . up^T + up_bias), h = rms_norm(x): nothing between is stored.
//
// A unit is eight rows of gate and the same eight of up, so one thread holds both sides of every product.
#include "common/gemv.cuh"
#include "common/mma_gemm.cuh"
#include "common/plain_gemm.cuh"
#include "common/product_variants.cuh"
#include "generated/fused_gate_up_silu_args.h"

// SiLU x * sigmoid(x), or GELU in its tanh form: x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
__device__ __forceinline__ float activate(float x, int activation) {
  const float u = activation == 1 ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
  return x / (1.f + expf(-u));
}

struct GateUp {
  static constexpr int kUnit = 2;
  static constexpr bool kNorm = true;
  const FusedGateUpSiluArgs &a;
  const float *x, *norm;
  const int T, K;
  const float eps;

  __device__ __forceinline__ explicit GateUp(const FusedGateUpSiluArgs &args) : a(args), x(args.x), norm(args.norm), T(args.T), K(args.D), eps(args.eps) {}

  __device__ __forceinline__ int num_units() const { return ceil_div(a.F, kTileRows); }

  template <class D>
  __device__ __forceinline__ WeightTile<D> tile(int index) const {
    return {index % 2 == 0 ? a.gate : a.up, index / 2 * kTileRows, 1, a.F, K};
  }

  __device__ __forceinline__ void put(int token, int f, float gate, float up) const {
    if (a.gate_bias != nullptr) gate += a.gate_bias[f], up += a.up_bias[f];
    a.out[static_cast<int64_t>(token) * a.F + f] = activate(gate, a.activation) * up;
  }

  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[2]) const {
    const int f = unit * kTileRows + r;
    if (f < a.F) put(token, f, values[0], values[1]);
  }

  __device__ __forceinline__ void plain(int f, const float *rows, int first, int tokens) const {
    float gate[kPlainTokens], up[kPlainTokens];
    plain_row(a.gate, a.gate_dtype, f, rows, tokens, K, gate);
    plain_row(a.up, a.up_dtype, f, rows, tokens, K, up);
#pragma unroll
    for (int t = 0; t < kPlainTokens; t++) {
      if (t < tokens && threadIdx.x % 32 == t) put(first + t, f, gate[t], up[t]);
    }
  }
};

#define KERNEL(bounds, name, ...) \
  extern "C" __global__ void __launch_bounds__ bounds fused_gate_up_silu__##name(const __grid_constant__ FusedGateUpSiluArgs a, ##__VA_ARGS__)

#define GEMV(name, Type, planes, tiles) \
  KERNEL((kGemvThreads, kGemvBlocks), gemv_##name##_p##planes##_m##tiles) { gemv<Type, planes, tiles>(GateUp(a)); }
GEMV_VARIANTS(GEMV)

#define ROWS(name, Half) \
  KERNEL((kRowThreads), rows_##name, void *scratch) { prepare_row<Half, true>(a.x, a.norm, a.T, a.D, a.eps, scratch); }
ROWS(f16, __half)
ROWS(bf16, bf16)
KERNEL((kRowThreads), rows_f32, void *scratch) { normalize_row(a.x, a.norm, a.D, a.eps, static_cast<float *>(scratch)); }

#define MMA(name, Type, tokens, rows, ...)                                              \
  KERNEL((GemmShape<Type, tokens, rows, __VA_ARGS__>::kThreads), mma_##name##_##tokens##x##rows, void *scratch) { \
    mma_gemm<Type, GemmShape<Type, tokens, rows, __VA_ARGS__>>(GateUp(a), PreparedRows(scratch, a.T, a.D)); \
  }
MMA_VARIANTS(MMA)

KERNEL((kPlainThreads), plain, void *scratch) { plain_gemm(GateUp(a), static_cast<const float *>(scratch), a.F); }
