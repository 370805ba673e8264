// fused_qkv_rope - norm, Q/K/V projections, biases, q/k-norm, rotary embedding, and the write into the paged KV cache.
//
// A unit is sixteen rows of one head. Where heads have no norm of their own, its two tiles hold the rows in pairs that are
// rotated together, and the product's epilogue finishes the job. A head's norm needs the whole head: products then go,
// as they are, to `q` and to scratch (k and v), and `place` does the rest with a warp per head.
//
// Scratch: k and v as they are, f32 [T, 2 KD], then the rows of activations at a multiple of 256 bytes.
#include "common/dot.cuh"
#include "common/gemv.cuh"
#include "common/mma_gemm.cuh"
#include "common/plain_gemm.cuh"
#include "common/product_variants.cuh"
#include "common/quant_dot.cuh"
#include "common/quant_mma.cuh"
#include "generated/fused_qkv_rope_args.h"

constexpr int kPlaceThreads = 128;
constexpr int kUnitRows = 2 * kTileRows;

struct Qkv {
  static constexpr int kUnit = 2;
  static constexpr bool kNorm = true;
  const FusedQkvRopeArgs &a;
  const float *x;
  const int T, K;
  const RowNorm norm;
  float *const raw;   // [T, 2 KD]
  const bool rotates;  // whether the epilogue finishes the job; gllm_driver/launch/fused_qkv_rope.py decides alike
  const float heads_per_unit;

  __device__ __forceinline__ Qkv(const FusedQkvRopeArgs &args, void *scratch)
      : a(args), x(args.x), T(args.T), K(args.D), norm(args), raw(static_cast<float *>(scratch)),
        rotates(args.q_norm == nullptr && args.R % 8 == 0 && args.Dh % kUnitRows == 0),
        heads_per_unit(static_cast<float>(kUnitRows) / static_cast<float>(args.Dh)) {}

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
  __device__ __forceinline__ int dtype_of_unit(int unit) const { return dtype_of(part_of(unit)); }
  __device__ __forceinline__ const float *bias_of(int part) const { return part == 0 ? a.bq : part == 1 ? a.bk : a.bv; }

  // The head that a unit of a projection is of, where heads are whole units. Exact for up to 2^20 units: less code, and
  // sooner done, than a division.
  __device__ __forceinline__ int head_of(int unit) const { return static_cast<int>((static_cast<float>(unit) + 0.5f) * heads_per_unit); }
  __device__ __forceinline__ int dim_of(int unit) const { return unit * kUnitRows - head_of(unit) * a.Dh; }

  // Which rows of its projection stand in tile 0 or 1 of a unit: first, first + step, ...
  __device__ __forceinline__ int first_row(int part, int unit, int tile) const {
    const int first = unit * kUnitRows, dim = dim_of(unit);
    if (!rotated(part, dim)) return first + tile * kTileRows;
    return a.rope_style == 1 ? first + tile : first - dim / 2 + tile * a.R;
  }
  __device__ __forceinline__ int row_step(int part, int unit) const {
    return a.rope_style == 1 && rotated(part, dim_of(unit)) ? 2 : 1;
  }
  __device__ __forceinline__ bool rotated(int part, int dim) const { return rotates && part != 2 && dim < 2 * a.R; }

  // Rows of projections stored in another type are left out: a launch per type computes them.
  template <class D>
  __device__ __forceinline__ WeightTile<D> tile(int index) const {
    int unit = index / 2;
    const int part = part_of(unit), rows = rows_of(part);
    const bool mine = D::holds(dtype_of(part)) && unit < units(rows);
    return {weight_of(part), mine ? first_row(part, unit, index % 2) : rows, row_step(part, unit), rows, K};
  }

  __device__ __forceinline__ PackedTile packed(int index) const {
    int unit = index / 2;
    const int part = part_of(unit), rows = rows_of(part);
    return {weight_of(part), dtype_of(part), unit < units(rows) ? first_row(part, unit, index % 2) : rows, row_step(part, unit), rows};
  }

  template <int kBits>
  __device__ __forceinline__ int scale_nbytes(int segments) const {
    int most = 0;
#pragma unroll
    for (int part = 0; part < 3; part++) most = max(most, packed_scale_nbytes<kBits>(dtype_of(part), segments));
    return most;
  }

