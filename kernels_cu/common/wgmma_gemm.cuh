// wgmma_gemm.cuh - products with many tokens on Hopper: a block computes kTokens tokens by kRows weight rows at a time.
//
// Blocks stay and take tile after tile. One thread has the copy engine fill a ring of kStages tiles of 64 elements of K; two
// warpgroups multiply and hand a stage back when the tensor cores have read it. Either each takes half of a tile's tokens, so
// that tiles can be large, or, kAlternate, they take tiles in turn: while one stores its results the other multiplies. `full`
// counts the bytes of a stage, `empty` the warps that are done with it, `turn` those of the other group that have seen the
// last stage of a tile: without it a group could look for a stage two rounds ahead, which a barrier cannot tell from this one.
//
// Activations are flat rows (flat_rows.cuh), weights are read as they are stored, so rows must start at multiples of 16
// bytes. An output is one sum over K: its bits differ from those of mma_gemm.cuh, so deterministic mode does not come here.
//
// `Op`: T, K, row_tiles(), copy(to, tile, k, barrier), which asks for kRows weight rows at element k, and store(), which all
// lanes call, those of tokens that do not exist too.
#pragma once

#include "hopper.cuh"

template <int kTokens_, int kRows_, int kStages_, bool kAlternate_, int kTogether_ = 16>
struct WgmmaShape {
  static constexpr bool kAlternate = kAlternate_;
  static constexpr int kTokens = kTokens_, kRows = kRows_, kStages = kStages_;
  static constexpr int kDepth = 64, kStep = 16;  // elements of K in a stage, and in an instruction
  static constexpr int kGroups = 2;              // of warps that multiply
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kSharing = kAlternate ? 1 : kGroups;  // groups that work on one tile
  static constexpr int kTiles = kTokens / (64 * kSharing);   // of 64 tokens, of a group
  static constexpr int kTokenNbytes = kTokens * kSwizzleSpan, kStageNbytes = kTokenNbytes + kRows * kSwizzleSpan;
  static constexpr int kTogether = kTogether_;  // token tiles that are computed together for each row tile: both stay in L2
};

// Where a block is in the ring: the same for those who fill it and those who read it.
template <int kStages>
struct RingPosition {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void advance(int n) {
    phase ^= (stage + n) / kStages & 1;
    stage = (stage + n) % kStages;
  }
};

template <class Shape>
struct Barriers {
  uint64_t *const full, *const empty, *const turn;

  __device__ __forceinline__ explicit Barriers(unsigned char *shared)
      : full(reinterpret_cast<uint64_t *>(shared)), empty(full + Shape::kStages), turn(empty + Shape::kStages) {}
  __device__ __forceinline__ void init() const {
    for (int s = 0; s < Shape::kStages; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, Shape::kSharing * 4);
    for (int g = 0; g < Shape::kGroups; g++) mbarrier_init(turn + g, 4);
    mbarrier_init_fence();
  }
};

// Tiles in the order in which they are computed.
template <class Shape>
struct TileOrder {
  int token_tiles, row_tiles;

  __device__ __forceinline__ TileOrder(int T, int row_tiles_) : token_tiles(ceil_div(T, Shape::kTokens)), row_tiles(row_tiles_) {}
  __device__ __forceinline__ int count() const { return token_tiles * row_tiles; }
  __device__ __forceinline__ void find(int i, int &token_tile, int &row_tile) const {
    const int together = Shape::kTogether * row_tiles, first = i / together * Shape::kTogether, within = i % together;
    const int width = min(Shape::kTogether, token_tiles - first);
    token_tile = first + within % width;
    row_tile = within / width;
  }
};

template <class Shape, class Op>
__device__ __forceinline__ void fill_ring(const Op &op, const TensorMap &activations, unsigned char *shared, const Barriers<Shape> &barriers) {
  const TileOrder<Shape> order(op.T, op.row_tiles());
  const int depths = ceil_div(op.K, Shape::kDepth);
  RingPosition<Shape::kStages> at;
  for (int i = blockIdx.x; i < order.count(); i += gridDim.x) {
    int token_tile, row_tile;
    order.find(i, token_tile, row_tile);
    for (int d = 0; d < depths; d++) {
      mbarrier_wait(barriers.empty + at.stage, at.phase ^ 1);  // a ring that was never read is empty
      uint64_t *full = barriers.full + at.stage;
      unsigned char *tokens = shared + at.stage * Shape::kStageNbytes;
      mbarrier_arrive_expect(full, Shape::kStageNbytes);
      copy_box(tokens, activations, d * Shape::kDepth, token_tile * Shape::kTokens, full);
      op.copy(tokens + Shape::kTokenNbytes, row_tile, d * Shape::kDepth, full);
      at.advance();
    }
  }
}

