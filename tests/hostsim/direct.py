"""Run host-compiled kernels straight from Python, on numpy memory: no driver, no cubins. For kernel authors.

    from hostsim.direct import HostKernels
    HostKernels().run_op("rms_norm", tensors, scalars)      # by the op's launch arithmetic; a runner of tests/ops
    HostKernels().launch("rms_norm__f32", (4, 1, 1), (256, 1, 1), 0, args)

The variables HOSTSIM_ORDER, HOSTSIM_SEED and HOSTSIM_THREADS mean what README.md says.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gllm_driver.launch import DeviceProps, launches
from gllm_driver.ops import CONTRACTS
from gllm_driver.types import Tensor

from . import build

ORDERS = {"asc": 0, "desc": 1, "rand": 2}
A100_LIKE = DeviceProps(cc=(8, 0), num_sms=8, max_smem_optin=163 << 10)
SCRATCH_GUARD = 4096


def encode_tensor_map(address: int, dtype: str, shape: tuple[int, int], box: tuple[int, int]) -> np.ndarray:
    """A tensor map as the engine reads it (engine/hopper.h), of 16-bit elements swizzled by 128 bytes."""
    rows, cols = shape
    fields = (0x70616D726F736E74, address, cols * 2, 0, 0, 0, cols, rows, 0, 0, 0, box[1], box[0], 0, 0, 0, 2, 2, 128)
    return np.frombuffer(struct.pack("<6Q13I28x", *fields), np.uint8)


class KernelFailedError(Exception):
    """A kernel did something the device would not forgive: which thread, where and what."""


class HostKernels:
    """The kernels of one build."""

    def __init__(self, folder: Path | None = None) -> None:
        path = (folder or build.default_folder()) / build.KERNEL_LIBRARY
        self.library = library = ctypes.CDLL(str(path))
        library.hostsim_kernel.restype = ctypes.c_void_p
        library.hostsim_kernel_name.restype = ctypes.c_char_p
        library.hostsim_launch.argtypes = [
            *[ctypes.c_void_p] * 3,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]

    def names(self) -> list[str]:
        """Every kernel's symbol."""
        found: list[str] = []
        while name := self.library.hostsim_kernel_name(len(found)):
            found.append(name.decode())
        return sorted(found)

    def param_nbytes(self, symbol: str) -> list[int]:
        """Sizes of a kernel's parameters. KeyError for a symbol the build does not have."""
        kernel = self.library.hostsim_kernel(symbol.encode())
        if not kernel:
            raise KeyError(f"no kernel {symbol}; there are {', '.join(self.names())}")
        sizes = ctypes.POINTER(ctypes.c_size_t)()
        count = self.library.hostsim_kernel_params(ctypes.c_void_p(kernel), ctypes.byref(sizes))
        return [sizes[i] for i in range(count)]

    def launch(
        self,
        symbol: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        smem_nbytes: int,
        *params: np.ndarray | ctypes.Structure | int,
    ) -> None:
        """Run one grid to its end. Integers are passed as addresses, everything else by value.

        Raises KernelFailedError; KeyError for a symbol the build does not have.
        """
        expected = self.param_nbytes(symbol)
        values = [bytes(p) if not isinstance(p, int) else p.to_bytes(8, "little") for p in params]
        given = [len(v) for v in values]
        if given != expected:
            raise TypeError(f"{symbol} takes parameters of {expected} bytes, got {given}")
        buffers = [ctypes.create_string_buffer(v, len(v)) for v in values]
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*[ctypes.addressof(b) for b in buffers])
        error = ctypes.create_string_buffer(1024)
        failed = self.library.hostsim_launch(
            self.library.hostsim_kernel(symbol.encode()),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            smem_nbytes,
            pointers,
            ORDERS[os.environ.get("HOSTSIM_ORDER", "asc")],
            int(os.environ.get("HOSTSIM_SEED", "0")),
            int(os.environ.get("HOSTSIM_THREADS", "1")),
            error,
            len(error),
        )
        if failed:
            raise KernelFailedError(error.value.decode())

    def run_op(
        self,
        op: str,
        arrays: Mapping[str, Tensor | None],
        scalars: Mapping[str, float] | None = None,
        device: DeviceProps = A100_LIKE,
        deterministic: bool = True,
    ) -> None:
        """Check a call against its contract and run the launches its arithmetic says; scratch memory is guarded NaN."""
        args = CONTRACTS[op].bind(arrays, scalars)
        dtypes = {name: tensor.dtype.name for name, tensor in arrays.items() if tensor is not None}
        todo = launches(op, args, dtypes, device, deterministic)
        nbytes = max((launch.workspace_nbytes for launch in todo), default=0)
        scratch = np.full(nbytes + 2 * SCRATCH_GUARD, 0xFF, np.uint8)
        address = scratch.ctypes.data + SCRATCH_GUARD
        address += -address % 256
        counters = np.zeros(1 + max((launch.num_counters for launch in todo), default=0), np.int32)
        for launch in todo:
            if launch.smem_nbytes > device.max_smem_optin:
                raise KernelFailedError(
                    f"{launch.symbol}: {launch.smem_nbytes} bytes of shared memory, {device.max_smem_optin} at most"
                )
            params = launch.params(args, address, counters.ctypes.data, encode_tensor_map)
            self.launch(launch.symbol, launch.grid, launch.block, launch.smem_nbytes, *params)
        if counters.any():
            raise KernelFailedError(f"{op}: counters are not zero after the launch")
        start = address - scratch.ctypes.data
        if not (scratch[:start] == 0xFF).all() or not (scratch[start + nbytes :] == 0xFF).all():
            raise KernelFailedError(f"{op}: written outside its {nbytes} bytes of scratch")
