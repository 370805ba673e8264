// fused_gate_up_silu - out = act(h . gate^T + gate_bias) * (h . up^T + up_bias), h = rms_norm(x): nothing between is stored.
//
// A unit is eight rows of gate and the same eight of up, so one thread holds both sides of every product. Without a gate
// out = act(h . up^T + up_bias), and a unit is sixteen rows of up.
#include "common/dot.cuh"
#include "common/gemv.cuh"
#include "common/mma_gemm.cuh"
#include "common/plain_gemm.cuh"
#include "common/product_variants.cuh"
#include "common/quant_dot.cuh"
#include "common/quant_mma.cuh"
#include "generated/fused_gate_up_silu_args.h"

// SiLU x * sigmoid(x), GELU in its tanh form x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3), or GELU x * Phi(x):
// Phi(-|x|) = erfc(z) / 2 at z = |x| / sqrt(2), and erfc(z) = t * exp(p(t) - z^2), t = 1 / (1 + z / 2), with a polynomial
// fitted to its logarithm within 1e-7. All take one exponential.
__device__ __forceinline__ float activate(float x, int activation) {
  const float z = fabsf(x) * 0.70710678118654752f, t = 1.f / fmaf(z, 0.5f, 1.f);
  float exponent = -x;
  if (activation == 1) exponent = -1.5957691216057308f * (x + 0.044715f * x * x * x);
  if (activation == 2) {
    float p = 0.17087277767190606f;
    p = fmaf(p, t, -0.8221522343878044f);
    p = fmaf(p, t, 1.4885158891658385f);
    p = fmaf(p, t, -1.1352040002836414f);
    p = fmaf(p, t, 0.27886808440445215f);
    p = fmaf(p, t, -0.18628806164136785f);
    p = fmaf(p, t, 0.09678418948395508f);
    p = fmaf(p, t, 0.3740919597194165f);
    p = fmaf(p, t, 1.00002368015776f);
    p = fmaf(p, t, -1.265512225141606f);
    exponent = p - z * z;
  }
  const float e = expf(exponent), tail = 0.5f * t * e;
  if (activation == 2) return x * (x < 0 ? tail : 1.f - tail);
  return x / (1.f + e);
}

struct GateUp {
  static constexpr int kUnit = 2;
  static constexpr bool kNorm = true;
  const FusedGateUpSiluArgs &a;
  const float *x;
  const int T, K;
  const RowNorm norm;

  __device__ __forceinline__ explicit GateUp(const FusedGateUpSiluArgs &args) : a(args), x(args.x), T(args.T), K(args.D), norm(args) {}

  __device__ __forceinline__ bool is_gated() const { return a.gate != nullptr; }
  __device__ __forceinline__ int num_units() const { return ceil_div(a.F, is_gated() ? kTileRows : 2 * kTileRows); }

  template <class D>
  __device__ __forceinline__ WeightTile<D> tile(int index) const {
    if (!is_gated()) return {a.up, index * kTileRows, 1, a.F, K};
    return {index % 2 == 0 ? a.gate : a.up, index / 2 * kTileRows, 1, a.F, K};
  }

  __device__ __forceinline__ int dtype_of_unit(int) const { return a.up_dtype; }

  __device__ __forceinline__ PackedTile packed(int index) const {
    if (!is_gated()) return {a.up, a.up_dtype, index * kTileRows, 1, a.F};
    return {index % 2 == 0 ? a.gate : a.up, a.up_dtype, index / 2 * kTileRows, 1, a.F};  // both are of one type
  }

  template <int kBits>
  __device__ __forceinline__ int scale_nbytes(int segments) const {
    return packed_scale_nbytes<kBits>(a.up_dtype, segments);
  }

  // `value` is what is activated: the gate's where there is one.
  __device__ __forceinline__ void put(int token, int f, float value, float up) const {
    if (f >= a.F) return;
    const float *bias = is_gated() ? a.gate_bias : a.up_bias;
    if (bias != nullptr) value += bias[f];
    value = activate(value, a.activation);
    if (is_gated()) value *= a.up_bias != nullptr ? up + a.up_bias[f] : up;
    a.out[static_cast<int64_t>(token) * a.F + f] = value;
  }

