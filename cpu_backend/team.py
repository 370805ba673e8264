"""A team of threads that runs step programs: one call from Python, then only compiled code until the step is done.

Every thread walks the same list of (kernel, arguments) and meets the others at a barrier after each kernel; inside a
kernel, work is taken in chunks from one shared counter, so a slow or preempted core does not hold up the rest. A
meeting costs a few hundred nanoseconds; a numba `prange` region costs microseconds and a trip through Python tens.

Idle workers spin for a moment (the next step usually follows at once), then sleep in Python on a lock.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterable

import numpy as np

from .compile import Library, Progress
from .kernels import TABLES, table_entries, team_entries

MAX_DTYPES = 128
MAX_THREADS = 256
SPIN_ROUNDS = 20_000  # rounds of `pause` a waiting thread makes before it yields its core


def _line(name: str) -> list[tuple]:
    """A counter alone in its cache line: fields that different threads write must not share one."""
    return [(name, "<i8"), (f"{name}_pad", "<i8", (7,))]


TEAM = np.dtype(
    [
        *_line("counter"),  # next unit of work of the running phase
        *_line("arrived"),  # threads waiting at the barrier
        *_line("epoch"),  # barriers passed
        *_line("job"),  # steps posted so far
        ("program", "<i8"),  # address of the posted step: [(kernel, args)] i64
        ("program_length", "<i8"),
        ("stop", "<i8"),
        ("num_threads", "<i8"),
        ("os_yield", "<i8"),  # address of the system's "let another thread run"
        ("shared", "<i8"),  # scratch all threads of a kernel share
        ("shared_nbytes", "<i8"),
        ("private", "<i8"),  # scratch of thread i at private + i * private_nbytes
        ("private_nbytes", "<i8"),
        ("parked", "<i8", (MAX_THREADS,)),  # 1 while thread i sleeps, or is about to
        ("wake", "<i8", (MAX_THREADS,)),  # 1 when the last post found thread i asleep
        ("matmul", "<i8", (MAX_DTYPES,)),  # functions by dtype code, see formats.py
        ("dequantize", "<i8", (MAX_DTYPES,)),
        ("weigh", "<i8", (MAX_DTYPES,)),
    ]
)


def aligned(nbytes: int, alignment: int = 64) -> np.ndarray:
    """`nbytes` of zeroed memory whose address is a multiple of `alignment`."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def default_num_threads() -> int:
    """Processors this process may run on: its affinity mask, cut to its cgroup's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            allowed = min(allowed, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return max(1, min(allowed, MAX_THREADS))


def _os_yield_address() -> int:
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _Worker(threading.Thread):
    """One worker: runs compiled code until it has been idle for a moment, then sleeps on its lock."""

    def __init__(self, work: ctypes._CFunctionType, address: int, index: int, wake: threading.Semaphore) -> None:
        super().__init__(name=f"gllm-worker-{index}", daemon=True)
        self._call = (work, address, index)
        self._wake = wake

    def run(self) -> None:
        work, address, index = self._call
        seen = 0
        while (seen := work(address, index, seen)) >= 0:
            self._wake.acquire()


class Team:
    """`num_threads` threads (the caller is one of them) and the state they share.

    `run(program)` may be called by one thread at a time. After a fork the child has no workers and `run` raises.
    """

    def __init__(self, num_threads: int | None = None, progress: Progress | None = None) -> None:
        self.num_threads = num_threads or default_num_threads()
        if not 1 <= self.num_threads <= MAX_THREADS:
            raise ValueError(f"threads must be in 1 … {MAX_THREADS}, got {self.num_threads}")
        self.library = Library()
        addresses = self.library.load(team_entries(), progress)
        self._memory = aligned(TEAM.itemsize)
        self._state = self._memory.view(TEAM)[0]
        self._address = self._memory.ctypes.data
        self._state["num_threads"] = self.num_threads
        self._state["os_yield"] = _os_yield_address()
        self._scratch: list[np.ndarray] = []
        i64 = ctypes.c_int64
        self._lead = ctypes.CFUNCTYPE(i64, i64, i64)(addresses["team_lead"])
        self._post = ctypes.CFUNCTYPE(i64, i64)(addresses["team_post"])
        work = ctypes.CFUNCTYPE(i64, i64, i64, i64)(addresses["team_work"])
        self._wakes = [threading.Semaphore(0) for _ in range(self.num_threads)]
        self._workers = [_Worker(work, self._address, i, self._wakes[i]) for i in range(1, self.num_threads)]
        self._pid = os.getpid()
        for worker in self._workers:
            worker.start()
        self.close = weakref.finalize(self, _stop, self._memory, self._post, self._wakes, self._workers, self._pid)

    def load_tables(self, dtypes: Iterable[str], progress: Progress | None = None) -> None:
        """Make the functions for these dtypes reachable by kernels."""
        wanted = table_entries(dtypes)
        addresses = self.library.load([entry for _, _, entry in wanted], progress)
        for table, code, entry in wanted:
            assert table in TABLES
            self._state[table][code] = addresses[entry.name]

    def reserve(self, shared_nbytes: int, private_nbytes: int) -> None:
        """Grow the scratch regions to at least these sizes (never while a step runs)."""
        private_nbytes = (private_nbytes + 127) // 64 * 64
        if shared_nbytes > self._state["shared_nbytes"]:
            self._grow("shared", shared_nbytes, 1)
        if private_nbytes > self._state["private_nbytes"]:
            self._grow("private", private_nbytes, self.num_threads)

    def _grow(self, region: str, nbytes: int, count: int) -> None:
        memory = aligned(nbytes * count)
        self._scratch = [m for m in self._scratch if m.ctypes.data != self._state[region]] + [memory]
        self._state[region] = memory.ctypes.data
        self._state[f"{region}_nbytes"] = nbytes

    def run(self, program: np.ndarray) -> None:
        """Run a step program, i64 [n, 2] of (kernel address, argument struct address), to its end."""
        if os.getpid() != self._pid:
            raise RuntimeError("this process was forked from the one that loaded the model: load it again here")
        if not len(program):  # workers take part in barriers, of which it has none
            return
        state = self._state
        state["program"] = program.ctypes.data
        state["program_length"] = len(program)
        job = int(state["job"])
        try:
            if self.num_threads > 1 and self._post(self._address):
                _wake(state, self._wakes)
        except BaseException:  # an interrupt must not leave the workers alone with a job
            if state["job"] != job:
                for wake in self._wakes:  # some may be told twice, which costs a look
                    wake.release()
                self._lead(self._address, 0)
            raise
        self._lead(self._address, 0)


def _wake(state: np.void, wakes: list[threading.Semaphore]) -> None:
    for i in np.flatnonzero(state["wake"][: len(wakes)]):
        state["wake"][i] = 0
        wakes[i].release()


def _stop(
    memory: np.ndarray,
    post: ctypes._CFunctionType,
    wakes: list[threading.Semaphore],
    workers: list[_Worker],
    pid: int,
) -> None:
    """End the workers; their compiled loop sees `stop` when it finds no job to do."""
    if os.getpid() != pid:
        return
    state = memory.view(TEAM)[0]
    state["stop"] = 1
    state["program_length"] = 0
    if post(memory.ctypes.data):
        _wake(state, wakes)
    for worker in workers:
        worker.join(timeout=5)
