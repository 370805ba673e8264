"""The simulated device sees what it is for: planted bugs, in every order, and under the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hostsim import sanitize, session
from hostsim.direct import ORDERS, HostKernels, KernelFailedError

pytestmark = pytest.mark.skipif(
    session.on_real_gpu() or session.is_sanitized(), reason="bugs planted in the simulated device"
)

IN = np.arange(1, 129, dtype=np.float32)
REVERSED = IN[::-1]


@pytest.fixture(scope="module")
def kernels() -> HostKernels:
    return HostKernels(session.folder())


def run(kernels: HostKernels, name: str, order: str, blocks: int = 1) -> np.ndarray:
    out = np.full(256, np.nan, np.float32)
    out[:blocks] = 1 if blocks > 1 else np.nan
    os.environ["HOSTSIM_ORDER"] = order
    try:
        kernels.launch(f"bugs__{name}", (blocks, 1, 1), (128, 1, 1), 0, out.ctypes.data, IN.ctypes.data)
    finally:
        del os.environ["HOSTSIM_ORDER"]
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_bugs(kernels: HostKernels, order: str) -> None:
    assert np.array_equal(run(kernels, "none", order)[:128], REVERSED)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("divergent_barrier", "__syncthreads in divergent code"),
        ("exit_before_barrier", "exited"),
        ("exit_before_shuffle", "exited"),
        ("divergent_shuffle", "warp diverged: lane"),
        ("copy_never_waited", "exited with 1 cp.async not waited for"),
        ("misaligned_copy", "not 16-byte aligned"),
        ("null_pointer", "illegal access at address"),
    ],
)
def test_bugs_that_are_reported(kernels: HostKernels, name: str, problem: str, order: str) -> None:
    with pytest.raises(KernelFailedError, match=rf"bugs__{name}: block \(0,0,0\).*{problem}"):
        run(kernels, name, order)
    assert np.array_equal(run(kernels, "none", order)[:128], REVERSED)  # the engine is as good as before


@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("no_syncthreads", lambda out: np.array_equal(out[:128], REVERSED)),
        ("no_syncwarp", lambda out: np.array_equal(out[:128], IN.reshape(4, 32)[:, ::-1].reshape(128))),
        ("write_after_read", lambda out: np.array_equal(out[:128], 2 * np.roll(IN, -1)[::-1])),
        ("uninitialized_shared", lambda out: not np.isnan(out[:128]).any()),
        ("copy_read_before_wait", lambda out: np.array_equal(out[:128], IN)),
    ],
)
def test_bugs_that_spoil_results(kernels: HostKernels, name: str, is_right: Callable[[np.ndarray], bool]) -> None:
    assert not any(is_right(run(kernels, name, order)) for order in ORDERS)


def test_the_order_of_blocks_shows(kernels: HostKernels) -> None:
    assert run(kernels, "block_order", "asc", 2)[0] != run(kernels, "block_order", "desc", 2)[0]


def test_threads_of_the_machine_run_blocks_side_by_side(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTSIM_THREADS", "3")
    out = np.zeros(32, np.float32)
    counter = np.zeros(1, np.int32)
    args = np.array((IN.ctypes.data, out.ctypes.data), [("in", "<i8"), ("out", "<i8")])
    kernels.launch("conformance__count", (100, 1, 1), (32, 1, 1), 0, args, counter.ctypes.data)
    assert counter[0] == 100


def test_wrong_parameters(kernels: HostKernels) -> None:
    with pytest.raises(TypeError, match=r"takes parameters of \[8, 8\] bytes, got \[8\]"):
        kernels.launch("bugs__none", (1, 1, 1), (128, 1, 1), 0, 1)
    with pytest.raises(KeyError, match="no kernel bugs__nothing"):
        kernels.launch("bugs__nothing", (1, 1, 1), (128, 1, 1), 0)
    with pytest.raises(KernelFailedError, match="a block of 2048 threads"):
        kernels.launch("bugs__none", (1, 1, 1), (2048, 1, 1), 0, 1, 1)


SANITIZED = """
import sys
import numpy as np
from pathlib import Path
from hostsim.direct import HostKernels
data = np.arange(1, 129, dtype=np.float32)
out = np.zeros(128, np.float32)
kernels = HostKernels(Path(sys.argv[1]))
kernels.launch("bugs__" + sys.argv[2], (1, 1, 1), (128, 1, 1), 0, out.ctypes.data, data.ctypes.data)
"""


@pytest.mark.parametrize(
    ("sanitizer", "name", "finding"),
    [
        ("asan", "none", ""),
        ("asan", "shared_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("asan", "global_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("tsan", "none", ""),
        ("tsan", "no_syncthreads", "ThreadSanitizer: data race"),
        ("tsan", "no_syncwarp", "ThreadSanitizer: data race"),
        ("tsan", "write_after_read", "ThreadSanitizer: data race"),
        ("tsan", "copy_read_before_wait", "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers(sanitizer: str, name: str, finding: str) -> None:
    environment = sanitize.environment(sanitizer, ops=[]) | {"PYTHONMALLOC": "malloc"}
    roots = [Path(__file__).parents[1], Path(__file__).parents[2]]
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, environment["GLLM_HOSTSIM"], name],
        env=environment | {"PYTHONPATH": ":".join(map(str, roots))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finding in done.stderr
    assert (done.returncode == 0) == (finding == "")
