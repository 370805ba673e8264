// product_variants.cuh - which instances of the product kernels every op has; gllm_driver/launch/_products.py chooses.
#pragma once

// name, type, tokens, weight rows of a warp: few where there are few
#define DOT_VARIANTS_OF(X, name, Type) \
  X(name, Type, 1, 2) X(name, Type, 1, 4) X(name, Type, 2, 2) X(name, Type, 2, 4) X(name, Type, 4, 2) X(name, Type, 4, 4)
#define DOT_VARIANTS(X) DOT_VARIANTS_OF(X, f32, F32) DOT_VARIANTS_OF(X, f16, F16) DOT_VARIANTS_OF(X, bf16, BF16)

// name, type, planes, tiles of 16 activation rows. One plane is for deterministic mode.
#define GEMV_VARIANTS(X) \
  X(f16, F16, 1, 1)      \
  X(bf16, BF16, 1, 1)    \
  X(q8_0, Q8_0, 1, 1)    \
  X(q8_0, Q8_0, 2, 1)    \
  X(q8_0, Q8_0, 2, 2)    \
  X(q4_0, Q4_0, 1, 1)    \
  X(q4_0, Q4_0, 2, 1)    \
  X(q4_0, Q4_0, 2, 2)

// name, type, tokens and weight rows of a block, warps along each, stages, whether rows must start at multiples of 16 bytes
#define MMA_VARIANTS(X)                   \
  X(f16, F16, 16, 32, 1, 4, 10, true)     \
  X(f16, F16, 32, 32, 1, 4, 8, true)      \
  X(bf16, BF16, 16, 32, 1, 4, 10, true)   \
  X(bf16, BF16, 32, 32, 1, 4, 8, true)    \
  X(f16, F16, 128, 128, 2, 4, 3, true)    \
  X(f16, F16, 64, 64, 2, 2, 4, false)     \
  X(bf16, BF16, 128, 128, 2, 4, 3, true)  \
  X(bf16, BF16, 64, 64, 2, 2, 4, false)   \
  X(q8_0, Q8_0, 128, 128, 2, 4, 3, true)  \
  X(q8_0, Q8_0, 64, 64, 2, 2, 4, false)   \
  X(q4_0, Q4_0, 128, 128, 2, 4, 3, true)  \
  X(q4_0, Q4_0, 64, 64, 2, 2, 4, false)
