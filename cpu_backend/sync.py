"""The compiled half of a team: sharing out work, meeting at barriers, walking a step program. (Python half: team.py)"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit
from numba.core import types

from .simd import (
    atomic_load,
    atomic_store,
    call_address,
    cpu_pause,
    exchange,
    fetch_add,
    i64_at,
)
from .structs import Struct
from .team import SPIN_ROUNDS, TEAM

_OFFSET = {name: int(field[1]) for name, field in (TEAM.fields or {}).items()}
COUNTER, ARRIVED, EPOCH, JOB, STOP = (_OFFSET[n] for n in ("counter", "arrived", "epoch", "job", "stop"))
PARKED, WAKE = _OFFSET["parked"], _OFFSET["wake"]
YIELD_ROUNDS = 2_000


@njit
def take(team, n):
    """Claim the next n units of work of this phase: the index of the first one."""
    return fetch_add(team.address + COUNTER, n)


@njit
def barrier(team):
    """Wait for all threads of the team; then the work counter is 0 again and all their writes are visible."""
    if team.num_threads == 1:
        atomic_store(team.address + COUNTER, 0)
        return
    epoch = atomic_load(team.address + EPOCH)
    if fetch_add(team.address + ARRIVED, 1) == team.num_threads - 1:
        atomic_store(team.address + ARRIVED, 0)
        atomic_store(team.address + COUNTER, 0)
        atomic_store(team.address + EPOCH, epoch + 1)
        return
    rounds = 0
    while atomic_load(team.address + EPOCH) == epoch:
        cpu_pause()
        rounds += 1
        if rounds > YIELD_ROUNDS:
            call_address(team.os_yield, ())


@njit
def _walk(team, thread):
    record = team.program
    for _ in range(team.program_length):
        call_address(i64_at(record), (i64_at(record + 8), team.address, thread))
        barrier(team)
        record += 16


def _lead(team, thread):
    _walk(team, thread)


def _post(team):
    """Announce the step in `program`; returns how many workers sleep and must be woken (those with `wake` set)."""
    fetch_add(team.address + JOB, 1)
    asleep = 0
    for thread in range(1, team.num_threads):
        if exchange(team.address + PARKED + 8 * thread, 0) == 1:
            atomic_store(team.address + WAKE + 8 * thread, 1)
            asleep += 1
    return asleep


def _work(team, thread, seen):
    """A worker's life between sleeps: returns the number of the last step seen when it must sleep, −1 to end."""
    flag = team.address + PARKED + 8 * thread
    while True:
        rounds = 0
        while atomic_load(team.address + JOB) == seen:
            if atomic_load(team.address + STOP) != 0:
                return -1
            cpu_pause()
            rounds += 1
            if rounds < SPIN_ROUNDS:
                continue
            exchange(flag, 1)
            if atomic_load(team.address + JOB) == seen and atomic_load(team.address + STOP) == 0:
                return seen
            if exchange(flag, 0) != 1:  # the leader has already sent the wake-up: go and take it
                return seen
        seen += 1
        _walk(team, thread)


def make(name: str) -> tuple[Callable, tuple]:
    team = Struct("team", TEAM)
    if name == "lead":
        return _lead, (team, types.int64)
    if name == "post":
        return _post, (team,)
    return _work, (team, types.int64, types.int64)
