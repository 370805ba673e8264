// fused_qkv_rope - norm, Q/K/V projections, biases, q/k-norm, rotary embedding, and the write into the paged KV cache.
//
// A unit is sixteen rows of one head. Where heads have no norm of their own, its two tiles hold the rows in pairs that are
// rotated together, and the product's epilogue finishes the job. A head's norm needs the whole head: products then go,
// as they are, to `q` and to scratch (k and v), and `place` does the rest with a warp per head.
//
// Scratch: k and v as they are, f32 [T, 2 KD], then the rows of activations at a multiple of 256 bytes.
#include "common/gemv.cuh"
#include "common/mma_gemm.cuh"
#include "common/plain_gemm.cuh"
#include "common/product_variants.cuh"
#include "generated/fused_qkv_rope_args.h"

constexpr int kPlaceThreads = 128;
constexpr int kUnitRows = 2 * kTileRows;

struct Qkv {
  static constexpr int kUnit = 2;
  const FusedQkvRopeArgs &a;
  const float *x, *norm;
  const int T, K;
  const float eps;
  float *const raw;   // [T, 2 KD]
  const bool rotates;  // whether the epilogue finishes the job; gllm_driver/launch/fused_qkv_rope.py decides alike

  __device__ __forceinline__ Qkv(const FusedQkvRopeArgs &args, void *scratch)
      : a(args), x(args.x), norm(args.norm), T(args.T), K(args.D), eps(args.eps), raw(static_cast<float *>(scratch)),
        rotates(args.q_norm == nullptr && args.R % 8 == 0 && args.Dh % kUnitRows == 0) {}

  __device__ __forceinline__ void *rows_scratch() const {
    return byte_offset(static_cast<void *>(raw), ceil_div(static_cast<int64_t>(T) * a.KD * 8, static_cast<int64_t>(256)) * 256);
  }

  __device__ __forceinline__ int units(int rows) const { return ceil_div(rows, kUnitRows); }
  __device__ __forceinline__ int num_units() const { return units(a.QD) + 2 * units(a.KD); }

  // Which projection a unit is of (0 q, 1 k, 2 v); `unit` becomes its number there.
  __device__ __forceinline__ int part_of(int &unit) const {
    if (unit < units(a.QD)) return 0;
    unit -= units(a.QD);
    if (unit < units(a.KD)) return 1;
    unit -= units(a.KD);
    return 2;
  }
  __device__ __forceinline__ int rows_of(int part) const { return part == 0 ? a.QD : a.KD; }
  __device__ __forceinline__ const void *weight_of(int part) const { return part == 0 ? a.wq : part == 1 ? a.wk : a.wv; }
  __device__ __forceinline__ int dtype_of(int part) const { return part == 0 ? a.wq_dtype : part == 1 ? a.wk_dtype : a.wv_dtype; }
  __device__ __forceinline__ const float *bias_of(int part) const { return part == 0 ? a.bq : part == 1 ? a.bk : a.bv; }

  // The row of its projection that stands at row r of tile 0 or 1 of a unit.
  __device__ __forceinline__ int projection_row(int part, int unit, int tile, int r) const {
    const int first = unit * kUnitRows, dim = first % a.Dh;
    if (!rotates || part == 2 || dim >= 2 * a.R) return first + tile * kTileRows + r;
    if (a.rope_style == 1) return first + 2 * r + tile;
    return first - dim + dim / 2 + r + tile * a.R;
  }

  // Rows of projections stored in another type are left out: a launch per type computes them.
  template <class D>
  __device__ __forceinline__ WeightRow row(int tile, int r) const {
    int unit = tile / 2;
    const int part = part_of(unit), index = projection_row(part, unit, tile % 2, r);
    return weight_row<D>(weight_of(part), dtype_of(part) == D::kCode && index >= 0 ? index : rows_of(part), rows_of(part), K);
  }

  // Where key (part 1) or value (part 2) of a token goes: the element of dim 0 of its head.
  __device__ __forceinline__ int64_t slot(int token, int part, int head) const {
    const int64_t position = a.positions[token];
    int64_t page = position / a.P, within = position % a.P;
    if (position < (int64_t{1} << 31)) page = static_cast<unsigned>(position) / static_cast<unsigned>(a.P), within = static_cast<unsigned>(position) % static_cast<unsigned>(a.P);
    page = a.page_table[static_cast<int64_t>(a.seq[token]) * a.MP + page];
    return ((((page * a.L + a.layer) * 2 + (part - 1)) * a.HK + head) * a.P + within) * a.Dh;
  }

  __device__ __forceinline__ void put(int token, int part, int row, float value) const {
    if (part == 0) {
      a.q[static_cast<int64_t>(token) * a.QD + row] = value;
      return;
    }
    const int64_t i = slot(token, part, row / a.Dh) + row % a.Dh;
    if (a.kv_dtype == kCodeF16) {
      static_cast<__half *>(a.kv)[i] = from_f32<__half>(value);
    } else if (a.kv_dtype == kCodeBF16) {
      static_cast<bf16 *>(a.kv)[i] = from_f32<bf16>(value);
    } else {
      static_cast<float *>(a.kv)[i] = value;
    }
  }

