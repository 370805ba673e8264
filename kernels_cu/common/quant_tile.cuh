// quant_tile.cuh - packed weights as the A operand of tensor cores: 16 rows by one segment of 256 elements, from shared memory.
//
// Weights stand on the M side: rows g and g + 8 of a tile (g = lane / 4), which are row g of two neighbouring tiles of an op.
// The layout (packed_types.py) is the operand's own, so a lane unpacks the words it reads in place: integers q that f16 holds
// exactly, multiplied exactly, summed in f32 over a group, and scaled then. No weight is ever rounded. Where a format has
// an offset, a second product with ones gives the sums of activations it is multiplied with.
#pragma once

#include "packed.cuh"
#include "vec.cuh"

constexpr int kQuantRows = 16;    // weight rows of a tile
constexpr int kQuantSteps = 8;    // of 32 elements, two mma, in a segment
constexpr int kUnitRows8 = 8;     // rows of one of an op's tiles

// What an op says of one of its tiles: up to eight rows of a packed weight, first, first + step, ... below `rows`.
struct PackedTile {
  const void *weight;
  int code, first, step, rows;
};

// Stands for "packed, of kBits" where ops are told the type of weights.
template <int kBits_>
struct Packed {
  static constexpr int kBits = kBits_;
  static __device__ __forceinline__ bool holds(int code) { return is_packed(code) && (1 << (code & 3)) == kBits; }
};

// Bytes of `segments` segments of a row's scales; 0 for rows of another width.
template <int kBits>
__device__ __forceinline__ int packed_scale_nbytes(int code, int segments) {
  const PackedFormat format(code);
  return Packed<kBits>::holds(code) ? segments * (kPackedSegment >> format.group_shift) * format.scale_nbytes() : 0;
}

// Two tiles of an op side by side. Rows that are missing, or stored in another width, are zeros.
template <int kBits>
struct QuantTile {
  static constexpr int kRowNbytes = 32 * kBits;  // quants of a segment

  const unsigned char *rows[2];
  int64_t stride;
  int count[2];
  int64_t scales;  // where they start in a row
  int scale_nbytes, group_shift, kind;  // scale_nbytes: of a segment

  __device__ __forceinline__ QuantTile() {}
  __device__ __forceinline__ QuantTile(const PackedTile &first, const PackedTile &second, int K) {
    const PackedFormat format(first.code);
    const int64_t nbytes = format.row_nbytes(K);
    rows[0] = static_cast<const unsigned char *>(first.weight) + first.first * nbytes;
    rows[1] = static_cast<const unsigned char *>(second.weight) + second.first * nbytes;
    stride = first.step * nbytes;
    count[0] = count_of(first), count[1] = count_of(second);
    scales = format.quants_nbytes(K);
    group_shift = format.group_shift, kind = format.kind;
    scale_nbytes = (kPackedSegment >> group_shift) * format.scale_nbytes();
  }
  static __device__ __forceinline__ int count_of(const PackedTile &tile) {
    return Packed<kBits>::holds(tile.code) ? max(0, min(kUnitRows8, ceil_div(tile.rows - tile.first, tile.step))) : 0;
  }

  __device__ __forceinline__ bool has_row(int r) const { return (r & 7) < (r < 8 ? count[0] : count[1]); }
  __device__ __forceinline__ const unsigned char *row(int r) const { return (r < 8 ? rows[0] : rows[1]) + (r & 7) * stride; }
};

// Bytes of a row's scales of one segment in shared memory: whole pieces of 16.
__device__ __forceinline__ int scale_stride(int scale_nbytes) { return max(16, scale_nbytes); }

// 16-byte pieces of odd rows swap halves of 128 bytes, so that two rows read together touch all banks.
template <int kBits>
__device__ __forceinline__ int quant_piece(int r, int piece) {
  return r * (32 * kBits) + (kBits >= 4 ? piece ^ (r & 1) << 2 : piece) * 16;
}

