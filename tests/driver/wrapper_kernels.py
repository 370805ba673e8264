"""The test kernels of tests/hostsim/kernels/conformance*.cu for the device at hand."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hostsim import build, session
from hostsim.direct import HostKernels
from hostsim.fake_cubin import FakeKernel, fake_cubin

from gllm_driver.ops.header import write_headers

SOURCE = build.TEST_KERNELS / "conformance.cu"
HOPPER_SOURCE = build.TEST_KERNELS / "conformance_hopper.cu"


@functools.cache
def conformance_cubin(cc: tuple[int, int]) -> bytes:
    """On the simulated device tables suffice; a real one needs nvcc. Skips the test without."""
    if session.on_real_gpu():
        return _by_nvcc(SOURCE, f"{cc[0]}{cc[1]}")
    host = HostKernels(session.folder())
    names = [n for n in host.names() if n.startswith("conformance__")]
    return fake_cubin({n: FakeKernel(host.param_nbytes(n), _launch_bounds()[n]) for n in names}, cc[0] * 10 + cc[1])


@functools.cache
def hopper_cubin() -> bytes:
    """The same for the wrappers of sm_90a."""
    return _by_nvcc(HOPPER_SOURCE, "90a") if session.on_real_gpu() else session.cubin_for_tests("hopper", 90, 160)


def _launch_bounds() -> dict[str, int]:
    found = re.findall(r"__launch_bounds__\((\d+)\) (\w+)\(", SOURCE.read_text())
    return {name: int(threads) for threads, name in found}


def _by_nvcc(source: Path, arch: str) -> bytes:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("test kernels for a real GPU need nvcc")
    write_headers(build.KERNELS / "generated")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "conformance.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", f"-I{build.KERNELS}", "-o", str(out)]
        subprocess.run([*command, str(source)], check=True, capture_output=True)
        return out.read_bytes()
