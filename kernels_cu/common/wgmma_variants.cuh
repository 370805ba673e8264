// wgmma_variants.cuh - which instances of the warpgroup products every op has; gllm_driver/launch/_wgmma.py chooses.
#pragma once

// name, type, tokens and weight rows of a tile, stages of the ring, whether the groups take tiles in turn
#define WGMMA_VARIANTS_OF(X, name, Half) X(name, Half, 128, 256, 4, false) X(name, Half, 128, 128, 6, true)
#define WGMMA_VARIANTS(X) WGMMA_VARIANTS_OF(X, f16, __half) WGMMA_VARIANTS_OF(X, bf16, bf16)
