// paged_attention - decode: one query token per sequence. A block takes one span of the context for one group of heads, so
// keys and values are read once; the last block of a group to finish merges its spans, in their order. Grid (splits, head
// groups, sequences), sized by the page table: blocks without work leave at once. A counter per group and sequence.
//
// flash_attention launches these kernels for a step's sequences with a single query, and gives `offsets`: where in the
// packed queries each sequence's begin. Null here, as a token is a sequence.
#include "generated/paged_attention_args.h"
#include "common/attention_rows.cuh"
#include "common/attention_split.cuh"

#define SPLIT(dtype, H, D) \
  extern "C" __global__ void __launch_bounds__(SplitShape<D>::kThreads) \
      paged_attention__split_##dtype##_d##D(const __grid_constant__ PagedAttentionArgs a, const int32_t *offsets, void *scratch, unsigned *counters) { \
    overlap_launches(); \
    split_attention<H, D>(a, offsets, scratch, counters); \
  }
#define ROWS(max_dim) \
  extern "C" __global__ void __launch_bounds__(kRowsThreads, 1) \
      paged_attention__rows_split_d##max_dim(const __grid_constant__ PagedAttentionArgs a, const int32_t *offsets, void *scratch, unsigned *counters) { \
    overlap_launches(); \
    split_rows<max_dim / 32>(a, offsets, scratch, counters); \
  }

#if TENSOR_CORE_KERNELS
SPLIT(f16, __half, 64)
SPLIT(f16, __half, 80)
SPLIT(f16, __half, 96)
SPLIT(f16, __half, 128)
SPLIT(f16, __half, 256)
SPLIT(bf16, bf16, 64)
SPLIT(bf16, bf16, 80)
SPLIT(bf16, bf16, 96)
SPLIT(bf16, bf16, 128)
SPLIT(bf16, bf16, 256)
#endif
ROWS(128)
ROWS(256)
