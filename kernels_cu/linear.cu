// linear - out = x . weight^T + bias + residual. out may be the same memory as residual.
//
// gemv_*: few tokens, one pass over the weights. rows_* then mma_*: many tokens. plain: whatever those cannot take.
#include "common/gemv.cuh"
#include "common/mma_gemm.cuh"
#include "common/plain_gemm.cuh"
#include "common/product_variants.cuh"
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

  __device__ __forceinline__ void put(int token, int n, float value) const {
    const int64_t i = static_cast<int64_t>(token) * a.N + n;
    if (a.bias != nullptr) value += a.bias[n];
    if (a.residual != nullptr) value += a.residual[i];
    a.out[i] = value;
  }

  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[1]) const {
    const int n = unit * kTileRows + r;
    if (n < a.N) put(token, n, values[0]);
  }

  __device__ __forceinline__ void plain(int n, const float *rows, int first, int tokens) const {
    float sum[kPlainTokens];
    plain_row(a.weight, a.weight_dtype, n, rows, tokens, K, sum);
#pragma unroll
    for (int t = 0; t < kPlainTokens; t++) {
      if (t < tokens && threadIdx.x % 32 == t) put(first + t, n, sum[t]);
    }
  }
};

#define KERNEL(bounds, name, ...) \
  extern "C" __global__ void __launch_bounds__ bounds linear__##name(const __grid_constant__ LinearArgs a, ##__VA_ARGS__)

#define GEMV(name, Type, planes, tiles) \
  KERNEL((kGemvThreads, kGemvBlocks), gemv_##name##_p##planes##_m##tiles) { gemv<Type, planes, tiles>(Linear(a)); }
GEMV_VARIANTS(GEMV)

#define ROWS(name, Half) \
  KERNEL((kRowThreads), rows_##name, void *scratch) { prepare_row<Half, false>(a.x, RowNorm(), a.T, a.K, scratch); }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define MMA(name, Type, tokens, rows, ...)                                                                        \
  KERNEL((GemmShape<Type, tokens, rows, __VA_ARGS__>::kThreads), mma_##name##_##tokens##x##rows, void *scratch) { \
    mma_gemm<Type, GemmShape<Type, tokens, rows, __VA_ARGS__>>(Linear(a), PreparedRows(scratch, a.T, a.K));          \
  }
MMA_VARIANTS(MMA)

KERNEL((kPlainThreads), plain) { plain_gemm(Linear(a), a.x, a.N); }
