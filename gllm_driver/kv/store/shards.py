"""A directory of files that several processes read, write and remove at once, any of which may die at any moment.

Files appear whole, by renaming, and never change afterwards, so a reader sees all of a file or none. There is no lock:
two that write one name write the same, and one that removes what another has removed is content.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import StoreError
from .header import ALIGNMENT

_NAME = re.compile(r"[0-9a-f]{64}(-int[48])*")
_SHARD = re.compile(r"[0-9a-f]{2}")
_SUFFIX = ".kv"
_TMP = "tmp"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # neither follow links nor wait for a pipe's writer
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TOUCH_S = 1.0  # how exactly the time of the last use is kept


@dataclass(frozen=True)
class FileInfo:
    name: str
    nbytes: int
    last_used: float  # seconds since 1970


class Shards:
    """Files `ab/cdef….kv` by name (a digest in hex, perhaps with a suffix), under a directory that is made when needed.

    Only plain files in plain directories are seen: symbolic links, pipes and foreign names are not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str, max_nbytes: int, *, touch: bool = True) -> memoryview | None:
        """All bytes of a file; None when there is none. `touch`: this is a use of it.

        Raises StoreError: truncated for a file of more than `max_nbytes`, io for anything else that is wrong.
        """
        try:
            with self._shard(name) as directory, _opened(_file(name), _READ, directory) as fd:
                info = os.fstat(fd)
                if not stat.S_ISREG(info.st_mode):
                    raise StoreError("io", f"{self._path(name)} is no plain file")
                if info.st_size > max_nbytes:
                    raise StoreError("truncated", f"{info.st_size} bytes where {max_nbytes} are the most there can be")
                if touch and time.time() - info.st_mtime > _TOUCH_S:
                    with contextlib.suppress(OSError):  # another user's file
                        os.utime(fd)
                return _read_all(fd, info.st_size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._failure(error, name) from error

    def head(self, name: str, nbytes: int) -> memoryview | None:
        """The first bytes of a file. None when there is none. Raises StoreError (io)."""
        try:
            with self._shard(name) as directory, _opened(_file(name), _READ, directory) as fd:
                return _read_all(fd, min(nbytes, os.fstat(fd).st_size))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._failure(error, name) from error

    def write(self, name: str, parts: Sequence[bytes | memoryview], *, fsync: bool) -> None:
        """A file of these bytes, in place of what has its name. Raises StoreError (full, io), leaving nothing behind.

        fsync: data reach the disk before the name does, so that a power cut leaves whole files. The directory is not
        synced: a name lost that way is a miss.
        """
        tmp = self.root / _TMP / f"{name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            tmp.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.root / name[:2]).mkdir(mode=0o700, exist_ok=True)
            try:
                with _opened(str(tmp), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC) as fd:
                    _write_all(fd, parts)
                    if fsync:
                        os.fsync(fd)
                with self._shard(name) as directory:
                    os.replace(tmp, _file(name), dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    tmp.unlink()
                raise
        except OSError as error:
            raise self._failure(error, name) from error

    def has(self, name: str) -> bool:
        try:
            with self._shard(name) as directory:
                return stat.S_ISREG(os.stat(_file(name), dir_fd=directory, follow_symlinks=False).st_mode)
        except OSError:
            return False

    def touch(self, name: str) -> None:
        with contextlib.suppress(OSError), self._shard(name) as directory:
            os.utime(_file(name), dir_fd=directory, follow_symlinks=False)

    def remove(self, name: str) -> bool:
        """False if it was not there. Raises StoreError (io) when it cannot be removed."""
        try:
            with self._shard(name) as directory:
                os.unlink(_file(name), dir_fd=directory)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._failure(error, name) from error
        return True

    def scan(self) -> Iterator[FileInfo]:
        """All files, in no order. What comes or goes meanwhile may or may not be among them."""
        for shard in _listed(self.root):
            if not _SHARD.fullmatch(shard.name) or not shard.is_dir(follow_symlinks=False):
                continue
            for entry in _listed(shard.path):
                name = shard.name + entry.name.removesuffix(_SUFFIX)
                if entry.name.endswith(_SUFFIX) and _NAME.fullmatch(name):
                    yield from _info(entry, name)

    def remove_leftovers(self, older_than_s: float) -> int:
        """Remove files that writers who died left half-written; returns the bytes of those too young to tell."""
        kept = 0
        for entry in _listed(self.root / _TMP):
            for info in _info(entry, entry.name):
                if time.time() - info.last_used > older_than_s:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
                else:
                    kept += info.nbytes
        return kept

    @contextlib.contextmanager
    def _shard(self, name: str) -> Iterator[int]:
        with _opened(str(self.root / name[:2]), _DIRECTORY) as fd:
            yield fd

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / _file(name)

    def _failure(self, error: OSError, name: str) -> StoreError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return StoreError("full" if is_full else "io", f"{error.strerror or error}: {self._path(name)}")


def _file(name: str) -> str:
    return name[2:] + _SUFFIX


@contextlib.contextmanager
def _opened(path: str, flags: int, directory: int | None = None) -> Iterator[int]:
    fd = os.open(path, flags, 0o600, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_all(fd: int, nbytes: int) -> memoryview:
    """Up to `nbytes` bytes, in memory of their own whose start is aligned as bodies are."""
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    view = memory.data[start : start + nbytes]
    done = 0
    while done < nbytes:
        count = os.preadv(fd, [view[done:]], done)
        if count == 0:
            break
        done += count
    return view[:done]


def _write_all(fd: int, parts: Sequence[bytes | memoryview]) -> None:
    for part in parts:
        view = memoryview(part).cast("B")
        while view:
            view = view[os.write(fd, view) :]


def _listed(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as listing:
            return list(listing)
    except OSError:
        return []


def _info(entry: os.DirEntry[str], name: str) -> Iterator[FileInfo]:
    """One, or none if the file is gone or odd."""
    with contextlib.suppress(OSError):
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(info.st_mode):
            yield FileInfo(name, info.st_size, info.st_mtime)
