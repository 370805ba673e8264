// dot.cuh - products of up to four tokens with float weights, in f32: nothing of an activation is rounded.
//
// A warp computes the dot products of kRows weight rows, each lane taking 16 bytes of every 512 of a row. Weights pass through
// a ring in shared memory, kStages steps of kRows * 512 bytes per warp, always under way; a lane reads what it has copied
// itself, so there is no barrier. The first copies start before the launch waits for the one before it. Activations stand in
// shared memory in f32, times the norm's weights; a row's 1 / rms multiplies results.
//
// An output is summed in one order whatever the number of tokens. `Op` as in gemv.cuh, and dtype_of_unit(unit), the type of its
// weights; a warp's rows are entries of a unit, all kUnit rows whose results are stored together.
#pragma once

#include "activation_rows.cuh"
#include "weight_tile.cuh"

constexpr int kDotThreads = 256;
constexpr int kDotBlocks = 2;            // of a multiprocessor that registers must suffice for
constexpr int kDotRingNbytes = 8 << 10;  // of a warp

template <class D, int kTokens, int kRows, class Op>
struct Dot {
  using Element = typename D::Element;
  static constexpr int kWarps = kDotThreads / 32;
  static constexpr int kEach = 16 / sizeof(Element);  // weights of a copy
  static constexpr int kStep = 32 * kEach;            // elements of a row that a warp copies at once
  static constexpr int kStageNbytes = kRows * 512, kStages = kDotRingNbytes / kStageNbytes;
  static constexpr int kAhead = (Op::kNorm ? 4 : 8) / kTokens;  // loads of activations under way, per thread and token
  static constexpr int kEntries = kRows / Op::kUnit;  // of a group, the rows a warp works on at a time

  const Op &op;
  unsigned char *const ring;  // this lane's part of this warp's
  float *const rows;          // [kTokens][stride], in the order lanes read them
  const int steps, stride, groups;

  __device__ __forceinline__ Dot(const Op &o, unsigned char *shared)
      : op(o), ring(shared + threadIdx.x / 32 * kDotRingNbytes + threadIdx.x % 32 * 16),
        rows(reinterpret_cast<float *>(shared + kWarps * kDotRingNbytes)), steps(ceil_div(o.K, kStep)), stride(steps * kStep),
        groups(ceil_div(o.num_units() * kTileRows, kEntries)) {}

  // Row i of a group; null where there is none.
  __device__ __forceinline__ const unsigned char *row_of(int group, int i) const {
    const int entry = group * kEntries + i / Op::kUnit, unit = entry / kTileRows;
    if (unit >= op.num_units()) return nullptr;
    return op.template tile<D>(unit * Op::kUnit + i % Op::kUnit).row(entry % kTileRows);
  }

  // Lane i works out where row i is: for all lanes.
  __device__ __forceinline__ void find_rows(int group, const unsigned char *(&from)[kRows]) const {
    const auto mine = static_cast<unsigned long long>(address_of(row_of(group, threadIdx.x % 32 % kRows)));
#pragma unroll
    for (int r = 0; r < kRows; r++) from[r] = pointer_at<const unsigned char>(static_cast<uintptr_t>(__shfl_sync(kFullMask, mine, r)));
  }

  // Starts the copy of a step of all rows; past the end, zeros.
  __device__ __forceinline__ void copy(const unsigned char *const (&from)[kRows], int step, int stage) const {
    const int k = step * kStep + threadIdx.x % 32 * kEach;
#pragma unroll
    for (int r = 0; r < kRows; r++)
      cp_async16(ring + stage * kStageNbytes + r * 512, from[r] + k * static_cast<int64_t>(sizeof(Element)), from[r] != nullptr && k < op.K);
    cp_async_commit();
  }

  // Where elements 4i .. 4i+3 of an activation row stand: a lane's eight are read as two float4, each next to its neighbours'.
  static __device__ __forceinline__ int place(int i) {
    if constexpr (kEach == 4) return i * 4;
    return (i / 64 * 64 + i % 2 * 32 + i % 64 / 2) * 4;
  }

