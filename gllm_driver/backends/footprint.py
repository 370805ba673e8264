"""What a model and a context need of a device's memory, known before any of it is reserved.

The workspace is found by recording a prefill step and a decode step with nothing behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from ..config import KvCacheConfig
from ..launch import DeviceProps, launches
from ..ops import CONTRACTS
from ..ops.sample import PARAM_WORDS
from ..packed_types import packed_dtype
from ..quant.repack import repacked_dtype
from ..types import DTYPES, F32, I32, I64, DType, Tensor
from .base import Forward, ModelWeights, StepTensors

ADDRESS = 256  # of every array: nothing is there, and it is aligned as a device's memory is
H200 = ((9, 0), 132, 227 << 10)  # compute capability, SMs, shared memory of a block: a large device needs the most

# op, its argument struct and the element types of its arrays → bytes of scratch all share, and of each thread's own
Scratch = Callable[[str, np.ndarray, Mapping[str, str]], tuple[int, int]]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one device's memory. On the CPU, weights that are computed as stored stay in the mapped file."""

    weights: int
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace


@dataclass(frozen=True)
class Sizes:
    """What decides a footprint besides the weights. `chunk`: tokens of the longest prefill step."""

    kv: KvCacheConfig
    vocab_size: int
    chunk: int
    num_threads: int = 1


def footprint(
    model: ModelWeights, sizes: Sizes, computed: Collection[str], scratch: Scratch, *, packs: bool
) -> Footprint:
    """Of a model on a device that computes weights of the types `computed`, its ops with `scratch` memory.

    packs: the device holds blocks in packed types.
    """
    placed = {slot: Tensor(ADDRESS, t.shape, held_dtype(t, computed, packs)) for slot, t in model.tensors.items()}
    distinct = {model.tensors[slot].address: tensor for slot, tensor in placed.items()}  # tied ones once
    recorded, forward, constants = {**placed, **model.constants}, model.forward, model.constants
    prefill = _workspace(forward, recorded, sizes, min(sizes.chunk, sizes.kv.num_pages * sizes.kv.page_size), scratch)
    decode = _workspace(forward, recorded, sizes, 1, scratch)
    weights = sum(t.nbytes for t in distinct.values()) + sum(t.nbytes for t in constants.values())
    return Footprint(weights, sizes.kv.nbytes, max(prefill, decode))


def held_dtype(tensor: Tensor, computed: Collection[str], packs: bool, dtype: str = "auto") -> DType:
    """What a stored tensor is held in: vectors in f32, matrices as stored where the device computes that.

    dtype: of floats, as in `load`.
    """
    if len(tensor.shape) == 1:
        return F32
    wanted = repacked_dtype(tensor.dtype, computed, dtype)
    if dtype != "auto" and not wanted.is_quantized:
        wanted = DTYPES[dtype]
    return (packed_dtype(wanted.name) or wanted) if packs else wanted


def _workspace(forward: Forward, weights: Mapping[str, Tensor], sizes: Sizes, T: int, scratch: Scratch) -> int:
    """Bytes of a step of T tokens of one sequence that fills the cache."""
    counted = _Counter(scratch, sizes.num_threads)
    kv = sizes.kv
    shape = (kv.num_pages, kv.num_layers, 2, kv.num_kv_heads, kv.page_size, kv.head_dim)
    inputs = {
        "ids": ((T,), I32),
        "positions": ((T,), I64),
        "seq": ((T,), I32),
        "offsets": ((2,), I32),
        "page_table": ((1, kv.num_pages), I32),
        "logits_rows": ((1,), I32),
        "logits": ((1, sizes.vocab_size), F32),
    }
    arrays = {name: counted.tensor(name, shape, dtype) for name, (shape, dtype) in inputs.items()}
    forward(counted, weights, Tensor(ADDRESS, shape, DTYPES[kv.dtype]), StepTensors(**arrays, is_decode=T == 1))
    chosen = {"params": ((1, PARAM_WORDS), I32), "tokens": ((1,), I32)}
    sampling = {name: counted.tensor(name, shape, dtype) for name, (shape, dtype) in chosen.items()}
    counted.add("sample", {"logits": arrays["logits"], "positions": Tensor(ADDRESS, (1,), I64), **sampling})
    return counted.nbytes


class _Counter:
    """A Recorder that keeps nothing but sizes."""

    def __init__(self, scratch: Scratch, num_threads: int) -> None:
        self._scratch, self._num_threads = scratch, num_threads
        self._arrays: dict[str, int] = {}
        self._shared = self._private = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """An array of this name that is nowhere."""
        self._arrays[name] = max(self._arrays.get(name, 0), prod(shape) * dtype.block_nbytes)
        return Tensor(ADDRESS, shape, dtype)

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.tensor(name, shape, F32)

    def add(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> None:
        args = CONTRACTS[op].bind(arrays, scalars)
        dtypes = {name: tensor.dtype.name for name, tensor in arrays.items() if tensor is not None}
        shared, private = self._scratch(op, args, dtypes)
        self._shared, self._private = max(self._shared, shared), max(self._private, private)

    @property
    def nbytes(self) -> int:
        return sum(self._arrays.values()) + self._shared + self._num_threads * self._private


def cuda_scratch(op: str, args: np.ndarray, dtypes: Mapping[str, str]) -> tuple[int, int]:
    """Of the launches on a large GPU."""
    return max((x.workspace_nbytes for x in launches(op, args, dtypes, DeviceProps(*H200))), default=0), 0
