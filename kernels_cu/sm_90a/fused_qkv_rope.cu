// fused_qkv_rope on sm_90a: the products of many tokens by warpgroups. flat_rows_*, which normalizes, then wgmma_*_d64 or
// wgmma_*_d128 for heads of that many dims: a quad of lanes holds a token's whole head, so the product's epilogue adds biases,
// normalizes, rotates and stores. Other heads: wgmma_*, which writes products as they are, then `place` of the other binary.
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
};

// Products as they are.
struct RawQkv : WideQkv {
  template <int kRows, int kHalf>
  __device__ __forceinline__ void store(int token, int tile, int t, const float (&d)[kRows / 2], float unscale) const {
    if (token >= T) return;
    const int part = part_of(tile), first = tile * kRows + 2 * t;
    float *out = part == 0 ? a.q + static_cast<int64_t>(token) * a.QD : raw + (static_cast<int64_t>(token) * 2 + (part - 1)) * a.KD;
    struct Nothing {};
    for_pairs<kRows, kHalf, Nothing>(d, unscale, (part == 0 ? a.QD : a.KD) - first, [](int, Nothing &) {},
                                     [&](int column, float x, float y, const Nothing &) { *reinterpret_cast<float2 *>(out + first + column) = make_float2(x, y); });
  }
};

// Heads of kDim dims, finished here. Rotated are all of a head's dims, or pairs of neighbours.
template <int kDim>
struct FinishedQkv : WideQkv {
  // Where dim 0 of a token's head goes: an element of q, or of the cache for keys (part 1) and values (part 2).
  __device__ __forceinline__ int64_t slot(int token, int part, int head) const {
    if (part == 0) return static_cast<int64_t>(token) * a.QD + head * kDim;
    const int position = static_cast<int>(a.positions[token]), index = position / a.P, within = position - index * a.P;
    const int64_t page = a.page_table[static_cast<int64_t>(a.seq[token]) * a.MP + index];
    return ((((page * a.L + a.layer) * 2 + (part - 1)) * a.HK + head) * a.P + within) * kDim;
  }

  __device__ __forceinline__ void put(int part, int64_t i, const float (&v)[2]) const {
    if (part == 0 || a.kv_dtype == kCodeF32) {
      *reinterpret_cast<float2 *>((part == 0 ? a.q : static_cast<float *>(a.kv)) + i) = make_float2(v[0], v[1]);
    } else {
      auto *words = reinterpret_cast<uint32_t *>(static_cast<unsigned char *>(a.kv) + 2 * i);
      *words = a.kv_dtype == kCodeF16 ? pack_pair<__half>(v[0], v[1]) : pack_pair<bf16>(v[0], v[1]);
    }
  }

  static __device__ __forceinline__ void rotate(float c, float s, float &u, float &v) {
    const float x0 = u;
    u = fmaf(x0, c, -(v * s));
    v = fmaf(v, c, x0 * s);
  }

  // Dims 8 j + 2 t and the next of a head, which lane t of the quad holds.
  __device__ __forceinline__ void turn(int token, int t, float (&v)[kDim / 8][2]) const {
    const float *cosines = a.cos_sin + static_cast<int64_t>(token) * 2 * a.R, *sines = cosines + a.R;
    if (a.rope_style == 1) {
#pragma unroll
      for (int j = 0; j < kDim / 8; j++) {
        if (4 * j + t < a.R) rotate(cosines[4 * j + t], sines[4 * j + t], v[j][0], v[j][1]);
      }
    } else if (a.R > 0) {
#pragma unroll
      for (int j = 0; j < kDim / 16; j++) {
        const float2 c = *reinterpret_cast<const float2 *>(cosines + 8 * j + 2 * t), s = *reinterpret_cast<const float2 *>(sines + 8 * j + 2 * t);
        rotate(c.x, s.x, v[j][0], v[j + kDim / 16][0]);
        rotate(c.y, s.y, v[j][1], v[j + kDim / 16][1]);
      }
    }
  }

  template <int kRows, int kHalf>
  __device__ __forceinline__ void store(int token, int tile, int t, const float (&d)[kRows / 2], float unscale) const {
    const int part = part_of(tile), heads = (part == 0 ? a.QD : a.KD) / kDim;
    const float *bias = part == 0 ? a.bq : part == 1 ? a.bk : a.bv, *weight = part == 0 ? a.q_norm : part == 1 ? a.k_norm : nullptr;
#pragma unroll
    for (int h = 0; h < kRows / kDim; h++) {
      const int head = tile * (kRows / kDim) + h;
      if (head >= heads) return;
      float v[kDim / 8][2];
#pragma unroll
      for (int j = 0; j < kDim / 8; j++) {
        const int i = 4 * (h * kDim / 8 + j) + 2 * kHalf;
        float2 b = make_float2(0.f, 0.f);
        if (bias != nullptr) b = *reinterpret_cast<const float2 *>(bias + head * kDim + 8 * j + 2 * t);
        v[j][0] = d[i] * unscale + b.x, v[j][1] = d[i + 1] * unscale + b.y;
      }
      if (weight != nullptr) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kDim / 8; j++) sum = fmaf(v[j][0], v[j][0], fmaf(v[j][1], v[j][1], sum));
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
        const float factor = 1.f / sqrtf(sum / static_cast<float>(kDim) + a.qk_eps);
#pragma unroll
        for (int j = 0; j < kDim / 8; j++) {
          const float2 w = *reinterpret_cast<const float2 *>(weight + 8 * j + 2 * t);
          v[j][0] *= factor * w.x, v[j][1] *= factor * w.y;
        }
      }
      if (token >= T) continue;
      if (part != 2) turn(token, t, v);
      const int64_t to = slot(token, part, head) + 2 * t;
#pragma unroll
      for (int j = 0; j < kDim / 8; j++) put(part, to + 8 * j, v[j]);
    }
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

#define WGMMA_OF(suffix, Op, name, Half, tokens, rows, stages, alternate)                                                       \
  extern "C" __global__ void __launch_bounds__(WgmmaShape<tokens, rows, stages, alternate>::kThreads, 1)                        \
      fused_qkv_rope__wgmma_##name##_##tokens##x##rows##suffix(const __grid_constant__ FusedQkvRopeArgs a,                      \
                                                       const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap wq, \
                                                       const __grid_constant__ TensorMap wk, const __grid_constant__ TensorMap wv, \
                                                       void *scratch) {                                                         \
    const Op op{{a, wq, wk, wv, static_cast<float *>(scratch), a.T, a.D, rows}};                                                \
    wgmma_gemm<Half, WgmmaShape<tokens, rows, stages, alternate>>(op, x, FlatRows<Half>(rows_scratch(a, scratch), a.T, a.D).unscale); \
  }
#define WGMMA(...) WGMMA_OF(, RawQkv, __VA_ARGS__) WGMMA_OF(_d64, FinishedQkv<64>, __VA_ARGS__) WGMMA_OF(_d128, FinishedQkv<128>, __VA_ARGS__)
WGMMA_VARIANTS(WGMMA)
