#!/usr/bin/env python3
"""Time ways of bringing a mapped file from the page cache to a GPU: what the bus is left to wait for.

Each figure is the best of some runs, each of which maps the file anew, as a process that loads a model does, and counts
everything from the first thread's start to the last byte on the device, pinning and unpinning included.

\b
fill      how bytes come into pinned memory
  mapped    copied from the mapping, whose pages the system maps as they are touched (what the backend does)
  populate  the same, the pages of a piece mapped by one call before
  read      read from the file, past the mapping
  present   copied from a mapping whose pages are there already: no way of loading, only what copying alone takes
  direct    not at all: the mapping itself is pinned, a part at a time, and copied from
staging   plain: allocated by the driver; huge: 2 MB pages of our own, pinned by the driver
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from gllm_driver.backends.cuda import transfer  # noqa: E402
from gllm_driver.backends.cuda.transfer import Job, Span, Transfer, Window, windows  # noqa: E402
from gllm_driver.driver import open_device  # noqa: E402
from gllm_driver.driver.device import Device  # noqa: E402
from gllm_driver.driver.gate import call, cleanup, cu  # noqa: E402
from gllm_driver.driver.memory import DeviceBuffer, PinnedBuffer  # noqa: E402
from gllm_driver.errors import DriverError  # noqa: E402

JOB_NBYTES = 128 << 20
HUGE_NBYTES = 2 << 20
MADV_POPULATE_READ = 22  # Linux 5.14
READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY
NON_TEMPORAL = "glibc.cpu.x86_non_temporal_threshold=0x80000"
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Variant:
    """One way, and how it is dosed."""

    fill: str
    staging: str = "plain"
    workers: int = 8
    piece: int = 4  # MB; of `direct`, what is pinned at once
    buffers: int = 2  # of a worker

    def __str__(self) -> str:
        return f"{self.fill:9} {self.staging:6} {self.workers:7} {self.piece:5} {self.buffers:7}"


VARIANTS = (
    Variant("mapped"),
    Variant("mapped", "huge"),
    Variant("mapped", "huge", workers=12),
    Variant("mapped", "huge", workers=16),
    Variant("mapped", "huge", piece=1),
    Variant("mapped", "huge", piece=8),
    Variant("populate", "huge"),
    Variant("populate", "huge", workers=16),
    Variant("read"),
    Variant("read", workers=16),
    Variant("read", "huge"),
    Variant("read", "huge", piece=1),
    Variant("read", "huge", piece=2),
    Variant("read", "huge", workers=12),
    Variant("read", "huge", workers=16),
    Variant("read", "huge", workers=16, piece=2),
    Variant("read", "huge", workers=16, piece=1, buffers=3),
    Variant("present", "huge"),
    Variant("present", "huge", workers=16),
    Variant("direct", workers=2, piece=256),
    Variant("direct", workers=4, piece=64),
    Variant("direct", workers=8, piece=64),
    Variant("direct", workers=16, piece=16),
)


class HugeBuffer:
    """Pinned memory as PinnedBuffer, on huge pages where the system gives some: pinning goes by page."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes, self._device = nbytes, device
        self._memory = mmap.mmap(-1, (nbytes // HUGE_NBYTES + 2) * HUGE_NBYTES)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = start + -start % HUGE_NBYTES
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(len(self._memory)), mmap.MADV_HUGEPAGE)
        for page in range(0, nbytes, HUGE_NBYTES):
            ctypes.memset(self.address + page, 0, 1)
        call(cu.cuMemHostRegister, self.address, nbytes, 0)

    def free(self) -> None:
        cleanup(cu.cuMemHostUnregister, self.address, context=self._device.context)


@dataclass(frozen=True)
class Mapped:
    """The file, mapped for one run."""

    file: int
    address: int
    nbytes: int

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Mapped]:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            view = np.frombuffer(memory, np.uint8)
            yield cls(file.fileno(), view.ctypes.data, view.nbytes)
            del view
            memory.close()

    def populate(self, start: int, nbytes: int) -> None:
        """Map the pages of a part; addresses are rounded to pages."""
        first = start & -mmap.PAGESIZE
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + nbytes - first), MADV_POPULATE_READ):
            raise OSError(ctypes.get_errno(), "MADV_POPULATE_READ")

    def fill_populated(self, address: int, piece: Window) -> None:
        for span in piece.spans:
            self.populate(span.source, span.nbytes)
            ctypes.memmove(address + span.at, span.source, span.nbytes)

    def fill_read(self, address: int, piece: Window) -> None:
        for span in piece.spans:
            done = 0
            while done < span.nbytes:
                to = (ctypes.c_char * (span.nbytes - done)).from_address(address + span.at + done)
                done += os.preadv(self.file, [to], span.source - self.address + done)