  __device__ __forceinline__ float *raw_row(int token, int part) const {
    return part == 0 ? a.q + static_cast<int64_t>(token) * a.QD : raw + (static_cast<int64_t>(token) * 2 + (part - 1)) * a.KD;
  }

  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[2]) const {
    if (unit >= num_units()) return;
    const int part = part_of(unit), first = projection_row(part, unit, 0, r), second = projection_row(part, unit, 1, r);
    if (dtype_of(part) != D::kCode) return;
    if (!rotates) {
      if (first < rows_of(part)) raw_row(token, part)[first] = values[0];
      if (second < rows_of(part)) raw_row(token, part)[second] = values[1];
      return;
    }
    const float *bias = bias_of(part);
    float u = values[0], v = values[1];
    if (bias != nullptr) u += bias[first], v += bias[second];
    const int dim = unit * kUnitRows % a.Dh;
    if (part != 2 && dim < 2 * a.R) rotate(token, dim / 2 + r, u, v);
    put(token, part, first, u);
    put(token, part, second, v);
  }

  // Turn (u, v) by the angle of pair i at the token's position.
  __device__ __forceinline__ void rotate(int token, int i, float &u, float &v) const {
    const float *cos_sin = a.cos_sin + static_cast<int64_t>(token) * 2 * a.R;
    const float c = cos_sin[i], s = cos_sin[a.R + i], x0 = u;
    u = x0 * c - v * s;
    v = v * c + x0 * s;
  }

  __device__ __forceinline__ void plain(int n, const float *rows, int first, int tokens) const {
    const int part = n < a.QD ? 0 : n < a.QD + a.KD ? 1 : 2, row = n - (part == 0 ? 0 : a.QD + (part - 1) * a.KD);
    float sum[kPlainTokens];
    plain_row(weight_of(part), dtype_of(part), row, rows, tokens, K, sum);
#pragma unroll
    for (int t = 0; t < kPlainTokens; t++) {
      if (t < tokens && threadIdx.x % 32 == t) raw_row(first + t, part)[row] = sum[t];
    }
  }

  // One head of one token: bias, norm, rotation, and to where it belongs. All lanes of a warp.
  __device__ __forceinline__ void place(int token, int head) const {
    const int q_heads = a.QD / a.Dh, part = head < q_heads ? 0 : head < q_heads + a.HK ? 1 : 2, lane = threadIdx.x % 32;
    const int first = (head - (part == 0 ? 0 : q_heads + (part - 1) * a.HK)) * a.Dh;
    const float *in = raw_row(token, part) + first, *bias = bias_of(part), *weight = part == 0 ? a.q_norm : part == 1 ? a.k_norm : nullptr;
    const auto biased = [&](int d) { return bias != nullptr ? in[d] + bias[first + d] : in[d]; };
    float factor = 1.f;
    if (weight != nullptr) {
      float sum = 0;
      for (int d = lane; d < a.Dh; d += 32) sum = fmaf(biased(d), biased(d), sum);
      factor = 1.f / sqrtf(warp_sum(sum) / static_cast<float>(a.Dh) + a.qk_eps);
    }
    const auto value = [&](int d) { return weight != nullptr ? biased(d) * factor * weight[d] : biased(d); };
    const int pairs = part == 2 ? 0 : a.R;
    for (int i = lane; i < pairs; i += 32) {  // a lane reads both of a pair before it writes them: q is changed in place
      const int d0 = a.rope_style == 1 ? 2 * i : i, d1 = a.rope_style == 1 ? 2 * i + 1 : i + a.R;
      float u = value(d0), v = value(d1);
      rotate(token, i, u, v);
      put(token, part, first + d0, u);
      put(token, part, first + d1, v);
    }
    for (int d = 2 * pairs + lane; d < a.Dh; d += 32) put(token, part, first + d, value(d));
  }
};

#define KERNEL(bounds, name) \
  extern "C" __global__ void __launch_bounds__ bounds fused_qkv_rope__##name(const __grid_constant__ FusedQkvRopeArgs a, void *scratch)

#define GEMV(name, Type, planes, tiles) \
  KERNEL((kGemvThreads, kGemvBlocks), gemv_##name##_p##planes##_m##tiles) { gemv<Type, planes, tiles>(Qkv(a, scratch)); }
GEMV_VARIANTS(GEMV)

#define ROWS(name, Half) \
  KERNEL((kRowThreads), rows_##name) { prepare_row<Half>(a.x, a.norm, a.T, a.D, a.eps, Qkv(a, scratch).rows_scratch()); }
ROWS(f16, __half)
ROWS(bf16, bf16)
KERNEL((kRowThreads), rows_f32) { normalize_row(a.x, a.norm, a.D, a.eps, static_cast<float *>(Qkv(a, scratch).rows_scratch())); }

#define MMA(name, Type, tokens, rows, ...)                                                                       \
  KERNEL((GemmShape<Type, tokens, rows, __VA_ARGS__>::kThreads), mma_##name##_##tokens##x##rows) {               \
    const Qkv op(a, scratch);                                                                                 \
    mma_gemm<Type, GemmShape<Type, tokens, rows, __VA_ARGS__>>(op, PreparedRows(op.rows_scratch(), a.T, a.D)); \
  }
MMA_VARIANTS(MMA)

KERNEL((kPlainThreads), plain) {
  const Qkv op(a, scratch);
  plain_gemm(op, static_cast<const float *>(op.rows_scratch()), a.QD + 2 * a.KD);
}

KERNEL((kPlaceThreads), place) {
  const int warp = static_cast<int>(blockIdx.x) * (kPlaceThreads / 32) + threadIdx.x / 32, heads = a.QD / a.Dh + 2 * a.HK;
  if (warp < a.T * heads) Qkv(a, scratch).place(warp / heads, warp % heads);
}
