// gemv.cuh - products with few tokens: every weight is read once, as fast as memory gives it, and all tokens are served.
//
// Up to 16 * kTokenTiles activation rows (tokens times planes) stand in shared memory as the A operands of mma, eight weight
// rows are the B operand: one instruction serves 1 to 16 rows. Each warp has its own ring of weight tiles (8 rows by one
// segment of K) filled by 16-byte asynchronous copies, and shares out the segments of a unit with the other warps of the
// block; there is no barrier between warps until a unit is done. The first copies start before activations are touched.
//
// An output is the sum of its segments in order, each summed step by step in order: the same bits whatever the number of
// tokens, the grid, and whether this kernel or that of mma_gemm.cuh computes it (with one plane).
//
// `Op` says what is multiplied and what becomes of it:
//   kUnit                        tiles of eight weight rows whose results are wanted together
//   kNorm; x, norm, T, K         the activations, and whether they are normalized first
//   num_units()
//   tile<D>(unit * kUnit + i)    the rows of a tile, a WeightTile; none past the last unit
//   store<D>(token, unit, r, v)  v[kUnit], one value per tile
#pragma once

#include "activation_rows.cuh"
#include "weight_tile.cuh"

constexpr int kGemvThreads = kRowThreads;
constexpr int kGemvBlocks = 4;  // blocks of a multiprocessor that registers must suffice for
constexpr int kGemvWarps = kGemvThreads / 32;
constexpr int kMaxGemvTokens = 16;
constexpr int kRingStages = 3;
constexpr int kPanelNbytes = 32 << 10;  // of activation rows in shared memory; longer K is done panel by panel

template <class D, int kPlanes, int kTokenTiles, class Op>
struct Gemv {
  using Half = typename D::Half;
  using Tile = RowTile<kSegment>;
  static constexpr int kStages = kRingStages, kStageNbytes = kTileRows * Tile::kStride;

  const Op &op;
  const int slots, segments, pairs, panel_segments, per_unit;  // per_unit: tiles of a unit, all segments
  unsigned char *ring, *rows;                            // this warp's ring; activation rows of the panel
  float *parts, *totals;                                 // [segment][tile][slot][8], [tile][slot][8]

  __device__ __forceinline__ Gemv(const Op &o, unsigned char *shared)
      : op(o),
        slots(o.T * kPlanes),
        segments(ceil_div(o.K, kSegment)),
        pairs((slots + 1) / 2),
        panel_segments(min(segments, kPanelNbytes / (pairs * kSegment * 4))),
        per_unit(segments * Op::kUnit) {
    ring = shared + threadIdx.x / 32 * kStages * kStageNbytes;
    rows = shared + kGemvWarps * kStages * kStageNbytes;
    parts = reinterpret_cast<float *>(rows + pair_stride() * pairs);
    totals = parts + panel_segments * Op::kUnit * slots * 8;
  }

  __device__ __forceinline__ int pair_stride() const { return panel_segments * kSegment * 4; }

  // A warp's tiles in order: every kGemvWarps-th of the block's, which go segment by segment through its units,
  // blockIdx.x, blockIdx.x + gridDim.x, ...
  struct Cursor {
    int unit, within;
  };
  __device__ __forceinline__ void advance(Cursor &at) const {
    at.within += kGemvWarps;
    while (at.within >= per_unit) at.within -= per_unit, at.unit += gridDim.x;
  }

  // Lane l copies to row l / 4, and unpacks that row later.
  __device__ __forceinline__ void copy_tile(Cursor at, int stage) const {
    if (at.unit < op.num_units()) {
      const int r = threadIdx.x % 32 / 4, first = at.within / Op::kUnit * kSegment;
      const unsigned char *row = op.template tile<D>(at.unit * Op::kUnit + at.within % Op::kUnit).row(r);
      Tile::copy_row(ring + stage * kStageNbytes, r, threadIdx.x % 4, row, first, op.K);
    }
    cp_async_commit();
  }

  // Activations of segments first_segment .. of the panel, every plane, zeros behind K.
  __device__ __forceinline__ void fill_rows(int first_segment, const float *means, const float *factors, const float *scales) const {
    const int first = first_segment * kSegment, words = panel_segments * kSegment / 2;
#pragma unroll 2
    for (int i = threadIdx.x; i < op.T * words; i += kGemvThreads) {
      const int t = i / words, word = i % words, k = first + 2 * word;
      const float *x = op.x + static_cast<int64_t>(t) * op.K;
      const float lo = k < op.K ? normalized<Op::kNorm>(x, op.norm, k, means[t], factors[t]) * scales[t] : 0.f;
      const float hi = k + 1 < op.K ? normalized<Op::kNorm>(x, op.norm, k + 1, means[t], factors[t]) * scales[t] : 0.f;
      uint32_t planes[kPlanes];
      split_pair<Half, kPlanes>(lo, hi, planes);
#pragma unroll
      for (int p = 0; p < kPlanes; p++) {
        const int slot = p * op.T + t;
        *reinterpret_cast<uint32_t *>(rows + activation_piece(slot / 2, pair_stride(), word / 2) + word % 2 * 8 + slot % 2 * 4) = planes[p];
      }
    }
  }