  // Where dim 0 of a token's head goes: an element of q, or of the cache for keys (part 1) and values (part 2).
  __device__ __forceinline__ int64_t slot(int token, int part, int head) const {
    if (part == 0) return static_cast<int64_t>(token) * a.QD + head * a.Dh;
    const int position = static_cast<int>(a.positions[token]), index = static_cast<unsigned>(position) / static_cast<unsigned>(a.P), within = position - index * a.P;
    const int64_t page = a.page_table[static_cast<int64_t>(a.seq[token]) * a.MP + index];
    return ((((page * a.L + a.layer) * 2 + (part - 1)) * a.HK + head) * a.P + within) * a.Dh;
  }

  __device__ __forceinline__ void put(int part, int64_t i, float value) const {
    if (part == 0) {
      a.q[i] = value;
    } else if (a.kv_dtype == kCodeF16) {
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

  // Where a result goes and how it is rotated: read before it is needed.
  struct Early {
    int64_t slot = 0;  // of the head's dim 0
    float cosine, sine;
    bool turns = false;
  };
  __device__ __forceinline__ Early early(int token, int unit, int r) const {
    Early found;
    if (!rotates || unit >= num_units()) return found;
    const int part = part_of(unit), dim = dim_of(unit);
    found.slot = slot(token, part, head_of(unit));
    if (rotated(part, dim)) {
      const float *cos_sin = a.cos_sin + static_cast<int64_t>(token) * 2 * a.R + dim / 2 + r;
      found.cosine = cos_sin[0], found.sine = cos_sin[a.R], found.turns = true;
    }
    return found;
  }

  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[2]) const {
    store<D>(token, unit, r, values, early(token, unit, r));
  }
  template <class D>
  __device__ __forceinline__ void store(int token, int unit, int r, const float (&values)[2], const Early &found) const {
    if (unit >= num_units()) return;
    const int part = part_of(unit), step = row_step(part, unit);
    const int first = first_row(part, unit, 0) + r * step, second = first_row(part, unit, 1) + r * step;
    if (!D::holds(dtype_of(part))) return;
    if (!rotates) {
      if (first < rows_of(part)) raw_row(token, part)[first] = values[0];
      if (second < rows_of(part)) raw_row(token, part)[second] = values[1];
      return;
    }
    const float *bias = bias_of(part);
    float u = values[0], v = values[1];
    if (bias != nullptr) u += bias[first], v += bias[second];
    if (found.turns) rotate(found.cosine, found.sine, u, v);
    const int64_t to = found.slot - head_of(unit) * a.Dh;
    put(part, to + first, u);
    put(part, to + second, v);
  }

  // Turn (u, v) by an angle.
  static __device__ __forceinline__ void rotate(float c, float s, float &u, float &v) {
    const float x0 = u;  // fmaf by name: every kernel must get the same bits
    u = fmaf(x0, c, -(v * s));
    v = fmaf(v, c, x0 * s);
  }

  __device__ __forceinline__ void plain(int n, const float *rows, int first, int tokens) const {
    const int part = n < a.QD ? 0 : n < a.QD + a.KD ? 1 : 2, row = n - (part == 0 ? 0 : a.QD + (part - 1) * a.KD);
    float sum[kPlainTokens];
    plain_row(weight_of(part), dtype_of(part), row, rows, tokens, K, sum);
    const int t = threadIdx.x % 32;
    if (t < tokens) raw_row(first + t, part)[row] = lane_sum(sum);
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
      __syncwarp();  // q may be written where other lanes have just read it
    }
    const auto value = [&](int d) { return weight != nullptr ? biased(d) * factor * weight[d] : biased(d); };
    const int64_t to = slot(token, part, first / a.Dh);
    const int pairs = part == 2 ? 0 : a.R;
    const float *cos_sin = a.cos_sin + static_cast<int64_t>(token) * 2 * a.R;
    for (int i = lane; i < pairs; i += 32) {  // a lane reads both of a pair before it writes them: q is changed in place
      const int d0 = a.rope_style == 1 ? 2 * i : i, d1 = a.rope_style == 1 ? 2 * i + 1 : i + a.R;
      float u = value(d0), v = value(d1);
      rotate(cos_sin[i], cos_sin[a.R + i], u, v);
      put(part, to + d0, u);
      put(part, to + d1, v);
    }
    for (int d = 2 * pairs + lane; d < a.Dh; d += 32) put(part, to + d, value(d));
  }
};

