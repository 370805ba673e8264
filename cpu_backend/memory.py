"""How much memory there is: the machine's figures, cut to the limits of the process's cgroup."""

from __future__ import annotations

import os


def _meminfo() -> dict[str, int]:
    try:
        with open("/proc/meminfo") as file:
            return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    except (OSError, ValueError, IndexError):
        return {}


def _cgroup(name: str) -> int | None:
    try:
        with open(f"/sys/fs/cgroup/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None


def _reclaimable() -> int:
    """Page cache charged to the cgroup: used by its books, free for the asking."""
    try:
        with open("/sys/fs/cgroup/memory.stat") as file:
            stat = dict(line.split() for line in file)
        return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def total_and_available() -> tuple[int, int]:
    """(total, available) bytes for this process."""
    info = _meminfo()
    total = info.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = info.get("MemAvailable", total)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None and limit < total:
        total, available = limit, min(available, limit - used + _reclaimable())
    return total, max(0, available)


def available_nbytes() -> int:
    return total_and_available()[1]


def memory_pressure() -> float:
    """Share of memory in use, 0.0 … 1.0."""
    total, available = total_and_available()
    return min(1.0, max(0.0, 1.0 - available / total))