  // One tile of one segment: its part of [slot][row].
  __device__ __forceinline__ void multiply_tile(Cursor at, int stage, int first_segment) const {
    const int segment = at.within / Op::kUnit, tile = at.within % Op::kUnit;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned char *weights = ring + stage * kStageNbytes;
    const LaneWeights<kSegment> lane_weights(weights, g, t);
    const unsigned char *panel = rows + (segment - first_segment) * kSegment * 4;
    float sum[kTokenTiles][4] = {};
    const int steps = min(kSegment, op.K - segment * kSegment + kStep - 1) / kStep;
    const auto multiply = [&](int step) {
      uint32_t b[4];
      lane_weights.read(step, 0, b);
#pragma unroll
      for (int m = 0; m < kTokenTiles; m++) {  // lanes whose pair there is not read another's: their sums are nobody's
        uint32_t a[2][4];
        LaneActivations(panel, m * 8 + g < pairs ? m * 8 + g : 0, pair_stride(), t).read(step, 0, a);
        multiply_step<Half>(sum[m], a, b);
      }
    };
    int step = 0;
#pragma unroll 2
    for (; step + 2 <= steps; step += 2) multiply(step), multiply(step + 1);
    if (step < steps) multiply(step);
    float *part = parts + ((segment - first_segment) * Op::kUnit + tile) * slots * 8 + 2 * t;
#pragma unroll
    for (int m = 0; m < kTokenTiles; m++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int slot = m * 16 + 2 * g + h;
        if (slot < slots) *reinterpret_cast<float2 *>(part + slot * 8) = make_float2(sum[m][2 * h], sum[m][2 * h + 1]);
      }
    }
  }

  __device__ __forceinline__ void add_parts(int first_segment) const {
    const int entries = Op::kUnit * slots * 8, count = min(panel_segments, segments - first_segment);
#pragma unroll 1
    for (int i = threadIdx.x; i < entries; i += kGemvThreads) {
      float total = first_segment == 0 ? 0.f : totals[i];
      for (int s = 0; s < count; s++) total += parts[s * entries + i];
      totals[i] = total;
    }
  }

  __device__ __forceinline__ void store(int unit, const float *unscales) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < op.T * 8; i += kGemvThreads) {
      const int t = i / 8, r = i % 8;
      float values[Op::kUnit];
#pragma unroll
      for (int tile = 0; tile < Op::kUnit; tile++) {
        float rest = 0;
#pragma unroll
        for (int p = kPlanes - 1; p > 0; p--) rest += totals[(tile * slots + p * op.T + t) * 8 + r];
        values[tile] = join_planes(totals[(tile * slots + t) * 8 + r], rest) * unscales[t];
      }
      op.template store<D>(t, unit, r, values);
    }
  }
};

template <class D, int kPlanes, int kTokenTiles, class Op>
__device__ __forceinline__ void gemv(const Op &op) {
  using Kernel = Gemv<D, kPlanes, kTokenTiles, Op>;
  DYN_SHARED(unsigned char, shared);
  SHARED(float, reduction, kGemvWarps);
  SHARED(float, means, kMaxGemvTokens);
  SHARED(float, factors, kMaxGemvTokens);
  SHARED(float, scales, kMaxGemvTokens);
  SHARED(float, unscales, kMaxGemvTokens);
  const Kernel kernel(op, shared);
  typename Kernel::Cursor next{static_cast<int>(blockIdx.x), warp_index() - kGemvWarps}, copied = next;
  kernel.advance(next);
#pragma unroll 1
  for (int s = 0; s < Kernel::kStages; s++) kernel.advance(copied), kernel.copy_tile(copied, s);
  int stage = 0;  // where the next tile is in the ring

  for (int t = 0; t < op.T; t++) {
    const RowFactors f = row_factors<typename D::Half, Op::kNorm>(op.x + static_cast<int64_t>(t) * op.K, op.norm, op.K, reduction);
    if (threadIdx.x == 0) means[t] = f.mean, factors[t] = f.factor, scales[t] = f.scale, unscales[t] = f.unscale;
  }
  bool filled = false;
  for (int unit = blockIdx.x; unit < op.num_units(); unit += gridDim.x) {
    for (int segment = 0; segment < kernel.segments; segment += kernel.panel_segments) {
      __syncthreads();  // the factors are there; the parts and rows of the last round have been read
      if (!filled) {
        kernel.fill_rows(segment, means, factors, scales);
        filled = kernel.panel_segments == kernel.segments;
        __syncthreads();
      }
      const int end = min(kernel.segments, segment + kernel.panel_segments) * Op::kUnit;
      while (next.unit == unit && next.within < end) {
        cp_async_wait<Kernel::kStages - 1>();
        __syncwarp();
        kernel.multiply_tile(next, stage, segment);
        __syncwarp();  // every lane is done with the tile that the next copy overwrites
        kernel.advance(copied);
        kernel.copy_tile(copied, stage);
        kernel.advance(next);
        stage = stage + 1 == Kernel::kStages ? 0 : stage + 1;
      }
      __syncthreads();
      kernel.add_parts(segment);
    }
    __syncthreads();
    kernel.store(unit, unscales);
  }
  cp_async_wait<0>();
}
