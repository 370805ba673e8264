// sample - the next token of each sequence, by the steps gllm_driver/ops/sample.py lists, without sorting the vocabulary.
//
// Small vocabularies: one block per row does it all (sample__row). Large ones: four kernels, as a row is more than one SM
// can read in little time. `scan` finds the largest logit; `histogram` bins every token by its distance from it, and
// draws at once in rows without top_k and top_p; `collect` lists the tokens that may be kept, in no order; `choose` fixes
// the exact thresholds among these few with one block per row and commits. Rows whose candidates outnumber the list
// (near-uniform distributions) are chosen from the whole row by that one block: slower, and as exact.
//
// Nothing depends on the order in which blocks or atomics come: sums are integers, and the best of packed (value, id)
// pairs is the same whichever is seen first.
#include "common/reduce.cuh"
#include "common/sample_choose.cuh"

constexpr int kScanThreads = 256;
constexpr int kTile = kScanThreads * 16;  // tokens a block takes at a time: four groups of four per thread
constexpr int kMaxBlocks = 256;           // per row; blocks of longer rows take several tiles
constexpr int kMaxCandidates = 4096;
constexpr int kBins = 2048;               // of distance below the best
// Beyond this distance a token weighs nothing (less than 2^-40 of the best) and cannot win: it goes in no bin, and a top_k
// that reaches so far down changes nothing.
constexpr float kBinReach = 27.75f;

// What the four kernels hand on, per row.
struct RowScratch {
  u64 best[kMaxBlocks];   // of each block: largest value and its lowest id
  u64 drawn[kMaxBlocks];  // of each block: the draw's winner, in rows without top_k and top_p
  u64 masses[kBins];
  uint32_t counts[kBins];
  uint32_t num_candidates;  // how many there are, even if too many to list
  uint32_t num_listed;
  uint32_t num_blocks;  // that found best and drawn
  uint32_t reserved;
  Candidate candidates[kMaxCandidates];
};
static_assert(sizeof(RowScratch) == 61456, "gllm_driver/launch/sample.py says ROW_SCRATCH_NBYTES");

__device__ __forceinline__ RowScratch &row_scratch(void *scratch, int64_t s) { return static_cast<RowScratch *>(scratch)[s]; }

// Bins follow z and so the logits: a token is never in an earlier bin than a better one. kBins: none of them.
__device__ __forceinline__ int bin_of(float z) {
  const float bin = -z * (kBins / kBinReach);
  return bin < kBins ? static_cast<int>(bin) : kBins;
}

// Calls visit(first id, values of it and the next three) for the groups of this thread in the tiles of this block.
template <class Visit>
__device__ __forceinline__ void for_each_group(const Row &row, Visit visit) {
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile; tile < row.V; tile += static_cast<int64_t>(gridDim.x) * kTile) {
#pragma unroll 2
    for (int j = 0; j < kTile / kScanThreads / 4; j++) {
      const int64_t i = tile + (j * kScanThreads + threadIdx.x) * 4;
      if (i >= row.V) continue;
      float v[4];
      row.values4(static_cast<int>(i), v);
      visit(static_cast<int>(i), v);
    }
  }
}

// The -inf beyond the row's end never wins: it is no better than any token, and has a higher id.
__device__ __forceinline__ u64 best_of_values(const Row &row) {
  u64 best = 0;
  for_each_group(row, [&](int id, const float(&v)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u64 packed = pack_best(v[j], id + j);
      if (packed > best) best = packed;
    }
  });
  return best;
}

// The best of what every block of the row found.
template <int kThreads>
__device__ __forceinline__ u64 best_of_blocks(const u64 *bests, int num_blocks, u64 *warp_bests) {
  u64 best = 0;
  for (int b = threadIdx.x; b < num_blocks; b += kThreads) best = bests[b] > best ? bests[b] : best;
  return block_best<kThreads>(best, warp_bests);
}

