// kv_pages - whole pages between the cache and a contiguous buffer: gather (0) cache to buffer, scatter (1) buffer to cache.
//
// A block moves 16 KiB of one page, four 16-byte loads of a thread in flight. Pages beyond the grid's height are taken in
// turns, so that any number fits.
#include "common/vec.cuh"
#include "generated/kv_pages_args.h"

constexpr int kPageThreads = 256, kPageUnroll = 4, kPageChunk = kPageThreads * kPageUnroll * 16;

__device__ __forceinline__ void copy_vectors(uint8_t *to, const uint8_t *from, int64_t begin, int64_t nbytes) {
  uint4 v[kPageUnroll];
#pragma unroll
  for (int j = 0; j < kPageUnroll; j++) {
    const int64_t at = begin + (j * kPageThreads + threadIdx.x) * 16;
    if (at < nbytes) v[j] = load_stream16(from + at);
  }
#pragma unroll
  for (int j = 0; j < kPageUnroll; j++) {
    const int64_t at = begin + (j * kPageThreads + threadIdx.x) * 16;
    if (at < nbytes) store16(to + at, v[j]);
  }
}

extern "C" __global__ void __launch_bounds__(kPageThreads) kv_pages__copy(const __grid_constant__ KvPagesArgs a) {
  const int64_t nbytes = a.B, begin = static_cast<int64_t>(blockIdx.x) * kPageChunk;
  const bool vectors = nbytes % 16 == 0 && (address_of(a.kv) | address_of(a.buffer)) % 16 == 0;
  for (int n = blockIdx.y; n < a.N; n += gridDim.y) {
    uint8_t *page = a.kv + a.pages[n] * nbytes, *item = a.buffer + n * nbytes;
    uint8_t *to = a.direction ? page : item;
    const uint8_t *from = a.direction ? item : page;
    if (vectors) {
      copy_vectors(to, from, begin, nbytes);
    } else {
      const int64_t end = begin + kPageChunk < nbytes ? begin + kPageChunk : nbytes;
      for (int64_t at = begin + threadIdx.x; at < end; at += kPageThreads) to[at] = from[at];
    }
  }
}