#define KERNEL(bounds, name) \
  extern "C" __global__ void __launch_bounds__ bounds fused_qkv_rope__##name(const __grid_constant__ FusedQkvRopeArgs a, void *scratch)

#if TENSOR_CORE_KERNELS
#define GEMV(name, Type, planes, tiles) \
  KERNEL((kGemvThreads, kGemvBlocks), gemv_##name##_p##planes##_m##tiles) { overlap_launches(); gemv<Type, planes, tiles>(Qkv(a, scratch)); }
GEMV_VARIANTS(GEMV)

#define DOT(name, Type, tokens, rows) \
  KERNEL((kDotThreads, kDotBlocks), dot_##name##_t##tokens##_r##rows) { dot<Type, tokens, rows>(Qkv(a, scratch)); }
DOT_VARIANTS(DOT)

#define ROWS(name, Half) \
  KERNEL((kRowThreads), rows_##name) { overlap_launches(); prepare_row<Half, true>(a.x, RowNorm(a), a.T, a.D, Qkv(a, scratch).rows_scratch()); }
ROWS(f16, __half)
ROWS(bf16, bf16)

#define MMA(name, Type, tokens, rows, ...)                                                                       \
  KERNEL((GemmShape<tokens, rows, __VA_ARGS__>::kThreads), mma_##name##_##tokens##x##rows) {               \
    overlap_launches();                                                                                          \
    const Qkv op(a, scratch);                                                                                 \
    mma_gemm<Type, GemmShape<tokens, rows, __VA_ARGS__>>(op, PreparedRows(op.rows_scratch(), a.T, a.D)); \
  }
MMA_VARIANTS(MMA)

#define QUANT_ROWS(planes) \
  KERNEL((kSlotThreads), slots_p##planes) { prepare_slots<planes, true>(a.x, RowNorm(a), a.T, a.D, Qkv(a, scratch).rows_scratch()); }
QUANT_ROWS(1)
QUANT_ROWS(2)

#define QUANT_DOT(bits, rows) \
  KERNEL((kQuantDotThreads, kQuantDotBlocks), dot_q##bits##_r##rows) { quant_dot<bits, rows>(Qkv(a, scratch)); }
QUANT_DOT_VARIANTS(QUANT_DOT)

#define QUANT_GEMV(bits)                                       \
  KERNEL((kQuantThreads, kQuantBlocks), gemv_q##bits) {        \
    const Qkv op(a, scratch);                                  \
    quant_gemv<bits>(op, op.rows_scratch());                   \
  }
QUANT_VARIANTS(QUANT_GEMV)

#define QUANT_MMA(bits, tokens, rows, ...)                                                      \
  KERNEL((QuantShape<tokens, rows, __VA_ARGS__>::kThreads), mma_q##bits##_##tokens##x##rows) {  \
    const Qkv op(a, scratch);                                                                   \
    quant_mma<bits, QuantShape<tokens, rows, __VA_ARGS__>>(op, op.rows_scratch());              \
  }
QUANT_MMA_VARIANTS(QUANT_MMA)
#endif

KERNEL((kRowThreads), rows_f32) { overlap_launches(); normalize_row(a.x, RowNorm(a), a.D, static_cast<float *>(Qkv(a, scratch).rows_scratch())); }
KERNEL((kPlainThreads), plain) {
  overlap_launches();
  const Qkv op(a, scratch);
  plain_gemm(op, static_cast<const float *>(op.rows_scratch()), a.QD + 2 * a.KD);
}

KERNEL((kPlaceThreads), place) {
  overlap_launches();
  const int warp = static_cast<int>(blockIdx.x) * (kPlaceThreads / 32) + warp_index(), heads = a.QD / a.Dh + 2 * a.HK;
  if (warp < a.T * heads) Qkv(a, scratch).place(warp / heads, warp % heads);
}
