// embedding - out[t] = weight[ids[t]], dequantized. A block takes 2048 columns of one row, eight to a thread.
#include "common/packed.cuh"
#include "common/vec.cuh"
#include "generated/embedding_args.h"

constexpr int kEmbeddingThreads = 256;

template <class D>
__device__ __forceinline__ void embedding(const EmbeddingArgs &a) {
  overlap_launches();
  const int64_t t = blockIdx.x;
  const auto *row = static_cast<const typename D::Element *>(a.weight) + static_cast<int64_t>(a.ids[t]) * a.D;
  float *out = a.out + t * a.D;
  const int k = (blockIdx.y * kEmbeddingThreads + threadIdx.x) * 8;
  if (k >= a.D) return;
  if (k + 8 > a.D) {  // the ragged end
#pragma unroll 1
    for (int i = k; i < a.D; i++) out[i] = to_f32(row[i]);
    return;
  }
  float v[8];
  if (is_aligned(row, 16)) {
    load8_aligned(row + k, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_f32(row[k + i]);
  }
  if (is_aligned(out, 16)) {
    store_f32x4(out + k, make_float4(v[0], v[1], v[2], v[3]));
    store_f32x4(out + k + 4, make_float4(v[4], v[5], v[6], v[7]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[k + i] = v[i];
  }
}

#define EMBEDDING(dtype, D) \
  extern "C" __global__ void __launch_bounds__(kEmbeddingThreads) embedding__##dtype(const __grid_constant__ EmbeddingArgs a) { embedding<D>(a); }
EMBEDDING(f32, F32)
EMBEDDING(f16, F16)
EMBEDDING(bf16, BF16)

// Packed weights of every width: the order of elements in memory is not theirs, so each is picked alone.
extern "C" __global__ void __launch_bounds__(kEmbeddingThreads) embedding__packed(const __grid_constant__ EmbeddingArgs a) {
  overlap_launches();
  const int64_t t = blockIdx.x;
  const PackedRow row(PackedFormat(a.weight_dtype), a.weight, a.ids[t], a.D);
  const int first = blockIdx.y * kEmbeddingThreads * 8, end = min(a.D, first + kEmbeddingThreads * 8);
  for (int k = first + threadIdx.x; k < end; k += kEmbeddingThreads) a.out[t * a.D + k] = row.element(k);
}
