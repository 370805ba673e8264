"""Which devices there are, why each is usable or not, and opening the one asked for. The only importer of backends."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..driver import probe
from ..errors import BackendUnavailableError, RequestError
from .base import Backend, Progress

if TYPE_CHECKING:
    from .footprint import Scratch

log = logging.getLogger("gllm_driver.backends")


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
    return [*_cuda(), _cpu()]


def open_backend(
    device: str = "auto",
    *,
    threads: int | None = None,
    deterministic: bool = False,
    progress: Progress | None = None,
) -> Backend:
    """The backend for `device`: auto (the first usable one), cpu, cuda (the first usable GPU) or cuda:N.

    deterministic: results do not depend on what shares a step; the CPU's never do.

    Raises RequestError for a name that means nothing, BackendUnavailableError when the device named cannot be used:
    a choice that was made explicitly never falls back to another device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not (index.isascii() and index.isdigit()))):
        raise RequestError(f"unknown device {device!r}: choose auto, cpu, cuda or cuda:N")
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be at least 1, got {threads}")
    reason = ""
    for info in devices() if kind != "cpu" else [_cpu()]:
        if kind not in ("auto", info.kind) or (index and info.name != f"cuda:{int(index)}"):
            continue
        reason = reason or info.reason  # of several that cannot be used, the first one's
        if not info.usable:
            log.info("%s is not usable: %s", info.name, info.reason)
            continue
        if info.kind == "cpu":
            from .cpu import CpuBackend

            return CpuBackend(threads, progress)
        from .cuda import CudaBackend

        try:
            return CudaBackend(int(info.name.partition(":")[2]), deterministic=deterministic, progress=progress)
        except BackendUnavailableError as error:
            if kind == "cuda":
                raise
            log.warning("%s cannot be opened, looking further: %s", info.name, error.reason)
    raise BackendUnavailableError(device, reason or _missing(kind))


def kernel_cache_dir() -> Path:
    """Where kernels compiled on this machine are kept."""
    from .cpu import cache_dir

    return cache_dir()


def computed_weights() -> dict[str, tuple[str, ...]]:
    """The stored weight types that each kind of device computes; matrices of others are repacked when loaded."""
    from ..launch import WEIGHT_DTYPES
    from .cpu import CpuBackend

    return {"cpu": CpuBackend.weight_dtypes, "cuda": WEIGHT_DTYPES}


def scratch_of(kind: str) -> Scratch:
    """What an op's call takes of scratch memory on a kind of device."""
    if kind == "cpu":
        from .cpu.footprint import scratch

        return scratch
    from .footprint import cuda_scratch

    return cuda_scratch


def _cuda() -> list[DeviceInfo]:
    """Every NVIDIA GPU, or one entry that says why there is none."""
    found = []
    for gpu in probe():
        memory = f", {gpu.total_nbytes / 2**30:.1f} GiB" if gpu.total_nbytes else ""
        found.append(DeviceInfo(gpu.device, "cuda", f"{gpu.name}{memory}", gpu.usable, gpu.reason))
    return found


def _missing(kind: str) -> str:
    """Why a device of this kind that was named by number is none of those there are."""
    named = [info for info in devices() if info.kind == kind]
    if len(named) == 1 and ":" not in named[0].name:
        return named[0].reason
    return f"no such device, there are {', '.join(info.name for info in named)}"


def num_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> DeviceInfo:
    count = num_processors()
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
