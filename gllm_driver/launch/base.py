"""What every op's launch arithmetic speaks of: the device's limits and one kernel launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Grid = tuple[int, int, int]

# (address, dtype, shape, box) of an array → what makes its tensor map the parameter of a kernel: u8 [128].
Encode = Callable[[int, str, tuple[int, int], tuple[int, int]], np.ndarray]

MAX_GRID_YZ = 65_535  # gridDim.y and .z; .x may reach 2**31 - 1
BOX_COLS = 64  # elements of a row of a box: 128 bytes, the span of the swizzle
STATIC_SMEM_NBYTES = 48 << 10  # shared memory a block gets without opting in


@dataclass(frozen=True)
class DeviceProps:
    """The figures of a device that grids are chosen by."""

    cc: tuple[int, int]  # compute capability
    num_sms: int
    max_smem_optin: int  # bytes of shared memory a block may have after opting in
    warp_size: int = 32


@dataclass(frozen=True)
class TensorMap:
    """An array [rows, cols] of 16-bit floats in device memory, as the copy engine of sm_90 reads it: boxes of
    `box_rows` rows by 64 elements, which it puts into shared memory swizzled, zeros for what lies outside of the array.
    """

    address: int  # a multiple of 16; an offset where `in_workspace`
    rows: int
    cols: int  # a multiple of 8
    dtype: str
    box_rows: int  # at most 256
    in_workspace: bool = False

    def encoded(self, encode: Encode, workspace: int) -> np.ndarray:
        """The map as a kernel's parameter."""
        address = self.address + workspace * self.in_workspace
        return encode(address, self.dtype, (self.rows, self.cols), (self.box_rows, BOX_COLS))


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Grids may depend on shapes, never on values that change between replays of a graph."""

    symbol: str  # `<op>__<variant>`, in the binary of that op
    grid: Grid
    block: Grid
    smem_nbytes: int = 0  # dynamic shared memory
    workspace_nbytes: int = 0  # scratch in device memory; not 0: its address follows the tensor maps
    overlaps: bool = False  # the kernel calls wait_for_earlier_launches() and may start before the one before has ended

    num_counters: int = 0  # i32, zero before and after the launch; not 0: their address is the kernel's last parameter
    addresses: tuple[int, ...] = ()  # parameters right behind the argument struct
    args: np.ndarray | None = field(default=None, compare=False)  # the struct of a kernel that is another op's

    tensor_maps: tuple[TensorMap, ...] = ()  # parameters right behind the argument struct

    @property
    def takes_workspace(self) -> bool:
        return self.workspace_nbytes > 0

    def params(self, args: np.ndarray, workspace: int, counters: int, encode: Encode) -> tuple[np.ndarray | int, ...]:
        """The kernel's parameters, given the op's argument struct and the addresses of workspace and counters."""
        struct = args if self.args is None else self.args
        maps = tuple(m.encoded(encode, workspace) for m in self.tensor_maps)
        scratch = (workspace,) * self.takes_workspace + (counters,) * (self.num_counters > 0)
        return (struct, *self.addresses, *maps, *scratch)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a ≥ 0."""
    return -(-a // b)
