"""Runs an op's CUDA kernels on arrays of a test case: on the simulated device directly, or through the driver.

Both are runners as op_harness wants them. `direct()` calls the host-compiled kernels on the test's own memory, which
lies between guards and is poisoned. `DriverRunner` copies that memory, guards included, to a device (simulated or real)
and back, so that the guards are checked after the trip; a real GPU runs the parity suite by

    runner = DriverRunner(); run_case(contract, case, storage, runner, shift)
"""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from op_harness import Runner

from gllm_driver.launch import DeviceProps, Launch, launches
from gllm_driver.ops import CONTRACTS
from gllm_driver.types import FLOAT_DTYPES, Tensor

if TYPE_CHECKING:
    from gllm_driver.driver.memory import DeviceBuffer

ROOT = Path(__file__).parents[2]
ALIGNMENT = 256  # arrays lie on the device as they lie here, relative to this
SCRATCH_GUARD = 4096
# Types weights have on a device: every width and kind, group sizes in turn; test_cuda_packed.py has them all.
DEVICE_WEIGHTS = (*FLOAT_DTYPES, "p8_32", "p4_32", "p4_32m", "p2_16m", "p1_32")


def kernel_ops() -> list[str]:
    """Ops that have CUDA kernels, in the order of CONTRACTS."""
    files = {path.stem for path in (ROOT / "kernels_cu").glob("*.cu")}
    return [op for op in CONTRACTS if op in files]


@functools.cache
def hostsim_folder() -> Path:
    """The folder of the simulated device, built. Skips without a C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("the simulated device needs g++")
    from hostsim import build

    return build.build()


@functools.cache
def direct() -> Runner:
    """A runner on the simulated device without a driver in between."""
    from hostsim.direct import HostKernels

    kernels = HostKernels(hostsim_folder())

    def run(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        kernels.run_op(op, arrays, scalars)

    return run


@functools.cache
def simulated_driver() -> DriverRunner:
    """A runner through the driver package and the stub libcuda. Only for processes that use no real one."""
    ctypes.CDLL(str(hostsim_folder() / "libcuda.so.1"), ctypes.RTLD_GLOBAL)  # found by its name from now on
    return DriverRunner()


@dataclass(frozen=True)
class Copied:
    """A piece of host memory on the device, at the same offset from a multiple of ALIGNMENT."""

    memory: np.ndarray  # u8
    buffer: DeviceBuffer
    start: int  # device address of its first byte

    def address_of(self, tensor: Tensor) -> int:
        return self.start + tensor.address - self.memory.ctypes.data


class DriverRunner:
    """Uploads, launches, downloads. One device, one stream, every kernel of the manifest."""

    def __init__(self, index: int = 0, cubins: Path | None = None, deterministic: bool = True) -> None:
        from gllm_driver.driver import open_device
        from gllm_driver.driver.manifest import FOLDER
        from gllm_driver.driver.module import KernelLibrary

        self.device = open_device(index)
        self.library = KernelLibrary(self.device, cubins or FOLDER)
        self.stream = self.device.stream()
        self.deterministic = deterministic
        properties = self.device.properties
        self.props = DeviceProps(properties.cc, properties.num_sms, properties.max_smem_optin)

    def __call__(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        """Run an op on host tensors whose owners are the memory they lie in, as op_memory.Placed makes them."""
        given = {name: tensor for name, tensor in arrays.items() if tensor is not None}
        copies = {id(t.owner): t.owner for t in given.values()}  # arrays that share memory share it there, too
        on_device = {key: self.upload(memory) for key, memory in copies.items()}
        tensors: dict[str, Tensor | None] = dict.fromkeys(arrays)
        for name, tensor in given.items():
            tensors[name] = replace(tensor, address=on_device[id(tensor.owner)].address_of(tensor))
        args = CONTRACTS[op].bind(tensors, scalars)
        dtypes = {name: tensor.dtype.name for name, tensor in given.items()}
        self.launch(launches(op, args, dtypes, self.props, self.deterministic), args)
        for copied in on_device.values():
            self.device.copy_d2h(copied.memory.ctypes.data, copied.start, copied.memory.nbytes)
            copied.buffer.free()

    def upload(self, memory: np.ndarray) -> Copied:
        """Copy a whole owner, guards and all."""
        offset = memory.ctypes.data % ALIGNMENT
        buffer = self.device.alloc(memory.nbytes + offset)
        self.device.copy_h2d(buffer.address + offset, memory.ctypes.data, memory.nbytes)
        return Copied(memory, buffer, buffer.address + offset)

    def launch(self, todo: list[Launch], args: np.ndarray) -> None:
        """Run launches in order and wait. Scratch memory is poisoned, and guarded on both sides."""
        from gllm_driver.driver.launch import PackedParams
        from gllm_driver.driver.tensor_map import encode_tensor_map

        nbytes = max((launch.workspace_nbytes for launch in todo), default=0)
        counters = self.device.alloc(4 * max((launch.num_counters for launch in todo), default=0) + 4)
        guarded = self.device.alloc(nbytes + 2 * SCRATCH_GUARD)
        scratch = guarded.address + SCRATCH_GUARD
        with self.device:
            self.device.fill(guarded.address, 0xFF, guarded.nbytes, self.stream)
            self.device.fill(counters.address, 0, counters.nbytes, self.stream)
            for launch in todo:
                params = PackedParams(*launch.params(args, scratch, counters.address, encode_tensor_map))
                function = self.library.function(launch.symbol)
                function.launch(launch.grid, launch.block, launch.smem_nbytes, self.stream, params)
            self.stream.synchronize()
        left: np.ndarray[Any, np.dtype[np.uint8]] = np.empty(guarded.nbytes, np.uint8)
        self.device.copy_d2h(left.ctypes.data, guarded.address, guarded.nbytes)
        guarded.free()
        counted: np.ndarray[Any, np.dtype[np.uint8]] = np.empty(counters.nbytes, np.uint8)
        self.device.copy_d2h(counted.ctypes.data, counters.address, counters.nbytes)
        counters.free()
        assert (counted == 0).all(), "counters are left as they were found: zero"
        assert (left[:SCRATCH_GUARD] == 0xFF).all(), "written before the scratch memory"
        assert (left[SCRATCH_GUARD + nbytes :] == 0xFF).all(), "written beyond the scratch memory"