// A lane's integers of one row and two steps (64 elements).
constexpr int kQuantDepths = kQuantSteps / 2;
template <int kBits>
struct LaneQuants {
  static constexpr int kWords = kBits == 1 ? 1 : kBits / 2;
  uint32_t words[kWords];

  // Row r of a tile in shared memory, the two steps `depth`.
  __device__ __forceinline__ LaneQuants(const unsigned char *tile, int r, int t, int depth) {
    if constexpr (kBits == 8) {
      const uint4 v = load16(tile + quant_piece<8>(r, depth * 4 + t));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (kBits == 4) {
      const uint2 v = *reinterpret_cast<const uint2 *>(tile + quant_piece<4>(r, depth / 2 * 4 + t) + depth % 2 * 8);
      words[0] = v.x, words[1] = v.y;
    } else if constexpr (kBits == 2) {
      words[0] = *reinterpret_cast<const uint32_t *>(tile + quant_piece<2>(r, t) + depth * 4);
    } else {
      words[0] = *reinterpret_cast<const uint32_t *>(tile + r * 32 + t * 8 + depth / 2 * 4) >> depth % 2 * 8;
    }
  }
};

// Two integers of 0 to 2^10 - 1 in the halves of a word, at bit kShift of each, times 2 if kTwice, less `less`: as f16, exact.
// Under the exponent of 1024 they are 1024 + n.
template <int kShift, bool kTwice>
__device__ __forceinline__ uint32_t integers_to_halves(uint32_t masked, float less) {
#if defined(__CUDACC__)
  const uint32_t raised = masked | 0x64006400u;
  __half2 x;
  memcpy(&x, &raised, 4);
  constexpr float kFactor = (kTwice ? 2.f : 1.f) / (1 << kShift);
  static_assert(kFactor <= 1.f, "f16 holds 1024 * kFactor + less: beyond 2048 only even numbers");
  if constexpr (kShift == 0 && !kTwice) {
    x = __hsub2(x, __float2half2_rn(1024.f + less));
  } else {
    x = __hfma2(x, __float2half2_rn(kFactor), __float2half2_rn(-(1024.f * kFactor + less)));
  }
  uint32_t out;
  memcpy(&out, &x, 4);
  return out;
#else
  const auto value = [&](uint32_t half) { return static_cast<float>((half & 0x3ffu) >> kShift) * (kTwice ? 2.f : 1.f) - less; };
  return pack_pair<__half>(value(masked & 0xffffu), value(masked >> 16));
#endif
}

// The integers q of step 0 or 1: two words for the first mma, {k, k+1} and {k+2, k+3} of the lane, and two for the second.
template <int kBits>
__device__ __forceinline__ void unpack_step(const LaneQuants<kBits> &from, int step, uint32_t (&q)[4]) {
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t w = from.words[step * 2 + i];
      q[2 * i] = integers_to_halves<0, false>(w & 0x00ff00ffu, 128.f);
      q[2 * i + 1] = integers_to_halves<0, false>(w >> 8 & 0x00ff00ffu, 128.f);
    }
  } else if constexpr (kBits == 4) {
    const uint32_t w = from.words[step], high = w >> 8;
    q[0] = integers_to_halves<0, false>(w & 0x000f000fu, 8.f);
    q[1] = integers_to_halves<4, false>(w & 0x00f000f0u, 8.f);
    q[2] = integers_to_halves<0, false>(high & 0x000f000fu, 8.f);
    q[3] = integers_to_halves<4, false>(high & 0x00f000f0u, 8.f);
  } else if constexpr (kBits == 2) {
    const uint32_t w = from.words[0] >> step * 8;
    q[0] = integers_to_halves<0, false>(w << 1 & 0x00060006u, 3.f);
    q[1] = integers_to_halves<2, true>(w & 0x000c000cu, 3.f);
    q[2] = integers_to_halves<4, true>(w & 0x00300030u, 3.f);
    q[3] = integers_to_halves<6, true>(w & 0x00c000c0u, 3.f);
  } else {
    const uint32_t w = from.words[0] >> step * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = (w << (15 - i) & 0x80008000u) ^ 0xbc00bc00u;  // 1.0, or -1.0 for a 0
  }
}

