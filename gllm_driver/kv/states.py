"""The state of a sequence's pages: Active, Standby, Swapped, Warm, Protected. They change together, as one group.

Time is passed in, never read: timeouts are applied when the state is looked at.
"""

from __future__ import annotations

from collections import deque

from ..config import SwapConfig
from ..types import PageState


class GroupState:
    """State machine of one group, with the accesses it follows from.

    Swapped →(swap-in) Warm →(time up, or enough accesses) Active, or Protected when hot; Active →(idle) Standby;
    Protected →(left alone for the window, or preempted) Standby. A new group is Active: it is about to run.
    """

    def __init__(self, config: SwapConfig) -> None:
        self._config = config
        self._state = PageState.ACTIVE
        self._recent: deque[float] = deque(maxlen=config.hot_threshold)  # times of the last accesses
        self._warm_accesses = 0
        self._is_running = True
        self.access_count = 0
        self.last_access: float | None = None
        self.swap_in_time: float | None = None
        self.warm_until: float | None = None

    def at(self, now: float) -> PageState:
        """The state at time `now`, which must not go backwards."""
        if self._state is PageState.WARM and self.warm_until is not None and now >= self.warm_until:
            self._leave_warm()
        if self._state is PageState.PROTECTED and self._idle_for(now) > self._config.working_set_window:
            self._state = PageState.STANDBY
        return self._state

    def may_leave(self, now: float, *, must_be_idle: bool = False) -> bool:
        """Whether the group may be swapped out, as far as its state is concerned."""
        state = self.at(now)
        return state is PageState.STANDBY or (state is PageState.ACTIVE and not must_be_idle)

    def is_warm(self, now: float) -> bool:
        return self.at(now) is PageState.WARM

    def accessed(self, now: float) -> None:
        """A step reads the group's pages."""
        self.access_count += 1
        self.last_access = now
        self._is_running = True
        self._recent.append(now)
        if self._state is PageState.WARM:
            self._warm_accesses += 1
            if self._warm_accesses >= self._config.min_warm_access:
                self._leave_warm()
            if self.at(now) is PageState.WARM:
                return
        recent = self._recent
        is_hot = len(recent) == recent.maxlen and now - recent[0] <= self._config.working_set_window
        self._state = PageState.PROTECTED if is_hot else PageState.ACTIVE

    def idled(self) -> None:
        """The sequence is no longer running. What is Warm or Protected cools when that ends."""
        self._is_running = False
        if self._state is PageState.ACTIVE:
            self._state = PageState.STANDBY

    def preempted(self) -> None:
        """The scheduler gives the group up: what was Protected leaves the working set."""
        if self._state is PageState.PROTECTED:
            self._state = PageState.STANDBY
            self._recent.clear()

    def restarted(self) -> None:
        """The group has lost its pages and begins again."""
        self._is_running = True
        self._state = PageState.ACTIVE
        self.swap_in_time = self.warm_until = None

    def swapped_out(self) -> None:
        self._state = PageState.SWAPPED
        self.warm_until = None

    def swapped_in(self, now: float) -> None:
        self._state = PageState.WARM
        self._is_running = True
        self._warm_accesses = 0
        self.swap_in_time = now
        self.warm_until = now + self._config.warmup_duration

    def _leave_warm(self) -> None:
        self._state = PageState.ACTIVE if self._is_running else PageState.STANDBY
        self.warm_until = None

    def _idle_for(self, now: float) -> float:
        return now - self.last_access if self.last_access is not None else float("inf")
