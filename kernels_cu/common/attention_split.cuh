// attention_split.cuh - one query token against one span of its context, up to eight heads of a KV head at a time.
//
// Split-KV as in Flash-Decoding (Dao et al. 2023). Keys and values stream through tensor cores; the query stays exact: its
// 16-bit rounding fills rows 0-7 of the m16n8k16 tile and what rounding left over rows 8-15, which decode would leave empty.
// The softmax weights come in two parts likewise, so only the cache itself is in 16 bits.
#pragma once

#include "attention_parts.cuh"

template <int D>
struct SplitShape {
  static constexpr int kWarps = D > 128 ? 2 : 4;
  static constexpr int kKeys = 16;  // of a warp's tile
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTile = kKeys * TileShape<D>::kStride;                 // elements
  static constexpr int kRingNbytes = kWarps * kStages * 2 * kTile * 2;        // each warp's keys and values
  static_assert(WarpParts<kWarps>::nbytes(D) <= kRingNbytes && kMergeNbytes <= kRingNbytes, "the results take the ring's memory");
};

// f32 values enter the tensor cores in two 16-bit parts, rounded and rest. f16 rests are 2^11 times as large, as they would
// be below its least number where the value itself is small.
template <class H>
constexpr float kRestScale = 1.0f;
template <>
constexpr float kRestScale<__half> = 2048.0f;

template <class H>
__device__ __forceinline__ void to_parts(float x, float y, uint32_t &rounded, uint32_t &rest) {
  const float rx = to_f32(from_f32<H>(x)), ry = to_f32(from_f32<H>(y));
  rounded = pack_pair<H>(rx, ry);
  rest = pack_pair<H>((x - rx) * kRestScale<H>, (y - ry) * kRestScale<H>);
}

// A result whose parts were computed apart. Where the first is infinite or NaN the second is noise.
template <class H>
__device__ __forceinline__ float join(float rounded, float rest) {
  return fabsf(rounded) < INFINITY ? rounded + rest * (1.0f / kRestScale<H>) : rounded;
}

// A warp's ring of key and value tiles, filled by cp.async.
template <class H, int D>
struct WarpRing {
  using Shape = SplitShape<D>;
  using Tile = TileShape<D>;
  H *memory;
  HeadCache cache;
  int lane, end;

  __device__ __forceinline__ H *keys(int stage) const { return memory + stage * 2 * Shape::kTile; }
  __device__ __forceinline__ H *values(int stage) const { return keys(stage) + Shape::kTile; }

  // Lane's share of the page table for the tile at `begin`: where key lane % 16 lies, -1 beyond the span.
  __device__ __forceinline__ int64_t locate(int begin) const {
    const int position = begin + lane % Shape::kKeys;
    return position < end ? cache.key_offset(position) : -1;
  }

  __device__ __forceinline__ void load(int stage, int64_t located) const {
    static_assert(Shape::kKeys * Tile::kChunks % 32 == 0, "every lane copies as often");
#pragma unroll
    for (int i = 0; i < Shape::kKeys * Tile::kChunks / 32; i++) {
      const int index = i * 32 + lane, row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const int64_t offset = __shfl_sync(kFullMask, located, row);
      const unsigned char *key = cache.head + (offset < 0 ? 0 : offset) + chunk * 16;
      cp_async16(keys(stage) + Tile::at(row, chunk), key, offset >= 0);
      cp_async16(values(stage) + Tile::at(row, chunk), key + cache.value_offset, offset >= 0);
    }
  }
};

