"""Streams, events, graphs: order, capture, traffic per launch, what cannot be captured."""

from __future__ import annotations

import numpy as np
import pytest
from hostsim import session

from gllm_driver.driver.device import Device
from gllm_driver.driver.memory import PinnedBuffer
from gllm_driver.errors import DriverError
from gllm_driver.types import Traffic


def filled(device: Device, value: int, n: int = 64) -> PinnedBuffer:
    pinned = device.pinned(4 * n)
    pinned.view(np.int32)[:] = value
    return pinned


@pytest.mark.skipif(session.on_real_gpu(), reason="a real device may be faster than the mistake")
def test_host_memory_belongs_to_the_stream_until_it_is_done(device: Device) -> None:
    staging = filled(device, 1)  # simulated streams run nothing before somebody waits: reuse of staging shows
    buffer, stream = device.alloc(256), device.stream()
    device.copy_h2d(buffer.address, staging.address, 256, stream)
    staging.view(np.int32)[:] = 2
    stream.synchronize()
    back = np.zeros(64, np.int32)
    device.copy_d2h(back.ctypes.data, buffer.address, 256)
    assert (back == 2).all()


def test_events_order_streams(device: Device) -> None:
    one, two = device.stream(), device.stream()
    a, b, out = device.alloc(256), device.alloc(256), filled(device, -1)
    event, source = device.event(), filled(device, 7)
    device.copy_h2d(a.address, source.address, 256, one)
    event.record(one)
    two.wait(event)
    device.copy_d2d(b.address, a.address, 256, two)
    device.copy_d2h(out.address, b.address, 256, two)
    two.synchronize()
    assert (out.view(np.int32) == 7).all()
    assert event.is_done()


def test_polling(device: Device) -> None:
    stream, event, buffer = device.stream(), device.event(), device.alloc(256)
    assert stream.is_idle()
    device.fill(buffer.address, 0, 256, stream)
    event.record(stream)
    polls = 0
    while not event.is_done():
        polls += 1
        assert polls < 10_000_000
    while not stream.is_idle():
        polls += 1
    event.synchronize()


def test_elapsed_time(device: Device) -> None:
    stream, buffer = device.stream(), device.alloc(1 << 20)
    start, end = device.event(timing=True), device.event(timing=True)
    start.record(stream)
    device.fill(buffer.address, 1, 1 << 20, stream)
    end.record(stream)
    end.synchronize()
    assert 0 <= end.elapsed_ms(start) < 60_000


def test_a_graph_repeats_what_was_captured(device: Device) -> None:
    stream, buffer = device.stream(), device.alloc(256)
    source, out = filled(device, 3), filled(device, 0)

    def record() -> None:
        device.copy_h2d(buffer.address, source.address, 256, stream)
        device.copy_d2h(out.address, buffer.address, 128, stream)

    graph = stream.capture(record)
    assert device.traffic() == Traffic(0, 0)
    assert (graph.num_nodes, graph.num_kernels, graph.h2d_nbytes, graph.d2h_nbytes) == (2, 0, 256, 128)
    for value in (3, 5):
        source.view(np.int32)[:] = value
        graph.launch(stream)
        stream.synchronize()
        assert (out.view(np.int32)[:32] == value).all()
        assert (out.view(np.int32)[32:] == 0).all()
    assert device.traffic() == Traffic(512, 256)
    graph.upload(stream)
    graph.close()
    graph.close()


def test_a_capture_may_fork_and_join(device: Device) -> None:
    stream, side, buffers = device.stream(), device.stream(), [device.alloc(256) for _ in range(2)]
    forked, joined, out = device.event(), device.event(), filled(device, 0, 128)

    def record() -> None:
        forked.record(stream)
        side.wait(forked)
        device.fill(buffers[0].address, 1, 256, stream)
        device.fill(buffers[1].address, 2, 256, side)
        joined.record(side)
        stream.wait(joined)
        device.copy_d2h(out.address, buffers[0].address, 256, stream)
        device.copy_d2h(out.address + 256, buffers[1].address, 256, stream)

    graph = stream.capture(record)
    assert graph.num_nodes == 4
    graph.launch(stream)
    stream.synchronize()
    assert (out.view(np.uint8)[:256] == 1).all()
    assert (out.view(np.uint8)[256:] == 2).all()


def test_a_fork_that_is_not_joined(device: Device) -> None:
    stream, side, buffer, event = device.stream(), device.stream(), device.alloc(256), device.event()

    def record() -> None:
        event.record(stream)
        side.wait(event)
        device.fill(buffer.address, 1, 256, side)

    with pytest.raises(DriverError, match=r"UNJOINED.*not joined"):
        stream.capture(record)


@pytest.mark.parametrize("what", ["allocate", "synchronize", "copy"])
def test_what_cannot_be_captured(device: Device, what: str) -> None:
    if what == "copy" and session.on_real_gpu():
        pytest.skip("a real driver (580, H200) lets a copy from pageable memory pass beside a capture")
    stream, buffer, host = device.stream(), device.alloc(256), np.zeros(64, np.int32)

    def record() -> None:
        if what == "allocate":
            device.alloc(12345)
        elif what == "synchronize":
            stream.synchronize()
        else:
            device.copy_h2d(buffer.address, host.ctypes.data, 256)

    with pytest.raises(DriverError, match="CAPTURE"):
        stream.capture(record)
    device.fill(buffer.address, 1, 256, stream)  # the stream is as before
    stream.synchronize()


def test_an_exception_ends_the_capture(device: Device) -> None:
    stream, buffer = device.stream(), device.alloc(256)

    def record() -> None:
        device.fill(buffer.address, 1, 256, stream)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        stream.capture(record)
    device.fill(buffer.address, 1, 256, stream)
    stream.synchronize()
    graph = stream.capture(lambda: device.fill(buffer.address, 2, 256, stream))
    assert graph.num_nodes == 1


def test_an_empty_graph(device: Device) -> None:
    stream = device.stream()
    graph = stream.capture(lambda: None)
    assert (graph.num_nodes, graph.num_kernels) == (0, 0)
    graph.launch(stream)
    stream.synchronize()
