// sample_choose.cuh - one block chooses the token of one row by exact top_k, top_p and min_p thresholds, then draws.
//
// It works on a source: `size()` entries, each with an id and z = (logit - best) / temperature. That is either the whole
// row, or the few candidates that a first pass over a large vocabulary left.
#pragma once

#include "sample_row.cuh"

constexpr int kChooseThreads = 1024;
constexpr int kDepthBins = 2048;  // digits of a depth: 11, 10 and 10 bits
constexpr uint32_t kWholeRow = 0x7f800000u;

struct ChooseScratch {
  u64 bins[kDepthBins];
  SelectScratch<kChooseThreads> select;
};

struct WholeRow {
  static constexpr int kUnroll = 2;  // a long way to go: two loads of a thread in flight
  const Row &row;
  float best;
  __device__ __forceinline__ int size() const { return row.V; }
  __device__ __forceinline__ int id(int i) const { return i; }
  __device__ __forceinline__ float z(int i) const { return row.scaled(row.value(i), best); }
};

struct Candidate {
  float z;
  int id;
};

struct CandidateList {
  static constexpr int kUnroll = 1;  // a few entries per thread
  const Candidate *entries;
  int count;
  __device__ __forceinline__ int size() const { return count; }
  __device__ __forceinline__ int id(int i) const { return entries[i].id; }
  __device__ __forceinline__ float z(int i) const { return entries[i].z; }
};

// The least depth d such that entries with depth <= d number, or weigh, at least `wanted`; no less than every entry's where
// there is not so much. Three passes, each fixing one digit from the top.
template <bool kByMass, class Source>
__device__ __forceinline__ uint32_t select_depth(const Source &source, u64 wanted, ChooseScratch &scratch) {
  uint32_t prefix = 0;
#pragma unroll 1
  for (int level = 0; level < 3; level++) {
    const int shift = 20 - 10 * level, width = level == 0 ? 11 : 10;
    for (int i = threadIdx.x; i < kDepthBins; i += kChooseThreads) scratch.bins[i] = 0;
    __syncthreads();
#pragma unroll Source::kUnroll
    for (int i = threadIdx.x; i < source.size(); i += kChooseThreads) {
      const float z = source.z(i);
      const uint32_t d = depth(z);
      if (d >> (shift + width) != prefix) continue;
      const u64 amount = kByMass ? mass(z) : 1;
      if (amount) atomicAdd(&scratch.bins[d >> shift & ((1u << width) - 1)], amount);
    }
    __syncthreads();
    const Bin bin = find_bin<kChooseThreads, kDepthBins>(scratch.bins, wanted, scratch.select);
    const uint32_t last = (1u << width) - 1;
    prefix = prefix << width | (static_cast<uint32_t>(bin.index) < last ? bin.index : last);
    wanted -= bin.before;
  }
  return prefix;
}

template <class Source>
__device__ __forceinline__ u64 mass_within(const Source &source, uint32_t limit, ChooseScratch &scratch) {
  u64 sum = 0;
#pragma unroll Source::kUnroll
  for (int i = threadIdx.x; i < source.size(); i += kChooseThreads) {
    const float z = source.z(i);
    if (depth(z) <= limit) sum += mass(z);
  }
  return block_sum_integer<kChooseThreads>(sum, scratch.select.warp_totals);
}

// The mass that top_p asks for, of `total`.
__device__ __forceinline__ u64 wanted_mass(const Row &row, u64 total) {
  const u64 wanted = static_cast<u64>(ceil(static_cast<double>(row.params.top_p) * static_cast<double>(total)));
  return wanted ? wanted : 1;
}

// Gumbel-max over the entries no deeper than `limit` that min_p keeps: packed score and id, 0 for nobody.
template <class Source>
__device__ __forceinline__ u64 draw(const Row &row, const Source &source, uint32_t limit, ChooseScratch &scratch) {
  const float lowest = row.lowest();
  u64 best = 0;
#pragma unroll Source::kUnroll
  for (int i = threadIdx.x; i < source.size(); i += kChooseThreads) {
    const float z = source.z(i);
    if (!(z >= lowest) || depth(z) > limit) continue;
    const int id = source.id(i);
    const PhiloxWords words = row.words(id / 4);
    const uint32_t word = id % 4 == 0 ? words.w[0] : id % 4 == 1 ? words.w[1] : id % 4 == 2 ? words.w[2] : words.w[3];
    const u64 packed = pack_best(z + gumbel(word), id);
    if (packed > best) best = packed;
  }
  return block_best<kChooseThreads>(best, scratch.select.warp_totals);
}

// The token of a row that has numbers and is not greedy. `total` is the mass of the whole row where it is known already
// (a list of candidates does not tell), else 0.
template <class Source>
__device__ __forceinline__ int choose(const Row &row, const Source &source, u64 total, ChooseScratch &scratch) {
  uint32_t limit = kWholeRow;
  if (row.has_top_k()) limit = select_depth<false>(source, row.params.top_k, scratch);
  if (row.has_top_p()) {
    if (row.has_top_k() || total == 0) total = mass_within(source, limit, scratch);
    limit = select_depth<true>(source, wanted_mass(row, total), scratch);  // never beyond top_k's: that has all of total
  }
  return best_id(draw(row, source, limit, scratch));
}
