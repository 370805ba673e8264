// sample_row.cuh - one row of logits as `sample` sees it: penalties applied, NaN out of the way, draws by token id.
#pragma once

#include "../generated/sample_args.h"
#include "../generated/sample_params.h"
#include "philox.cuh"
#include "select.cuh"
#include "vec.cuh"

// -ln(-ln u) lies in (-2.82, 16.7): a token this far below the best cannot win the draw.
constexpr float kDrawReach = 20.5f;
constexpr float kMassUnit = 1099511627776.0f;  // 2^40

struct Row {
  const float *logits;    // [V]
  const int32_t *counts;  // [V]; null when no penalty applies
  int V;
  SampleParams params;
  u64 position;

  // The logit of token i after penalties; -inf for NaN.
  __device__ __forceinline__ float value(int i) const {
    float v = logits[i];
    if (counts) v = penalized(v, counts[i]);
    return v == v ? v : -INFINITY;
  }

  // Tokens i .. i+3, -inf beyond the row. i is a multiple of 4.
  __device__ __forceinline__ void values4(int i, float (&v)[4]) const {
    if (i + 4 <= V && !counts && is_aligned(logits + i, 16)) {
      const float4 x = load_f32x4(logits + i);
      v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = v[j] == v[j] ? v[j] : -INFINITY;
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = i + j < V ? value(i + j) : -INFINITY;
    }
  }

  __device__ __forceinline__ float penalized(float logit, int count) const {
    const int output = count & (kSeenInPrompt - 1);
    if (count != 0) logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    // fmaf by name: every kernel must get the same bits for the same token
    if (output > 0) logit = fmaf(-params.frequency_penalty, static_cast<float>(output), logit - params.presence_penalty);
    return logit;
  }

  // (value - best) / temperature, at most 0; subtracting first keeps a tiny temperature from overflowing.
  __device__ __forceinline__ float scaled(float value, float best) const {
    const float z = (value - best) / params.temperature;
    return z <= 0 ? z : -INFINITY;
  }

  __device__ __forceinline__ bool has_top_k() const { return params.top_k > 0 && params.top_k < V; }
  __device__ __forceinline__ bool has_top_p() const { return params.top_p < 1.0f; }
  __device__ __forceinline__ bool is_filtered() const { return has_top_k() || has_top_p(); }
  __device__ __forceinline__ bool is_greedy(float best) const { return params.temperature == 0.0f || best == INFINITY; }

  // The least z that min_p keeps and that can still win.
  __device__ __forceinline__ float lowest() const {
    return params.min_p > 0 ? fmaxf(-kDrawReach, logf(params.min_p)) : -kDrawReach;
  }

  // The four random words of tokens 4 * group .. 4 * group + 3.
  __device__ __forceinline__ PhiloxWords words(int group) const {
    return philox4x32(group, 0, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                      static_cast<uint32_t>(params.seed), static_cast<uint32_t>(params.seed >> 32));
  }
};

__device__ __forceinline__ Row sample_row(const SampleArgs &a, int64_t s) {
  Row row;
  uint32_t words[sizeof(SampleParams) / 4];  // rows of params are aligned to 4 bytes only
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(SampleParams) / 4); i++) words[i] = a.params[s * (sizeof(SampleParams) / 4) + i];
  memcpy(&row.params, words, sizeof words);
  const SampleParams &p = row.params;
  const bool penalties = p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
  row.logits = a.logits + s * a.V;
  row.counts = a.counts && penalties ? a.counts + s * a.V : nullptr;
  row.V = a.V;
  row.position = static_cast<u64>(a.positions[s]);
  return row;
}

// Probability relative to the best token's, in units of 2^-40.
__device__ __forceinline__ u64 mass(float z) { return static_cast<u64>(expf(z) * kMassUnit); }

// How far below the best, as an integer: 0 is the best, 0x7f800000 is -inf; 31 bits, in the order of z.
__device__ __forceinline__ uint32_t depth(float z) { return __float_as_uint(z) & 0x7fffffffu; }

// What a row without numbers yields is -1; it is not counted and enters ids as 0.
__device__ __forceinline__ void commit(const SampleArgs &a, int64_t s, int token) {
  a.tokens[s] = token;
  if (a.counts && token >= 0) a.counts[s * a.V + token] += 1;
  if (a.ids) {
    a.ids[s] = token < 0 ? 0 : token;
    a.positions[s] += 1;
  }
}
