"""Weights and a KV cache on a device: how much room each gets, and how requests share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .config import DistillConfig, KvCacheConfig, SwapConfig
from .engine import Engine, EngineConfig
from .engine.sharing import KvSharingConfig
from .errors import RequestError
from .sched.plan import SchedulerConfig
from .types import FLOAT_DTYPES

if TYPE_CHECKING:
    from .backends.base import Backend, ModelWeights
    from .kv.distill import Rope
    from .kv.store import KvStore
    from .models.arch import Arch
    from .models.checkpoint import Checkpoint

PAGE_SIZE = 16
KV_MEMORY_SHARE = 0.5  # of the free memory, what the KV cache takes at most where nothing is said about it
CPU_IDLE_CHUNK = 256  # tokens of one prefill step: long enough to reuse weights, short enough to stop quickly
CUDA_IDLE_CHUNK = 2048  # what fills a large GPU


@dataclass(frozen=True)
class Sharing:
    """How requests share the device; `load` explains the options."""

    max_batch: int = 16
    chunk_size: int | None = 64
    prefix_reuse: bool = True
    kv_tokens: int | None = None
    swap: SwapConfig = field(default_factory=SwapConfig)
    kv_store: KvStore | None = None
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise RequestError(f"max_batch must be at least 1, got {self.max_batch}")
        if self.chunk_size is not None and self.chunk_size < 4:
            raise RequestError(f"chunk_size must be at least 4, got {self.chunk_size}")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise RequestError(f"kv_tokens must be at least 1, got {self.kv_tokens}")
        if self.kv_store is not None and not self.prefix_reuse:
            raise RequestError("kv_store needs prefix_reuse: what it brings is found as a prefix")

    def engine_config(self, *, on_cpu: bool, chunk_invariant: bool) -> EngineConfig:
        """The same for the engine."""
        scheduler = SchedulerConfig(
            max_batch=self.max_batch,
            chunk_size=self.chunk_size,
            idle_chunk_size=CPU_IDLE_CHUNK if on_cpu else CUDA_IDLE_CHUNK,
            chunk_invariant=chunk_invariant,
            page_move_tokens=0.05 if on_cpu else 4.0,  # 80 µs beside 2 ms; 70 µs (PCIe) beside 30 µs
            page_size=PAGE_SIZE,
        )
        return EngineConfig(scheduler, self.swap, self.prefix_reuse)


def place(
    checkpoint: Checkpoint,
    backend: Backend,
    dtype: str,
    context_length: int | None,
    progress: Callable[[str, int, int], None] | None,
    sharing: Sharing = Sharing(),
    deterministic: bool = False,
) -> Engine:
    """Weights and KV cache on a device, which is closed when that fails."""
    from .engine.sharing.root import kv_root
    from .models.decoder import model_weights
    from .models.identity import weights_digest
    from .quant.repack import repacked_dtype

    try:
        arch = checkpoint.arch
        kv_dtype = dtype if dtype != "auto" else default_kv_dtype(checkpoint)
        one_page = KvCacheConfig(1, arch.num_layers, arch.num_kv_heads, arch.head_dim, PAGE_SIZE, kv_dtype)
        free = backend.available_memory() - _weights_nbytes(checkpoint, backend, dtype)
        fits = int(KV_MEMORY_SHARE * max(free, 0)) // one_page.page_nbytes * PAGE_SIZE
        context = _context_length(arch.context_length, context_length, fits)
        stored = {t.dtype for t in checkpoint.tensors.values()}
        backend.prepare({repacked_dtype(d, backend.weight_dtypes, dtype).name for d in stored} | {kv_dtype})
        model = model_weights(checkpoint, context)
        weights = backend.upload_weights(model, dtype=dtype, progress=progress)
        room = sharing.kv_tokens or max(context, min(sharing.max_batch * context, fits))
        num_pages = -(-room // PAGE_SIZE)
        kv = KvCacheConfig(num_pages, arch.num_layers, arch.num_kv_heads, arch.head_dim, PAGE_SIZE, kv_dtype)
        # What decides the bits of a token's KV besides the tokens up to it; RoPE may depend on the context.
        root_key = repr((weights_digest(checkpoint), dtype, kv_dtype, context, backend.name)).encode()
        on_cpu = backend.name == "cpu"
        config = sharing.engine_config(on_cpu=on_cpu, chunk_invariant=on_cpu or not deterministic)
        config = replace(config, distill=sharing.distill, rope=_rope(arch, model))
        if sharing.distill is not None and (arch.alibi_max_bias or arch.sliding_windows):
            raise RequestError(
                "kv_distill is not for models with ALiBi or sliding windows, which go by places in the KV"
            )
        if sharing.kv_store is not None:
            root = kv_root(checkpoint, backend, kv, dtype=dtype, context=context, deterministic=deterministic)
            config = replace(config, kv_sharing=KvSharingConfig(sharing.kv_store, root))
        return Engine(backend, weights, kv, context, config, root_key)
    except BaseException:
        backend.close()
        raise


def default_kv_dtype(checkpoint: Checkpoint) -> str:
    """f32 models keep an f32 cache, bf16 ones (whose range f16 lacks) bf16; all others f16."""
    stored = checkpoint.tensors["layers.0.k"].dtype.name
    return stored if stored in FLOAT_DTYPES else "f16"


def _weights_nbytes(checkpoint: Checkpoint, backend: Backend, dtype: str) -> int:
    """Bytes of the backend's memory that the weights take, as they are held."""
    from .backends.footprint import held_dtype

    total = 0
    for tensor in {t.address: t for t in checkpoint.tensors.values()}.values():  # tied ones once
        held = held_dtype(tensor, backend.weight_dtypes, not backend.maps_weights, dtype)
        if held is not tensor.dtype or not backend.maps_weights:
            total += tensor.num_rows * held.row_nbytes(tensor.shape[-1])
    return total


def _context_length(models: int, wanted: int | None, fits: int) -> int:
    """The context asked for, else the model's own as far as it fits in memory."""
    if wanted is not None:
        if wanted < 1:
            raise RequestError(f"context_length must be at least 1, got {wanted}")
        if wanted > models:
            raise RequestError(f"context_length {wanted} is more than the {models} tokens the model was made for")
        return wanted
    return max(min(models, fits), min(models, PAGE_SIZE))


def _rope(arch: Arch, model: ModelWeights) -> Rope | None:
    """How keys are rotated; None: they are not."""
    from .kv.distill import Rope
    from .ops.fused_qkv_rope import INTERLEAVED

    table = model.constants.get("rope_inv_freq")
    if table is None:
        return None
    return Rope(table.to_numpy().copy(), INTERLEAVED if arch.rope_style == "interleaved" else 0)
