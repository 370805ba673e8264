"""Graphs: work captured once and launched as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .gate import call, cleanup, cu
from .stream import CapturedTraffic, Stream

if TYPE_CHECKING:
    from .device import Device


class Graph:
    """An executable graph. Addresses and parameters are those of the capture; memory contents may change in between."""

    def __init__(self, device: Device, captured: Any, traffic: CapturedTraffic) -> None:
        self.device = device
        self.h2d_nbytes = traffic.h2d_nbytes  # per launch
        self.d2h_nbytes = traffic.d2h_nbytes
        with device:
            try:
                self.num_nodes, self.num_kernels = _count_nodes(captured)
                self.handle = call(cu.cuGraphInstantiate, captured, 0)
            finally:
                cleanup(cu.cuGraphDestroy, captured)
        device.keep(self)

    def launch(self, stream: Stream) -> None:
        """Run the graph once, after what the stream has been given before. Needs the device's context on the thread."""
        call(cu.cuGraphLaunch, self.handle, stream.handle)
        if self.h2d_nbytes or self.d2h_nbytes:
            self.device.count_traffic(self.h2d_nbytes, self.d2h_nbytes)

    def upload(self, stream: Stream) -> None:
        """Do now what the first launch would otherwise do on the way."""
        call(cu.cuGraphUpload, self.handle, stream.handle)

    def close(self) -> None:
        """Destroy the graph; launches under way finish."""
        handle, self.handle = self.handle, None
        if handle is not None:
            cleanup(cu.cuGraphExecDestroy, handle, context=self.device.context)
            self.device.drop(self)


def _count_nodes(graph: Any) -> tuple[int, int]:
    """(nodes, kernel nodes) of a captured graph."""
    _, num_nodes = call(cu.cuGraphGetNodes, graph, 0)
    if not num_nodes:
        return 0, 0
    nodes, _ = call(cu.cuGraphGetNodes, graph, num_nodes)
    kernel = cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    return num_nodes, sum(call(cu.cuGraphNodeGetType, node) == kernel for node in nodes)
