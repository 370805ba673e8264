"""Values every layer shares: element types, tensors, handles, batches. No numba, no CUDA, no file formats here."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DType:
    """How elements lie in memory: `block_nbytes` bytes hold `block_size` consecutive elements of a row.

    `code` is what kernels see; it is part of the kernel ABI, so a code is never reused.
    """

    name: str
    code: int
    block_size: int
    block_nbytes: int

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def row_nbytes(self, num_elements: int) -> int:
        """Bytes of a row of `num_elements`; a row must hold whole blocks."""
        blocks, rest = divmod(num_elements, self.block_size)
        if rest:
            raise ValueError(f"{num_elements} elements are no whole number of {self.name} blocks of {self.block_size}")
        return blocks * self.block_nbytes

    def __repr__(self) -> str:
        return f"DType({self.name})"


F32 = DType("f32", 0, 1, 4)
F16 = DType("f16", 1, 1, 2)
BF16 = DType("bf16", 2, 1, 2)
I32 = DType("i32", 3, 1, 4)
I64 = DType("i64", 4, 1, 8)
U8 = DType("u8", 5, 1, 1)
F64 = DType("f64", 6, 1, 8)
Q8_0 = DType("q8_0", 8, 32, 34)
Q4_0 = DType("q4_0", 9, 32, 18)

_FIXED = (F32, F16, BF16, I32, I64, U8, F64, Q8_0, Q4_0)

# Block formats of GGUF beside those two: name, elements and bytes of a block.
_GGUF_BLOCKS = (
    ("q4_1", 32, 20),
    ("q5_0", 32, 22),
    ("q5_1", 32, 24),
    ("q2_k", 256, 84),
    ("q3_k", 256, 110),
    ("q4_k", 256, 144),
    ("q5_k", 256, 176),
    ("q6_k", 256, 210),
    ("iq4_nl", 32, 18),
    ("iq4_xs", 256, 136),
)

# Block formats of GGUF that are repacked when a model is loaded: no kernel reads them.
_GGUF_READ_ONLY_BLOCKS = (
    ("iq2_xxs", 256, 66),
    ("iq2_xs", 256, 74),
    ("iq2_s", 256, 82),
    ("iq3_xxs", 256, 98),
    ("iq3_s", 256, 110),
    ("iq1_s", 256, 50),
    ("iq1_m", 256, 56),
    ("tq1_0", 256, 54),
    ("tq2_0", 256, 66),
    ("mxfp4", 32, 17),
    ("nvfp4", 64, 36),
)

# Native block formats int{bits}_{block}{kind}: a f16 scale, one more f16 for the kinds z (zero point) and m (minimum),
# then the quants (docs/quantization.md).
NATIVE_BITS, NATIVE_BLOCK_SIZES, NATIVE_KINDS = (8, 4, 2, 1), (32, 64, 128), ("", "z", "m")


def native_name(bits: int, block_size: int, kind: str) -> str:
    """(4, 64, "z") → int4_64z."""
    return f"int{bits}_{block_size}{kind}"


_NATIVE_BLOCKS = tuple(
    (native_name(bits, block_size, kind), block_size, (4 if kind else 2) + block_size * bits // 8)
    for bits in NATIVE_BITS
    for block_size in NATIVE_BLOCK_SIZES
    for kind in NATIVE_KINDS
)

# Codes follow the order of these rows: new ones go at the end.
_BLOCK_ROWS = (*_GGUF_BLOCKS, *_NATIVE_BLOCKS, *_GGUF_READ_ONLY_BLOCKS)

DTYPES: dict[str, DType] = {d.name: d for d in _FIXED} | {
    name: DType(name, code, block_size, nbytes) for code, (name, block_size, nbytes) in enumerate(_BLOCK_ROWS, 10)
}
FLOAT_DTYPES = ("f32", "f16", "bf16")
# Types a weight matrix may be stored in. Each backend says which of them its ops compute; the others are repacked when
# a model is loaded (quant/repack.py).
WEIGHT_DTYPES = (*FLOAT_DTYPES, *(d.name for d in DTYPES.values() if d.is_quantized))


@dataclass(frozen=True)
class Tensor:
    """A dense row-major array on some device: an address, a shape in elements, an element type.

    `owner` keeps the memory alive (a numpy array, a file mapping, a device allocation) and is never looked into.
    """

    address: int
    shape: tuple[int, ...]
    dtype: DType
    owner: Any = field(repr=False, compare=False, default=None)

    @property
    def num_rows(self) -> int:
        """Number of rows: the product of all axes but the last."""
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows

    @property
    def row_nbytes(self) -> int:
        return self.dtype.row_nbytes(self.shape[-1]) if self.shape else self.dtype.block_nbytes

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_nbytes

    @classmethod
    def from_numpy(cls, array: np.ndarray, dtype: DType | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """A host tensor over `array` (C-contiguous, not copied).

        Without `dtype` the array's own type is used (ml_dtypes.bfloat16 is bf16). Packed types (q8_0 …) come as bytes:
        give `dtype`, and `shape` in elements.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"tensor memory must be contiguous, got strides {array.strides} for shape {array.shape}")
        dtype = dtype or DTYPES[_NUMPY_NAMES[array.dtype.name]]
        tensor = cls(array.ctypes.data, array.shape if shape is None else shape, dtype, array)
        if tensor.nbytes != array.nbytes:
            raise ValueError(f"{tensor.shape} of {dtype.name} needs {tensor.nbytes} bytes, got {array.nbytes}")
        return tensor

    def to_numpy(self) -> np.ndarray:
        """A view of host memory in the tensor's shape; packed types come as bytes [num_rows, row_nbytes]."""
        import ctypes

        raw = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))
        if self.dtype.is_quantized:
            return raw.reshape(self.num_rows, self.row_nbytes)
        if self.dtype.name == "bf16":
            import ml_dtypes

            return raw.view(ml_dtypes.bfloat16).reshape(self.shape)
        return raw.view(_NUMPY_TYPES[self.dtype.name]).reshape(self.shape)


