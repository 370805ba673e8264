// flash_attention - prefill: packed chunks of queries over the paged cache. Grid.x is (bound on row tiles) * KV heads, KV
// head innermost. Sequences with a single query are left to the split kernels of paged_attention, launched beside: a query
// that is decoded in a mixed step gets the same bits, and parallelism, as in a step of its own.
#include "generated/flash_attention_args.h"
#include "common/attention_rows.cuh"
#include "common/attention_tile.cuh"

template <class H, int D, class Shape>
__device__ __forceinline__ void flash_attention(const FlashAttentionArgs &a) {
  using Tile = TileShape<D>;
  constexpr int kKeys = Shape::kKeys, kThreads = Shape::kThreads, kBlocks = Shape::kBlocks;
  DYN_SHARED(unsigned char, shared);
  SHARED(int64_t, located, 2 * kKeys);  // where the keys of this tile and the next are; -1: no row sees it
  SHARED(float, slopes, Shape::kRows);
  H *const queries = reinterpret_cast<H *>(shared);                // [kRows]
  H *const ring = queries + Shape::kRows * Tile::kStride;          // [kStages][keys, values][kKeys]
  const int tid = threadIdx.x, warp = warp_index(), lane = tid % 32, heads = heads_per_kv(a);
  const int kv_head = blockIdx.x % a.HK;
  const RowTile tile = find_tile(a.offsets, a.S, heads, Shape::kRows, blockIdx.x / a.HK);
  if (tile.sequence < 0) return;

  const int64_t first_token = a.offsets[tile.sequence];
  const int all_rows = (a.offsets[tile.sequence + 1] - a.offsets[tile.sequence]) * heads;
  const int num_rows = min(Shape::kRows, all_rows - tile.first);
  const int p0 = static_cast<int>(a.positions[first_token]);  // of the sequence's first query; the rest follow it
  const int first_position = p0 + tile.first / heads, last_position = p0 + (tile.first + num_rows - 1) / heads;
  const KeyRange seen = {visible_begin(a, first_position), last_position + 1};
  const HeadCache cache = head_cache(a, tile.sequence, kv_head, 2);

  // Thread i < kKeys finds key i of a tile: its page two tiles ahead, where it lies one tile ahead.
  static_assert(kKeys <= kThreads, "a thread each");
  auto is_wanted = [&](int position) { return tid < kKeys && position >= seen.begin && position < seen.end; };
  auto find_page = [&](int tile_begin) { return is_wanted(tile_begin + tid) ? cache.page_of(tile_begin + tid) : 0; };
  auto locate = [&](int tile_begin, int page) {
    const int position = tile_begin + tid;
    const int64_t offset = is_wanted(position) ? cache.key_offset(position, page) : -1;
    if (tid < kKeys) located[tile_begin / kKeys % 2 * kKeys + tid] = offset;
  };
  auto load = [&](int tile_begin) {
    H *const keys = ring + tile_begin / kKeys % 2 * 2 * Shape::kTile, *const values = keys + Shape::kTile;
#pragma unroll
    for (int i = 0; i < ceil_div(kKeys * Tile::kChunks, kThreads); i++) {
      const int index = i * kThreads + tid;
      if (index >= kKeys * Tile::kChunks) break;  // only where the threads do not divide the chunks
      const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const int64_t offset = located[tile_begin / kKeys % 2 * kKeys + row];
      const unsigned char *key = cache.head + (offset < 0 ? 0 : offset) + chunk * 16;
      cp_async16(keys + Tile::at(row, chunk), key, offset >= 0);
      cp_async16(values + Tile::at(row, chunk), key + cache.value_offset, offset >= 0);
    }
  };

  int begin = seen.begin / kKeys * kKeys;
  locate(begin, find_page(begin));
  int page = find_page(begin + kKeys);  // of the next tile
  for (int i = tid; i < Shape::kRows * Tile::kChunks; i += kThreads) {  // queries, rounded; zeros beyond the last
    const int r = i / Tile::kChunks, chunk = i % Tile::kChunks, row = tile.first + r;
    float q[8] = {};
    if (r < num_rows) {
      load8_aligned(a.q + (first_token + row / heads) * a.QD + (kv_head * heads + row % heads) * D + chunk * 8, q);
    }
    store16(queries + Tile::at(r, chunk),
            make_uint4(pack_pair<H>(q[0], q[1]), pack_pair<H>(q[2], q[3]), pack_pair<H>(q[4], q[5]), pack_pair<H>(q[6], q[7])));
  }
  const bool has_alibi = a.alibi_max_bias > 0;
  if (has_alibi) {
    for (int r = tid; r < Shape::kRows; r += kThreads) slopes[r] = alibi_slope(a, kv_head * heads + (tile.first + r) % heads);
  }
  __syncthreads();
  load(begin);
  cp_async_commit();

  FlashTile<H, D, Shape> state;
  state.lane = lane;
  state.window = a.window > 0 ? a.window : 1u << 31;
  const int warp_row = warp * 16 * kBlocks;
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {  // rows beyond the last see what the last sees, and are not stored
      state.position[b][half] = p0 + (tile.first + min(warp_row + state.row_of(b, half), num_rows - 1)) / heads;
      state.m[b][half] = -INFINITY, state.l[b][half] = 0;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) state.o[b][n][i] = 0;
    }
  }
  // The keys some row of this warp sees, and those all of its rows see.
  const int low_row = min(warp_row, num_rows - 1), high_row = min(warp_row + 16 * kBlocks, num_rows) - 1;
  const int low_position = p0 + (tile.first + low_row) / heads;
  const int high_position = p0 + (tile.first + max(high_row, low_row)) / heads;
  const KeyRange some = {visible_begin(a, low_position), high_position + 1};
  const KeyRange all = {visible_begin(a, high_position), low_position + 1};
  const float scale = log2_scale(a);

  for (; begin < seen.end; begin += kKeys) {
    locate(begin + kKeys, page);
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, the one before is read, the next one is located
    if (begin + kKeys < seen.end) load(begin + kKeys);
    cp_async_commit();
    page = find_page(begin + 2 * kKeys);
    if (warp_row >= num_rows || begin >= some.end || begin + kKeys <= some.begin) continue;

    const H *const keys = ring + begin / kKeys % 2 * 2 * Shape::kTile, *const values = keys + Shape::kTile;
    float s[kBlocks][kKeys / 8][4] = {};
    state.score(queries + warp_row * Tile::kStride, keys, s);
    if (has_alibi) state.add_alibi(begin, scale, slopes + warp_row, s);
    if (begin < all.begin || begin + kKeys > all.end) state.mask(begin, s);
    state.soften(has_alibi ? 1.0f : scale, s);
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      const int first_key = begin + k * 16;
      if (first_key >= some.end || first_key + 16 <= some.begin) continue;
      uint32_t weights[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          weights[b][i] = pack_pair<H>(s[b][2 * k + i / 2][i % 2 * 2], s[b][2 * k + i / 2][i % 2 * 2 + 1]);
        }
      }
      const H *const rows = values + k * 16 * Tile::kStride;
      const bool seen_by_all = first_key >= all.begin && first_key + 16 <= all.end;
      if (seen_by_all || state.all_finite(rows)) {
        state.weigh(weights, rows);
      } else {
        state.weigh_seen(weights, rows, first_key);
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = state.l[b][half];
      total += __shfl_xor_sync(kFullMask, total, 1);
      total += __shfl_xor_sync(kFullMask, total, 2);
      const int r = warp_row + state.row_of(b, half), row = tile.first + r;
      if (r >= num_rows) continue;
      float *out = a.out + (first_token + row / heads) * a.QD + (kv_head * heads + row % heads) * D + lane % 4 * 2;
      const float inverse = 1.0f / total;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const float2 pair = make_float2(state.o[b][n][half * 2] * inverse, state.o[b][n][half * 2 + 1] * inverse);
        *reinterpret_cast<float2 *>(out + n * 8) = pair;
      }
    }
  }
}

