// quant_mma.cuh - products of packed weights with many tokens: a block computes kRows weight rows by kTokens tokens.
//
// Activations come from prepared slots of one plane (quant_rows.cuh), 64 elements a stage, kStages of them under way; weights a
// segment of 256 at a time, kSegments - 1 of them being copied while one is multiplied, unpacked on the way from shared memory to
// registers. Each warp sums a segment apart and adds segments in order: an output has the same bits whatever the shape and the
// number of tokens. `Op` as there.
#pragma once

#include "quant_gemv.cuh"

template <int kTokens_, int kRows_, int kTokenWarps, int kRowWarps, int kStages_, int kSegments_>
struct QuantShape {
  static constexpr int kTokens = kTokens_, kRows = kRows_, kStages = kStages_, kSegments = kSegments_, kRowWarpsOfBlock = kRowWarps, kThreads = kTokenWarps * kRowWarps * 32;
  static constexpr int kDepth = 64, kDepths = kPackedSegment / kDepth;  // elements of K in a stage; stages of a segment
  static constexpr int kSlotTiles = kTokens / kTokenWarps / 8, kTiles = kRows / kRowWarps / kQuantRows;  // of a warp
  static constexpr int kStageNbytes = kTokens * kDepth * 2;
  static_assert((kSegments - 1) * kDepths >= kStages - 1, "a segment has landed when its turn comes");
};

template <int kBits, class Shape, class Op>
struct QuantMma {
  static constexpr int kTiles = Shape::kTiles, kSlotTiles = Shape::kSlotTiles, kTileNbytes = kQuantStageNbytes<kBits>;
  static constexpr int kBlockTiles = Shape::kRows / kQuantRows, kWeightNbytes = kBlockTiles * kTileNbytes;

  const Op &op;
  const SlotRows &prepared;
  unsigned char *activations, *weights;  // kStages stages; kSegments segments of kBlockTiles tiles
  const int first_token, first_tile;     // of the block
  const int warp_token, warp_tile;       // of the warp, within the block

  __device__ __forceinline__ void copy_activations(int stage, int depth) const {
    unsigned char *to = activations + stage * Shape::kStageNbytes;
    constexpr int kPieces = Shape::kTokens * 4, kSteps = Shape::kDepth / 32;  // of a step
#pragma unroll
    for (int j = 0; j < kPieces * kSteps / Shape::kThreads; j++) {
      const int i = j * Shape::kThreads + threadIdx.x, step = i / kPieces, token = i % kPieces / 4, piece = i % 4;
      const int64_t from = (static_cast<int64_t>(depth * kSteps + step) * prepared.slots + first_token + token) * kSlotNbytes + piece * 16;
      cp_async16(to + i * 16, prepared.steps + from, first_token + token < op.T);
    }
  }

