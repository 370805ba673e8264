// quant_gemv.cuh - products of packed weights with few tokens: every weight is read once, as fast as memory gives it.
//
// Up to eight slots of activations (quant_rows.cuh), two planes of up to four tokens or one of eight, stand in shared memory as the B operand of mma, sixteen weight
// rows are the A operand. A block goes through tiles of sixteen rows, blockIdx.x, blockIdx.x + gridDim.x, ...; its warps share
// out the segments of K. Each warp has a ring of its own that 16-byte asynchronous copies keep full across tiles, so memory
// is read without pause; the only barrier is one per tile. Where activations do not fit shared memory, all tiles are done for
// one panel of K after another, and sums wait in shared memory.
//
// An output is the sum of the warps' sums in order. `Op` says what is multiplied and what becomes of it:
//   kUnit                        tiles of eight weight rows whose results are wanted together: 1 or 2
//   kNorm; x, norm, T, K         the activations, and whether they are normalized first
//   num_units()
//   packed(unit * kUnit + i)     the rows of a tile, a PackedTile
//   store<D>(token, unit, r, v)  v[kUnit], one value per tile; D is Packed<kBits>
#pragma once

#include "quant_rows.cuh"
#include "quant_tile.cuh"

constexpr int kQuantThreads = kSlotThreads;
constexpr int kQuantBlocks = 2;  // of a multiprocessor that registers must suffice for
constexpr int kQuantWarps = kQuantThreads / 32;
constexpr int kQuantPlanes = 2;        // what f32 holds of an activation
constexpr int kMaxExactTokens = 4;     // more have one plane
constexpr int kQuantScaleNbytes = 64;  // the most a row has in a segment

template <int kBits>
constexpr int kQuantStages = kBits == 8 ? 2 : kBits == 4 ? 3 : 4;
template <int kBits>
constexpr int kQuantStageNbytes = kQuantRows * (32 * kBits + kQuantScaleNbytes);

// Rows of a tile, from an op's two tiles.
template <int kBits, class Op>
__device__ __forceinline__ QuantTile<kBits> quant_tile(const Op &op, int tile) {
  return QuantTile<kBits>(op.packed(2 * tile), op.packed(2 * tile + 1), op.K);
}
template <class Op>
__device__ __forceinline__ int num_quant_tiles(const Op &op) {
  return ceil_div(op.num_units() * Op::kUnit, 2);
}

// The quants and scales of one segment of a tile to shared memory, by the 32 lanes of a warp; missing rows are zeros.
template <int kBits>
__device__ __forceinline__ void copy_segment(unsigned char *quants, unsigned char *scales, const QuantTile<kBits> &from, int segment) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kBits; j++) {
    const int i = j * 32 + lane, r = i / (2 * kBits), piece = i % (2 * kBits);
    cp_async16(quants + quant_piece<kBits>(r, piece), from.row(r) + segment * (32 * kBits) + piece * 16, from.has_row(r));
  }
  const int stride = scale_stride(from.scale_nbytes), shift = stride == 64 ? 2 : stride == 32 ? 1 : 0;
  const int64_t start = from.scales + (static_cast<int64_t>(segment) * from.scale_nbytes & ~static_cast<int64_t>(15));
  for (int i = lane; i < kQuantRows << shift; i += 32) {
    const int r = i >> shift, piece = i & ((1 << shift) - 1);
    cp_async16(scales + r * stride + piece * 16, from.row(r) + start + piece * 16, from.has_row(r));
  }
}

template <int kBits, class Op>
struct QuantGemv {
  static constexpr int kStages = kQuantStages<kBits>, kStageNbytes = kQuantStageNbytes<kBits>;
  static constexpr int kItems = Op::kUnit == 1 ? kQuantRows : kUnitRows8;  // results of a token in a tile

  const Op &op;
  const int planes, slots, pairs, segments, panel, tiles;  // panel: segments of K at a time
  unsigned char *ring, *rows;                      // this warp's ring; activations of the panel
  float *parts, *totals;                           // [2][kQuantWarps][16][2 pairs]; [tile of the block][16][2 pairs], if there are panels

