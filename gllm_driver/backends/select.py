"""Which devices there are, why each is usable or not, and opening the one asked for. The only importer of backends."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackendUnavailableError, RequestError
from .base import Backend, Progress


@dataclass(frozen=True)
class DeviceInfo:
    """One device; `reason` says why it is usable or not."""

    name: str
    kind: str
    description: str
    usable: bool
    reason: str


def devices() -> list[DeviceInfo]:
    """Every device this version knows of, the preferred one first."""
    return [_cuda(), _cpu()]


def open_backend(device: str = "auto", *, threads: int | None = None, progress: Progress | None = None) -> Backend:
    """The backend for `device`: auto (the first usable one), cpu, cuda or cuda:N.

    Raises RequestError for a name that means nothing, BackendUnavailableError when the device named cannot be used:
    a choice that was made explicitly never falls back to another device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise RequestError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be at least 1, got {threads}")
    for info in devices():
        if info.kind == kind and not info.usable:
            raise BackendUnavailableError(device, info.reason)
        if info.kind == "cpu" and kind in ("auto", "cpu"):
            from .cpu import CpuBackend

            return CpuBackend(threads, progress)
    raise BackendUnavailableError(device, "no usable device")


def kernel_cache_dir() -> Path:
    """Where kernels compiled on this machine are kept."""
    from .cpu import cache_dir

    return cache_dir()


def _cuda() -> DeviceInfo:
    return DeviceInfo("cuda", "cuda", "NVIDIA GPU", False, "this version has no CUDA kernels yet")


def _cpu() -> DeviceInfo:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    description = f"{_cpu_model()}, {count} processor{'s' if count > 1 else ''} for this process"
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "aarch64", "arm64"):
        return DeviceInfo("cpu", "cpu", description, True, "always there")
    return DeviceInfo("cpu", "cpu", description, False, f"no kernels for {machine} processors")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
