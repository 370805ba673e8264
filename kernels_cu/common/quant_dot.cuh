// quant_dot.cuh - products of one token with packed weights, in byte products.
//
// As in dot.cuh a warp computes the dot products of kRows weight rows, each lane taking 16 bytes of every 512 of a row, through a
// ring in shared memory that asynchronous copies keep full. A step of 512 bytes has two (8 bits) to sixteen (1 bit) segments of
// 256 elements; beside it stand the step's group scales, which lanes read of each other.
//
// Activations are integers of 16 bits, scaled so that the largest of a segment is 32767: their rounding is 2^-16 of that largest,
// far below what the weights were rounded by. A high byte with a sign and a low one without meet weights' bytes in dp4a. Integers
// of a group are summed exactly and scaled in f32; sums of activations, for what the weights' integers are off by, are ready.
//
// `Op` as in dot.cuh, and
//   packed(unit * kUnit + i)     the rows of a tile, a PackedTile; all of a unit are of one type
//   scale_nbytes<kBits>(n)       the largest of what n segments of scales take, over the weights of this width
#pragma once

#include "quant_quads.cuh"
#include "quant_rows.cuh"
#include "quant_tile.cuh"

constexpr int kQuantDotThreads = 512;
constexpr int kQuantDotBlocks = 1;            // of a multiprocessor that registers must suffice for
constexpr int kQuantDotRingNbytes = 4 << 10;  // of a warp, without scales
constexpr int kQuantDotAhead = 2;             // segments of activations under way, per warp
constexpr float kLargestActivation = 32767.f;
constexpr float kSmallestTop = 1e-30f;        // segments whose largest activation is below count as zeros

template <int kBits, int kRows, class Op>
struct QuantDot {
  using Place = QuadPlace<kBits>;
  using Type = Packed<kBits>;
  static constexpr int kWarps = kQuantDotThreads / 32;
  static constexpr int kSegments = Place::kSegments, kVectors = Place::kVectors;
  static constexpr int kStages = kQuantDotRingNbytes / (kRows * 512);
  static constexpr int kEntries = kRows / Op::kUnit;  // of a group, the rows a warp works on at a time
  static constexpr int kVectorNbytes = 3 * 512;       // high bytes, low bytes, sums: of all lanes

  const Op &op;
  const int segments, steps, groups, quants_nbytes, scale_stride;
  unsigned char *const ring, *const rows;  // this warp's; activations
  float *const segment_scales;

  __device__ __forceinline__ QuantDot(const Op &o, unsigned char *shared)
      : op(o), segments(ceil_div(o.K, kPackedSegment)), steps(ceil_div(segments, kSegments)), groups(ceil_div(o.num_units() * kUnitRows8, kEntries)),
        quants_nbytes(segments * (kPackedSegment / 8 * kBits)), scale_stride(max(16, o.template scale_nbytes<kBits>(kSegments))),
        ring(shared + warp_index() * kStages * stage_nbytes()), rows(shared + kWarps * kStages * stage_nbytes()),
        segment_scales(reinterpret_cast<float *>(rows + steps * kVectors * kVectorNbytes)) {}

  __device__ __forceinline__ int stage_nbytes() const { return kRows * (512 + scale_stride); }

  __device__ __forceinline__ int code_of(int group) const { return op.packed(group * kEntries / kUnitRows8 * Op::kUnit).code; }

  // The next group from `group` on, gridDim.x * kWarps apart, that is stored in this width.
  __device__ __forceinline__ int next_group(int group) const {
    while (group < groups && !Type::holds(code_of(group))) group += gridDim.x * kWarps;
    return group;
  }

  // Row i of a group. Where it would be past the last, that one: the result is nobody's.
  __device__ __forceinline__ const unsigned char *row_of(int group, int i) const {
    const int entry = group * kEntries + i / Op::kUnit;
    const PackedTile tile = op.packed(entry / kUnitRows8 * Op::kUnit + i % Op::kUnit);
    const int row = min(tile.first + entry % kUnitRows8 * tile.step, tile.rows - 1);
    return static_cast<const unsigned char *>(tile.weight) + row * PackedFormat(tile.code).row_nbytes(op.K);
  }

