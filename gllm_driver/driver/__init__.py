"""The NVIDIA driver, through `libcuda` alone: devices, memory, streams, graphs, modules, launches.

The only package that imports `cuda.bindings.driver`, and nothing else of CUDA: no runtime library enters the process.
Importing it loads none of that; `probe()` tells which devices can be used and never raises, `open_device()` opens one.
Nothing is set for the whole process but each open device's primary context, which `Device.close()` gives back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .probe import ProbedDevice, probe

if TYPE_CHECKING:
    from .device import Device

__all__ = ["ProbedDevice", "open_device", "probe"]


def open_device(index: int = 0) -> Device:
    """Open device number `index` (as the driver counts them, after CUDA_VISIBLE_DEVICES).

    Raises BackendUnavailableError when there is no driver, it is too old, or there is no such device.
    """
    from .device import Device

    return Device(index)
