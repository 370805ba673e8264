// attention_rows.cuh - attention in plain f32 arithmetic: any head_dim up to 256, any element type, any alignment.
//
// A block takes one query token and up to eight heads of a KV head; its warps take batches of 32 keys in turn. Lanes hold
// dims lane, lane + 32, ... It touches what the query sees and nothing else.
#pragma once

#include "attention_parts.cuh"

constexpr int kRowsWarps = 4;
constexpr int kRowsThreads = kRowsWarps * 32;

// This lane's elements of a stored row; zeros beyond its end.
template <class E, int kPerLane>
__device__ __forceinline__ void load_lane(const void *row, int lane, int n, float (&out)[kPerLane]) {
#pragma unroll
  for (int e = 0; e < kPerLane; e++) out[e] = lane + e * 32 < n ? to_f32(static_cast<const E *>(row)[lane + e * 32]) : 0.0f;
}
template <int kPerLane>
__device__ __forceinline__ void load_lane(const void *row, int dtype, int lane, int n, float (&out)[kPerLane]) {
  if (dtype == kCodeF32) {
    load_lane<float>(row, lane, n, out);
  } else if (dtype == kCodeF16) {
    load_lane<__half>(row, lane, n, out);
  } else {
    load_lane<bf16>(row, lane, n, out);
  }
}

template <int kPerLane, class Args>
__device__ __forceinline__ void attend_rows(const Args &a, int sequence, const HeadGroup &group, int64_t token, int position, KeyRange keys,
                                            const WarpParts<kRowsWarps> &parts) {
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const HeadCache cache = head_cache(a, sequence, group.kv_head, a.kv_dtype == kCodeF32 ? 4 : 2);
  const float scale = log2_scale(a);
  float q[kGroupHeads][kPerLane], o[kGroupHeads][kPerLane], m[kGroupHeads], l[kGroupHeads];
#pragma unroll
  for (int h = 0; h < kGroupHeads; h++) {
    m[h] = -INFINITY, l[h] = 0;
#pragma unroll
    for (int e = 0; e < kPerLane; e++) {
      const int d = lane + e * 32;
      q[h][e] = h < group.heads && d < a.Dh ? a.q[token * a.QD + (group.first + h) * a.Dh + d] : 0.0f;
      o[h][e] = 0;
    }
  }
  for (int begin = keys.begin + warp * 32; begin < keys.end; begin += kRowsThreads) {
    const int n = min(32, keys.end - begin);
    const int64_t located = lane < n ? cache.key_offset(begin + lane) : 0;
    float p[kGroupHeads];  // of key begin + lane
#pragma unroll
    for (int h = 0; h < kGroupHeads; h++) p[h] = -INFINITY;
    for (int j = 0; j < n; j++) {
      float k[kPerLane];
      load_lane(cache.head + __shfl_sync(kFullMask, located, j), a.kv_dtype, lane, a.Dh, k);
#pragma unroll
      for (int h = 0; h < kGroupHeads; h++) {
        if (h < group.heads) {
          float s = 0;
#pragma unroll
          for (int e = 0; e < kPerLane; e++) s += q[h][e] * k[e];
          s = warp_sum(s) * scale;
          if (lane == j) p[h] = s;
        }
      }
    }
    if (a.alibi_max_bias > 0) {
#pragma unroll
      for (int h = 0; h < kGroupHeads; h++) p[h] += alibi_slope(a, group.first + h) * static_cast<float>(begin + lane - position);
    }
#pragma unroll
    for (int h = 0; h < kGroupHeads; h++) {
      if (h < group.heads) {
        const float top = fmaxf(m[h], warp_max(p[h])), shift = shift_of(top), keep = exp2_approx(m[h] - shift);
        m[h] = top;
        p[h] = exp2_approx(p[h] - shift);
        l[h] = l[h] * keep + p[h];
#pragma unroll
        for (int e = 0; e < kPerLane; e++) o[h][e] *= keep;
      }
    }
    for (int j = 0; j < n; j++) {
      float v[kPerLane];
      load_lane(cache.head + cache.value_offset + __shfl_sync(kFullMask, located, j), a.kv_dtype, lane, a.Dh, v);
#pragma unroll
      for (int h = 0; h < kGroupHeads; h++) {
        if (h < group.heads) {
          const float weight = __shfl_sync(kFullMask, p[h], j);
#pragma unroll
          for (int e = 0; e < kPerLane; e++) o[h][e] += weight * v[e];
        }
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kGroupHeads; h++) {
    if (h < group.heads) {
      const float total = warp_sum(l[h]);
      const int mine = warp * kGroupHeads + h;
      if (lane == 0) parts.states[mine * 2] = m[h], parts.states[mine * 2 + 1] = total;
#pragma unroll
      for (int e = 0; e < kPerLane; e++) {
        if (lane + e * 32 < a.Dh) parts.sums[mine * a.Dh + lane + e * 32] = o[h][e];
      }
    }
  }
}

// One query against one span: the same grid and scratch as split_attention.
template <int kPerLane, class Args>
__device__ __forceinline__ void split_rows(const Args &a, const int32_t *offsets, void *scratch, unsigned *counters) {
  DYN_SHARED(unsigned char, shared);
  const int split = blockIdx.x, sequence = blockIdx.z, max_splits = gridDim.x;
  const int64_t token = only_query(offsets, sequence);
  if (token < 0) return;
  const int position = static_cast<int>(a.positions[token]);
  const KeyRange seen = {visible_begin(a, position), position + 1};
  const KeyRange span = span_of(seen, split, max_splits);
  if (span.begin >= span.end) return;
  const HeadGroup group(a, blockIdx.y);
  const WarpParts<kRowsWarps> parts(shared);
  attend_rows<kPerLane>(a, sequence, group, token, position, span, parts);
  __syncthreads();
  finish_span<kRowsWarps>(a, parts, group, sequence, token, seen, scratch, counters);
}