  // What is copied: the rows of a group, and the scales of one of them, which this lane copies. None if there is no group.
  struct Source {
    const unsigned char *row[kRows], *scales;
    int scale_nbytes;  // of a step
    bool exists;
  };
  __device__ __forceinline__ void find_rows(int group, Source &from) const {
    from.exists = group < groups;
    if (!from.exists) return;
    const unsigned char *mine = row_of(group, threadIdx.x % 32 % kRows);
    from.scales = mine + quants_nbytes;
    from.scale_nbytes = packed_scale_nbytes<kBits>(code_of(group), kSegments);
    const auto address = static_cast<unsigned long long>(address_of(mine));
#pragma unroll
    for (int r = 0; r < kRows; r++) from.row[r] = pointer_at<const unsigned char>(static_cast<uintptr_t>(__shfl_sync(kFullMask, address, r)));
  }

  // Starts the copy of a step of all rows; past their end, zeros.
  __device__ __forceinline__ void copy(const Source &from, int step, unsigned char *stage) const {
    if (from.exists) {
      const int lane = threadIdx.x % 32, offset = step * 512 + lane * 16;
#pragma unroll
      for (int r = 0; r < kRows; r++) cp_async16(stage + r * 512 + lane * 16, from.row[r] + offset, offset < quants_nbytes);
      const int start = step * from.scale_nbytes & ~15, end = (step + 1) * from.scale_nbytes;
      const int scales_nbytes = from.scale_nbytes / kSegments * segments;
      unsigned char *scales = stage + kRows * 512 + lane % kRows * scale_stride;
      for (int i = lane / kRows * 16; start + i < end; i += 32 / kRows * 16) cp_async16(scales + i, from.scales + start + i, start + i < scales_nbytes);
    }
    cp_async_commit();
  }

  // A lane's eight activations of a segment, elements 4 * lane .. and 128 + 4 * lane .., as integers.
  __device__ __forceinline__ void put_segment(int segment, const float4 (&values)[2]) const {
    const int lane = threadIdx.x % 32;
    float top = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) top = fmaxf(top, top_of(values[half]));
    top = warp_max(top);
    const float scale = top > kSmallestTop && top < INFINITY ? kLargestActivation / top : 0.f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float4 v = values[half];
      const int a = __float2int_rn(v.x * scale), b = __float2int_rn(v.y * scale), c = __float2int_rn(v.z * scale), d = __float2int_rn(v.w * scale);
      const uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);  // low bytes, then high ones
      const QuadPlace<kBits> place(segment % kSegments, half * 32 + lane);
      unsigned char *to = rows + (segment / kSegments * kVectors + place.vector) * kVectorNbytes + place.lane * 16 + place.word * 4;
      *reinterpret_cast<uint32_t *>(to) = __byte_perm(ab, cd, 0x7362);
      *reinterpret_cast<uint32_t *>(to + 512) = __byte_perm(ab, cd, 0x5140);
      *reinterpret_cast<float *>(to + 1024) = static_cast<float>(a + b + c + d);
    }
    // What is no number makes no numbers.
    if (lane == 0) segment_scales[segment] = top < INFINITY ? top * (1.f / kLargestActivation) : top - top;
  }
  static __device__ __forceinline__ float top_of(float4 v) { return fmaxf(fmaxf(magnitude(v.x), magnitude(v.y)), fmaxf(magnitude(v.z), magnitude(v.w))); }
  static __device__ __forceinline__ float magnitude(float x) { return fabsf(x) < INFINITY ? fabsf(x) : INFINITY; }

  // Activations to shared memory, zeros behind K. Results are to be multiplied with what it returns.
  __device__ __forceinline__ float fill_rows(float *scratch) const {
    const SlotRow<Op::kNorm> row(op.x, op.norm, op.K);
    const bool is_rms = Op::kNorm && !op.norm.center && op.norm.bias == nullptr;
    RowFactors f{0.f, 1.f, 1.f, 1.f};
    if (Op::kNorm && !is_rms) f = row.template factors<kQuantDotThreads>(scratch);
    float squares = 0;
#pragma unroll 1
    for (int first = warp_index(); first < steps * kSegments; first += kQuantDotAhead * kWarps) {
      float4 values[kQuantDotAhead][2];
#pragma unroll
      for (int s = 0; s < kQuantDotAhead; s++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int i = (first + s * kWarps) * (kPackedSegment / 4) + half * 32 + static_cast<int>(threadIdx.x % 32);
          const float4 x = row_load4(op.x, i, op.K, row.aligned);
          if (Op::kNorm) squares = fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, squares))));
          values[s][half] = row.normalized4(i, f.mean, f.factor);
        }
      }
