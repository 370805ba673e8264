"""A step recorded as a flat list of kernel launches, issued one by one or captured once into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...driver.graph import Graph
from ...driver.launch import Function, PackedParams
from ...driver.tensor_map import encode_tensor_map
from ...launch import Launch, launches
from ...ops import CONTRACTS
from ...types import F32, I32, U8, Tensor

if TYPE_CHECKING:
    from .runtime import Runtime


OVERLAP_CC = (9, 0)  # the first compute capability with programmatic dependent launch


@dataclass(frozen=True)
class _Ready:
    """A launch with everything resolved."""

    function: Function
    launch: Launch
    params: PackedParams


class Program:
    """Launches in order. `add` checks and packs an op call; `finish` resolves kernels and scratch; `run` issues all.

    Recording it is what the forward pass needs of a Recorder.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._calls: list[tuple[np.ndarray, Launch]] = []
        self._owners: list[Tensor] = []  # argument structs hold bare addresses: keep what they point to
        self._ready: list[_Ready] = []
        self._graph: Graph | None = None

    def add(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> None:
        """Append an op call. Raises ContractError, UnsupportedError."""
        runtime = self._runtime
        given = {name: tensor for name, tensor in arrays.items() if tensor is not None}
        args = CONTRACTS[op].bind(arrays, scalars)
        dtypes = {name: tensor.dtype.name for name, tensor in given.items()}
        self._owners += given.values()
        for launch in launches(op, args, dtypes, runtime.props, runtime.deterministic):
            self._calls.append((args, launch))

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The f32 workspace array of this name."""
        return self._runtime.workspace.tensor(name, shape, F32)

    @property
    def symbols(self) -> list[str]:
        """The kernels in order."""
        return [launch.symbol for _, launch in self._calls]

    def finish(self) -> Program:
        """Load the kernels, size the scratch that all launches share, fix the parameters. Raises BackendError."""
        runtime = self._runtime
        scratch_nbytes = max((launch.workspace_nbytes for _, launch in self._calls), default=0)
        scratch = runtime.workspace.tensor("scratch", (scratch_nbytes,), U8)
        num_counters = max((launch.num_counters for _, launch in self._calls), default=0)
        counters = runtime.workspace.tensor("counters", (num_counters,), I32)
        self._owners += scratch, counters
        with runtime.device:
            if num_counters:  # every launch leaves them so
                runtime.device.fill(counters.address, 0, counters.nbytes, runtime.stream)
            for args, launch in self._calls:
                params = PackedParams(*launch.params(args, scratch.address, counters.address, encode_tensor_map))
                self._ready.append(_Ready(runtime.function(launch), launch, params))
        return self

    def issue(self, overlapping: bool = False) -> None:
        """Queue every launch. Needs the device's context.

        `overlapping`: those that can start before the one before them has ended. A launch costs the host more then.
        """
        stream = self._runtime.stream
        for i, each in enumerate(self._ready):
            launch = each.launch
            overlaps = overlapping and launch.overlaps and i > 0
            each.function.launch(launch.grid, launch.block, launch.smem_nbytes, stream, each.params, overlaps)

    def capture(self, after: Callable[[], None] | None = None) -> None:
        """Make a graph of the launches and of what `after` issues. Nothing runs. Needs the device's context."""

        def record() -> None:
            self.issue(overlapping=self._runtime.props.cc >= OVERLAP_CC)
            if after:
                after()

        self.close()
        self._graph = self._runtime.stream.capture(record)

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def replay(self) -> None:
        """Run the captured graph once. Needs the device's context."""
        assert self._graph is not None
        self._graph.launch(self._runtime.stream)

    def close(self) -> None:
        """Destroy the graph; launches under way finish."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()