extern "C" __global__ void __launch_bounds__(kScanThreads) sample__scan(const __grid_constant__ SampleArgs a, void *scratch) {
  SHARED(u64, warp_bests, kScanThreads / 32);
  overlap_launches();
  const Row row = sample_row(a, blockIdx.y);
  RowScratch &mine = row_scratch(scratch, blockIdx.y);
  for (int i = blockIdx.x * kScanThreads + threadIdx.x; i < kBins; i += gridDim.x * kScanThreads) {
    mine.masses[i] = 0;
    mine.counts[i] = 0;
  }
  const u64 best = block_best<kScanThreads>(best_of_values(row), warp_bests);
  if (threadIdx.x == 0) {
    mine.best[blockIdx.x] = best;
    if (blockIdx.x == 0) {
      mine.num_blocks = gridDim.x;
      mine.num_listed = 0;
    }
  }
}

// Adds this block's tokens to the row's histogram of numbers and masses.
__device__ __forceinline__ void add_to_histogram(const Row &row, float best, RowScratch &mine, u64 *masses, uint32_t *counts) {
  for (int i = threadIdx.x; i < kBins; i += kScanThreads) masses[i] = counts[i] = 0;
  __syncthreads();
  for_each_group(row, [&](int, const float(&v)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float z = row.scaled(v[j], best);
      const int bin = bin_of(z);
      if (bin == kBins) continue;
      atomicAdd(&masses[bin], mass(z));
      atomicAdd(&counts[bin], 1u);
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kScanThreads) {
    if (!counts[i]) continue;
    atomicAdd(&mine.masses[i], masses[i]);
    atomicAdd(&mine.counts[i], counts[i]);
  }
}

// Gumbel-max over this block's tokens, four to one call of the generator.
__device__ __forceinline__ u64 draw_of_values(const Row &row, float best) {
  const float lowest = row.lowest();
  u64 winner = 0;
  for_each_group(row, [&](int id, const float(&v)[4]) {
    float z[4];
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      z[j] = row.scaled(v[j], best);
      any |= z[j] >= lowest;
    }
    if (!any) return;
    const PhiloxWords words = row.words(id / 4);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (!(z[j] >= lowest)) continue;
      const u64 packed = pack_best(z[j] + gumbel(words.w[j]), id + j);
      if (packed > winner) winner = packed;
    }
  });
  return winner;
}

extern "C" __global__ void __launch_bounds__(kScanThreads) sample__histogram(const __grid_constant__ SampleArgs a, void *scratch) {
  SHARED(u64, masses, kBins);
  SHARED(uint32_t, counts, kBins);
  SHARED(u64, warp_bests, kScanThreads / 32);
  overlap_launches();
  const Row row = sample_row(a, blockIdx.y);
  RowScratch &mine = row_scratch(scratch, blockIdx.y);
  const float best = best_value(best_of_blocks<kScanThreads>(mine.best, gridDim.x, warp_bests));
  if (best == -INFINITY || row.is_greedy(best)) return;
  if (row.is_filtered()) {
    add_to_histogram(row, best, mine, masses, counts);
  } else {
    const u64 winner = block_best<kScanThreads>(draw_of_values(row, best), warp_bests);
    if (threadIdx.x == 0) mine.drawn[blockIdx.x] = winner;
  }
}

// The last bin that may hold kept tokens.
__device__ __forceinline__ int bound(const Row &row, const RowScratch &mine, u64 *bins, SelectScratch<kScanThreads> &select) {
  u64 wanted = row.params.top_k;
  u64 total = 0;
  for (int i = threadIdx.x; i < kBins; i += kScanThreads) {
    bins[i] = row.has_top_k() ? mine.counts[i] : mine.masses[i];
    total += bins[i];
  }
  if (!row.has_top_k()) {
    total = block_sum_integer<kScanThreads>(total, select.warp_totals);
    wanted = wanted_mass(row, total);
  }
  __syncthreads();
  return find_bin<kScanThreads, kBins>(bins, wanted, select).index;
}

