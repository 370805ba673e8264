// attention_parts.cuh - partial attention results: from a block's warps to one, to scratch memory, and merged.
#pragma once

#include "attention.cuh"

// The token of a sequence that has one, else -1; null offsets say that each has one.
__device__ __forceinline__ int64_t only_query(const int32_t *offsets, int sequence) {
  if (offsets == nullptr) return sequence;
  const int begin = offsets[sequence];
  return offsets[sequence + 1] - begin == 1 ? begin : -1;
}

// What the warps of a block found for up to kGroupHeads heads, in shared memory.
template <int kWarps>
struct WarpParts {
  float *states;  // [kWarps][kGroupHeads][2]: m, l
  float *sums;    // [kWarps][kGroupHeads][head_dim]: o

  static __host__ __device__ constexpr int nbytes(int head_dim) { return kWarps * kGroupHeads * (2 + head_dim) * 4; }
  __device__ __forceinline__ explicit WarpParts(void *memory)
      : states(static_cast<float *>(memory)), sums(states + kWarps * kGroupHeads * 2) {}
};

// Scratch memory of the split kernels: m and l, then o, of every (query head, split).
struct Partials {
  int max_splits;
  float2 *states;  // [sequences * heads][max_splits], and one more where that is odd: o starts at a multiple of 16 bytes
  float *sums;     // [sequences * heads][max_splits][head_dim]

  template <class Args>
  __device__ __forceinline__ Partials(const Args &a, void *scratch, int max_splits_)
      : max_splits(max_splits_), states(static_cast<float2 *>(scratch)) {
    const int64_t num_states = static_cast<int64_t>(a.S) * (a.QD / a.Dh) * max_splits;
    sums = reinterpret_cast<float *>(states + (num_states + 1) / 2 * 2);
  }
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
#pragma unroll 1  // the code of a loop that runs a few times is not worth its size
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

// What the last block of a group needs in shared memory to merge its spans: their weights, and the sums of these.
constexpr int kMergeNbytes = kGroupHeads * (kMaxSplits + 1) * 4;

// Whether this block is the last of `num` to come here with `counter`, which is 0 before the first and after the last. What
// the others had written before is then visible to it. Every thread of the block calls.
__device__ __forceinline__ bool is_last_block(unsigned *counter, int num) {
  SHARED(unsigned, before, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before[0] = atomicInc(counter, static_cast<unsigned>(num - 1));
  __syncthreads();
  const bool is_last = before[0] == static_cast<unsigned>(num - 1);
  if (is_last) __threadfence();
  return is_last;
}

// out of one sequence's group of heads from `num` spans' results, from scratch row `row` on. One order for a given number of
// spans, whichever block comes last. `shared` has kMergeNbytes.
template <int kThreads, class Args>
__device__ __forceinline__ void merge_parts(const Args &a, const Partials &partials, const HeadGroup &group, int64_t token, int64_t row,
                                            int num, void *shared) {
  constexpr int kAtOnce = 16;  // loads of a thread
  auto *weights = static_cast<float *>(shared), *totals = weights + kGroupHeads * kMaxSplits;
  const int warp = warp_index(), lane = threadIdx.x % 32;
#pragma unroll 1
  for (int h = warp; h < group.heads; h += kThreads / 32) {
    const float2 *states = partials.states + (row + h) * partials.max_splits;
    float top = -INFINITY, total = 0;
#pragma unroll 1
    for (int i = lane; i < num; i += 32) top = fmaxf(top, states[i].x);
    top = shift_of(warp_max(top));
#pragma unroll 1
    for (int i = lane; i < num; i += 32) {
      const float2 state = states[i];
      const float weight = exp2_approx(state.x - top);
      weights[h * kMaxSplits + i] = weight;
      total = fmaf(weight, state.y, total);
    }
    total = warp_sum(total);
    if (lane == 0) totals[h] = total;
  }
  __syncthreads();
  const bool by_four = a.Dh % 4 == 0 && is_aligned(a.out, 16);
  const int width = by_four ? 4 : 1, pieces = a.Dh / width;
#pragma unroll 1
  for (int piece = threadIdx.x; piece < group.heads * pieces; piece += kThreads) {
    const int h = piece / pieces, d = piece % pieces * width;
    const float *sums = partials.sums + (row + h) * partials.max_splits * a.Dh + d, *weight = weights + h * kMaxSplits;
    float *out = a.out + token * a.QD + (group.first + h) * a.Dh + d;
    const float inverse = 1.0f / totals[h];
    if (by_four) {
      float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (int begin = 0; begin < num; begin += kAtOnce) {
        float4 sum[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) sum[i] = load_f32x4(sums + min(begin + i, num - 1) * a.Dh);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          if (begin + i >= num) break;
          const float w = weight[begin + i];
          o = make_float4(fmaf(w, sum[i].x, o.x), fmaf(w, sum[i].y, o.y), fmaf(w, sum[i].z, o.z), fmaf(w, sum[i].w, o.w));
        }
      }
      store_f32x4(out, make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse));
    } else {
      float o = 0;
#pragma unroll 1
      for (int i = 0; i < num; i++) o = fmaf(weight[i], sums[i * a.Dh], o);
      *out = o * inverse;
    }
  }
}

// The end of a block of the split kernels, which saw `span` of the keys `seen`: its warps' results together; and, where it is
// the last of its group, those of all spans.
template <int kWarps, class Args>
__device__ __forceinline__ void finish_span(const Args &a, const WarpParts<kWarps> &parts, const HeadGroup &group, int sequence,
                                            int64_t token, KeyRange seen, void *scratch, unsigned *counters) {
  const int max_splits = gridDim.x, num = num_spans(seen, max_splits);
  const int64_t row = static_cast<int64_t>(sequence) * (a.QD / a.Dh) + group.first;
  const Partials partials(a, scratch, max_splits);
  store_parts<kWarps>(a, parts, group, token, partials, row, blockIdx.x, num == 1);
  if (num == 1) return;
  if (!is_last_block(counters + static_cast<int64_t>(sequence) * gridDim.y + blockIdx.y, num)) return;
  merge_parts<kWarps * 32>(a, partials, group, token, row, num, parts.states);
}