  __device__ __forceinline__ QuantGemv(const Op &o, unsigned char *shared)
      : op(o), planes(o.T <= kMaxExactTokens ? kQuantPlanes : 1), slots(o.T * planes), pairs((slots + 1) / 2), segments(ceil_div(o.K, kPackedSegment)), panel(panel_of_launch()), tiles(num_quant_tiles(o)) {
    ring = shared + threadIdx.x / 32 * kStages * kStageNbytes;
    rows = shared + kQuantWarps * kStages * kStageNbytes;
    parts = reinterpret_cast<float *>(rows + panel * kQuantSteps * slots * kSlotNbytes);
    totals = parts + 2 * kQuantWarps * part_size();
  }

  // As many segments as the launch has given shared memory for (gllm_driver/launch/_packed.py counts alike).
  __device__ __forceinline__ int panel_of_launch() const {
    const int each = kQuantSteps * slots * kSlotNbytes, part = kQuantRows * 2 * pairs * 4;
    const int left = dynamic_smem_nbytes() - kQuantWarps * (kStages * kStageNbytes + 2 * part);
    if (segments * each <= left) return segments;
    const int kept = ceil_div(num_quant_tiles(op), static_cast<int>(gridDim.x)) * part;
    return (left - kept) / each;
  }

  __device__ __forceinline__ int part_size() const { return kQuantRows * 2 * pairs; }

  // A warp's work in order: every kQuantWarps-th segment of the panel's in each tile of the block, panel after panel.
  struct Cursor {
    int first, tile, within;  // first segment of the panel
  };
  __device__ __forceinline__ int count(int first) const { return min(panel, segments - first); }
  __device__ __forceinline__ void advance(Cursor &at) const {
    at.within += kQuantWarps;
    while (at.first < segments && at.within >= count(at.first)) {
      at.within -= count(at.first);
      at.tile += gridDim.x;
      if (at.tile >= tiles) at.tile = blockIdx.x, at.first += panel, at.within = threadIdx.x / 32;
    }
  }

  // Activations of a panel, every slot.
  __device__ __forceinline__ void fill_rows(int first, const SlotRows &prepared) const {
    const int pieces = count(first) * kQuantSteps * slots * (kSlotNbytes / 16);
    const unsigned char *from = prepared.steps + static_cast<int64_t>(first) * kQuantSteps * slots * kSlotNbytes;
    for (int i = threadIdx.x; i < pieces; i += kQuantThreads) store16(rows + i * 16, load16(from + i * 16));
  }

  template <bool kFine, bool kOffset>
  __device__ __forceinline__ void multiply(const unsigned char *quants, const unsigned char *scales, const unsigned char *x, const PackedFormat &format,
                                           float (&sum)[4]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int stride = scale_stride((kPackedSegment >> format.group_shift) * format.scale_nbytes());
    constexpr int kUnroll = kBits == 8 ? 1 : 2;
#pragma unroll kUnroll
    for (int depth = 0; depth < kQuantDepths; depth++) {
      const LaneQuants<kBits> low(quants, g, t, depth), high(quants, g + 8, t, depth);
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const int step = depth * 2 + s;
        LaneScale scale[2];
        read_scales<kBits, kFine, kOffset>(scale, scales, stride, g, step, format.group_shift, format.kind);
        uint32_t q0[4], q1[4];
        unpack_step<kBits>(low, s, q0);
        unpack_step<kBits>(high, s, q1);
        const StepOperands operands(q0, q1);
        // Lanes whose slot there is not read another's: their sums are nobody's.
        const uint4 v = load16(x + (step * slots + min(g, slots - 1)) * kSlotNbytes + t * 16);
        quant_step<kFine, kOffset>(sum, operands, v, scale);
      }
    }
  }

  // sum += one segment of a tile, [16][slot].
  __device__ __forceinline__ void multiply_segment(const Cursor &at, int stage, const PackedFormat &format, float (&sum)[4]) const {
    const unsigned char *quants = ring + stage * kStageNbytes;
    const int scale_nbytes = (kPackedSegment >> format.group_shift) * format.scale_nbytes();
    const unsigned char *scales = quants + kQuantRows * 32 * kBits + ((at.first + at.within) * scale_nbytes & 15);
    const unsigned char *x = rows + at.within * kQuantSteps * slots * kSlotNbytes;
    if (format.kind == 0 && format.group_shift > 4) {
      multiply<false, false>(quants, scales, x, format, sum);
    } else if (format.kind == 0) {
      multiply<true, false>(quants, scales, x, format, sum);
    } else {
      multiply<true, true>(quants, scales, x, format, sum);
    }
  }

  // What this warp's segments of a tile sum up to.
  __device__ __forceinline__ void put_part(int buffer, const float (&sum)[4]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, slot = lane % 4 * 2;
    if (slot >= slots) return;
    float *part = parts + (buffer * kQuantWarps + threadIdx.x / 32) * part_size() + slot;
    *reinterpret_cast<float2 *>(part + g * 2 * pairs) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2 *>(part + (g + 8) * 2 * pairs) = make_float2(sum[2], sum[3]);
  }

  // The sum of a row so far: the warps' in order.
  __device__ __forceinline__ float add_parts(int first, int buffer, int local, int r, int slot) const {
    const int i = r * 2 * pairs + slot, size = part_size();
    float total = first == 0 ? 0.f : totals[local * size + i];
    const float *part = parts + buffer * kQuantWarps * size + i;
#pragma unroll
    for (int w = 0; w < kQuantWarps; w++) total += part[w * size];
    if (first + panel < segments) totals[local * size + i] = total;
    return total;
  }

  // What the segments of a panel make of a tile: stored if it is the last, kept otherwise. `local` counts the block's tiles.
  __device__ __forceinline__ void finish_tile(int first, int tile, int local, const float *unscale) const {
    const int buffer = local & 1;
    const int turned = (threadIdx.x + local * 32) % kQuantThreads;  // another warp for every tile
#pragma unroll 1
    for (int i = turned; i < kItems * op.T; i += kQuantThreads) {
      const int r = i % kItems, token = i / kItems;
      float values[Op::kUnit];
#pragma unroll
      for (int u = 0; u < Op::kUnit; u++) {
        const float whole = add_parts(first, buffer, local, u * 8 + r, token);
        values[u] = (planes == 1 ? whole : join_planes(whole, add_parts(first, buffer, local, u * 8 + r, op.T + token))) * unscale[token];
      }
      if (first + panel < segments) continue;
      const int unit = Op::kUnit == 1 ? 2 * tile + r / 8 : tile;
      op.template store<Packed<kBits>>(token, unit, r % 8, values);
    }
  }
};

