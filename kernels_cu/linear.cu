// linear - out = x . weight^T + bias + residual. out may be the same memory as residual.
//
// dot_*: up to four tokens, float weights, in f32. gemv_*: few tokens, one pass over the weights. rows_* then mma_*: many
// tokens. plain: whatever those cannot take.
#include "common/dot.cuh"
#include "common/gemv.cuh"
#include "common/mma_gemm.cuh"
#include "common/plain_gemm.cuh"
#include "common/product_variants.cuh"
#include "common/quant_dot.cuh"
#include "common/quant_mma.cuh"
#include "generated/linear_args.h"

struct Linear {
  static constexpr int kUnit = 1;
  static constexpr bool kNorm = false;
  const LinearArgs &a;
  const float *x;
  const int T, K;
  const RowNorm norm;

  __device__ __forceinline__ explicit Linear(const LinearArgs &args) : a(args), x(args.x), T(args.T), K(args.K) {}

  __device__ __forceinline__ int num_units() const { return ceil_div(a.N, kTileRows); }

  template <class D>
  __device__ __forceinline__ WeightTile<D> tile(int index) const {
    return {a.weight, index * kTileRows, 1, a.N, K};
  }

  __device__ __forceinline__ int dtype_of_unit(int) const { return a.weight_dtype; }

  __device__ __forceinline__ PackedTile packed(int index) const { return {a.weight, a.weight_dtype, index * kTileRows, 1, a.N}; }

  template <int kBits>
  __device__ __forceinline__ int scale_nbytes(int segments) const {
    return packed_scale_nbytes<kBits>(a.weight_dtype, segments);
  }

  // What is added to a result: read before it is needed.
  struct Early {
    float bias = 0, residual = 0;
  };
  __device__ __forceinline__ Early early(int token, int unit, int r) const {
    const int n = unit * kTileRows + r;
    Early found;
    if (n < a.N && a.bias != nullptr) found.bias = a.bias[n];
    if (n < a.N && a.residual != nullptr) found.residual = a.residual[static_cast<int64_t>(token) * a.N + n];
    return found;
  }

  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[1], const Early &found) const {
    const int n = unit * kTileRows + r;
    if (n < a.N) a.out[static_cast<int64_t>(token) * a.N + n] = values[0] + found.bias + found.residual;
  }
  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[1]) const {
    store<D>(token, unit, r, values, early(token, unit, r));
  }

  __device__ __forceinline__ void plain(int n, const float *rows, int first, int tokens) const {
    float sum[kPlainTokens];
    plain_row(a.weight, a.weight_dtype, n, rows, tokens, K, sum);
    const int t = threadIdx.x % 32;
    const float value[1] = {lane_sum(sum)};
    if (t < tokens) store<F32>(first + t, n / kTileRows, n % kTileRows, value);
  }
};

#define KERNEL(bounds, name, ...) \
  extern "C" __global__ void __launch_bounds__ bounds linear__##name(const __grid_constant__ LinearArgs a, ##__VA_ARGS__)

#if TENSOR_CORE_KERNELS
#define GEMV(name, Type, planes, tiles) \
  KERNEL((kGemvThreads, kGemvBlocks), gemv_##name##_p##planes##_m##tiles) { overlap_launches(); gemv<Type, planes, tiles>(Linear(a)); }
GEMV_VARIANTS(GEMV)

#define DOT(name, Type, tokens, rows) \
  KERNEL((kDotThreads, kDotBlocks), dot_##name##_t##tokens##_r##rows) { dot<Type, tokens, rows>(Linear(a)); }
DOT_VARIANTS(DOT)

#define ROWS(name, Half) \
  KERNEL((kRowThreads), rows_##name, void *scratch) { overlap_launches(); prepare_row<Half, false>(a.x, RowNorm(), a.T, a.K, scratch); }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define MMA(name, Type, tokens, rows, ...)                                                                        \
  KERNEL((GemmShape<tokens, rows, __VA_ARGS__>::kThreads), mma_##name##_##tokens##x##rows, void *scratch) { \
    overlap_launches();                                                                                           \
    mma_gemm<Type, GemmShape<tokens, rows, __VA_ARGS__>>(Linear(a), PreparedRows(scratch, a.T, a.K));          \
  }
MMA_VARIANTS(MMA)

#define QUANT_ROWS(planes) \
  KERNEL((kSlotThreads), slots_p##planes, void *scratch) { prepare_slots<planes, false>(a.x, RowNorm(), a.T, a.K, scratch); }
QUANT_ROWS(1)
QUANT_ROWS(2)

#define QUANT_DOT(bits, rows) \
  KERNEL((kQuantDotThreads, kQuantDotBlocks), dot_q##bits##_r##rows) { quant_dot<bits, rows>(Linear(a)); }
QUANT_DOT_VARIANTS(QUANT_DOT)

#define QUANT_GEMV(bits) \
  KERNEL((kQuantThreads, kQuantBlocks), gemv_q##bits, void *scratch) { quant_gemv<bits>(Linear(a), scratch); }
QUANT_VARIANTS(QUANT_GEMV)

#define QUANT_MMA(bits, tokens, rows, ...) \
  KERNEL((QuantShape<tokens, rows, __VA_ARGS__>::kThreads), mma_q##bits##_##tokens##x##rows, void *scratch) { \
    quant_mma<bits, QuantShape<tokens, rows, __VA_ARGS__>>(Linear(a), scratch);                               \
  }
QUANT_MMA_VARIANTS(QUANT_MMA)
#endif

KERNEL((kPlainThreads, 2), plain) { overlap_launches(); plain_gemm(Linear(a), a.x, a.N); }
