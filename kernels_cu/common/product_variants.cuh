// product_variants.cuh - which instances of the product kernels every op has; gllm_driver/launch/_products.py chooses.
#pragma once

// name, type, tokens, weight rows of a warp: few where there are few
#define DOT_VARIANTS_OF(X, name, Type) \
  X(name, Type, 1, 2) X(name, Type, 1, 4) X(name, Type, 2, 4) X(name, Type, 4, 4)
#define DOT_VARIANTS(X) DOT_VARIANTS_OF(X, f32, F32) DOT_VARIANTS_OF(X, half, AnyHalf)

// name, type, planes, tiles of 16 activation rows. One plane is for deterministic mode.
#define GEMV_VARIANTS(X) \
  X(f16, F16, 1, 1)      \
  X(bf16, BF16, 1, 1)

// name, type, tokens and weight rows of a block, warps along each, stages
#define MMA_VARIANTS(X)             \
  X(f16, F16, 16, 32, 1, 4, 10)     \
  X(f16, F16, 32, 32, 1, 4, 8)      \
  X(bf16, BF16, 16, 32, 1, 4, 10)   \
  X(bf16, BF16, 32, 32, 1, 4, 8)    \
  X(f16, F16, 128, 128, 2, 4, 3)    \
  X(f16, F16, 64, 64, 2, 2, 4)      \
  X(bf16, BF16, 128, 128, 2, 4, 3)  \
  X(bf16, BF16, 64, 64, 2, 2, 4)

// Packed weights: every width, and for each of them the kernels of one token (bits, weight rows of a warp), of few, and
// of many (bits, tokens and weight rows of a block, warps along each, stages, segments).
#define QUANT_DOT_VARIANTS(X) X(8, 2) X(8, 4) X(4, 2) X(4, 4) X(2, 2) X(2, 4) X(1, 2)
#define QUANT_VARIANTS(X) X(8) X(4) X(2) X(1)
#define QUANT_MMA_VARIANTS_OF(X, bits) X(bits, 64, 128, 2, 4, 3, 2) X(bits, 32, 32, 2, 2, 8, 3)
#define QUANT_MMA_VARIANTS(X) \
  QUANT_MMA_VARIANTS_OF(X, 8) QUANT_MMA_VARIANTS_OF(X, 4) QUANT_MMA_VARIANTS_OF(X, 2) QUANT_MMA_VARIANTS_OF(X, 1)
