"""Fuzz of the decoder of stored KV: `python -m tests.fuzz_kv_codec 1000000 [seed]`.

Entries of tiny layouts in every codec are flipped, cut, spliced and replaced by noise; half of them are sealed again,
so that damage is behind right checksums. Only StoreError may come out, no memory beyond a bound may be used, and what
is accepted is of the expected key and, unless sealed again, the KV that was written.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from gllm_driver.errors import StoreError
from gllm_driver.kv.store import KvChunkKey, KvEntry, KvLayout, KvRoot
from gllm_driver.kv.store.checksum import tree_digest
from gllm_driver.kv.store.codec import Codec, check_entry
from gllm_driver.kv.store.header import PREFIX_NBYTES, parse_header
from gllm_driver.kv.store.keys import DIGEST_NBYTES, chain, chunk_keys

CODECS = ("none", "zstd", "lz4", "int8", "int4", "int8+zstd", "int8+lz4", "int4+zstd", "int4+lz4")
PEAK_NBYTES = 1 << 20  # that Python and NumPy may have allocated for one input; entries have about 1 KiB
ADDRESS_SPACE = 256 << 20  # beyond what the process has at the start; bounds the C libraries too
_HEADER_CHECKSUM = PREFIX_NBYTES - DIGEST_NBYTES
_BODY_CHECKSUM = _HEADER_CHECKSUM - DIGEST_NBYTES
_KEY = _BODY_CHECKSUM - DIGEST_NBYTES
_PARENT = _KEY - DIGEST_NBYTES
_BODY_AT = 384  # or a little before, by the number of tokens
_EDGES = (0, 1, 2, 3, 127, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def entries() -> list[tuple[Codec, KvEntry, bytes]]:
    """What is written, in every codec, for several layouts."""
    found = []
    for dtype, page_size, dim in (("f16", 4, 8), ("f32", 4, 4), ("bf16", 8, 8)):
        layout = KvLayout(dtype, 2, 1, page_size, dim)
        root = KvRoot.of(layout, weights=b"w" * 32, weight_dtypes={}, context=64)
        for key in chunk_keys(root, list(range(4 * page_size)), chunk_tokens=2 * page_size):
            small = np.zeros(key.payload_nbytes // layout.itemsize, np.float32)
            small[::3] = np.arange(len(small[::3])) / 8
            if dtype == "bf16":
                data = (small.view(np.uint32) >> 16).astype(np.uint16)
            else:
                data = small.astype(np.float16 if dtype == "f16" else np.float32)
            entry = KvEntry(key, data.view(np.uint8).reshape(key.num_pages, -1))
            for name in CODECS:
                codec = Codec.of(name)
                found.append((codec, entry, b"".join(bytes(part) for part in codec.encode(entry))))
    return found


def damaged(g: random.Random, good: bytes, other: bytes) -> bytes:
    """Another string of bytes than `good`, mostly."""
    bad = bytearray(good)
    for _ in range(g.choice((1, 1, 1, 2, 4))):
        at = g.randrange(len(bad)) if bad else 0
        kind = g.randrange(12)
        if kind == 0 and bad:
            bad[at] ^= 1 << g.randrange(8)
        elif kind == 1:
            bad[at : at + 8] = g.randbytes(g.randrange(12))
        elif kind == 2:
            del bad[at:]
        elif kind == 3:
            bad += g.randbytes(g.randrange(1, 80))
        elif kind == 4:
            bad[at:] = other[at:]
        elif kind == 5:
            bad[at:] = other[g.randrange(len(other)) :]
        elif kind == 6:
            bad = bytearray(g.randbytes(g.randrange(1200)))
        elif kind < 9:  # the body alone, as long as before: what reaches decompression once it is sealed
            at = g.randrange(min(_BODY_AT, len(bad)), len(bad) + 1)
            new = g.randbytes(min(g.randrange(1, 9), len(bad) - at))
            bad[at : at + len(new)] = new
        else:  # a number of the header at an edge
            at = g.choice((8, 12, 16, 17, 18, 19, *range(20, 44, 4), *range(44, 92, 4)))
            width = 1 if 16 <= at < 20 else g.choice((4, 8))
            value = g.choice((*_EDGES, g.randrange(64)))
            bad[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(bad)


def sealed(data: bytes) -> bytes:
    """With all digests made right, as someone would who writes entries by purpose."""
    if len(data) < PREFIX_NBYTES:
        return data
    bad = bytearray(data)
    num_tokens = int.from_bytes(bad[40:44], "little")
    ids = bytes(bad[PREFIX_NBYTES : PREFIX_NBYTES + 8 * num_tokens])
    body = min(int.from_bytes(bad[12:16], "little"), len(bad))
    bad[_BODY_CHECKSUM:_HEADER_CHECKSUM] = tree_digest(memoryview(bytes(bad[body:])))
    position = int.from_bytes(bad[44:52], "little")
    bad[_KEY:_BODY_CHECKSUM] = chain(bytes(bad[_PARENT:_KEY]), position, ids)
    bad[_HEADER_CHECKSUM:PREFIX_NBYTES] = hashlib.sha256(bytes(bad[:_HEADER_CHECKSUM]) + ids).digest()
    return bytes(bad)


def examine(codec: Codec, data: bytes, key: KvChunkKey, written: np.ndarray | None) -> str:
    """What became of an input: a StoreError's reason, or taken. `written`: the only KV that may come out."""
    for look in (lambda: parse_header(memoryview(data)), lambda: check_entry(data)):
        with suppress(StoreError):
            look()
    try:
        found = codec.decode(data, key)
    except StoreError as error:
        return error.reason
    if found.key != key or found.data.shape != (key.num_pages, key.root.layout.page_nbytes):
        raise AssertionError(f"taken as {key}: {found.key}, {found.data.shape}")
    if written is not None and not np.array_equal(found.data, written):
        raise AssertionError(f"other KV was taken as {key}")
    return "taken"


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Prints the name when something is raised."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            print(name, file=sys.stderr)


def fuzz(count: int, seed: int = 0) -> Counter[str]:
    """Outcomes by name. Raises what the decoder should not have, AssertionError for other KV or too much memory."""
    g = random.Random(seed)
    known = entries()
    originals = [codec.decode(data, entry.key).data for codec, entry, data in known]
    outcomes: Counter[str] = Counter()
    tracemalloc.start(1)
    try:
        for at in range(count):
            index = g.randrange(len(known))
            codec, entry, good = known[index]
            data = damaged(g, good, known[g.randrange(len(known))][2])
            again = g.random() < 0.5
            if again:
                data = sealed(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            # Spliced entries may be another's in full: the same key's by another codec is as good.
            is_whole = not again and any(data == each[2] for each in known)
            name = f"input {at} of seed {seed}, codec {codec}: {data.hex()}"
            with naming(name):
                outcome = examine(codec, data, entry.key, None if again or is_whole else originals[index])
            if tracemalloc.get_traced_memory()[1] - before > PEAK_NBYTES:
                raise AssertionError(f"input {at} of seed {seed}: more than {PEAK_NBYTES} bytes for {len(data)}")
            outcomes[outcome] += 1
    finally:
        tracemalloc.stop()
    return outcomes


def main(count: int, seed: int = 0) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    fuzz(1000, seed)  # imports what is imported late
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    start = time.perf_counter()
    outcomes = fuzz(count, seed)
    counts = ", ".join(f"{n} {reason}" for reason, n in outcomes.most_common())
    print(f"{count} inputs in {time.perf_counter() - start:.0f} s: {counts}")


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:3]))
