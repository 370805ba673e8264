// attention.cuh - what the attention kernels share: the paged cache of one head, who sees what, softmax in parts.
//
// Scores are kept in base 2: weight = exp2(q.k * scale * log2(e) - top). A partial result is (m, l, o): the greatest score
// seen, the sum of the weights relative to it, the weighted sum of the values; `fold` puts two of them together.
#pragma once

#include "dtype.cuh"
#include "vec.cuh"

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMaxSplits = 128;   // spans a context is cut into at most; gllm_driver/launch/paged_attention.py knows it too
constexpr int kGroupHeads = 8;    // query heads a decode block takes: they share every key and value it reads

// A scale of 0 becomes the least positive number: the score of a masked key is -inf, and -inf * 0 is NaN.
template <class Args>
__device__ __forceinline__ float log2_scale(const Args &a) {
  return fmaxf(a.scale * kLog2E, 1.17549435e-38f);
}

// The slope of a query head's bias, for scores in base 2; 0 where there is none. Attention with linear biases (Press et al.
// 2022): `alibi_slopes` in gllm_driver/ops/_attention.py. The bias is taken from the distance of query and key, not from
// the key's position, so that it is exact where it matters.
template <class Args>
__device__ __forceinline__ float alibi_slope(const Args &a, int head) {
  if (a.alibi_max_bias == 0) return 0;
  const int n = 1 << (31 - __clz(a.QD / a.Dh)), steps = head < n ? 2 * (head + 1) : 2 * (head - n) + 1;
  return kLog2E * exp2_approx(-a.alibi_max_bias * static_cast<float>(steps) / static_cast<float>(2 * n));
}

// The first position that a query at `position` sees. Positions fit 32 bits (2^31 cached tokens of one head of dim 64 are
// 512 GB); addresses do not, and are 64-bit.
template <class Args>
__device__ __forceinline__ int visible_begin(const Args &a, int position) {
  return a.window > 0 ? max(0, position - a.window + 1) : 0;
}

struct KeyRange {
  int begin, end;
};

// Keys a block takes at least: 64 cost it about as much time as merging six spans more does (measured on an H200). One span
// needs no merge. gllm_driver/launch/_attention.py knows these numbers too.
__device__ __forceinline__ int least_span(int num_keys) {
  return num_keys <= 128 ? 128 : num_keys <= 512 ? 64 : num_keys <= 2048 ? 128 : 256;
}

// How keys begin .. end-1 are cut into at most max_splits spans. It depends on nothing but what the query sees, so a
// result does not change with the batch, the table's width or the chunk that the query came in.
__device__ __forceinline__ int span_size(int num_keys, int max_splits) {
  return max(least_span(num_keys), ceil_div(ceil_div(num_keys, max_splits), 64) * 64);
}
__device__ __forceinline__ KeyRange span_of(KeyRange seen, int split, int max_splits) {
  const int span = span_size(seen.end - seen.begin, max_splits), begin = seen.begin + split * span;
  return {begin, min(begin + span, seen.end)};
}
__device__ __forceinline__ int num_spans(KeyRange seen, int max_splits) {
  return ceil_div(seen.end - seen.begin, span_size(seen.end - seen.begin, max_splits));
}

// The cached keys and values of one KV head of one sequence: kv [NP, L, 2, HK, P, Dh]. Offsets count bytes.
struct HeadCache {
  const unsigned char *head;  // this layer's and head's keys in page 0
  const int32_t *pages;       // this sequence's row of the page table
  int64_t page_stride;
  int64_t value_offset;  // from a key to its value
  int page_size, row_nbytes;

  // Where the key at a position lies, from `head` on, in two steps: the read of the page table, and what to do with it.
  __device__ __forceinline__ int page_of(int position) const { return pages[static_cast<unsigned>(position) / page_size]; }
  __device__ __forceinline__ int64_t key_offset(int position, int page) const {
    return page * page_stride + static_cast<int64_t>(static_cast<unsigned>(position) % page_size) * row_nbytes;
  }
  __device__ __forceinline__ int64_t key_offset(int position) const { return key_offset(position, page_of(position)); }
};

template <class Args>
__device__ __forceinline__ HeadCache head_cache(const Args &a, int sequence, int kv_head, int element_nbytes) {
  const int row_nbytes = a.Dh * element_nbytes;
  const int64_t head_nbytes = static_cast<int64_t>(a.P) * row_nbytes, part_nbytes = a.HK * head_nbytes;
  return {static_cast<const unsigned char *>(a.kv) + a.layer * 2 * part_nbytes + kv_head * head_nbytes,
          a.page_table + static_cast<int64_t>(sequence) * a.MP,
          a.L * 2 * part_nbytes,
          part_nbytes,
          a.P,
          row_nbytes};
}

template <class Args>
__device__ __forceinline__ int heads_per_kv(const Args &a) {
  return a.QD / (a.HK * a.Dh);
}

// What exponents are taken relative to. Nothing seen yet is -inf, read as 0: its weights are then exp2(-inf) and not NaN.
__device__ __forceinline__ float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

// (m, l, o) += (new_m, new_l, new_o). A part whose scores are all NaN has m = -inf and l = NaN, which survives the weight 0.
__device__ __forceinline__ void fold(float &m, float &l, float &o, float new_m, float new_l, float new_o) {
  const float top = fmaxf(m, new_m), shift = shift_of(top), keep = exp2_approx(m - shift), add = exp2_approx(new_m - shift);
  m = top;
  l = l * keep + new_l * add;
  o = o * keep + new_o * add;
}

// ---- 16-bit tiles in shared memory for ldmatrix: rows of D elements and 16 bytes of padding, which puts equal chunks of
// eight rows in different banks (D / 8 + 1 is odd) and leaves every offset within a tile a constant of the instruction.
template <int D>
struct TileShape {
  static_assert(D % 16 == 0, "mma takes 16 dims at a time");
  static constexpr int kChunks = D / 8;  // of 16 bytes
  static constexpr int kStride = D + 8;
  static __device__ __forceinline__ int at(int row, int chunk) { return row * kStride + chunk * 8; }
};

template <class H>
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_half<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16_bf16(d, a, {b0, b1});
}
template <>
__device__ __forceinline__ void mma_half<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16_f16(d, a, {b0, b1});
}

// Weights enter the second product in 16 bits. f16 has no small numbers to spare, so there they are 2^15 times as large
// (at most 32768): the factor cancels, as l has it too.
template <class H>
constexpr float kWeightExponent = 0.0f;
template <>
constexpr float kWeightExponent<__half> = 15.0f;
