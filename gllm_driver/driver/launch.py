"""Launching kernels with parameters packed once: the driver is given one address per launch, nothing is converted."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .gate import call, cu

if TYPE_CHECKING:
    from .stream import Stream

_ATTRIBUTE = cu.CUfunction_attribute
_DEFAULT_SMEM_NBYTES = 48 << 10  # what a block may have without opting in


class PackedParams:
    """A kernel's parameters as the driver wants them: an array of pointers to values, at `address`.

    `values[i]` is parameter i as bytes; writing there changes the launches that follow.
    """

    def __init__(self, *params: np.ndarray | int) -> None:
        """`params`: argument structs (0-d structured arrays, passed by value) and addresses (integers)."""
        self.values = [
            np.frombuffer(bytearray(p.to_bytes(8, "little") if isinstance(p, int) else p.tobytes()), np.uint8)
            for p in params
        ]
        self._pointers = (ctypes.c_void_p * max(1, len(params)))(*[v.ctypes.data for v in self.values])
        self.address = ctypes.addressof(self._pointers)

    @property
    def nbytes(self) -> list[int]:
        """Size of each parameter."""
        return [v.nbytes for v in self.values]


def _overlapping(
    grid: tuple[int, int, int], block: tuple[int, int, int], smem_nbytes: int, stream: Stream
) -> cu.CUlaunchConfig:
    """The configuration of a launch that may start before the one before it has ended."""
    attribute = cu.CUlaunchAttribute()
    attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = cu.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = smem_nbytes
    config.hStream = stream.handle
    config.attrs = [attribute]
    config.numAttrs = 1
    return config


class Function:
    """A kernel of a loaded module."""

    def __init__(self, symbol: str, handle: Any) -> None:
        self.symbol = symbol
        self.handle = handle
        self._smem_limit = _DEFAULT_SMEM_NBYTES

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        smem_nbytes: int,
        stream: Stream,
        params: int | PackedParams,
        overlaps: bool = False,
    ) -> None:
        """Queue one launch; `params` is a PackedParams or its address. The driver copies the values before it returns.

        `overlaps`: it may start before the kernel launched before it has ended (programmatic dependent launch, devices
        of compute capability 9.0 on); the kernel then waits for that one by itself.

        Needs the device's context on the calling thread. Raises DriverError for a grid or block beyond the limits.
        """
        if smem_nbytes > self._smem_limit:
            self.allow_smem(smem_nbytes)
        address = params if isinstance(params, int) else params.address
        if overlaps:
            call(cu.cuLaunchKernelEx, _overlapping(grid, block, smem_nbytes, stream), self.handle, address, 0)
            return
        call(cu.cuLaunchKernel, self.handle, *grid, *block, smem_nbytes, stream.handle, address, 0)

    def allow_smem(self, nbytes: int) -> None:
        """Opt in to more dynamic shared memory than 48 kB. Raises DriverError when the device has less."""
        call(cu.cuFuncSetAttribute, self.handle, _ATTRIBUTE.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes)
        self._smem_limit = max(self._smem_limit, nbytes)

    @cached_property
    def param_nbytes(self) -> list[int]:
        """Sizes of the parameters, as the binary says."""
        sizes: list[int] = []
        while True:
            result = cu.cuFuncGetParamInfo(self.handle, len(sizes))
            if result[0]:  # past the last
                return sizes
            sizes.append(int(result[2]))

    @cached_property
    def num_registers(self) -> int:
        return self._attribute(_ATTRIBUTE.CU_FUNC_ATTRIBUTE_NUM_REGS)

    @cached_property
    def max_threads(self) -> int:
        """Most threads a block may have."""
        return self._attribute(_ATTRIBUTE.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)

    @cached_property
    def static_smem_nbytes(self) -> int:
        return self._attribute(_ATTRIBUTE.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)

    @cached_property
    def local_nbytes(self) -> int:
        """Bytes of stack and spills per thread."""
        return self._attribute(_ATTRIBUTE.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)

    @cached_property
    def binary_arch(self) -> int:
        """The architecture the driver loaded: 80 for sm_80."""
        return self._attribute(_ATTRIBUTE.CU_FUNC_ATTRIBUTE_BINARY_VERSION)

    def occupancy(self, block_size: int, smem_nbytes: int) -> int:
        """Blocks that fit on one multiprocessor at once."""
        return int(call(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor, self.handle, block_size, smem_nbytes))

    def _attribute(self, which: cu.CUfunction_attribute) -> int:
        return int(call(cu.cuFuncGetAttribute, which, self.handle))
