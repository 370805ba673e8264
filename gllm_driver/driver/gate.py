"""The gate: every driver call passes `call`, which returns the value or raises a typed error that explains it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cu

from ..errors import BackendUnavailableError, ContextLost, DriverError, NoKernelImage, OutOfDeviceMemory

MIN_DRIVER_VERSION = 13_000  # CUDA 13.0, the toolkit that builds the binaries: an older driver refuses them
MIN_DRIVER_RELEASE = "580"

_NOT_FOUND = 500
_SUBCLASSES: dict[int, type[DriverError]] = {2: OutOfDeviceMemory, 209: NoKernelImage}
_LOST = frozenset({214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719})

_EXPLANATIONS = {
    1: "an argument is wrong: a bug in this program",
    2: "the device has no memory left; use a smaller model, context or batch, or stop other programs on it",
    3: "the driver is not initialized in this process",
    4: "the driver is shutting down: the process is exiting",
    34: "this libcuda is the stub of the toolkit, meant for linking; the real one comes with the driver",
    36: "the call needs a newer driver",
    46: "the device is busy or closed to this process; another program may hold it exclusively",
    100: "the driver sees no NVIDIA GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and the container's device access",
    101: "there is no such device",
    200: "the kernel binary is damaged or no binary at all; reinstall the package",
    201: "no context is current on this thread: call inside `with device:`",
    209: "the kernel binary is for another architecture",
    214: "the device's memory had an error that could not be corrected; the device may be failing",
    304: "the operating system refused; check permissions on /dev/nvidia*",
    400: "an object is used after it was closed, or belongs to another device: a bug in this program",
    401: "not allowed in this state: a bug in this program",
    500: "the driver does not have what was asked for by name",
    700: "a kernel touched memory that is not its own",
    701: "the kernel wants more registers or threads than a block can have",
    702: "a kernel ran longer than the display's time limit",
    709: "the device's context was destroyed, by a reset or by another library in this process",
    716: "a kernel used an address that is not aligned to the access",
    719: "a kernel failed; the device's log (dmesg) may say more",
    802: "the driver is not ready: on NVSwitch machines the fabric manager must be running",
    803: "the installed driver and its kernel module differ in version; reboot, or reload the module",
    804: "a CUDA compatibility package is installed that does not support this device; remove it",
    900: "the operation cannot be captured into a graph",
    901: "an earlier operation spoiled the capture of the graph",
    904: "work of a forked stream was not joined before the capture ended",
    999: "the driver failed for a reason it does not name; nvidia-smi or dmesg may say more",
}

_initialized_pid: int | None = None  # the process that called cuInit, which is for good


def call(function: Callable[..., tuple[Any, ...]], *args: Any) -> Any:
    """Call a driver function: None, its value, or a tuple of its values.

    Raises DriverError: OutOfDeviceMemory, NoKernelImage or ContextLost where that is what happened.
    """
    if _initialized_pid is not None and _initialized_pid != os.getpid():
        raise _forked(function.__name__)
    try:
        result = function(*args)
    except RuntimeError as error:  # the binding found no such function in this driver
        raise DriverError(_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", function.__name__, str(error)) from error
    if result[0]:
        raise error_of(function.__name__, int(result[0]))
    if len(result) == 1:
        return None
    return result[1] if len(result) == 2 else result[1:]


def cleanup(function: Callable[..., tuple[Any, ...]], *args: Any, context: cu.CUcontext | None = None) -> None:
    """Call a function that gives something back, in `context`. A failure warns: it must not hide what led here."""
    try:
        if context is not None:
            call(cu.cuCtxPushCurrent, context)
        try:
            call(function, *args)
        finally:
            if context is not None:
                call(cu.cuCtxPopCurrent)
    except ContextLost:
        pass  # everything of the context is gone with it, and the first error said so
    except DriverError as error:
        if _initialized_pid == os.getpid():  # a forked child has nothing to give back
            warnings.warn(f"could not release a device resource: {error}", ResourceWarning, stacklevel=3)


def error_of(call_name: str, code: int) -> DriverError:
    """The typed error for a result code."""
    try:
        name = cu.CUresult(code).name
    except ValueError:
        name = "unknown error"
    explanation = _EXPLANATIONS.get(code, "see the CUresult section of NVIDIA's driver API manual")
    if code in _LOST:
        advice = "this process can use the device no more, start it again"
        return ContextLost(code, name, call_name, f"{explanation}; {advice}")
    return _SUBCLASSES.get(code, DriverError)(code, name, call_name, explanation)


def initialize() -> None:
    """Initialize the driver, once for the process, and check that it can run the shipped binaries.

    Raises BackendUnavailableError saying what is missing.
    """
    global _initialized_pid
    try:
        call(cu.cuInit, 0)
        version = call(cu.cuDriverGetVersion)
    except DriverError as error:
        raise BackendUnavailableError("cuda", _why_unusable(error)) from error
    if _initialized_pid is None:
        _initialized_pid = os.getpid()
    if version < MIN_DRIVER_VERSION:
        raise BackendUnavailableError(
            "cuda",
            f"the NVIDIA driver is too old: it supports CUDA {version_text(version)}, these kernels need CUDA "
            f"{version_text(MIN_DRIVER_VERSION)}, that is driver {MIN_DRIVER_RELEASE} or newer",
        )


def version_text(version: int) -> str:
    """13000 → 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _why_unusable(error: DriverError) -> str:
    if error.code == _NOT_FOUND:
        return "no NVIDIA driver: libcuda.so.1 was not found or cannot be loaded"
    if error.code == 100:
        return error.explanation
    return f"the NVIDIA driver does not work: {error}"


def _forked(call_name: str) -> DriverError:
    explanation = (
        f"this process was forked from {_initialized_pid} after that one had opened the device, which a child cannot "
        "use; start workers with the spawn method, or open the device in the child alone"
    )
    return DriverError(3, "CUDA_ERROR_NOT_INITIALIZED", call_name, explanation)
