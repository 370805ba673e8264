"""What reaches the engine from other threads, and what time brings."""

from __future__ import annotations

import heapq
from collections import deque

from ..sched.request import RunningSequence


class Mailbox:
    """New sequences and cancellations. Any thread may post at any time: nothing here waits or locks."""

    def __init__(self) -> None:
        self.live: dict[int, RunningSequence] = {}  # every sequence that has not been buried
        self.inbox: deque[RunningSequence] = deque()
        self.cancelled: deque[RunningSequence] = deque()
        self.has_mail = False  # set after posting, cleared before reading, so nothing is overlooked

    def post(self, sequence: RunningSequence) -> None:
        """Hand in a new sequence."""
        self.live[sequence.id] = sequence
        self.inbox.append(sequence)
        self.has_mail = True

    def post_cancel(self, sequence: RunningSequence) -> None:
        """Ask for a sequence's end."""
        self.cancelled.append(sequence)
        self.has_mail = True

    def knock(self) -> None:
        """There is news elsewhere: let the next step begin with a look around."""
        self.has_mail = True


class Deadlines:
    """Sequences by when they must end. Those that end earlier are forgotten in time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RunningSequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, sequence: RunningSequence, num_live: int) -> None:
        """Watch a sequence, if it has a deadline; `num_live`: how many sequences there are."""
        if sequence.deadline is None:
            return
        if len(self._heap) > 2 * num_live + 64:
            self._heap = [entry for entry in self._heap if entry[2].progress.finish_reason is None]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (sequence.deadline, sequence.id, sequence))

    def overdue(self, now: float) -> list[RunningSequence]:
        """Those whose time is up; each is named once."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            found.append(heapq.heappop(self._heap)[2])
        return found

    def clear(self) -> None:
        self._heap.clear()
