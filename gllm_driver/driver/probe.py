"""Which devices there are and why each can or cannot be used, found out without raising and without opening any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BackendError
from .arch import RUN_ON_HARDWARE, choose_archs
from .manifest import read_manifest

NO_DRIVER = "no NVIDIA driver: libcuda.so.1 was not found or cannot be loaded"


@dataclass(frozen=True)
class ProbedDevice:
    """One device, or the reason why there is none: then `index` is None and it stands for them all."""

    index: int | None
    name: str
    usable: bool
    reason: str  # one phrase, whether usable or not
    cc: tuple[int, int] | None = None  # compute capability
    total_nbytes: int = 0

    @property
    def device(self) -> str:
        """What to call it: cuda:N, or cuda."""
        return "cuda" if self.index is None else f"cuda:{self.index}"


def probe(archs: Sequence[str] | None = None) -> list[ProbedDevice]:
    """Every device the driver sees, in its order; one entry with the reason when there is none.

    `archs`: architectures there are kernels for ("80", "90a" …), by default the shipped manifest's. Never raises.
    """
    try:
        archs = read_manifest().archs if archs is None else archs
    except BackendError as error:
        return [_none(str(error))]
    if not _has_libcuda():  # a machine without a driver need not load the binding to learn that
        return [_none(NO_DRIVER)]
    try:
        from . import gate
        from .device import describe
    except (ImportError, RuntimeError) as error:
        return [_none(f"the package cuda-python cannot be imported: {error}")]
    try:
        gate.initialize()
        count = gate.call(gate.cu.cuDeviceGetCount)
    except BackendError as error:
        return [_none(getattr(error, "reason", str(error)))]
    found = []
    for index in range(count):
        try:
            about = describe(index)
        except BackendError as error:
            found.append(ProbedDevice(index, "NVIDIA GPU", False, str(error)))
            continue
        usable = bool(choose_archs(archs, about.cc))
        reason = _supported(archs, about.cc)
        found.append(ProbedDevice(index, about.name, usable, reason, about.cc, about.total_nbytes))
    return found or [_none("the driver sees no NVIDIA GPU")]


def _has_libcuda() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _none(reason: str) -> ProbedDevice:
    return ProbedDevice(None, "NVIDIA GPU", False, reason)


def _supported(archs: Sequence[str], cc: tuple[int, int]) -> str:
    chosen = choose_archs(archs, cc)
    capability = f"compute capability {cc[0]}.{cc[1]}"
    if chosen:
        untried = "" if chosen[0] in RUN_ON_HARDWARE else ", which have never run on hardware"
        return f"{capability}, kernels of sm_{chosen[0]}{untried}"
    there_are = ", ".join(f"sm_{a}" for a in archs) or "none at all"
    return f"no kernels for {capability}; there are {there_are}"
