"""Pages through host buffers beside the steps: the same bytes on both backends, whatever happens to the pages."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda_models import fresh, open_cuda
from hostsim import session

from gllm_driver.backends.cpu import CpuBackend
from gllm_driver.backends.cuda import pages as cuda_pages
from gllm_driver.config import KvCacheConfig
from gllm_driver.errors import BackendError, CapacityError

CONFIG = KvCacheConfig(24, 2, 2, 16, 16, "f16")

pytestmark = pytest.mark.hostsim


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "cpu":
        made = CpuBackend(1)
        yield made
        made.close()
        return
    stub = fresh()
    made = open_cuda()
    yield made
    stub.set_faults("")
    made.close()
    assert session.on_real_gpu() or stub.live() == {}


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, CONFIG.page_nbytes), np.uint8)


def test_copies_of_stages_and_swaps_keep_their_order(backend: Any) -> None:
    """Pages are given to others as soon as a copy of them is issued: what is copied next into them comes after."""
    kv = backend.alloc_kv_cache(CONFIG)
    backend.alloc_swap_space(kv, 8)
    stages = [backend.page_stage(kv, 4, 2) for _ in range(2)]
    kept, swapped, fetched = (rows(4, seed) for seed in range(3))
    pages, others = [2, 3, 9, 5], [12, 13, 14, 20]
    backend.copy_pages_from_host(kv, others, swapped)
    backend.swap_out_pages(kv, others, range(4))
    backend.copy_pages_from_host(kv, pages, kept)
    saved, brought = stages[0].take(), stages[1].hold(fetched)
    stages[0].to_host(pages, saved)
    backend.swap_in_pages(kv, range(4), pages)  # into pages that are being saved
    assert np.array_equal(backend.copy_pages_to_host(kv, pages), swapped)
    saved.wait()
    assert np.array_equal(saved.data[:4], kept)
    backend.swap_out_pages(kv, pages, range(4, 8))
    stages[1].to_device(brought, pages)  # into pages that are being swapped out
    brought.wait()
    backend.swap_in_pages(kv, range(4, 8), others)
    assert np.array_equal(backend.copy_pages_to_host(kv, others), swapped)
    assert np.array_equal(backend.copy_pages_to_host(kv, pages), fetched)


def test_a_cache_whose_pages_were_copied_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the garbage collector, wherever that runs: it must wait for no thread."""
    fresh()
    backend = open_cuda()
    live = backend.device.allocations().live_nbytes
    kv = backend.alloc_kv_cache(CONFIG)
    backend.copy_pages_from_host(kv, [3], rows(1))
    joined: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "join", lambda thread, timeout=None: joined.append(thread))
    del kv
    gc.collect()
    monkeypatch.undo()
    assert not joined
    assert backend.device.allocations().live_nbytes - live < CONFIG.page_nbytes  # the workspace has grown a little
    backend.close()