  // The sum over the block of each token's value, in every thread.
  __device__ __forceinline__ static void block_sums(float (&sums)[kTokens], float *scratch) {
    const int warp = warp_index();
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      const float sum = warp_sum(sums[t]);
      if (threadIdx.x % 32 == 0) scratch[t * kWarps + warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      sums[t] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sums[t] += scratch[t * kWarps + w];
    }
  }

  // Activations to shared memory, zeros behind K and for tokens there are not; `factors` multiply results.
  __device__ __forceinline__ void fill_rows(float *scratch, float (&factors)[kTokens]) const {
    const bool is_rms = Op::kNorm && !op.norm.center && op.norm.bias == nullptr;
    float sums[kTokens] = {};
    if ((address_of(op.x) | address_of(op.norm.weight)) % 16 == 0) {
      copy_rows(is_rms, sums);
    } else {
      copy_elements(is_rms, sums);
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++) factors[t] = 1.f;
    if constexpr (Op::kNorm) {
      if (is_rms) {
        block_sums(sums, scratch);
#pragma unroll
        for (int t = 0; t < kTokens; t++) factors[t] = 1.f / sqrtf(sums[t] / static_cast<float>(op.K) + op.norm.eps);
        return;
      }
      normalize(scratch);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void copy_rows(bool is_rms, float (&sums)[kTokens]) const {
#pragma unroll 1
    for (int first = threadIdx.x; first < stride / 4; first += kAhead * kDotThreads) {
      float4 values[kAhead][kTokens], weights[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        const int k = (first + j * kDotThreads) * 4;
        weights[j] = is_rms && k < op.K ? load_f32x4(op.norm.weight + k) : make_float4(1, 1, 1, 1);
#pragma unroll
        for (int t = 0; t < kTokens; t++)
          values[j][t] = k < op.K && t < op.T ? load_f32x4(op.x + static_cast<int64_t>(t) * op.K + k) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        const int i = first + j * kDotThreads;
        if (i >= stride / 4) break;
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
          const float4 v = values[j][t], w = weights[j];
          if (Op::kNorm) sums[t] = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sums[t]))));
          store_f32x4(rows + t * stride + place(i), make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w));
        }
      }
    }
  }

  // The same from any address.
  __device__ __forceinline__ void copy_elements(bool is_rms, float (&sums)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll 1
      for (int k = threadIdx.x; k < stride; k += kDotThreads) {
        const float v = k < op.K && t < op.T ? op.x[static_cast<int64_t>(t) * op.K + k] : 0.f;
        sums[t] = fmaf(v, v, sums[t]);
        rows[t * stride + place(k / 4) + k % 4] = is_rms && k < op.K ? v * op.norm.weight[k] : v;
      }
    }
  }

  // Rows of a norm with a bias or a mean, in place.
  __device__ __forceinline__ void normalize(float *scratch) const {
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < op.T; t++) {
      float *row = rows + t * stride, mean = 0;
      const auto at = [&](int k) -> float & { return row[place(k / 4) + k % 4]; };
      if (op.norm.center) {
        float sum = 0;
#pragma unroll 1
        for (int k = threadIdx.x; k < op.K; k += kDotThreads) sum += at(k);
        mean = block_sum<kDotThreads>(sum, scratch) / static_cast<float>(op.K);
      }
      float sum = 0;
#pragma unroll 1
      for (int k = threadIdx.x; k < op.K; k += kDotThreads) sum = fmaf(at(k) - mean, at(k) - mean, sum);
      const float factor = 1.f / sqrtf(block_sum<kDotThreads>(sum, scratch) / static_cast<float>(op.K) + op.norm.eps);
#pragma unroll 1
      for (int k = threadIdx.x; k < op.K; k += kDotThreads) {
        const float value = (at(k) - mean) * factor * op.norm.weight[k];
        at(k) = op.norm.bias != nullptr ? value + op.norm.bias[k] : value;
      }
    }
  }

  static __device__ __forceinline__ void unpack(const uint4 (&packed)[kRows], bool is_bf16, float (&out)[kRows][kEach]) {
    if constexpr (kEach == 4) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const uint4 v = packed[r];
        out[r][0] = __uint_as_float(v.x), out[r][1] = __uint_as_float(v.y), out[r][2] = __uint_as_float(v.z), out[r][3] = __uint_as_float(v.w);
      }
    } else if (is_bf16) {
#pragma unroll
      for (int r = 0; r < kRows; r++) unpack8<bf16>(packed[r], out[r]);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; r++) unpack8<__half>(packed[r], out[r]);
    }
  }
};

