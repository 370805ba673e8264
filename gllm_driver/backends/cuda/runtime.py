"""What every part of the backend shares: an open device, its kernels, one stream, the workspace."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ...driver import open_device
from ...driver.launch import Function
from ...driver.manifest import FOLDER
from ...driver.module import KernelLibrary
from ...errors import BackendUnavailableError, CubinError, DriverError
from ...launch import DeviceProps, Launch
from ...launch.base import STATIC_SMEM_NBYTES
from .memory import Workspace
from .program import Program


class Runtime:
    """An open device with kernels for it. All work goes through one stream, in order."""

    def __init__(self, index: int, deterministic: bool, use_graphs: bool, kernels: Path = FOLDER) -> None:
        """Raises BackendUnavailableError saying what is missing; nothing stays open then."""
        self.deterministic = deterministic
        self.use_graphs = use_graphs
        self.device = open_device(index)
        try:
            self.library = KernelLibrary(self.device, kernels)
            self.stream = self.device.stream()
        except (CubinError, DriverError) as error:
            self.device.close()
            raise BackendUnavailableError(f"cuda:{index}", getattr(error, "explanation", str(error))) from error
        about = self.device.properties
        self.props = DeviceProps(about.cc, about.num_sms, about.max_smem_optin)
        # Programs that are kept, with the `generation` of the workspace they were recorded in; closed when it moves.
        self.recorded: list[MutableMapping[Any, Any]] = []
        self.workspace = Workspace(self.device, self._workspace_moved)
        self.num_forwards = 0  # passes that have written logits since; only the last one's are still there
        self._smem_nbytes: dict[str, int] = {}  # dynamic shared memory each kernel has opted in to

    def _workspace_moved(self) -> None:
        with self.device:
            self.stream.synchronize()  # what is closed may be under way
        for cached in self.recorded:
            for key in [k for k, v in cached.items() if v.generation != self.workspace.generation]:
                cached.pop(key).close()

    def program(self) -> Program:
        """An empty program."""
        return Program(self)

    def function(self, launch: Launch) -> Function:
        """The kernel of a launch, with all done that must not happen while a graph is captured: its code is on the
        device (the driver loads it at the first look at it) and it may have the shared memory it needs.

        Needs the device's context.
        """
        function = self.library.function(launch.symbol)
        wanted = launch.smem_nbytes
        is_much = wanted + function.static_smem_nbytes > STATIC_SMEM_NBYTES
        if is_much and wanted > self._smem_nbytes.get(launch.symbol, 0):
            function.allow_smem(wanted)
            self._smem_nbytes[launch.symbol] = wanted
        return function

    def close(self) -> None:
        """Give everything back."""
        self.workspace.clear()
        self.device.close()