def upload_staged(device: Device, slab: DeviceBuffer, mapped: Mapped, variant: Variant) -> None:
    """By the backend's own transfer, its parts exchanged."""
    stream = device.stream()
    saved = transfer.PIECE_NBYTES, transfer.MAX_WORKERS, transfer.BUFFERS_PER_WORKER, transfer._fill, Device.pinned
    fills: dict[str, Callable[[int, Window], None]] = {"read": mapped.fill_read, "populate": mapped.fill_populated}
    try:
        transfer.PIECE_NBYTES = variant.piece << 20
        transfer.MAX_WORKERS, transfer.BUFFERS_PER_WORKER = variant.workers, variant.buffers
        transfer._fill = fills.get(variant.fill, transfer._fill)
        if variant.staging == "huge":
            Device.pinned = lambda self, nbytes: HugeBuffer(self, nbytes)  # type: ignore[assignment, method-assign, return-value]
        spans = [Span(mapped.address, 0, mapped.nbytes)]
        jobs = [Job(slab.address + w.start, w) for w in windows(spans, mapped.nbytes, JOB_NBYTES)]
        with device, Transfer(device, jobs) as running:
            for index in range(len(jobs)):
                running.wait_issued(index, stream)
            stream.synchronize()
    finally:
        transfer.PIECE_NBYTES, transfer.MAX_WORKERS, transfer.BUFFERS_PER_WORKER, transfer._fill = saved[:4]
        Device.pinned = saved[4]  # type: ignore[method-assign]
        stream.close()


def upload_direct(device: Device, slab: DeviceBuffer, mapped: Mapped, variant: Variant) -> None:
    """From the mapping, pinned part by part: threads pin, copy, wait and unpin."""
    size = variant.piece << 20
    starts = itertools.count(0, size)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with device:
                stream = device.stream()
                while (start := next(starts)) < mapped.nbytes:
                    nbytes = min(size, mapped.nbytes - start)
                    call(cu.cuMemHostRegister, mapped.address + start, nbytes, READ_ONLY)
                    device.copy_h2d(slab.address + start, mapped.address + start, nbytes, stream)
                    stream.synchronize()
                    cleanup(cu.cuMemHostUnregister, mapped.address + start, context=device.context)
                stream.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(variant.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def seconds_of(device: Device, slab: DeviceBuffer, path: Path, variant: Variant) -> float:
    """One run."""
    with Mapped.open(path) as mapped:
        if variant.fill == "present":
            mapped.populate(mapped.address, mapped.nbytes)
        begin = time.perf_counter()
        (upload_direct if variant.fill == "direct" else upload_staged)(device, slab, mapped, variant)
        return time.perf_counter() - begin


def bus_seconds(device: Device, slab: DeviceBuffer, nbytes: int) -> float:
    """What the bus alone takes for `nbytes`."""
    buffer: PinnedBuffer = device.pinned(min(nbytes, 256 << 20))
    stream, begin, end = device.stream(), device.event(timing=True), device.event(timing=True)
    with device:
        for _ in range(2):
            begin.record(stream)
            for at in range(0, nbytes - buffer.nbytes + 1, buffer.nbytes):
                device.copy_h2d(slab.address + at, buffer.address, buffer.nbytes, stream)
            end.record(stream)
            end.synchronize()
        seconds = end.elapsed_ms(begin) / 1e3 * nbytes / (nbytes // buffer.nbytes * buffer.nbytes)
    for each in (begin, end, stream):
        each.close()
    buffer.free()
    return seconds


def write(path: Path, nbytes: int) -> None:
    """A file of bytes that are not all equal, by several threads."""
    with path.open("wb") as file:
        file.truncate(nbytes)
        starts, block = itertools.count(0, 64 << 20), np.random.default_rng(0).bytes(64 << 20)

        def work() -> None:
            while (start := next(starts)) < nbytes:
                os.pwrite(file.fileno(), block[: min(len(block), nbytes - start)], start)

        threads = [threading.Thread(target=work) for _ in range(os.cpu_count() or 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def time_all(path: Path, runs: int, only: str) -> None:
    nbytes = path.stat().st_size
    device = open_device()
    slab = device.alloc(nbytes)
    bus = bus_seconds(device, slab, nbytes)
    click.echo(
        f"{device.name}, {os.cpu_count()} cores; {nbytes / 1e9:.2f} GB; bus {nbytes / max(bus, 1e-9) / 1e9:.1f} GB/s"
    )
    click.echo("fill      staging workers piece buffers    GB/s  of bus")
    for variant in VARIANTS:
        if only and variant.fill not in only.split(","):
            continue
        try:
            best = min(seconds_of(device, slab, path, variant) for _ in range(runs))
        except (OSError, DriverError) as error:
            click.echo(f"{variant}  {error}")
            continue
        click.echo(f"{variant}  {nbytes / best / 1e9:6.1f}  {bus / best:5.0%}")
    slab.free()
    device.close()


@click.command(help=__doc__)
@click.option("--nbytes", type=click.IntRange(1 << 20), default=6 << 30, show_default=True, help="Size of the file.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("/dev/shm"), show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--only", default="", metavar="FILL,…", help="Only these.")
@click.option("--file", "path", type=click.Path(path_type=Path, exists=True), hidden=True)
def main(nbytes: int, folder: Path, runs: int, only: str, path: Path | None) -> None:
    if path is not None:
        time_all(path, runs, only)
        return
    path = folder / f"gllm-upload-{os.getpid()}"
    command = [sys.executable, __file__, "--file", str(path), "--runs", str(runs)]
    try:
        write(path, nbytes)
        subprocess.run([*command, "--only", only], check=True)
        click.echo(f"with stores past the cache ({NON_TEMPORAL})")
        environment = {**os.environ, "GLIBC_TUNABLES": NON_TEMPORAL}
        subprocess.run([*command, "--only", "mapped,present"], check=True, env=environment)
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