// Tokens in the bins up to `last`.
__device__ __forceinline__ uint32_t num_within(const RowScratch &mine, int last, SelectScratch<kScanThreads> &select) {
  u64 sum = 0;
  for (int i = threadIdx.x; i <= last; i += kScanThreads) sum += mine.counts[i];
  return static_cast<uint32_t>(block_sum_integer<kScanThreads>(sum, select.warp_totals));
}

extern "C" __global__ void __launch_bounds__(kScanThreads) sample__collect(const __grid_constant__ SampleArgs a, void *scratch) {
  SHARED(u64, bins, kBins);
  SHARED(SelectScratch<kScanThreads>, select, 1);
  overlap_launches();
  const Row row = sample_row(a, blockIdx.y);
  RowScratch &mine = row_scratch(scratch, blockIdx.y);
  const float best = best_value(best_of_blocks<kScanThreads>(mine.best, gridDim.x, select[0].warp_totals));
  if (best == -INFINITY || row.is_greedy(best) || !row.is_filtered()) return;
  const int last = bound(row, mine, bins, select[0]);
  const uint32_t expected = num_within(mine, last, select[0]);
  if (blockIdx.x == 0 && threadIdx.x == 0) mine.num_candidates = expected;
  if (expected > kMaxCandidates) return;
  for_each_group(row, [&](int id, const float(&v)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float z = row.scaled(v[j], best);
      if (bin_of(z) <= last) mine.candidates[atomicAdd(&mine.num_listed, 1u)] = {z, id + j};
    }
  });
}

// One block per row.
extern "C" __global__ void __launch_bounds__(kChooseThreads) sample__choose(const __grid_constant__ SampleArgs a, void *scratch) {
  SHARED(ChooseScratch, shared, 1);
  overlap_launches();
  const int64_t s = blockIdx.x;
  const Row row = sample_row(a, s);
  RowScratch &mine = row_scratch(scratch, s);
  const int num_blocks = static_cast<int>(mine.num_blocks);
  u64 *warp_bests = shared[0].select.warp_totals;
  const u64 top = best_of_blocks<kChooseThreads>(mine.best, num_blocks, warp_bests);
  const float best = best_value(top);
  int token;
  if (best == -INFINITY) {
    token = -1;
  } else if (row.is_greedy(best)) {
    token = best_id(top);
  } else if (!row.is_filtered()) {
    token = best_id(best_of_blocks<kChooseThreads>(mine.drawn, num_blocks, warp_bests));
  } else if (mine.num_candidates <= kMaxCandidates) {
    u64 total = 0;
    for (int i = threadIdx.x; i < kBins; i += kChooseThreads) total += mine.masses[i];
    total = block_sum_integer<kChooseThreads>(total, warp_bests);
    token = choose(row, CandidateList{mine.candidates, static_cast<int>(mine.num_candidates)}, total, shared[0]);
  } else {
    token = choose(row, WholeRow{row, best}, 0, shared[0]);
  }
  if (threadIdx.x == 0) commit(a, s, token);
}

extern "C" __global__ void __launch_bounds__(kChooseThreads) sample__row(const __grid_constant__ SampleArgs a) {
  SHARED(ChooseScratch, shared, 1);
  overlap_launches();
  const int64_t s = blockIdx.x;
  const Row row = sample_row(a, s);
  u64 top = 0;
  for (int i = threadIdx.x; i < row.V; i += kChooseThreads) {
    const u64 packed = pack_best(row.value(i), i);
    if (packed > top) top = packed;
  }
  top = block_best<kChooseThreads>(top, shared[0].select.warp_totals);
  const float best = best_value(top);
  int token;
  if (best == -INFINITY) {
    token = -1;
  } else if (row.is_greedy(best)) {
    token = best_id(top);
  } else {
    token = choose(row, WholeRow{row, best}, 0, shared[0]);
  }
  if (threadIdx.x == 0) commit(a, s, token);
}
