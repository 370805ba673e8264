// pack_weight on sm_90a: the way back. Packed weights as rows of f16 in scratch, for products of so many tokens that unpacking a
// weight once, instead of in every block that multiplies it, pays for writing and reading it.
#include "../common/packed.cuh"
#include "../common/vec.cuh"

constexpr int kUnpackThreads = 128;

struct UnpackArgs {  // gllm_driver/launch/_wgmma.py
  const void *weight;
  int64_t to;  // where in scratch
  int K, code;
};
static_assert(sizeof(UnpackArgs) == 24, "as numpy has it");

// Elements k to k + 3 of a row; k is a multiple of 4, so that one word holds them and they share a scale.
template <int kBits>
__device__ __forceinline__ void unpack4(const PackedRow &row, int k, float (&v)[4]) {
  constexpr unsigned kMask = (1u << kBits) - 1;
  const PackedPlace first(kBits, k % kPackedSegment);
  const uint32_t word = row.words[k / kPackedSegment * (8 * kBits) + first.at];
  const int group = k >> row.format.group_shift;
  const float d = to_f32(row.scales[row.format.kind == 0 ? group : 2 * group]);
  const float a = row.format.kind == 0 ? 0.f : to_f32(row.scales[2 * group + 1]);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int u = static_cast<int>(word >> PackedPlace(kBits, k % kPackedSegment + i).field * kBits & kMask);
    const int q = kBits >= 4 ? u - (1 << (kBits - 1)) : 2 * u - static_cast<int>(kMask);
    v[i] = row.format.kind == 0 ? d * static_cast<float>(q) : row.format.kind == 1 ? d * (static_cast<float>(u) - a) : fmaf(d, static_cast<float>(u), a);
  }
}

// A block takes a row, a thread eight elements of it at a time. K is a multiple of 8.
template <int kBits>
__device__ __forceinline__ void unpack(const UnpackArgs &a, void *scratch) {
  PackedFormat format(a.code);
  format.bits = kBits;
  const int64_t n = blockIdx.x;
  const PackedRow row(format, a.weight, n, a.K);
  auto *out = static_cast<unsigned char *>(scratch) + a.to + n * a.K * 2;
  for (int k = threadIdx.x * 8; k < a.K; k += kUnpackThreads * 8) {
    float low[4], high[4];
    unpack4<kBits>(row, k, low);
    unpack4<kBits>(row, k + 4, high);
    uint4 v;
    v.x = pack_pair<__half>(low[0], low[1]), v.y = pack_pair<__half>(low[2], low[3]);
    v.z = pack_pair<__half>(high[0], high[1]), v.w = pack_pair<__half>(high[2], high[3]);
    store16(out + k * 2, v);
  }
}

#define UNPACK(bits)                                                                              \
  extern "C" __global__ void __launch_bounds__(kUnpackThreads) pack_weight__unpack_q##bits(       \
      const __grid_constant__ UnpackArgs a, void *scratch) {                                      \
    unpack<bits>(a, scratch);                                                                     \
  }
UNPACK(8)
UNPACK(4)
UNPACK(2)
UNPACK(1)
