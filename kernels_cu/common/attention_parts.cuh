// attention_parts.cuh - partial attention results: from a block's warps to one, to scratch memory, and merged.
#pragma once

#include "attention.cuh"

// What the warps of a block found for up to kGroupHeads heads, in shared memory.
template <int kWarps>
struct WarpParts {
  float *states;  // [kWarps][kGroupHeads][2]: m, l
  float *sums;    // [kWarps][kGroupHeads][head_dim]: o

  static __host__ __device__ constexpr int nbytes(int head_dim) { return kWarps * kGroupHeads * (2 + head_dim) * 4; }
  __device__ __forceinline__ explicit WarpParts(void *memory)
      : states(static_cast<float *>(memory)), sums(states + kWarps * kGroupHeads * 2) {}
};

// Scratch memory of the split kernels: how many splits there are, then m and l, then o, of every (query head, split).
struct Partials {
  int max_splits;
  float2 *states;  // [sequences * heads][max_splits]
  float *sums;     // [sequences * heads][max_splits][head_dim]

  template <class Args>
  __device__ __forceinline__ Partials(const Args &a, void *scratch, int max_splits_) : max_splits(max_splits_) {
    const int64_t num_states = static_cast<int64_t>(a.S) * (a.QD / a.Dh) * max_splits;
    states = static_cast<float2 *>(byte_offset(scratch, kHeaderNbytes));
    sums = reinterpret_cast<float *>(states + num_states);
  }
  static constexpr int kHeaderNbytes = 256;
};

// The heads one block of a decode grid works on: blockIdx.y counts the groups of all KV heads.
struct HeadGroup {
  int kv_head, first, heads;  // `first` counts query heads

  template <class Args>
  __device__ __forceinline__ HeadGroup(const Args &a, int index) {
    const int per_kv = heads_per_kv(a), groups = ceil_div(per_kv, kGroupHeads), begin = index % groups * kGroupHeads;
    kv_head = index / groups;
    first = kv_head * per_kv + begin;
    heads = min(kGroupHeads, per_kv - begin);
  }
};

// Folds the warps' results in their order and puts them where they belong: into `out` when the block saw all that the query
// sees, else into scratch, from row `scratch_row` on, a row per head. Every thread of the block calls, after a barrier.
template <int kWarps, class Args>
__device__ __forceinline__ void store_parts(const Args &a, const WarpParts<kWarps> &parts, const HeadGroup &group, int64_t token,
                                            const Partials &partials, int64_t scratch_row, int split, bool is_whole) {
  for (int i = threadIdx.x; i < group.heads * a.Dh; i += kWarps * 32) {
    const int h = i / a.Dh, d = i % a.Dh;
    float m = -INFINITY, l = 0, o = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float *state = parts.states + (w * kGroupHeads + h) * 2;
      fold(m, l, o, state[0], state[1], parts.sums[(w * kGroupHeads + h) * a.Dh + d]);
    }
    if (is_whole) {
      a.out[token * a.QD + (group.first + h) * a.Dh + d] = o / l;
    } else {
      const int64_t part = (scratch_row + h) * partials.max_splits + split;
      partials.sums[part * a.Dh + d] = o;
      if (d == 0) partials.states[part] = make_float2(m, l);
    }
  }
}

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * 32;

// out of one (head, sequence) = blockIdx.x, .y from its spans' results. Spans go to the warps in turn, and the warps' sums
// are added in order: one order for a given number of spans.
template <class Args>
__device__ __forceinline__ void merge_parts(const Args &a, void *scratch) {
  SHARED(float, weights, kMaxSplits);
  SHARED(float, totals, kMaxSplits);
  SHARED(float, sums, kMergeWarps * 256);
  const int head = blockIdx.x, sequence = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = only_query(a, sequence);
  if (token < 0) return;
  const Partials partials(a, scratch, *static_cast<const int *>(scratch));
  const int position = static_cast<int>(a.positions[token]);
  const int num = num_spans({visible_begin(a, position), position + 1}, partials.max_splits);
  if (num == 1) return;  // the one block has written `out`
  const int64_t row = (static_cast<int64_t>(sequence) * (a.QD / a.Dh) + head) * partials.max_splits;
  const float2 *states = partials.states + row;

  float top = -INFINITY;
  for (int i = lane; i < num; i += 32) top = fmaxf(top, states[i].x);  // every warp for itself
  top = shift_of(warp_max(top));
  for (int i = threadIdx.x; i < num; i += kMergeThreads) {
    const float weight = exp2_approx(states[i].x - top);
    weights[i] = weight;
    totals[i] = weight * states[i].y;
  }
  __syncthreads();
  float o[8] = {};  // dims lane, lane + 32, ...
  for (int i = warp; i < num; i += kMergeWarps) {
    const float weight = weights[i];
    const float *sum = partials.sums + (row + i) * a.Dh;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (lane + e * 32 < a.Dh) o[e] += weight * sum[lane + e * 32];
    }
  }
#pragma unroll
  for (int e = 0; e < 8; e++) sums[warp * 256 + lane + e * 32] = o[e];
  __syncthreads();
  for (int d = threadIdx.x; d < a.Dh; d += kMergeThreads) {
    float total = 0, out = 0;
    for (int i = 0; i < num; i++) total += totals[i];
#pragma unroll
    for (int w = 0; w < kMergeWarps; w++) out += sums[w * 256 + d];
    a.out[token * a.QD + head * a.Dh + d] = out / total;
  }
}
