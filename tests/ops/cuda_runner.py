"""Runs an op's CUDA kernels on arrays of a test case: on the simulated device directly, or through the driver.

Both are runners as op_harness wants them. `direct()` calls the host-compiled kernels on the test's own memory, which
lies between guards and is poisoned. `through_driver()` copies that memory, guards included, to a device (simulated or real)
and back, so the guards are checked after the trip.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from op_harness import Runner

from gllm_driver.ops import CONTRACTS
from gllm_driver.types import Tensor

ROOT = Path(__file__).parents[2]


def kernel_ops() -> list[str]:
    """Ops that have CUDA kernels, in the order of CONTRACTS."""
    files = {path.stem for path in (ROOT / "kernels_cu").glob("*.cu")}
    return [op for op in CONTRACTS if op in files]


@functools.cache
def direct() -> Runner:
    """A runner on the simulated device without a driver in between. Builds it first; skips without a C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("the simulated device needs g++")
    from hostsim import build
    from hostsim.direct import HostKernels

    kernels = HostKernels(build.build())

    def run(op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float]) -> None:
        kernels.run_op(op, arrays, scalars)

    return run
