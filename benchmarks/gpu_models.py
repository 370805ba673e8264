"""Models of published shapes with random weights made on the device, and timing by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from gllm_driver.backends.base import KvCacheHandle, WeightsHandle
from gllm_driver.backends.cuda import CudaBackend
from gllm_driver.config import KvCacheConfig
from gllm_driver.models.arch import Arch, tensor_slots
from gllm_driver.models.decoder import Decoder
from gllm_driver.models.rope import rope_inv_freq
from gllm_driver.packed_types import PackedDType, packed_dtype
from gllm_driver.quant.formats import FORMATS
from gllm_driver.quant.packed import Parts, pack_parts
from gllm_driver.types import DTYPES, DType, Tensor

_LLAMA_8B = Arch("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, norm_eps=1e-5, rope_theta=5e5, rotary_dim=128)
ARCHS = {
    "0.6b": replace(  # Qwen3-0.6B
        _LLAMA_8B,
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        qk_norm=True,
        tie_word_embeddings=True,
    ),
    "1b": replace(  # Llama-3.2-1B
        _LLAMA_8B,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        rotary_dim=64,
        tie_word_embeddings=True,
    ),
    "8b": _LLAMA_8B,  # Llama-3.1-8B
    "tiny": replace(
        _LLAMA_8B,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=64,
    ),
}
PATTERN_ELEMENTS = 1 << 22  # random elements, repeated over each tensor


def pattern(dtype: DType, K: int) -> np.ndarray:
    """Bytes of about PATTERN_ELEMENTS random weights, whole rows of K in packed types."""
    if isinstance(dtype, PackedDType):
        g, rows = np.random.default_rng(0), PATTERN_ELEMENTS // 4 // K + 1
        u = g.integers(0, 1 << dtype.bits, (rows, K), np.uint8)
        d = (g.random((rows, K // dtype.block_size)) * 0.04 / (1 << dtype.bits)).astype(np.float16)
        return pack_parts(Parts(u, d, -d * np.float16((1 << dtype.bits) / 2)), dtype).reshape(-1)
    values = np.random.default_rng(0).standard_normal(PATTERN_ELEMENTS, dtype=np.float32) * np.float32(0.02)
    if dtype.is_quantized:
        return FORMATS[dtype.name].quantize(values.reshape(-1, 4096)).reshape(-1)
    if dtype.name == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({"f16": np.float16, "f32": np.float32}[dtype.name]).view(np.uint8)


def held_as(stored: str) -> DType:
    """The type in which a device holds weights stored as `stored`."""
    return packed_dtype(stored) or DTYPES[stored]


class DeviceArrays:
    """Arrays made on the device."""

    def __init__(self, backend: CudaBackend) -> None:
        self.device, self.stream = backend.device, backend.runtime.stream
        self._patterns: dict[str, Tensor] = {}

    def upload(self, values: np.ndarray, dtype: DType | None = None) -> Tensor:
        """A copy of a host array."""
        buffer = self.device.alloc(values.nbytes)
        self.device.copy_h2d(buffer.address, values.ctypes.data, values.nbytes)
        host = Tensor.from_numpy(values, dtype)
        return Tensor(buffer.address, host.shape, host.dtype, buffer)

    def random(self, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """Random weights."""
        key = f"{dtype.name} {shape[-1]}" if isinstance(dtype, PackedDType) else dtype.name
        if key not in self._patterns:
            self._patterns[key] = self.upload(pattern(dtype, shape[-1]), DTYPES["u8"])
        source = self._patterns[key]
        nbytes = prod(shape[:-1]) * dtype.row_nbytes(shape[-1])
        buffer = self.device.alloc(nbytes)
        with self.device:
            for start in range(0, nbytes, source.nbytes):
                self.device.copy_d2d(
                    buffer.address + start, source.address, min(source.nbytes, nbytes - start), self.stream
                )
        return Tensor(buffer.address, shape, dtype, buffer)

    def ones(self, count: int) -> Tensor:
        """A norm's weights."""
        return self.upload(np.ones(count, np.float32))


def random_model(backend: CudaBackend, arch: Arch, dtype: str, context: int) -> tuple[WeightsHandle, KvCacheHandle]:
    """Weights and a KV cache on the device."""
    arrays, tensors, nbytes = DeviceArrays(backend), {}, 0
    for slot, shape in tensor_slots(arch).items():
        tensors[slot] = arrays.random(shape, held_as(dtype)) if len(shape) > 1 else arrays.ones(shape[0])
        nbytes += tensors[slot].nbytes
    inv_freq, factor = rope_inv_freq(arch, None, context)
    tensors["rope_inv_freq"] = arrays.upload(np.ascontiguousarray(inv_freq, np.float64))
    handle = WeightsHandle(tensors, arch.vocab_size, Decoder(arch, factor), nbytes)
    kv_dtype = "bf16" if dtype == "bf16" else "f16"
    config = KvCacheConfig(-(-context // 16), arch.num_layers, arch.num_kv_heads, arch.head_dim, 16, kv_dtype)
    return handle, backend.alloc_kv_cache(config)


def read_nbytes(weights: WeightsHandle) -> int:
    """Weight bytes a decode step reads: all but the embedding's table, unless it is the last product's as well."""
    tied = "lm_head" not in weights.tensors
    return sum(t.nbytes for slot, t in weights.tensors.items() if tied or slot != "embed")


def seconds_of(backend: CudaBackend, work: Callable[[], Any], repeats: int) -> float:
    """Median time on the device of work queued to the backend's stream."""
    device, stream = backend.device, backend.runtime.stream
    found = []
    with device:
        begin, end = device.event(timing=True), device.event(timing=True)
        for _ in range(repeats + 1):
            begin.record(stream)
            work()
            end.record(stream)
            end.synchronize()
            found.append(end.elapsed_ms(begin) / 1e3)
        begin.close()
        end.close()
    return statistics.median(found[1:])


def copy_bandwidth(backend: CudaBackend, nbytes: int = 1 << 30) -> float:
    """Bytes read and written per second by a copy within the device: what the roofline is measured against."""
    device, stream = backend.device, backend.runtime.stream
    a, b = device.alloc(nbytes), device.alloc(nbytes)
    seconds = seconds_of(backend, lambda: device.copy_d2d(b.address, a.address, nbytes, stream), 8)
    a.free()
    b.free()
    device.trim()
    return 2 * nbytes / seconds