  struct Early {};  // nothing is worth reading before it is needed
  __device__ __forceinline__ Early early(int, int, int) const { return {}; }

  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[2], const Early &) const {
    store<D>(token, unit, r, values);
  }
  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[2]) const {
    const int outputs = is_gated() ? 1 : 2;
#pragma unroll 1
    for (int i = 0; i < outputs; i++) put(token, (unit * outputs + i) * kTileRows + r, i == 0 ? values[0] : values[1], values[1]);
  }

  __device__ __forceinline__ void plain(int f, const float *rows, int first, int tokens) const {
    float value[kPlainTokens], up[kPlainTokens];
#pragma unroll 1  // up, then gate: the code exists once
    for (int side = 0; side <= is_gated(); side++) {
      plain_row(side == 0 ? a.up : a.gate, side == 0 ? a.up_dtype : a.gate_dtype, f, rows, tokens, K, value);
#pragma unroll
      for (int t = 0; t < kPlainTokens; t++) {
        if (side == 0) up[t] = value[t];
      }
    }
    const int t = threadIdx.x % 32;
    if (t < tokens) put(first + t, f, lane_sum(value), lane_sum(up));
  }
};

#define KERNEL(bounds, name, ...) \
  extern "C" __global__ void __launch_bounds__ bounds fused_gate_up_silu__##name(const __grid_constant__ FusedGateUpSiluArgs a, ##__VA_ARGS__)

#if TENSOR_CORE_KERNELS
#define GEMV(name, Type, planes, tiles) \
  KERNEL((kGemvThreads, kGemvBlocks), gemv_##name##_p##planes##_m##tiles) { overlap_launches(); gemv<Type, planes, tiles>(GateUp(a)); }
GEMV_VARIANTS(GEMV)

#define DOT(name, Type, tokens, rows) \
  KERNEL((kDotThreads, kDotBlocks), dot_##name##_t##tokens##_r##rows) { dot<Type, tokens, rows>(GateUp(a)); }
DOT_VARIANTS(DOT)

#define ROWS(name, Half) \
  KERNEL((kRowThreads), rows_##name, void *scratch) { overlap_launches(); prepare_row<Half, true>(a.x, RowNorm(a), a.T, a.D, scratch); }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define MMA(name, Type, tokens, rows, ...)                                              \
  KERNEL((GemmShape<tokens, rows, __VA_ARGS__>::kThreads), mma_##name##_##tokens##x##rows, void *scratch) { \
    overlap_launches();                                                                                           \
    mma_gemm<Type, GemmShape<tokens, rows, __VA_ARGS__>>(GateUp(a), PreparedRows(scratch, a.T, a.D)); \
  }
MMA_VARIANTS(MMA)

#define QUANT_ROWS(planes) \
  KERNEL((kSlotThreads), slots_p##planes, void *scratch) { prepare_slots<planes, true>(a.x, RowNorm(a), a.T, a.D, scratch); }
QUANT_ROWS(1)
QUANT_ROWS(2)

#define QUANT_DOT(bits, rows) \
  KERNEL((kQuantDotThreads, kQuantDotBlocks), dot_q##bits##_r##rows) { quant_dot<bits, rows>(GateUp(a)); }
QUANT_DOT_VARIANTS(QUANT_DOT)

#define QUANT_GEMV(bits) \
  KERNEL((kQuantThreads, kQuantBlocks), gemv_q##bits, void *scratch) { quant_gemv<bits>(GateUp(a), scratch); }
QUANT_VARIANTS(QUANT_GEMV)

#define QUANT_MMA(bits, tokens, rows, ...) \
  KERNEL((QuantShape<tokens, rows, __VA_ARGS__>::kThreads), mma_q##bits##_##tokens##x##rows, void *scratch) { \
    quant_mma<bits, QuantShape<tokens, rows, __VA_ARGS__>>(GateUp(a), scratch);                               \
  }
QUANT_MMA_VARIANTS(QUANT_MMA)
#endif

KERNEL((kRowThreads), rows_f32, void *scratch) { overlap_launches(); normalize_row(a.x, RowNorm(a), a.D, static_cast<float *>(scratch)); }
KERNEL((kPlainThreads), plain, void *scratch) { overlap_launches(); plain_gemm(GateUp(a), static_cast<const float *>(scratch), a.F); }