_NUMPY_TYPES = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
}
_NUMPY_NAMES = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
}


class PageState(enum.Enum):
    """Where a KV page is and whether it may leave the device (docs/architecture.md, "KV pages")."""

    ACTIVE = "active"
    STANDBY = "standby"
    SWAPPED = "swapped"
    WARM = "warm"
    PROTECTED = "protected"


@dataclass(frozen=True)
class PageMetadata:
    """What is known about one KV page. Times are seconds of the clock the KV manager was given.

    Ids from the cache's `num_pages` up are host slots: page `num_pages + slot` is SWAPPED.
    """

    page_id: int
    sequence_id: int | None  # None: shared by several sequences, or held by none
    state: PageState
    recency: int = 0  # distinct pages accessed between its last two accesses, or since the last if those are more
    is_lir: bool = False  # low inter-reference recency: among the share of pages used at the shortest intervals
    swap_in_time: float | None = None
    warm_until: float | None = None
    access_count: int = 0
    last_access: float | None = None
    strategy: str | None = None  # of KV quantization, e.g. keys per channel and values per token; None: as computed
    is_attention_sink: bool = False  # holds a sequence's first tokens, which KV quantization leaves exact


@dataclass(frozen=True)
class AttentionTopology:
    """Which earlier tokens a token sees. Only the causal chain exists today; trees come with speculative decoding."""

    kind: str = "linear"

    @classmethod
    def linear(cls) -> AttentionTopology:
        """Each token sees all tokens before it."""
        return cls("linear")


@dataclass(frozen=True)
class SequenceInput:
    """New tokens of one sequence, the first of them at `position` (0-based) of that sequence."""

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]  # the sequence's KV pages in order: enough for position + len(tokens) tokens
    wants_logits: bool = True  # False: a prefill chunk that is not the last, which only fills the KV cache


@dataclass(frozen=True)
class BatchInput:
    """Sequences that take part in one forward pass; lengths and positions may all differ."""

    sequences: Sequence[SequenceInput]
    topology: AttentionTopology = field(default_factory=AttentionTopology.linear)


@dataclass(frozen=True)
class LogitsTensor:
    """A handle to one sequence's next-token logits, f32 [vocab_size], which stay on the device."""

    row: Tensor
    generation: int  # the forward pass that wrote it; a later pass overwrites it


@dataclass(frozen=True)
class Traffic:
    """Bytes that crossed the bus between host and device so far. The CPU backend has no bus: the first two stay 0.

    kv_out and kv_in: of KV pages that were copied to host memory and back, and the seconds those copies took, as far
    as they are done.
    """

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    kv_out_bytes: int = 0
    kv_out_s: float = 0.0
    kv_in_bytes: int = 0
    kv_in_s: float = 0.0

    @property
    def kv_out_gb_per_s(self) -> float:
        return self.kv_out_bytes / self.kv_out_s / 1e9 if self.kv_out_s else 0.0

    @property
    def kv_in_gb_per_s(self) -> float:
        return self.kv_in_bytes / self.kv_in_s / 1e9 if self.kv_in_s else 0.0

    def __sub__(self, earlier: Traffic) -> Traffic:
        """What came since `earlier`."""
        return Traffic(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))
