"""What every part of the backend shares: an open device, its kernels, one stream, the workspace."""

from __future__ import annotations

from pathlib import Path

from ...driver import open_device
from ...driver.manifest import FOLDER
from ...driver.module import KernelLibrary
from ...errors import BackendUnavailableError, CubinError, DriverError
from ...launch import DeviceProps
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
        self.workspace = Workspace(self.device)

    def program(self) -> Program:
        """An empty program."""
        return Program(self)

    def close(self) -> None:
        """Give everything back."""
        self.workspace.clear()
        self.device.close()
