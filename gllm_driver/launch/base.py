"""What every op's launch arithmetic speaks of: the device's limits and one kernel launch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Grid = tuple[int, int, int]

MAX_GRID_YZ = 65_535  # gridDim.y and .z; .x may reach 2**31 - 1
STATIC_SMEM_NBYTES = 48 << 10  # shared memory a block gets without opting in


@dataclass(frozen=True)
class DeviceProps:
    """The figures of a device that grids are chosen by."""

    cc: tuple[int, int]  # compute capability
    num_sms: int
    max_smem_optin: int  # bytes of shared memory a block may have after opting in
    warp_size: int = 32


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Grids may depend on shapes, never on values that change between replays of a graph."""

    symbol: str  # `<op>__<variant>`, in the binary of that op
    grid: Grid
    block: Grid
    smem_nbytes: int = 0  # dynamic shared memory
    workspace_nbytes: int = 0  # scratch in device memory; not 0: its address follows `addresses`
    overlaps: bool = False  # the kernel calls wait_for_earlier_launches() and may start before the one before has ended

    num_counters: int = 0  # i32, zero before and after the launch; not 0: their address is the kernel's last parameter
    addresses: tuple[int, ...] = ()  # parameters right behind the argument struct
    args: np.ndarray | None = field(default=None, compare=False)  # the struct of a kernel that is another op's

    @property
    def takes_workspace(self) -> bool:
        return self.workspace_nbytes > 0

    def params(self, args: np.ndarray, workspace: int, counters: int) -> tuple[np.ndarray | int, ...]:
        """The kernel's parameters, given the op's argument struct and the addresses of workspace and counters."""
        struct = args if self.args is None else self.args
        return struct, *self.addresses, *(workspace,) * self.takes_workspace, *(counters,) * (self.num_counters > 0)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a ≥ 0."""
    return -(-a // b)
