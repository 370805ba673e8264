// mma_gemm.cuh - products with many tokens, on tensor cores: a block computes kTokens tokens by kRows weight rows.
//
// Activations come from prepared rows (activation_rows.cuh), weights as they are stored. kStages tiles of 64 elements of K are
// under way at once. Each warp sums segments of K apart and adds them in order, as gemv.cuh does: an output has the same bits
// whatever the tile and the number of tokens.
//
// `Op` as in gemv.cuh; tiles of one unit are neighbours in a block, so it holds all values that are stored together.
#pragma once

#include "activation_rows.cuh"
#include "weight_tile.cuh"

template <int kTokens_, int kRows_, int kTokenWarps, int kRowWarps, int kStages_>
struct GemmShape {
  static constexpr int kTokens = kTokens_, kRows = kRows_, kStages = kStages_, kThreads = kTokenWarps * kRowWarps * 32;
  static constexpr int kDepth = 64;  // elements of K in a stage
  static constexpr int kTokenTiles = kTokens / kTokenWarps / 16, kRowTiles = kRows / kRowWarps / 8;  // of a warp
  using Tile = RowTile<kDepth>;
  static constexpr int kTokenNbytes = kDepth * 2, kStageNbytes = kTokens * kTokenNbytes + kRows * Tile::kStride;
};

template <class D, class Shape, class Op>
struct MmaGemm {
  using Tile = typename Shape::Tile;
  static constexpr int kDepth = Shape::kDepth, kTokenTiles = Shape::kTokenTiles, kRowTiles = Shape::kRowTiles;
  static constexpr int kPairNbytes = 2 * Shape::kTokenNbytes;
  static constexpr int kCopies = Shape::kRows * Tile::kPieces / Shape::kThreads;
  static_assert(kCopies * Shape::kThreads == Shape::kRows * Tile::kPieces, "every thread copies as often");

  const Op &op;
  const PreparedRows &prepared;
  unsigned char *shared;
  const int first_token, first_tile;  // of the block
  const int warp_token, warp_tile;    // of the warp, within the block

  // The rows of weights whose pieces this thread copies, the same in every stage.
  __device__ __forceinline__ void find_rows(const unsigned char *(&from)[kCopies]) const {
#pragma unroll 1  // the code exists once
    for (int j = 0; j < kCopies; j++) {
      const int r = (static_cast<int>(threadIdx.x) + j * Shape::kThreads) / Tile::kPieces;
      const unsigned char *row = op.template tile<D>(first_tile + r / 8).row(r % 8);
#pragma unroll
      for (int i = 0; i < kCopies; i++) from[i] = i == j ? row : from[i];
    }
  }

  __device__ __forceinline__ void copy_stage(int stage, int first, const unsigned char *const (&from)[kCopies]) const {
    unsigned char *tokens = shared + stage * Shape::kStageNbytes, *weights = tokens + Shape::kTokens * Shape::kTokenNbytes;
    constexpr int kPairsAtOnce = Shape::kThreads / 16;  // a thread copies the same piece of every so many-th pair
    const int piece = threadIdx.x % 16, first_pair = threadIdx.x / 16;
    const unsigned char *from_pair = prepared.pairs + (first_token / 2 + first_pair) * prepared.pair_nbytes + first * 4 + piece * 16;
#pragma unroll
    for (int pair = 0; pair < Shape::kTokens / 2; pair += kPairsAtOnce) {
      const bool valid = first_token + 2 * (first_pair + pair) < op.T;
      cp_async16(tokens + activation_piece(first_pair, kPairNbytes, piece) + pair * kPairNbytes, from_pair + pair * prepared.pair_nbytes, valid);
    }
#pragma unroll
    for (int j = 0; j < kCopies; j++) {
      const int i = threadIdx.x + j * Shape::kThreads;
      Tile::copy(weights, i / Tile::kPieces, i % Tile::kPieces, from[j], first, op.K);
    }
  }