template <class H, int D, class Args>
__device__ __forceinline__ void split_attention(const Args &a, const int32_t *offsets, void *scratch, unsigned *counters) {
  using Shape = SplitShape<D>;
  using Tile = TileShape<D>;
  constexpr int kSteps = D / 16, kStride = Shape::kWarps * Shape::kKeys;
  DYN_SHARED(unsigned char, shared);
  const int split = blockIdx.x, sequence = blockIdx.z, max_splits = gridDim.x;
  const int warp = warp_index(), lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const int64_t token = only_query(offsets, sequence);
  if (token < 0) return;
  const int position = static_cast<int>(a.positions[token]);
  const KeyRange seen = {visible_begin(a, position), position + 1};
  const KeyRange span = span_of(seen, split, max_splits);
  if (span.begin >= span.end) return;

  const HeadGroup group(a, blockIdx.y);
  const WarpRing<H, D> ring = {reinterpret_cast<H *>(shared) + warp * Shape::kStages * 2 * Shape::kTile,
                               head_cache(a, sequence, group.kv_head, 2), lane, span.end};
  int begin = span.begin + warp * Shape::kKeys;
  ring.load(0, ring.locate(begin));
  cp_async_commit();
  int64_t next = ring.locate(begin + kStride);

  uint32_t q[kSteps][4];  // rows 0-7: the heads' queries rounded; rows 8-15: the rest
  const float *query = a.q + token * a.QD + (group.first + row) * D + column;
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 pair = row < group.heads ? *reinterpret_cast<const float2 *>(query + k * 16 + half * 8) : make_float2(0, 0);
      to_parts<H>(pair.x, pair.y, q[k][half * 2], q[k][half * 2 + 1]);
    }
  }

  const float scale = log2_scale(a), slope = alibi_slope(a, group.first + row);
  float m = -INFINITY, l = 0;   // of head `row`; l is this lane's share
  float o[D / 8][4] = {};
  for (int stage = 0; begin < span.end; begin += kStride, stage ^= 1) {
    ring.load(stage ^ 1, next);  // zeros beyond the span
    cp_async_commit();
    next = ring.locate(begin + 2 * kStride);
    cp_async_wait<1>();
    __syncwarp();

    float s[2][4] = {};  // 16 keys
    const H *keys = ring.keys(stage), *values = ring.values(stage);
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + Tile::at(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      mma_half<H>(s[0], q[k], b[0], b[1]);
      mma_half<H>(s[1], q[k], b[2], b[3]);
    }
    float p[4], top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int key = begin + i / 2 * 8 + column + i % 2;
      const float score = join<H>(s[i / 2][i % 2], s[i / 2][i % 2 + 2]);
      p[i] = key < span.end ? fmaf(score, scale, slope * static_cast<float>(key - position)) : -INFINITY;
      top = fmaxf(top, p[i]);
    }
    top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
    top = fmaxf(m, fmaxf(top, __shfl_xor_sync(kFullMask, top, 2)));
    const float shift = shift_of(top), keep = exp2_approx(m - shift);
    m = top;
    l *= keep;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      p[i] = exp2_approx(p[i] - shift + kWeightExponent<H>);
      l += p[i];
    }
    if (__any_sync(kFullMask, keep != 1.0f)) {
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] *= keep;
      }
    }
    uint32_t weights[4];
    to_parts<H>(p[0], p[1], weights[0], weights[1]);
    to_parts<H>(p[2], p[3], weights[2], weights[3]);
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + Tile::at(lane % 16, 2 * k + lane / 16));
      mma_half<H>(o[2 * k], weights, b[0], b[1]);
      mma_half<H>(o[2 * k + 1], weights, b[2], b[3]);
    }
    __syncwarp();  // the stage is read; the next round overwrites it
  }
  cp_async_wait<0>();
  l += __shfl_xor_sync(kFullMask, l, 1);
  l += __shfl_xor_sync(kFullMask, l, 2);
  __syncthreads();

  const WarpParts<Shape::kWarps> parts(shared);
  const int mine = warp * kGroupHeads + row;
  if (lane % 4 == 0) parts.states[mine * 2] = m, parts.states[mine * 2 + 1] = l;
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    parts.sums[mine * D + n * 8 + column] = join<H>(o[n][0], o[n][2]);
    parts.sums[mine * D + n * 8 + column + 1] = join<H>(o[n][1], o[n][3]);
  }
  __syncthreads();
  finish_span<Shape::kWarps>(a, parts, group, sequence, token, seen, scratch, counters);
}
