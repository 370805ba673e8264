"""Memory: the pool, its counters, running out, pinned buffers, traffic."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from hostsim import session

from gllm_driver import driver
from gllm_driver.driver.device import Device
from gllm_driver.driver.memory import Allocations, size_text
from gllm_driver.errors import ContextLost, OutOfDeviceMemory
from gllm_driver.types import Traffic

plants_a_bug = pytest.mark.skipif(session.is_sanitized(), reason="a sanitizer ends the process at the bug")


def test_round_trip_and_traffic(device: Device) -> None:
    data = np.arange(1001, dtype=np.float32)
    buffer, other = device.alloc(data.nbytes), device.alloc(data.nbytes)
    back = np.zeros_like(data)
    device.copy_h2d(buffer.address, data.ctypes.data, data.nbytes)
    device.copy_d2d(other.address, buffer.address, data.nbytes)
    device.copy_d2h(back.ctypes.data, other.address, data.nbytes)
    assert np.array_equal(back, data)
    assert device.traffic() == Traffic(data.nbytes, data.nbytes)  # copies within the device cross no bus
    device.count_traffic(d2h_nbytes=8)
    assert device.traffic() == Traffic(data.nbytes, data.nbytes + 8)


def test_addresses_are_aligned(device: Device) -> None:
    buffers = [device.alloc(n) for n in (1, 3, 255, 257, 100_000)]
    assert all(b.address % 256 == 0 for b in buffers)


def test_a_freed_buffer_serves_the_next_request_of_its_size(device: Device) -> None:
    first = device.alloc(1000)
    address = first.address
    first.free()
    first.free()
    assert first.address == 0
    assert device.allocations() == Allocations(1, 0, 0, 1000)
    assert device.alloc(1000).address == address
    assert device.allocations().num_driver_allocs == 1
    kept = device.alloc(1001)
    assert device.allocations() == Allocations(2, 1, 1001, 1000)  # the one above was collected
    assert device.trim() == 1000
    assert device.allocations() == Allocations(2, 1, 1001, 0)
    del kept


def test_a_buffer_is_freed_with_its_last_reference(device: Device) -> None:
    buffer = device.alloc(100)
    also = buffer
    del buffer
    gc.collect()
    assert device.allocations().num_live == 1
    del also
    gc.collect()
    assert device.allocations().num_live == 0


def test_nothing_is_allocated_by_nothing(device: Device) -> None:
    for nbytes in (0, -1):
        with pytest.raises(ValueError, match="at least 1 byte"):
            device.alloc(nbytes)
        with pytest.raises(ValueError, match="at least 1 byte"):
            device.pinned(nbytes)


def test_pinned_memory(device: Device) -> None:
    pinned, buffer = device.pinned(403), device.alloc(400)
    values = pinned.view(np.float32)
    assert values.shape == (100,)
    values[:] = np.arange(100)
    stream = device.stream()
    device.copy_h2d(buffer.address, pinned.address, 400, stream)
    stream.synchronize()
    values[:] = -1
    device.copy_d2h(pinned.address, buffer.address, 400, stream)
    stream.synchronize()
    assert np.array_equal(pinned.view(np.float32), np.arange(100))
    pinned.free()
    pinned.free()
    with pytest.raises(ValueError, match="freed"):
        pinned.view()


def test_fill(device: Device) -> None:
    stream, buffer = device.stream(), device.alloc(64)
    device.fill(buffer.address, 0x5A, 64, stream)
    stream.synchronize()
    back = np.zeros(64, np.uint8)
    device.copy_d2h(back.ctypes.data, buffer.address, 64)
    assert (back == 0x5A).all()


def test_memory_figures(device: Device) -> None:
    free, total = device.mem_info()
    assert 0 < free <= total == device.total_nbytes or session.on_real_gpu()
    buffer = device.alloc(64 << 20)
    assert free - device.mem_info()[0] == pytest.approx(64 << 20, rel=0.1)
    del buffer


def test_running_out_says_by_how_much(stub: session.Stub) -> None:
    stub.reset(MEM="10000000")
    device = driver.open_device()
    held = device.alloc(6_000_000)
    with pytest.raises(
        OutOfDeviceMemory, match=r"5\.0 MB asked for, 4\.0 MB of 10\.0 MB free, 6\.0 MB in this"
    ) as info:
        device.alloc(5_000_000)
    assert (info.value.code, info.value.call) == (2, "cuMemAlloc")
    assert device.allocations().num_live == 1
    held.free()
    replacement = device.alloc(5_000_000)  # what was cached is given back first
    assert device.allocations() == Allocations(2, 1, 5_000_000, 0)
    del replacement
    device.close()
    assert stub.live() == {}


def test_an_injected_failure_is_recovered_from(stub: session.Stub) -> None:
    device = driver.open_device()
    device.alloc(100).free()
    stub.set_faults("cuMemAlloc:1=2")
    buffer = device.alloc(200)  # the first call fails, the cache is emptied, the second succeeds
    assert stub.num_calls("cuMemAlloc") == 2
    assert stub.num_calls("cuMemFree") == 1
    del buffer
    device.close()
    assert stub.live() == {}


def test_every_allocation_is_freed(stub: session.Stub) -> None:
    device = driver.open_device()
    buffers = [device.alloc(n) for n in (10, 20, 20, 30)]
    buffers[0].free()
    pinned = device.pinned(100)
    with device:
        stream = device.stream()
    assert stub.live() == {"device memory": 4, "pinned memory": 1, "streams": 1, "contexts": 1}
    device.close()
    device.close()
    assert stub.live() == {}
    assert stub.num_calls("cuMemFree") == 4
    assert (buffers[1].address, pinned.address, stream.handle) == (0, 0, None)


@plants_a_bug
def test_a_write_beyond_an_allocation_is_seen(stub: session.Stub) -> None:
    device = driver.open_device()
    buffer = device.alloc(100)
    ctypes.memset(buffer.address + 100, 0, 1)  # as a kernel would
    buffer.free()
    device.trim()
    assert "memory after the allocation of 100 bytes" in stub.last_message()
    with pytest.raises(ContextLost):
        device.alloc(1)
    device.close()
    assert stub.live() == {}


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3e9, "3.0 GB")]
)
def test_size_text(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
