"""SHA-256 over large bodies on several cores: the digest of the digests of blocks."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

BLOCK_NBYTES = 1 << 20
_MAX_THREADS = 8


def tree_digest(data: bytes | memoryview) -> bytes:
    """SHA-256(b"tree" + length as u64 + SHA-256 of each 1 MiB block, in order), little-endian. 32 bytes.

    hashlib lets other threads run while it works on a block, so a body is hashed at the speed of all cores.
    """
    view = memoryview(data).cast("B")
    blocks = [view[start : start + BLOCK_NBYTES] for start in range(0, view.nbytes, BLOCK_NBYTES)]
    total = hashlib.sha256(b"tree" + view.nbytes.to_bytes(8, "little"))
    for digest in _digests(blocks):
        total.update(digest)
    return total.digest()


def _digests(blocks: list[memoryview]) -> Iterable[bytes]:
    if len(blocks) > 2:
        try:
            return _pool().map(_sha256, blocks)
        except RuntimeError:  # the interpreter is ending and starts no more threads
            pass
    return map(_sha256, blocks)


def _sha256(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()


_pool_of_process: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    global _pool_of_process
    with _lock:
        if _pool_of_process is None:
            workers = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
            _pool_of_process = ThreadPoolExecutor(workers, thread_name_prefix="kv-checksum")
        return _pool_of_process


def _forget_pool() -> None:
    global _pool_of_process, _lock
    _pool_of_process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork
