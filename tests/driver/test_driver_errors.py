"""Every way a call can fail, what the error says, and that everything is given back all the same."""

from __future__ import annotations

import gc
import os
import warnings

import numpy as np
import pytest
from hostsim import session

from gllm_driver import driver
from gllm_driver.driver.device import Device
from gllm_driver.errors import (
    BackendError,
    BackendUnavailableError,
    ContextLost,
    DriverError,
    NoKernelImage,
    OutOfDeviceMemory,
)


def use_everything(device: Device) -> None:
    """One of each: memory, copies, streams, events, a graph, a module."""
    host = np.zeros(64, np.int32)
    with device:
        buffer, pinned = device.alloc(256), device.pinned(256)
        stream, event = device.stream(), device.event()
        device.copy_h2d(buffer.address, host.ctypes.data, 256)
        module = device.load(session.cubin_for_tests("conformance"), "conformance")
        module.function("conformance__scale")

        def record() -> None:
            device.copy_h2d(buffer.address, pinned.address, 256, stream)
            device.fill(buffer.address, 1, 256, stream)

        graph = stream.capture(record)
        graph.launch(stream)
        event.record(stream)
        stream.wait(event)
        event.synchronize()
        device.copy_d2h(host.ctypes.data, buffer.address, 256, stream)
        stream.synchronize()
        device.mem_info()


ENTRIES = [
    *("cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"),
    *("cuCtxPushCurrent", "cuMemAlloc", "cuMemHostAlloc", "cuStreamCreateWithPriority", "cuEventCreate"),
    *("cuMemcpyHtoD", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemsetD8Async", "cuModuleLoadData"),
    *("cuModuleGetFunction", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphGetNodes", "cuGraphInstantiate"),
    *("cuGraphLaunch", "cuEventRecord", "cuStreamWaitEvent", "cuEventSynchronize", "cuStreamSynchronize"),
    "cuMemGetInfo",
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("code", [1, 999])
def test_any_call_may_fail(stub: session.Stub, entry: str, code: int) -> None:
    stub.set_faults(f"{entry}:1={code}")
    opened: list[Device] = []

    def open_and_use() -> None:
        opened.append(driver.open_device())
        use_everything(opened[0])

    with pytest.raises(BackendError) as info:
        open_and_use()
    if isinstance(info.value, DriverError):
        assert (info.value.code, info.value.call) == (code, entry)
    assert "\n" not in str(info.value)
    del info
    gc.collect()
    for device in opened:
        device.close()
    assert stub.live() == {}


@pytest.mark.parametrize("entry", ["cuGraphLaunch", "cuStreamSynchronize", "cuEventSynchronize", "cuMemcpyDtoHAsync"])
@pytest.mark.parametrize("code", [700, 719])
def test_a_lost_context_stays_lost(stub: session.Stub, entry: str, code: int) -> None:
    device = driver.open_device()
    stub.set_faults(f"{entry}:1={code}")
    with pytest.raises(ContextLost, match="this process can use the device no more") as info:
        use_everything(device)
    assert (info.value.code, info.value.call) == (code, entry)
    with pytest.raises(ContextLost):
        device.alloc(1)
    with pytest.raises(ContextLost):
        device.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # giving back what is gone is no news
        device.close()


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (2, OutOfDeviceMemory, "no memory left"),
        (209, NoKernelImage, "another architecture"),
        (700, ContextLost, "memory that is not its own"),
        (716, ContextLost, "not aligned"),
        (701, DriverError, "more registers or threads"),
        (304, DriverError, "permissions on /dev/nvidia"),
        (46, DriverError, "exclusively"),
        (12345, DriverError, "unknown error"),
    ],
)
def test_errors_explain_themselves(stub: session.Stub, code: int, kind: type[DriverError], words: str) -> None:
    from gllm_driver.driver.gate import error_of

    error = error_of("cuSomething", code)
    assert type(error) is kind
    assert words in str(error)
    assert f"cuSomething failed with {error.name} ({code}): " in str(error)


def test_a_failed_release_warns_and_hides_nothing(stub: session.Stub) -> None:
    device = driver.open_device()
    with device:
        stream = device.stream()
    stub.set_faults("cuStreamDestroy:1=999")
    with pytest.warns(ResourceWarning, match="cuStreamDestroy failed with CUDA_ERROR_UNKNOWN"):
        stream.close()
    device.close()


def test_objects_used_after_close(stub: session.Stub) -> None:
    device = driver.open_device()
    with device:
        stream, event = device.stream(), device.event()
        event.record(stream)
        event.close()
        event.close()
        stream.close()
        stream.close()
    device.close()
    with pytest.raises(DriverError):
        device.alloc(10)
    assert stub.live() == {}


def test_a_device_that_does_not_exist(stub: session.Stub) -> None:
    with pytest.raises(BackendUnavailableError, match=r"'cuda:1'.*there is one, number 0"):
        driver.open_device(1)
    stub.reset(CC="8.0,9.0")
    with pytest.raises(BackendUnavailableError, match="there are 2"):
        driver.open_device(2)
    with pytest.raises(BackendUnavailableError):
        driver.open_device(-1)
    device = driver.open_device(1)
    assert (device.index, device.cc) == (1, (9, 0))
    device.close()
    assert stub.live() == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"DRIVER": "12080"}, r"too old: it supports CUDA 12\.8, these kernels need CUDA 13\.0, that is driver 580"),
        ({"FAULTS": "cuInit:*=100"}, "sees no NVIDIA GPU"),
        ({"FAULTS": "cuInit:*=999"}, r"the NVIDIA driver does not work: cuInit failed with CUDA_ERROR_UNKNOWN"),
        ({"FAULTS": "cuInit:*=803"}, "kernel module differ in version"),
    ],
)
def test_a_driver_that_cannot_be_used(stub: session.Stub, settings: dict[str, str], reason: str) -> None:
    stub.reset(**settings)
    with pytest.raises(BackendUnavailableError, match=reason):
        driver.open_device()
    assert stub.live() == {}


def test_a_newer_driver_is_welcome(stub: session.Stub) -> None:
    stub.reset(DRIVER="13020")
    driver.open_device().close()


def test_two_devices_open_at_once(stub: session.Stub) -> None:
    stub.reset(CC="8.0,9.0")
    first, second, again = driver.open_device(0), driver.open_device(1), driver.open_device(0)
    a, b = first.alloc(100), second.alloc(100)
    assert (first.mem_info()[0], second.mem_info()[0]) == (again.mem_info()[0], first.mem_info()[0])
    with first, second:
        second.stream()
    second.close()
    assert a.address
    assert not b.address
    first.close()
    assert stub.live() == {"contexts": 1}  # the other opening of device 0 still holds it
    again.close()
    assert stub.live() == {}


def in_child(body: object) -> int:
    """Exit status of a forked child that runs `body`: 0 when it returned true."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if body() else 1  # type: ignore[operator]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_is_told(stub: session.Stub) -> None:
    device = driver.open_device()
    buffer = device.alloc(100)

    def child() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            buffer.free()
            device.close()
        try:
            driver.open_device()
        except BackendUnavailableError as error:
            return "forked" in str(error) and "spawn" in str(error)
        return False

    assert in_child(child) == 0
    device.alloc(100)
    device.close()
    assert stub.live() == {}


def test_threads_each_bring_the_context(device: Device) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(value: int) -> bool:
        host = np.full(64, value, np.int32)
        back = np.zeros_like(host)
        with device:
            stream, buffer = device.stream(), device.alloc(256)
            device.copy_h2d(buffer.address, host.ctypes.data, 256, stream)
            device.copy_d2h(back.ctypes.data, buffer.address, 256, stream)
            stream.synchronize()
            stream.close()
        return bool((back == value).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))