  // Every warp copies some tiles of a segment.
  __device__ __forceinline__ void copy_weights(int buffer, int segment) const {
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < kBlockTiles; i += Shape::kThreads / 32) {
      unsigned char *to = weights + buffer * kWeightNbytes + i * kTileNbytes;
      copy_segment<kBits>(to, to + kQuantRows * 32 * kBits, quant_tile<kBits>(op, first_tile + i), segment);
    }
  }

  template <bool kOffset>
  static __device__ __forceinline__ void add_step(float (&sum)[kSlotTiles][4], const StepOperands &operands, const unsigned char *x, const unsigned char *scales,
                                                  int stride, int step, const PackedFormat &format) {
    LaneScale scale[2];
    read_scales<kBits, true, kOffset>(scale, scales, stride, threadIdx.x % 32 / 4, step, format.group_shift, format.kind);
#pragma unroll
    for (int n = 0; n < kSlotTiles; n++) quant_step<true, kOffset>(sum[n], operands, load16(x + n * 8 * kSlotNbytes), scale);
  }

  __device__ __forceinline__ void multiply(int stage, int buffer, int segment, int depth, const PackedFormat (&formats)[kTiles], float (&sum)[kTiles][kSlotTiles][4]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const unsigned char *x = activations + stage * Shape::kStageNbytes + ((s * Shape::kTokens + warp_token + g) * 4 + t) * 16;
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        const unsigned char *tile = weights + buffer * kWeightNbytes + (warp_tile + m) * kTileNbytes;
        const PackedFormat &format = formats[m];
        const int scale_nbytes = (kPackedSegment >> format.group_shift) * format.scale_nbytes();
        const unsigned char *scales = tile + kQuantRows * 32 * kBits + (segment * scale_nbytes & 15);
        uint32_t q0[4], q1[4];
        unpack_step<kBits>(LaneQuants<kBits>(tile, g, t, depth), s, q0);
        unpack_step<kBits>(LaneQuants<kBits>(tile, g + 8, t, depth), s, q1);
        const StepOperands operands(q0, q1);
        if (format.kind == 0) {
          add_step<false>(sum[m], operands, x, scales, scale_stride(scale_nbytes), depth * 2 + s, format);
        } else {
          add_step<true>(sum[m], operands, x, scales, scale_stride(scale_nbytes), depth * 2 + s, format);
        }
      }
    }
  }

  // Results go through shared memory: stores to device memory then run along the rows, and their code exists once.
  __device__ __forceinline__ void store(const float (&total)[kTiles][kSlotTiles][4], unsigned char *shared) const {
    constexpr int kStride = Shape::kRows + 4, kUnits = Shape::kRows / (8 * Op::kUnit);
    static_assert(Shape::kTokens * kStride * 4 <= Shape::kSegments * kWeightNbytes + Shape::kStages * Shape::kStageNbytes, "the results fit where the stages were");
    auto *results = reinterpret_cast<float *>(shared);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int n = 0; n < kSlotTiles; n++) {
        float *to = results + (warp_token + n * 8 + 2 * t) * kStride + (warp_tile + m) * kQuantRows + g;
        to[0] = total[m][n][0], to[kStride] = total[m][n][1], to[8] = total[m][n][2], to[kStride + 8] = total[m][n][3];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < Shape::kTokens * kUnits * 8; i += Shape::kThreads) {
      const int r = i % 8, unit = i / 8 % kUnits, token = i / (8 * kUnits);
      if (first_token + token >= op.T) break;
      const float unscale = prepared.unscale[first_token + token];
      float values[Op::kUnit];
#pragma unroll
      for (int u = 0; u < Op::kUnit; u++) values[u] = results[token * kStride + (unit * Op::kUnit + u) * 8 + r] * unscale;
      const int all = first_tile * 2 / Op::kUnit + unit;
      if (all < op.num_units()) op.template store<Packed<kBits>>(first_token + token, all, r, values);
    }
  }
};

template <int kBits, class Shape, class Op>
__device__ __forceinline__ void quant_mma(const Op &op, void *scratch) {
  using Kernel = QuantMma<kBits, Shape, Op>;
  constexpr int kTiles = Shape::kTiles, kSlotTiles = Shape::kSlotTiles, kStages = Shape::kStages, kDepths = Shape::kDepths;
  DYN_SHARED(unsigned char, shared);
  const SlotRows prepared(scratch, op.T, op.K, 1);
  const int warp = threadIdx.x / 32;
  const Kernel kernel{op, prepared, shared, shared + kStages * Shape::kStageNbytes, static_cast<int>(blockIdx.y) * Shape::kTokens,
                      static_cast<int>(blockIdx.x) * Kernel::kBlockTiles, warp / Shape::kRowWarpsOfBlock * kSlotTiles * 8, warp % Shape::kRowWarpsOfBlock * kTiles};
  const int segments = ceil_div(op.K, kPackedSegment), depths = segments * kDepths;
  PackedFormat formats[kTiles] = {};
#pragma unroll
  for (int m = 0; m < kTiles; m++) formats[m] = PackedFormat(op.packed(2 * (kernel.first_tile + kernel.warp_tile + m)).code);

  constexpr int kSegments = Shape::kSegments;
#pragma unroll 1
  for (int s = 0; s < kSegments - 1 && s < segments; s++) kernel.copy_weights(s, s);
  allow_next_launch();
  wait_for_earlier_launches();
#pragma unroll 1
  for (int s = 0; s < kStages - 1; s++) {
    if (s < depths) kernel.copy_activations(s, s);
    cp_async_commit();
  }
  float total[kTiles][kSlotTiles][4] = {};
  int stage = 0, filled = kStages - 1;
#pragma unroll 1
  for (int segment = 0; segment < segments; segment++) {
    float sum[kTiles][kSlotTiles][4] = {};
#pragma unroll 1
    for (int d = 0; d < kDepths; d++) {
      const int depth = segment * kDepths + d;
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage has landed for all, and all are done with the stage that is filled next
      if (depth + kStages - 1 < depths) kernel.copy_activations(filled, depth + kStages - 1);
      if (d == 0 && segment + kSegments - 1 < segments) kernel.copy_weights((segment + kSegments - 1) % kSegments, segment + kSegments - 1);
      cp_async_commit();
      kernel.multiply(stage, segment % kSegments, segment, d, formats, sum);
      filled = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int n = 0; n < kSlotTiles; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) total[m][n][i] += sum[m][n][i];
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // all have read the last stage
  kernel.store(total, shared);
}
