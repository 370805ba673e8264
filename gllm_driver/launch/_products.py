"""What the launches of all products with stored weights share: which kernels can take them, and on what grids.

Four families (kernels_cu/common): dot for up to four tokens and float weights, gemv for few tokens, mma for many, plain
for what those cannot take. All may overlap with the launch before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..types import DTYPES
from .base import MAX_GRID_YZ, DeviceProps, Launch, ceil_div

SEGMENT = 256  # elements of K summed in one chain
TILE_ROWS = 8  # weight rows of one tensor-core instruction
GEMV_THREADS = 128
GEMV_WARPS = GEMV_THREADS // 32
MAX_GEMV_TOKENS = 16
PANEL_NBYTES = 32 << 10  # activation rows in shared memory
PLAIN_THREADS = 256
PLAIN_TOKENS = 8
ROW_THREADS = 128
SEGMENT_STRIDE = {"f16": 512, "bf16": 512}  # bytes of a row's segment in shared memory
DEPTH_STRIDE = {"f16": 128, "bf16": 128}  # of 64 elements
DOT_THREADS = 256
DOT_WARPS = DOT_THREADS // 32
DOT_RING_NBYTES = 8 << 10  # of a warp
DOT_STATIC_NBYTES = 1024  # the most its kernels have besides
DOT_STEP = {"f32": 128, "half": 256}  # elements of a row a warp copies at once
MAX_DOT_TOKENS = 4
TENSOR_CORE_CC = (8, 0)  # binaries of earlier architectures have none of these kernels but plain
MAX_GEMV_FLOAT_TOKENS = 2  # more take less time on large tiles
RING_STAGES = {"f16": 3, "bf16": 3}


@dataclass(frozen=True)
class GemmShape:
    """Tokens by weight rows of a block, and the bytes it holds in shared memory."""

    tokens: int
    rows: int
    threads: int
    stages: int

    def smem_nbytes(self, dtype: str) -> int:
        return self.stages * (self.tokens * 128 + self.rows * DEPTH_STRIDE[dtype])

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.rows}"


LARGE = GemmShape(128, 128, 256, 3)
SMALL = GemmShape(64, 64, 128, 4)
FEW = (GemmShape(16, 32, 128, 10), GemmShape(32, 32, 128, 8))  # for float weights: more blocks, more of them under way


def half_of(dtype: str) -> str:
    """The 16-bit type in which activations meet weights of `dtype`."""
    return "bf16" if dtype == "bf16" else "f16"


def on_tensor_cores(weights: Iterable[tuple[str, int]], K: int, device: DeviceProps) -> bool:
    """Whether weights (dtype, address) of row length K can be copied 16 bytes at a time; the plain kernel takes all."""
    return device.cc >= TENSOR_CORE_CC and all(
        dtype in SEGMENT_STRIDE and address % 16 == 0 and (DTYPES[dtype].is_quantized or K % 8 == 0)
        for dtype, address in weights
    )


def dot_kind(dtype: str) -> str:
    """What the kernels of `dot` call a type of weights: one takes both 16-bit floats, in the same launch."""
    return "half" if dtype in ("f16", "bf16") else dtype


def dot(
    op: str,
    weights: Sequence[tuple[str, int]],
    T: int,
    K: int,
    units: int,
    unit: int,
    device: DeviceProps,
    workspace_nbytes: int = 0,
) -> Launch | None:
    """One pass over float weights (dtype, address) of one kind in f32; None where another family must do it."""
    dtype = weights[0][0]
    kind = dot_kind(dtype)
    if T > MAX_DOT_TOKENS or kind not in DOT_STEP or device.cc < TENSOR_CORE_CC:
        return None
    if DTYPES[dtype].row_nbytes(K) % 16 or any(address % 16 for _, address in weights):
        return None
    tokens = 1 << (T - 1).bit_length()
    smem_nbytes = DOT_WARPS * DOT_RING_NBYTES + tokens * ceil_div(K, DOT_STEP[kind]) * DOT_STEP[kind] * 4
    if smem_nbytes + DOT_STATIC_NBYTES > device.max_smem_optin:
        return None
    num_rows = units * TILE_ROWS * unit
    # More than half of a multiprocessor's, so that no two blocks share one while another has none: a launch that
    # overlaps is placed beside what is left of the one before, and a multiprocessor with two would finish last.
    smem_nbytes = max(smem_nbytes, device.max_smem_optin // 2 + (1 << 10))
    rows = 4 if tokens > 1 or num_rows >= 3 * device.num_sms * DOT_WARPS else 2
    grid = min(device.num_sms, ceil_div(num_rows, rows))
    name = f"{op}__dot_{kind}_t{tokens}_r{rows}"
    return Launch(name, (grid, 1, 1), (DOT_THREADS, 1, 1), smem_nbytes, workspace_nbytes, overlaps=True)


def takes_gemv(dtype: str, T: int, deterministic: bool) -> bool:
    """Whether weights of a dtype, which tensor cores can take, are multiplied by gemv rather than mma."""
    if DTYPES[dtype].is_quantized:
        return T <= MAX_GEMV_TOKENS
    return deterministic and T <= MAX_GEMV_FLOAT_TOKENS


def gemv_planes(dtype: str, T: int, deterministic: bool) -> int:
    """16-bit rows per token: enough for f32 activations, but one if results may not depend on the number of tokens."""
    return 1 if deterministic or not DTYPES[dtype].is_quantized else 2


def gemv(
    op: str,
    dtype: str,
    T: int,
    K: int,
    units: int,
    unit: int,
    device: DeviceProps,
    deterministic: bool,
    workspace_nbytes: int = 0,
) -> Launch:
    """One pass over the weights for T ≤ MAX_GEMV_TOKENS; `units` of `unit` tiles each."""
    planes = gemv_planes(dtype, T, deterministic)
    slots = T * planes
    segments = ceil_div(K, SEGMENT)
    pairs = ceil_div(slots, 2)
    panel = min(segments, PANEL_NBYTES // (pairs * SEGMENT * 4))
    ring = GEMV_WARPS * RING_STAGES[dtype] * TILE_ROWS * SEGMENT_STRIDE[dtype]
    parts = (panel + 1) * unit * slots * TILE_ROWS * 4
    smem_nbytes = ring + panel * SEGMENT * 4 * pairs + parts
    # As many blocks as run at once, but no more than an equal number of rounds for each needs.
    at_once = device.num_sms * max(1, min(8, (device.max_smem_optin + 1024) // (smem_nbytes + 2048)))
    grid = ceil_div(units, ceil_div(units, at_once))
    name = f"{op}__gemv_{dtype}_p{planes}_m{1 if slots <= 16 else 2}"
    return Launch(name, (grid, 1, 1), (GEMV_THREADS, 1, 1), smem_nbytes, workspace_nbytes, overlaps=True)


def prepared_nbytes(T: int, K: int) -> int:
    """Scratch of activation rows in 16 bits, in pairs, and an f32 for each."""
    return ceil_div(T, 2) * ceil_div(K, SEGMENT) * SEGMENT * 4 + T * 4


def mma(op: str, dtype: str, T: int, K: int, tiles: int, workspace_nbytes: int, device: DeviceProps) -> Launch:
    """Products of prepared rows; `tiles` of eight weight rows."""
    blocks = ceil_div(T, LARGE.tokens) * ceil_div(tiles * TILE_ROWS, LARGE.rows)
    fits = LARGE.smem_nbytes(dtype) <= device.max_smem_optin and DTYPES[dtype].row_nbytes(K) % 16 == 0
    shape = LARGE if fits and blocks >= device.num_sms else SMALL
    if not DTYPES[dtype].is_quantized:
        shape = next((few for few in FEW if few.tokens >= T), shape)
    grid = (ceil_div(tiles * TILE_ROWS, shape.rows), ceil_div(T, shape.tokens), 1)
    smem_nbytes = shape.smem_nbytes(dtype)
    return Launch(
        f"{op}__mma_{dtype}_{shape.name}", grid, (shape.threads, 1, 1), smem_nbytes, workspace_nbytes, overlaps=True
    )


def rows(op: str, kind: str, T: int, workspace_nbytes: int) -> Launch:
    """The kernel that prepares activations, one block per token."""
    return Launch(f"{op}__rows_{kind}", (T, 1, 1), (ROW_THREADS, 1, 1), 0, workspace_nbytes, overlaps=True)


def plain(op: str, T: int, N: int, workspace_nbytes: int = 0) -> Launch:
    """The kernel for any weights: a warp per row, eight tokens at a time."""
    grid = (ceil_div(N, PLAIN_THREADS // 32), min(ceil_div(T, PLAIN_TOKENS), MAX_GRID_YZ), 1)
    return Launch(f"{op}__plain", grid, (PLAIN_THREADS, 1, 1), 0, workspace_nbytes, overlaps=True)