// Any head_dim, one query token and group of heads a block: grid (tokens, head groups).
template <int kPerLane>
__device__ __forceinline__ void flash_rows(const FlashAttentionArgs &a) {
  DYN_SHARED(unsigned char, shared);
  const int token = blockIdx.x;
  if (token >= a.offsets[a.S]) return;
  int sequence = 0, end = a.S;  // the last sequence that begins at or before the token
  while (end - sequence > 1) {
    const int middle = (sequence + end) / 2;
    if (a.offsets[middle] <= token) {
      sequence = middle;
    } else {
      end = middle;
    }
  }
  if (only_query(a.offsets, sequence) >= 0) return;
  const int position = static_cast<int>(a.positions[token]);
  const HeadGroup group(a, blockIdx.y);
  const WarpParts<kRowsWarps> parts(shared);
  attend_rows<kPerLane>(a, sequence, group, token, position, {visible_begin(a, position), position + 1}, parts);
  __syncthreads();
  store_parts<kRowsWarps>(a, parts, group, token, Partials(a, nullptr, 1), 0, 0, true);
}

#define FLASH(dtype, H, D, name, blocks, warps, keys)                                                      \
  extern "C" __global__ void __launch_bounds__(FlashShape<D, blocks, warps, keys>::kThreads)               \
      flash_attention__##dtype##_d##name(const __grid_constant__ FlashAttentionArgs a) {                   \
    flash_attention<H, D, FlashShape<D, blocks, warps, keys>>(a);                                          \
  }
#define ROWS(max_dim)                                                                                      \
  extern "C" __global__ void __launch_bounds__(kRowsThreads, 1)                                            \
      flash_attention__rows_d##max_dim(const __grid_constant__ FlashAttentionArgs a) {                     \
    flash_rows<max_dim / 32>(a);                                                                           \
  }
#define TENSOR_CORES(dtype, H)          \
  FLASH(dtype, H, 64, 64, 2, 4, 32)     \
  FLASH(dtype, H, 80, 80, 2, 4, 32)     \
  FLASH(dtype, H, 96, 96, 2, 4, 32)     \
  FLASH(dtype, H, 128, 128, 2, 4, 32)   \
  FLASH(dtype, H, 256, 256, 1, 8, 32)   \
  FLASH(dtype, H, 256, 256_m64, 1, 4, 16)

#if TENSOR_CORE_KERNELS
TENSOR_CORES(f16, __half)
TENSOR_CORES(bf16, bf16)
#endif
ROWS(128)
ROWS(256)