def test_counters_may_be_read_while_pages_move() -> None:
    fresh()
    backend = open_cuda()
    kv = backend.alloc_kv_cache(CONFIG)
    backend.alloc_swap_space(kv, 8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                backend.traffic()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for i in range(150):
            backend.swap_out_pages(kv, [i % 24], [i % 8])
            backend.swap_in_pages(kv, [i % 8], [(i + 7) % 24])
    finally:
        sys.setswitchinterval(interval)
        done.set()
        for thread in threads:
            thread.join()
    backend.close()
    assert not problems


def test_pages_come_through_a_buffer_unchanged(backend: Any) -> None:
    kv = backend.alloc_kv_cache(CONFIG)
    data, scattered = rows(5), [20, 3, 4, 5, 0]
    backend.copy_pages_from_host(kv, scattered, data)
    stage = backend.page_stage(kv, 6, 2)
    buffer = stage.take()
    stage.to_host(scattered, buffer)
    backend.copy_pages_from_host(kv, scattered, np.zeros(CONFIG.page_nbytes, np.uint8))  # as a later step would
    buffer.wait()
    assert np.array_equal(buffer.data[:5], data)
    stage.to_device(buffer, [7, 9, 8, 23, 1])
    assert np.array_equal(backend.copy_pages_to_host(kv, [7, 9, 8, 23, 1]), data)
    held = stage.hold(data[:2])
    stage.to_device(held, [2, 6])
    assert np.array_equal(backend.copy_pages_to_host(kv, [2, 6]), data[:2])
    traffic = backend.traffic()
    assert traffic.kv_out_bytes >= 5 * CONFIG.page_nbytes
    assert traffic.kv_in_bytes >= 7 * CONFIG.page_nbytes
    assert traffic.kv_in_s > 0
    assert traffic.kv_out_gb_per_s > 0
    del buffer, held
    stage.close()


def test_buffers_are_free_again_when_nobody_refers_to_them(backend: Any) -> None:
    kv = backend.alloc_kv_cache(CONFIG)
    stage = backend.page_stage(kv, 2, 2)
    first, second = stage.take(), stage.take()
    assert stage.take() is None
    stage.to_host([0, 1], first)
    first.wait()
    del first
    assert (again := stage.take()) is not None
    assert not np.shares_memory(again.data, second.data)


def test_a_page_outside_the_cache_is_refused(backend: Any) -> None:
    kv = backend.alloc_kv_cache(CONFIG)
    stage = backend.page_stage(kv, 2, 1)
    buffer = stage.take()
    with pytest.raises(IndexError, match="page 24 of a KV cache of 24"):
        stage.to_host([24], buffer)
    with pytest.raises(IndexError, match="page 24 of a KV cache of 24"):
        stage.to_device(buffer, [24])


def test_both_backends_lay_a_page_out_alike() -> None:
    """[layers, 2, kv heads, page size, head dim]: what is computed on one can be read on the other."""
    stub = fresh()
    cpu, cuda = CpuBackend(1), open_cuda()
    try:
        shapes = [b.alloc_kv_cache(CONFIG).tensor.shape[1:] for b in (cpu, cuda)]
        assert shapes == [(2, 2, 2, 16, 16)] * 2
    finally:
        cpu.close()
        cuda.close()
    assert session.on_real_gpu() or stub.live() == {}


def test_a_copy_that_cannot_be_issued_leaves_the_buffer_usable() -> None:
    if session.on_real_gpu():
        pytest.skip("tells the simulated device what to do")
    stub = fresh()
    cuda = open_cuda()
    kv = cuda.alloc_kv_cache(CONFIG)
    cuda.copy_pages_from_host(kv, [1, 2], rows(2))
    stage = cuda.page_stage(kv, 2, 1)
    buffer = stage.take()
    stub.set_faults("cuMemcpyDtoHAsync:1=1")
    with pytest.raises(BackendError):
        stage.to_host([1, 2], buffer)
    stub.set_faults("")
    stage.to_host([1, 2], buffer)
    buffer.wait()
    assert np.array_equal(buffer.data, rows(2))
    stub.set_faults("cuMemHostAlloc:1=2")
    with pytest.raises(CapacityError, match="no room on the host"):
        cuda.page_stage(kv, 2, 1)
    stub.set_faults("")
    cuda.close()
    assert stub.live() == {}


def test_arrays_larger_than_the_buffers_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_pages, "STAGE_NBYTES", 3 * CONFIG.page_nbytes)
    monkeypatch.setattr(cuda_pages, "THREAD_NBYTES", CONFIG.page_nbytes)
    fresh()
    cuda = open_cuda()
    try:
        kv = cuda.alloc_kv_cache(CONFIG)
        for count in (1, 3, 4, 6, 7, 24):
            pages = np.random.default_rng(count).permutation(24)[:count].tolist()
            cuda.copy_pages_from_host(kv, pages, rows(count, count))
            assert np.array_equal(cuda.copy_pages_to_host(kv, pages), rows(count, count))
        assert cuda.copy_pages_to_host(kv, []).shape == (0, CONFIG.page_nbytes)
    finally:
        cuda.close()


def test_a_step_waits_for_a_copy_only_if_it_clashes_with_it() -> None:
    """Pages that are copied out may be read meanwhile; pages that are copied in may not."""
    if session.on_real_gpu():
        pytest.skip("counts calls of the simulated driver")
    stub = fresh()
    cuda = open_cuda()
    kv = cuda.alloc_kv_cache(CONFIG)
    stage = cuda.page_stage(kv, 2, 2)
    out, back = stage.take(), stage.hold(rows(2))
    stage.to_host([1, 2], out)

    def num_waits(pages: list[int], first_written: int) -> int:
        stub.set_faults("")  # counts from here
        cuda._before(kv, pages, first_written)
        return stub.num_calls("cuStreamWaitEvent")

    assert num_waits([1, 2, 3], 2) == 0
    assert num_waits([3, 4], 0) == 0
    assert num_waits([3, 2], 1) == 1
    stage.to_device(back, [5, 6])
    assert num_waits([5, 6, 7], 2) == 1
    assert num_waits([7, 8], 0) == 0
    out.wait()
    back.wait()
    assert num_waits([1, 2, 5, 6], 0) == 0
    cuda.close()
    assert stub.live() == {}
