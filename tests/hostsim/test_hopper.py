"""What is specific to sm_90a on the simulated device: planted bugs are seen, in every order of threads."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hostsim import session
from hostsim.direct import ORDERS, HostKernels, KernelFailedError, encode_tensor_map

pytestmark = pytest.mark.skipif(
    session.on_real_gpu() or session.is_sanitized(), reason="bugs planted in the simulated device"
)

SMEM_NBYTES = 2 * 64 * 128 + 16


@pytest.fixture(scope="module")
def kernels() -> HostKernels:
    return HostKernels(session.folder())


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOSTSIM_ORDER", request.param)
    return str(request.param)


def run(kernels: HostKernels, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The product a kernel comes to, and the right one, both [64, 64]."""
    g = np.random.default_rng(1)
    a, b = (g.integers(-4, 5, (64, 256)).astype(ml_dtypes.bfloat16) for _ in range(2))
    out = np.zeros((128, 32), np.float32)
    maps = [encode_tensor_map(m.ctypes.data, "bf16", (64, 256), (64, 64)) for m in (a, b)]
    kernels.launch(f"hopperbugs__{name}", (1, 1, 1), (160, 1, 1), SMEM_NBYTES, out.ctypes.data, *maps)
    product = np.zeros((64, 64), np.float32)
    for thread in range(128):
        for i in range(32):
            row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
            product[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = out[thread, i]
    return product, a.astype(np.float32) @ b.astype(np.float32).T


def test_a_kernel_without_bugs(kernels: HostKernels, order: str) -> None:
    product, expected = run(kernels, "none")
    assert np.array_equal(product, expected)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_wait", "more arrivals in a phase than the 1"),
        ("no_fence", "wgmma without a wgmma_fence"),
        ("half_ask", "threads of a warpgroup ask for different products|only 64 of 128 threads"),
        ("too_many_arrivals", "more arrivals in a phase than the 1"),
        ("nothing_comes", "deadlock.*in mbarrier_wait"),
        ("box_not_awaited", "exited with 2 boxes not waited for"),
        ("product_not_awaited", "exited with a wgmma not waited for"),
        ("no_init", "never initialized"),
        ("misaligned", "the destination is not aligned"),
    ],
)
def test_bugs_that_are_reported(kernels: HostKernels, name: str, problem: str, order: str) -> None:
    with pytest.raises(KernelFailedError, match=problem):
        run(kernels, name)
    product, expected = run(kernels, "none")  # the engine is as good as before
    assert np.array_equal(product, expected)


@pytest.mark.parametrize("name", ["wrong_phase", "no_empty_wait", "early_release", "no_product_wait"])
def test_bugs_that_spoil_results(kernels: HostKernels, name: str, order: str) -> None:
    try:
        product, expected = run(kernels, name)
    except KernelFailedError:
        return
    assert not np.array_equal(product, expected)
