"""The queue of requests that have not begun: by priority, and fairly among flows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .request import RunningSequence

MAX_IDLE_FLOWS = 1000


class FairQueue:
    """Strict priorities; within one, the flow that was served least comes next (Sheng et al. 2024, virtual token
    counters). Within a flow, first come, first served.

    A flow that returns after a pause starts level with the least served one that is waiting, so that nobody saves up
    service, and nobody who stays away is punished.
    """

    def __init__(self) -> None:
        self._queues: dict[int, dict[str, deque[RunningSequence]]] = {}  # priority → flow → sequences
        self._served: dict[str, int] = {}  # tokens computed for a flow
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, sequence: RunningSequence) -> None:
        """Append to its flow."""
        flows = self._queues.setdefault(sequence.priority, {})
        flow = sequence.request.flow
        if flow not in flows:
            waiting = [self._served.get(other, 0) for queues in self._queues.values() for other in queues]
            self._served[flow] = max(self._served.get(flow, 0), min(waiting, default=0))
            flows[flow] = deque()
            if len(self._served) > MAX_IDLE_FLOWS + 2 * len(waiting):
                self._forget_idle()
        flows[flow].append(sequence)
        self._size += 1

    def peek(self) -> RunningSequence | None:
        """Who is next."""
        if not self._size:
            return None
        flows = self._queues[max(self._queues)]
        return flows[min(flows, key=lambda flow: (self._served[flow], flows[flow][0].id))][0]

    def remove(self, sequence: RunningSequence) -> None:
        """Take a sequence out, wherever it stands. Raises ValueError when it does not wait."""
        flows = self._queues.get(sequence.priority, {})
        queue = flows.get(sequence.request.flow)
        if queue is None:
            raise ValueError(f"sequence {sequence.id} is not waiting")
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._size -= 1
        if not queue:
            del flows[sequence.request.flow]
            if not flows:
                del self._queues[sequence.priority]

    def charge(self, sequence: RunningSequence, num_tokens: int) -> None:
        """Tokens were computed for the sequence's flow."""
        flow = sequence.request.flow
        self._served[flow] = self._served.get(flow, 0) + num_tokens

    def _forget_idle(self) -> None:
        """Drop the counters of flows that do not wait, so that names of flows may be many over time."""
        waiting = {flow for flows in self._queues.values() for flow in flows}
        self._served = {flow: served for flow, served in self._served.items() if flow in waiting}

    def __iter__(self) -> Iterator[RunningSequence]:
        for flows in self._queues.values():
            for queue in flows.values():
                yield from queue