#pragma unroll
      for (int s = 0; s < kQuantDotAhead; s++) {
        if (first + s * kWarps < steps * kSegments) put_segment(first + s * kWarps, values[s]);
      }
    }
    float factor = 1.f;
    if (Op::kNorm && is_rms) factor = 1.f / sqrtf(block_sum<kQuantDotThreads>(squares, scratch) / static_cast<float>(op.K) + op.norm.eps);
    __syncthreads();
    return factor;
  }

  // The scales of the groups of a vector's pairs of words in one row: d of both, next to each other or the same.
  struct PairScales {
    int at;             // bytes from the row's first
    uint32_t selector;  // what becomes of the word there

    __device__ __forceinline__ PairScales(int stretch, int group_shift) {
      const int index = stretch >> (group_shift - 4);
      at = index / 2 * 4;
      selector = group_shift == 5 ? 0x3210 : index % 2 ? 0x3232 : 0x1010;
    }
    __device__ __forceinline__ float2 read(const unsigned char *scales) const {
      return unpack_pair(__byte_perm(*reinterpret_cast<const uint32_t *>(scales + at), 0, selector), static_cast<const __half *>(nullptr));
    }
  };

  // sums += one step of all rows. kFine: groups of 16.
  template <bool kFine, bool kOffset>
  __device__ __forceinline__ void multiply(const unsigned char *stage, int step, const PackedFormat &format, float (&sums)[kRows]) const {
    constexpr int kGroups = kFine ? 4 : 2, kEach = 4 / kGroups;  // of a vector; words of each
    constexpr bool kSwapped = kBits == 4 && !kFine;
    constexpr bool kPairs = kBits != 1 && !kFine && !kOffset;
    constexpr bool kTwice = kBits <= 2 && !kOffset;  // q = 2u - (2^bits - 1)
    constexpr float kCenter = kOffset ? 0.f : kTwice ? static_cast<float>((1 << kBits) - 1) : static_cast<float>(1 << (kBits - 1));
    const int lane = threadIdx.x % 32, segment = lane / Place::kLanes;
    const int scale_nbytes = kSegments * (kPackedSegment >> format.group_shift) * format.scale_nbytes();
    const unsigned char *scales = stage + kRows * 512 + (step * scale_nbytes & 15);
    const unsigned char *x = rows + step * kVectors * kVectorNbytes + lane * 16;
    uint4 words[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) words[r] = load16(stage + r * 512 + lane * 16);
    float parts[kRows] = {};
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const uint4 high = load16(x + v * kVectorNbytes), low = load16(x + v * kVectorNbytes + 512);
      const float4 quad = load_f32x4(reinterpret_cast<const float *>(x + v * kVectorNbytes + 1024));
      uint32_t h[4] = {high.x, high.y, high.z, high.w}, l[4] = {low.x, low.y, low.z, low.w};
      if constexpr (kSwapped) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t h0 = h[i], l0 = l[i];
          h[i] = even_bytes(h0, h[i + 1]), h[i + 1] = odd_bytes(h0, h[i + 1]);
          l[i] = even_bytes(l0, l[i + 1]), l[i + 1] = odd_bytes(l0, l[i + 1]);
        }
      }
      float total[4] = {quad.x, quad.y, quad.z, quad.w};
      if constexpr (!kFine) total[0] += total[1], total[1] = total[2] + total[3];
      int stretch[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; g++) stretch[g] = segment * 16 + Place::stretch(lane, v, g * kEach / 2) + g * kEach % 2;
      const PairScales pair(stretch[0], format.group_shift);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const unsigned char *of_row = scales + r * scale_stride;
        uint32_t u[4];
        unpack_quads<kBits, kSwapped>(words[r], v, u);
        float2 both;
        if constexpr (kPairs) both = pair.read(of_row);
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          int hi = 0, lo = 0;
#pragma unroll
          for (int i = g * kEach; i < (g + 1) * kEach; i++) hi = dp4a_u32_s32(u[i], h[i], hi), lo = dp4a_u32_u32(u[i], l[i], lo);
          const float sum = static_cast<float>((hi * 256 + lo) * (kTwice ? 2 : 1));
          const int index = stretch[g] >> (format.group_shift - 4);
          if constexpr (kOffset) {
            const float2 s = unpack_pair(reinterpret_cast<const uint32_t *>(of_row)[index], static_cast<const __half *>(nullptr));
            parts[r] = fmaf(s.x, sum, fmaf(format.kind == 1 ? -s.x * s.y : s.y, total[g], parts[r]));
          } else {
            float d;
            if constexpr (kPairs) {
              d = g == 0 ? both.x : both.y;
            } else {
              d = to_f32(reinterpret_cast<const __half *>(of_row)[index]);
            }
            parts[r] = fmaf(d, fmaf(-kCenter, total[g], sum), parts[r]);
          }
        }
      }
    }
    const float scale = segment_scales[step * kSegments + segment];