// The scales of rows g and g + 8 for one group.
struct LaneScale {
  GroupScale low, high;

  template <int kBits, bool kOffset>
  static __device__ __forceinline__ LaneScale read(const unsigned char *scales, int stride, int g, int index, int kind) {
    PackedFormat format(0);
    format.bits = kBits, format.kind = kOffset ? kind : 0;
    const unsigned char *a = scales + g * stride, *b = a + 8 * stride;
    if constexpr (!kOffset) {
      const float d0 = to_f32(reinterpret_cast<const __half *>(a)[index]), d1 = to_f32(reinterpret_cast<const __half *>(b)[index]);
      return {GroupScale(format, d0, 0.f), GroupScale(format, d1, 0.f)};
    }
    const float2 x = unpack_pair(reinterpret_cast<const uint32_t *>(a)[index], static_cast<const __half *>(nullptr));
    const float2 y = unpack_pair(reinterpret_cast<const uint32_t *>(b)[index], static_cast<const __half *>(nullptr));
    return {GroupScale(format, x.x, x.y), GroupScale(format, y.x, y.y)};
  }
};

__device__ __forceinline__ void add_scaled(float (&sum)[4], const float (&part)[4], float low, float high) {
  sum[0] = fmaf(part[0], low, sum[0]), sum[1] = fmaf(part[1], low, sum[1]);
  sum[2] = fmaf(part[2], high, sum[2]), sum[3] = fmaf(part[3], high, sum[3]);
}

// The operands of a step: rows g and g + 8 for its two mma.
struct StepOperands {
  uint32_t a[2][4];

  __device__ __forceinline__ StepOperands(const uint32_t (&low)[4], const uint32_t (&high)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) a[i][0] = low[2 * i], a[i][1] = high[2 * i], a[i][2] = low[2 * i + 1], a[i][3] = high[2 * i + 1];
  }
};

// sum[16 rows x 8 slots] += weights . activations over 32 elements. x: a lane's four values of slot g for each mma.
// kFine: a scale per mma, for groups of 16 and more; `scale[1]` is the second's. Else one for both.
template <bool kFine, bool kOffset>
__device__ __forceinline__ void quant_step(float (&sum)[4], const StepOperands &w, uint4 x, const LaneScale (&scale)[2]) {
  const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}}, ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  float part[4] = {0, 0, 0, 0};
  mma_m16n8k16_f16(part, w.a[0], b[0]);
  if constexpr (kFine) {
    add_scaled(sum, part, scale[0].low.factor, scale[0].high.factor);
#pragma unroll
    for (int i = 0; i < 4; i++) part[i] = 0;
  }
  mma_m16n8k16_f16(part, w.a[1], b[1]);
  add_scaled(sum, part, scale[kFine].low.factor, scale[kFine].high.factor);
  if constexpr (kOffset) {
    float total[4] = {0, 0, 0, 0};
    mma_m16n8k16_f16(total, ones, b[0]);
    if constexpr (kFine) {
      add_scaled(sum, total, scale[0].low.offset, scale[0].high.offset);
#pragma unroll
      for (int i = 0; i < 4; i++) total[i] = 0;
    }
    mma_m16n8k16_f16(total, ones, b[1]);
    add_scaled(sum, total, scale[kFine].low.offset, scale[kFine].high.offset);
  }
}

// The scales of a step from a segment's in shared memory (`scales` is where the segment's first ones are).
template <int kBits, bool kFine, bool kOffset>
__device__ __forceinline__ void read_scales(LaneScale (&scale)[2], const unsigned char *scales, int stride, int g, int step, int group_shift, int kind) {
  if constexpr (kFine) {
    scale[0] = LaneScale::read<kBits, kOffset>(scales, stride, g, step * 32 >> group_shift, kind);
    scale[1] = LaneScale::read<kBits, kOffset>(scales, stride, g, (step * 32 + 16) >> group_shift, kind);
  } else {
    scale[0] = LaneScale::read<kBits, kOffset>(scales, stride, g, step * 32 >> group_shift, kind);
  }
}