  __device__ __forceinline__ void multiply_stage(int stage, float (&sum)[kTokenTiles][kRowTiles][4]) const {
    const unsigned char *tokens = shared + stage * Shape::kStageNbytes, *weights = tokens + Shape::kTokens * Shape::kTokenNbytes;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const LaneWeights<kDepth> first_rows(weights, warp_tile * 8 + g, t);
    const LaneActivations first_pairs(tokens, warp_token / 2 + g, kPairNbytes, t);
#pragma unroll
    for (int step = 0; step < kDepth / kStep; step++) {
      uint32_t b[kRowTiles][4];
#pragma unroll
      for (int n = 0; n < kRowTiles; n++) first_rows.read(step, n * 8 * Tile::kStride, b[n]);
#pragma unroll
      for (int m = 0; m < kTokenTiles; m++) {
        uint32_t a[2][4];
        first_pairs.read(step, m * 8 * kPairNbytes, a);
#pragma unroll
        for (int n = 0; n < kRowTiles; n++) multiply_step<typename D::Half>(sum[m][n], a, b[n]);
      }
    }
  }

  // Results go through shared memory: stores to device memory then run along the rows, and their code exists once.
  __device__ __forceinline__ void store(const float (&total)[kTokenTiles][kRowTiles][4]) const {
    constexpr int kStride = Shape::kRows + 4, kUnits = Shape::kRows / (8 * Op::kUnit);
    static_assert(Shape::kTokens * kStride * 4 <= Shape::kStages * Shape::kStageNbytes, "the results fit where the stages were");
    auto *results = reinterpret_cast<float *>(shared);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kTokenTiles; m++) {
#pragma unroll
      for (int n = 0; n < kRowTiles; n++) {
        float *to = results + (warp_token + m * 16 + 2 * g) * kStride + (warp_tile + n) * 8 + 2 * t;
        *reinterpret_cast<float2 *>(to) = make_float2(total[m][n][0], total[m][n][1]);
        *reinterpret_cast<float2 *>(to + kStride) = make_float2(total[m][n][2], total[m][n][3]);
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
      op.template store<D>(first_token + token, first_tile / Op::kUnit + unit, r, values);
    }
  }
};

template <class D, class Shape, class Op>
__device__ __forceinline__ void mma_gemm(const Op &op, const PreparedRows &prepared) {
  using Kernel = MmaGemm<D, Shape, Op>;
  constexpr int kTokenTiles = Shape::kTokenTiles, kRowTiles = Shape::kRowTiles, kStages = Shape::kStages, kDepth = Shape::kDepth;
  static_assert(Shape::kRows % (8 * Op::kUnit) == 0, "the tiles of a unit belong to one block");
  DYN_SHARED(unsigned char, shared);
  const int warp = warp_index(), row_warps = Shape::kRows / (kRowTiles * 8);
  const Kernel kernel{op, prepared, shared, static_cast<int>(blockIdx.y) * Shape::kTokens, static_cast<int>(blockIdx.x) * (Shape::kRows / 8),
                      warp / row_warps * kTokenTiles * 16, warp % row_warps * kRowTiles};

  const int depths = ceil_div(op.K, kDepth);
  int stage = 0, filled = kStages - 1;  // the stage that is multiplied, and the one that is copied to meanwhile
  const unsigned char *from[Kernel::kCopies] = {};
  kernel.find_rows(from);
#pragma unroll 1
  for (int s = 0; s < kStages - 1; s++) {
    if (s < depths) kernel.copy_stage(s, s * kDepth, from);
    cp_async_commit();
  }
  float total[kTokenTiles][kRowTiles][4] = {}, sum[kTokenTiles][kRowTiles][4] = {};
  for (int d = 0; d < depths; d++) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // stage d has landed for all, and all are done with the stage that is filled next
    if (d + kStages - 1 < depths) kernel.copy_stage(filled, (d + kStages - 1) * kDepth, from);
    cp_async_commit();
    kernel.multiply_stage(stage, sum);
    filled = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if ((d + 1) % (kSegment / kDepth) == 0 || d + 1 == depths) {
#pragma unroll
      for (int m = 0; m < kTokenTiles; m++) {
#pragma unroll
        for (int n = 0; n < kRowTiles; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) total[m][n][i] += sum[m][n][i], sum[m][n][i] = 0;
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // all have read the last stage
  kernel.store(total);
}