#pragma unroll
    for (int r = 0; r < kRows; r++) sums[r] = fmaf(parts[r], scale, sums[r]);
  }

  __device__ __forceinline__ void multiply_step(const unsigned char *stage, int step, const PackedFormat &format, float (&sums)[kRows]) const {
    if (format.kind == 0 && format.group_shift > 4) {
      multiply<false, false>(stage, step, format, sums);
    } else if (format.kind == 0) {
      multiply<true, false>(stage, step, format, sums);
    } else if (format.group_shift > 4) {
      multiply<false, true>(stage, step, format, sums);
    } else {
      multiply<true, true>(stage, step, format, sums);
    }
  }
};

template <int kBits, int kRows, class Op>
__device__ __forceinline__ void quant_dot(const Op &op) {
  using Kernel = QuantDot<kBits, kRows, Op>;
  constexpr int kStages = Kernel::kStages;
  DYN_SHARED(unsigned char, shared);
  SHARED(float, scratch, Kernel::kWarps);
  const Kernel kernel(op, shared);
  const int lane = threadIdx.x % 32, stride = gridDim.x * Kernel::kWarps;
  int group = kernel.next_group(blockIdx.x + gridDim.x * warp_index()), step = 0;
  int copied_group = group, copied = 0;  // what is copied next
  typename Kernel::Source from;
  kernel.find_rows(group, from);
  const auto copy_next = [&](unsigned char *stage) {
    if (copied == kernel.steps) {
      copied = 0, copied_group = kernel.next_group(copied_group + stride);
      kernel.find_rows(copied_group, from);
    }
    kernel.copy(from, copied++, stage);
  };
#pragma unroll 1
  for (int s = 0; s < kStages; s++) copy_next(kernel.ring + s * kernel.stage_nbytes());
  allow_next_launch();
  wait_for_earlier_launches();
  const float factor = kernel.fill_rows(scratch);

  typename Op::Early early;
  PackedFormat format;
  float sums[kRows] = {};
  unsigned char *stage = kernel.ring, *const end = stage + kStages * kernel.stage_nbytes();
#pragma unroll 1
  while (group < kernel.groups) {
    const int entry = group * Kernel::kEntries + lane, unit = entry / kUnitRows8;
    const bool has_result = lane < Kernel::kEntries && unit < op.num_units();
    if (step == 0 && has_result) early = op.early(0, unit, entry % kUnitRows8);
    if (step == 0) format = PackedFormat(kernel.code_of(group));
    cp_async_wait<kStages - 1>();
    __syncwarp();
    kernel.multiply_step(stage, step, format, sums);
    __syncwarp();  // every lane is done with the stage that the next copy overwrites
    copy_next(stage);
    stage += kernel.stage_nbytes();
    if (stage == end) stage = kernel.ring;
    if (++step < kernel.steps) continue;
    float result[Op::kUnit] = {};
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float sum = warp_sum(sums[r]);
      if (r / Op::kUnit == lane) result[r % Op::kUnit] = sum * factor;
      sums[r] = 0;
    }
    if (has_result) op.template store<Packed<kBits>>(0, unit, entry % kUnitRows8, result, early);
    step = 0;
    group = kernel.next_group(group + stride);
  }
  cp_async_wait<0>();
}
