"""What stored KV belongs to: the root of all keys of one model, as it is loaded."""

from __future__ import annotations

from ...backends.base import Backend
from ...config import KvCacheConfig
from ...kv.store import KvLayout, KvRoot
from ...models.checkpoint import Checkpoint
from ...models.identity import whole_digest
from ...quant.repack import repacked_dtype
from ...types import DTYPES


def kv_root(
    checkpoint: Checkpoint, backend: Backend, kv: KvCacheConfig, *, dtype: str, context: int, deterministic: bool
) -> KvRoot:
    """Equal in every process that computes the same KV within rounding; if `deterministic`, to the same bits."""
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    computed = {d: repacked_dtype(d, backend.weight_dtypes, dtype) for d in stored}
    if dtype != "auto":
        computed = {d: of if of.is_quantized else DTYPES[dtype] for d, of in computed.items()}
    scaling = checkpoint.arch.rope_scaling
    is_stretched = scaling.kind == "ntk" and scaling.original_context_length > 0  # the only RoPE that looks at it
    return KvRoot.of(
        KvLayout.of(kv),
        weights=whole_digest(checkpoint),
        weight_dtypes={d.name: of.name for d, of in computed.items()},
        context=context if is_stretched else 0,
        exact=backend.numerics if deterministic else "",
    )