template <class Half, class Shape, class Op>
__device__ __forceinline__ void multiply_ring(const Op &op, const float *unscale, const unsigned char *shared, const Barriers<Shape> &barriers) {
  constexpr int kGroupTokens = Shape::kTiles * 64;
  const TileOrder<Shape> order(op.T, op.row_tiles());
  const int depths = ceil_div(op.K, Shape::kDepth), group = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  const int part = Shape::kAlternate ? 0 : group, step = Shape::kGroups / Shape::kSharing;
  RingPosition<Shape::kStages> at;
  if (Shape::kAlternate) at.advance(group * depths);
  float d[Shape::kTiles][Shape::kRows / 2];
  int turn = 0;  // of this group
  for (int i = blockIdx.x + (Shape::kAlternate ? group : 0) * gridDim.x; i < order.count(); i += step * gridDim.x) {
    int token_tile, row_tile, last = 0;
    order.find(i, token_tile, row_tile);
    if (Shape::kAlternate) mbarrier_wait(barriers.turn + group, (turn & 1) ^ (group == 0));  // the first goes first
    turn++;
#pragma unroll 1
    for (int k = 0; k < depths; k++) {
      const unsigned char *tokens = shared + at.stage * Shape::kStageNbytes;
      mbarrier_wait(barriers.full + at.stage, at.phase);
      const uint64_t a = wgmma_descriptor(tokens + part * kGroupTokens * kSwizzleSpan), b = wgmma_descriptor(tokens + Shape::kTokenNbytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Shape::kDepth / Shape::kStep; step++) {
#pragma unroll
        for (int m = 0; m < Shape::kTiles; m++) wgmma<Shape::kRows, Half>(d[m], a + m * (64 * kSwizzleSpan / 16) + step * 2, b + step * 2, k + step > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one has been read
      if (k > 0 && lane == 0) mbarrier_arrive(barriers.empty + last);
      last = at.stage;
      at.advance();
    }
    if (Shape::kAlternate && lane == 0) mbarrier_arrive(barriers.turn + (group ^ 1));
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(barriers.empty + last);
    if (Shape::kAlternate) at.advance(depths);  // the other's tile
    const int first = token_tile * Shape::kTokens + part * kGroupTokens + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < Shape::kTiles; m++) {
      const int upper = first + m * 64, lower = upper + 8;
      op.template store<Shape::kRows, 0>(upper, row_tile, lane % 4, d[m], upper < op.T ? unscale[upper] : 0.f);
      op.template store<Shape::kRows, 1>(lower, row_tile, lane % 4, d[m], lower < op.T ? unscale[lower] : 0.f);
    }
  }
}

// The whole kernel: Shape::kThreads threads, one block per multiprocessor. `unscale` is what results of a token are multiplied by.
template <class Half, class Shape, class Op>
__device__ __forceinline__ void wgmma_gemm(const Op &op, const TensorMap &activations, const float *unscale) {
  DYN_SHARED(unsigned char, shared);
  const Barriers<Shape> barriers(shared + Shape::kStages * Shape::kStageNbytes);
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  overlap_launches();
  if (threadIdx.x >= Shape::kGroups * kWarpgroup) {
    give_registers<24>();
    if (threadIdx.x == Shape::kGroups * kWarpgroup) fill_ring<Shape>(op, activations, shared, barriers);
  } else {
    take_registers<240>();
    multiply_ring<Half, Shape>(op, unscale, shared, barriers);
  }
}

// The columns of one token that a thread holds come in pairs 8 j, 8 j + 1 after the first. Calls put(8 j, x, y) for those
// below `columns`. What put needs from memory load(8 j, loaded) has read: that of many columns before any is used.
template <int kRows, int kHalf, class Loaded, class Load, class Put>
__device__ __forceinline__ void for_pairs(const float (&d)[kRows / 2], float unscale, int columns, const Load &load, const Put &put) {
  constexpr int kTogether = 16;
#pragma unroll
  for (int first = 0; first < kRows / 8; first += kTogether) {
    Loaded loaded[kTogether] = {};
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      if (8 * (first + j) < columns) load(8 * (first + j), loaded[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const int i = 4 * (first + j) + 2 * kHalf;
      if (8 * (first + j) < columns) put(8 * (first + j), d[i] * unscale, d[i + 1] * unscale, loaded[j]);
    }
  }
}