template <class D, int kTokens, int kRows, class Op>
__device__ __forceinline__ void dot(const Op &op) {
  using Kernel = Dot<D, kTokens, kRows, Op>;
  constexpr int kEach = Kernel::kEach, kStages = Kernel::kStages;
  DYN_SHARED(unsigned char, shared);
  SHARED(float, scratch, kTokens * Kernel::kWarps);
  const Kernel kernel(op, shared);
  const int lane = threadIdx.x % 32, stride = gridDim.x * Kernel::kWarps;
  int group = blockIdx.x + gridDim.x * warp_index(), step = 0;
  int copied_group = group - stride, copied = kernel.steps;  // what has been copied
  const unsigned char *from[kRows];
  const auto copy_next = [&](int stage) {
    if (copied == kernel.steps) copied = 0, copied_group += stride, kernel.find_rows(copied_group, from);
    kernel.copy(from, copied++, stage);
  };
#pragma unroll 1
  for (int s = 0; s < kStages; s++) copy_next(s);
  allow_next_launch();
  wait_for_earlier_launches();
  float factors[kTokens], factor = 1.f;
  kernel.fill_rows(scratch, factors);

  // The entry and token whose result this lane stores.
  const int token = lane % kTokens, mine = lane / kTokens;
#pragma unroll
  for (int t = 0; t < kTokens; t++) {
    if (t == token) factor = factors[t];
  }
  typename Op::Early early;
  float sums[kRows][kTokens] = {};
  int stage = 0;
  bool is_bf16 = false;  // the group's weights
#pragma unroll 1
  while (group < kernel.groups) {
    const int entry = group * Kernel::kEntries + mine, unit = entry / kTileRows;
    const bool has_result = mine < Kernel::kEntries && token < op.T && unit < op.num_units();
    if (step == 0 && has_result) early = op.early(token, unit, entry % kTileRows);
    if (step == 0) is_bf16 = op.dtype_of_unit(group * Kernel::kEntries / kTileRows) == kCodeBF16;
    cp_async_wait<kStages - 1>();
    const unsigned char *weights = kernel.ring + stage * Kernel::kStageNbytes;
    uint4 packed[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) packed[r] = load16(weights + r * 512);
    copy_next(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    const float *x = kernel.rows + step * Kernel::kStep + lane * 4;
    float w[kRows][kEach];
    Kernel::unpack(packed, is_bf16, w);
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        const float4 v = load_f32x4(x + t * kernel.stride + i * 32);
#pragma unroll
        for (int r = 0; r < kRows; r++)
          sums[r][t] = fmaf(w[r][i + 3], v.w, fmaf(w[r][i + 2], v.z, fmaf(w[r][i + 1], v.y, fmaf(w[r][i], v.x, sums[r][t]))));
      }
    }
    if (++step < kernel.steps) continue;
    float result[Op::kUnit] = {};
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int t = 0; t < kTokens; t++) {
        const float sum = warp_sum(sums[r][t]);
        if (r / Op::kUnit == mine && t == token) result[r % Op::kUnit] = sum * factor;
        sums[r][t] = 0;
      }
    }
    if (has_result) op.template store<D>(token, unit, entry % kTileRows, result, early);
    step = 0;
    group += stride;
  }
  cp_async_wait<0>();
}