// `scratch`: prepared slots.
template <int kBits, class Op>
__device__ __forceinline__ void quant_gemv(const Op &op, void *scratch) {
  using Kernel = QuantGemv<kBits, Op>;
  DYN_SHARED(unsigned char, shared);
  const Kernel kernel(op, shared);
  QuantTile<kBits> from;  // the tile that is copied
  int from_tile = -1;
  const auto copy = [&](typename Kernel::Cursor at, int stage) {
    if (at.first < kernel.segments) {
      if (at.tile != from_tile) from = quant_tile<kBits>(op, at.tile), from_tile = at.tile;
      unsigned char *to = kernel.ring + stage * Kernel::kStageNbytes;
      copy_segment<kBits>(to, to + kQuantRows * 32 * kBits, from, at.first + at.within);
    }
    cp_async_commit();
  };
  typename Kernel::Cursor next{0, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x / 32) - kQuantWarps}, copied;
  kernel.advance(next);
  copied = next;
#pragma unroll 1
  for (int s = 0; s < Kernel::kStages; s++) copy(copied, s), kernel.advance(copied);

  allow_next_launch();
  wait_for_earlier_launches();

  const SlotRows prepared(scratch, op.T, op.K, kernel.planes);
  int stage = 0;  // where the next segment is in the ring
  for (int first = 0; first < kernel.segments; first += kernel.panel) {
    __syncthreads();  // all have read the rows of the last panel
    kernel.fill_rows(first, prepared);
    __syncthreads();
    int local = 0;
    for (int tile = blockIdx.x; tile < kernel.tiles; tile += gridDim.x, local++) {
      const PackedFormat format(op.packed(2 * tile).code);
      float sum[4] = {};
      while (next.first == first && next.tile == tile) {
        cp_async_wait<Kernel::kStages - 1>();
        __syncwarp();
        kernel.multiply_segment(next, stage, format, sum);
        __syncwarp();  // every lane is done with the segment that the next copy overwrites
        copy(copied, stage);
        kernel.advance(copied);
        kernel.advance(next);
        stage = stage + 1 == Kernel::kStages ? 0 : stage + 1;
      }
      kernel.put_part(local & 1, sum);
      __syncthreads();  // parts are there; those of the tile before are read, so the next tile may write its own
      kernel.finish_tile(first, tile, local, prepared.unscale);
    }
  }
  cp_async_wait<0>();
}
