// attention_tile.cuh - FlashAttention-2 (Dao 2023): a tile of query rows against all the keys they see, on tensor cores.
//
// A row is one query head of one token; the heads of a KV head stand next to each other, token by token, so a tile reads
// each key once for all of them. Tiles of keys begin at multiples of kKeys whatever the chunk, and a tile that a row does
// not see leaves its state bit for bit: the result of a query does not depend on how its prompt was cut.
#pragma once

#include "attention.cuh"

template <int D, int kBlocks_, int kWarps_, int kKeys_>
struct FlashShape {
  static constexpr int kBlocks = kBlocks_;  // of 16 rows per warp
  static constexpr int kWarps = kWarps_;
  static constexpr int kKeys = kKeys_;  // of a tile
  static constexpr int kRows = 16 * kBlocks * kWarps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = 2;
  static constexpr int kTile = kKeys * TileShape<D>::kStride;  // elements
};

// The rows a block works on: `first` counts rows (token * heads + head) within the sequence. The grid is sized by a bound on
// the number of tiles; sequence < 0 says that this block has none.
struct RowTile {
  int sequence, first;
};

// Tiles of a sequence: none for a single token, which the split kernels take.
__device__ __forceinline__ int num_tiles(int tokens, int heads, int tile_rows) {
  return tokens > 1 ? ceil_div(tokens * heads, tile_rows) : 0;
}

// Tile `rank` in the order of the sequences, last tile of a sequence first: it sees the most keys. Every warp finds out
// for itself, 32 sequences at a time.
__device__ __forceinline__ RowTile find_tile(const int32_t *offsets, int num_sequences, int heads, int tile_rows, int rank) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int base = 0; base < num_sequences; base += 32) {
    const int s = base + lane;
    const int tiles = s < num_sequences ? num_tiles(offsets[s + 1] - offsets[s], heads, tile_rows) : 0;
    int through = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kFullMask, through, distance);
      if (lane >= distance) through += other;
    }
    const unsigned reached = __ballot_sync(kFullMask, rank < before + through);
    if (reached != 0) {
      const int found = __ffs(reached) - 1;
      const int index = __shfl_sync(kFullMask, through + before - 1 - rank, found);
      return {base + found, index * tile_rows};
    }
    before += __shfl_sync(kFullMask, through, 31);
  }
  return {-1, 0};
}

// Whether a 16-bit float is infinite or NaN, for both halves of a word.
template <class H>
__device__ __forceinline__ bool any_nonfinite(uint32_t word);
template <>
__device__ __forceinline__ bool any_nonfinite<__half>(uint32_t word) {
  return (word & 0x7c00u) == 0x7c00u || (word & 0x7c000000u) == 0x7c000000u;
}
template <>
__device__ __forceinline__ bool any_nonfinite<bf16>(uint32_t word) {
  return (word & 0x7f80u) == 0x7f80u || (word & 0x7f800000u) == 0x7f800000u;
}

template <class H, int D, class Shape>
struct FlashTile {
  using Tile = TileShape<D>;
  static constexpr int kBlocks = Shape::kBlocks, kKeys = Shape::kKeys, kSteps = D / 16;

  // What one warp keeps in registers: rows lane / 4 and lane / 4 + 8 of each block of 16.
  int lane, position[kBlocks][2];
  unsigned window;                     // keys a row sees, itself included
  float m[kBlocks][2], l[kBlocks][2];  // l: this lane's share
  float o[kBlocks][D / 8][4];

  __device__ __forceinline__ int row_of(int block, int half) const { return block * 16 + half * 8 + lane / 4; }

  __device__ __forceinline__ bool sees(int block, int half, int key) const {
    return static_cast<unsigned>(position[block][half] - key) < window;  // keys to come are huge when unsigned
  }

