// wgmma_gemm.cuh - products with many tokens on Hopper: a block computes kTokens tokens by kRows weight rows at a time.
//
// Blocks stay and take tile after tile. One thread has the copy engine fill a ring of kStages tiles of 64 elements of K; two
// warpgroups multiply, each half of the tokens, and hand a stage back when the tensor cores have read it. While they store
// their results the ring fills with the next tile. `full` counts the bytes of a stage, `empty` the warps that are done with it.
//
// Activations are flat rows (flat_rows.cuh), weights are read as they are stored, so rows must start at multiples of 16
// bytes. An output is one sum over K: its bits differ from those of mma_gemm.cuh, so deterministic mode does not come here.
//
// `Op`: T, K, row_tiles(), copy(to, tile, k, barrier), which asks for kRows weight rows at element k, and store().
#pragma once

#include "hopper.cuh"

template <int kTokens_, int kRows_, int kStages_, int kTogether_ = 16>
struct WgmmaShape {
  static constexpr int kTokens = kTokens_, kRows = kRows_, kStages = kStages_;
  static constexpr int kDepth = 64, kStep = 16;  // elements of K in a stage, and in an instruction
  static constexpr int kGroups = 2;              // of warps that multiply
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kTiles = kTokens / (64 * kGroups);  // of 64 tokens, of a group
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
__device__ __forceinline__ void fill_ring(const Op &op, const TensorMap &activations, unsigned char *shared, uint64_t *full, uint64_t *empty) {
  const TileOrder<Shape> order(op.T, op.row_tiles());
  const int depths = ceil_div(op.K, Shape::kDepth);
  RingPosition<Shape::kStages> at;
  for (int i = blockIdx.x; i < order.count(); i += gridDim.x) {
    int token_tile, row_tile;
    order.find(i, token_tile, row_tile);
    for (int d = 0; d < depths; d++) {
      mbarrier_wait(empty + at.stage, at.phase ^ 1);  // a ring that was never read is empty
      unsigned char *tokens = shared + at.stage * Shape::kStageNbytes;
      mbarrier_arrive_expect(full + at.stage, Shape::kStageNbytes);
      copy_box(tokens, activations, d * Shape::kDepth, token_tile * Shape::kTokens, full + at.stage);
      op.copy(tokens + Shape::kTokenNbytes, row_tile, d * Shape::kDepth, full + at.stage);
      at.advance();
    }
  }
}

template <class Half, class Shape, class Op>
__device__ __forceinline__ void multiply_ring(const Op &op, const float *unscale, const unsigned char *shared, uint64_t *full, uint64_t *empty) {
  constexpr int kGroupTokens = Shape::kTiles * 64;
  const TileOrder<Shape> order(op.T, op.row_tiles());
  const int depths = ceil_div(op.K, Shape::kDepth), group = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  RingPosition<Shape::kStages> at;
  float d[Shape::kTiles][Shape::kRows / 2];
  for (int i = blockIdx.x; i < order.count(); i += gridDim.x) {
    int token_tile, row_tile, last = 0;
    order.find(i, token_tile, row_tile);
#pragma unroll 1
    for (int k = 0; k < depths; k++) {
      const unsigned char *tokens = shared + at.stage * Shape::kStageNbytes;
      mbarrier_wait(full + at.stage, at.phase);
      const uint64_t a = wgmma_descriptor(tokens + group * kGroupTokens * kSwizzleSpan), b = wgmma_descriptor(tokens + Shape::kTokenNbytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Shape::kDepth / Shape::kStep; step++) {
#pragma unroll
        for (int m = 0; m < Shape::kTiles; m++) wgmma<Shape::kRows, Half>(d[m], a + m * (64 * kSwizzleSpan / 16) + step * 2, b + step * 2, k + step > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one has been read
      if (k > 0 && lane == 0) mbarrier_arrive(empty + last);
      last = at.stage;
      at.advance();
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(empty + last);
    const int first = token_tile * Shape::kTokens + group * kGroupTokens + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < Shape::kTiles; m++) {
      const int upper = first + m * 64, lower = upper + 8;
      if (upper < op.T) op.template store<Shape::kRows, 0>(upper, row_tile, lane % 4, d[m], unscale[upper]);
      if (lower < op.T) op.template store<Shape::kRows, 1>(lower, row_tile, lane % 4, d[m], unscale[lower]);
    }
  }
}

// The whole kernel: Shape::kThreads threads, one block per multiprocessor. `unscale` is what results of a token are multiplied by.
template <class Half, class Shape, class Op>
__device__ __forceinline__ void wgmma_gemm(const Op &op, const TensorMap &activations, const float *unscale) {
  DYN_SHARED(unsigned char, shared);
  auto *full = reinterpret_cast<uint64_t *>(shared + Shape::kStages * Shape::kStageNbytes), *empty = full + Shape::kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, Shape::kGroups * 4);
    mbarrier_init_fence();
  }
  __syncthreads();
  overlap_launches();
  if (threadIdx.x >= Shape::kGroups * kWarpgroup) {
    give_registers<24>();
    if (threadIdx.x == Shape::kGroups * kWarpgroup) fill_ring<Shape>(op, activations, shared, full, empty);
  } else {
    take_registers<240>();
    multiply_ring<Half, Shape>(op, unscale, shared, full, empty);
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