  // s = q . k for the tile's keys, not yet scaled. `rows`: this warp's queries.
  __device__ __forceinline__ void score(const H *rows, const H *keys, float (&s)[kBlocks][kKeys / 8][4]) const {
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      uint32_t q[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; b++) ldmatrix_x4(q[b], rows + Tile::at(b * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kKeys / 16; n++) {
        uint32_t key[4];
        ldmatrix_x4(key, keys + Tile::at(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          mma_half<H>(s[b][2 * n], q[b], key[0], key[1]);
          mma_half<H>(s[b][2 * n + 1], q[b], key[2], key[3]);
        }
      }
    }
  }

  // s = q . k * scale + slope * distance, in place. `slopes`: of this warp's rows.
  __device__ __forceinline__ void add_alibi(int first_key, float scale, const float *slopes, float (&s)[kBlocks][kKeys / 8][4]) const {
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float slope = slopes[row_of(b, half)];
        const int distance = first_key + lane % 4 * 2 - position[b][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float &score = s[b][n][half * 2 + i];
            score = fmaf(score, scale, slope * static_cast<float>(distance + n * 8 + i));
          }
        }
      }
    }
  }

  __device__ __forceinline__ void mask(int first_key, float (&s)[kBlocks][kKeys / 8][4]) const {
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!sees(b, i / 2, first_key + n * 8 + lane % 4 * 2 + i % 2)) s[b][n][i] = -INFINITY;
        }
      }
    }
  }

  // Scores to weights, in place; the running state follows the new greatest score.
  __device__ __forceinline__ void soften(float scale, float (&s)[kBlocks][kKeys / 8][4]) {
    float keep[kBlocks][2];
    bool changed = false;
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) top = fmaxf(top, fmaxf(s[b][n][half * 2], s[b][n][half * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
        top = fmaxf(m[b][half], top * scale);
        const float shift = shift_of(top), bias = kWeightExponent<H> - shift;
        keep[b][half] = exp2_approx(m[b][half] - shift);
        changed = changed || keep[b][half] != 1.0f;
        m[b][half] = top;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float &weight = s[b][n][half * 2 + i];
            weight = exp2_approx(fmaf(weight, scale, bias));
            total += weight;
          }
        }
        l[b][half] = l[b][half] * keep[b][half] + total;
      }
    }
    if (!__any_sync(kFullMask, changed)) return;  // usual once the greatest score is found
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) o[b][n][i] *= keep[b][i / 2];
      }
    }
  }

  // o += weights . v for 16 keys; `values` is their first row.
  __device__ __forceinline__ void weigh(const uint32_t (&weights)[kBlocks][4], const H *values) {
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      uint32_t value[4];
      ldmatrix_x4_trans(value, values + Tile::at(lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        mma_half<H>(o[b][2 * k], weights[b], value[0], value[1]);
        mma_half<H>(o[b][2 * k + 1], weights[b], value[2], value[3]);
      }
    }
  }

  // Whether the mma may take 16 rows of values: 0 * infinity and 0 * NaN would reach rows that do not see them.
  __device__ __forceinline__ bool all_finite(const H *values) const {
    bool found = false;
    for (int i = lane; i < 16 * Tile::kChunks; i += 32) {
      const uint4 v = load16(values + Tile::at(i / Tile::kChunks, i % Tile::kChunks));
      found = found || any_nonfinite<H>(v.x) || any_nonfinite<H>(v.y) || any_nonfinite<H>(v.z) || any_nonfinite<H>(v.w);
    }
    return !__any_sync(kFullMask, found);
  }

  // As weigh, key by key and only into rows that see the key. Rare: it is for memory that holds NaN or infinities.
  __device__ __forceinline__ void weigh_seen(const uint32_t (&weights)[kBlocks][4], const H *values, int first_key) {
    for (int j = 0; j < 16; j++) {
      const int owner = lane / 4 * 4 + j % 8 / 2;  // the lane of this quad that holds key j's weights
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t early = __shfl_sync(kFullMask, weights[b][half], owner);
          const uint32_t late = __shfl_sync(kFullMask, weights[b][half + 2], owner);
          const float2 pair = unpack_pair(j < 8 ? early : late, static_cast<const H *>(nullptr));
          const float weight = j % 2 ? pair.y : pair.x;
          if (!sees(b, half, first_key + j)) continue;
#pragma unroll
          for (int n = 0; n < D / 8; n++) {
            const H *value = values + Tile::at(j, n) + lane % 4 * 2;
            o[b][n][half * 2] += weight * to_f32(value[0]);
            o[b][n][half * 2 + 1] += weight * to_f32(value[1]);
          }
        }
      }
    }
  }
};
