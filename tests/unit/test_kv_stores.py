"""Every KV store gives back what was put, and nothing that is not exactly what was asked for."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gllm_driver.errors import RequestError, StoreError
from gllm_driver.kv.store import KvChunkKey, KvEntry, KvLayout, KvRoot, KvStore, MemoryStore, disk, open_store
from gllm_driver.kv.store.codec import Codec, check_entry
from gllm_driver.kv.store.disk import DiskStore
from gllm_driver.kv.store.keys import chunk_keys
from gllm_driver.kv.store.redis_store import RedisStore
from gllm_driver.kv.store.spec import parse_spec
from gllm_driver.kv.store.tiered import TieredStore

LAYOUT = KvLayout("f16", 2, 1, 16, 8)
ROOT = KvRoot.of(LAYOUT, weights=b"w" * 32, weight_dtypes={"q8_0": "q8_0"}, context=512)
OTHER = KvRoot.of(LAYOUT, weights=b"v" * 32, weight_dtypes={"q8_0": "q8_0"}, context=512)


def keys(count: int = 3, seed: int = 0, root: KvRoot = ROOT) -> list[KvChunkKey]:
    g = random.Random(seed)
    return chunk_keys(root, [g.randrange(1000) for _ in range(32 * count)], chunk_tokens=32)


def entry(key: KvChunkKey, seed: int = 0) -> KvEntry:
    numbers = np.random.default_rng(seed).standard_normal(key.payload_nbytes // 2).astype(np.float16)
    return KvEntry(key, numbers.view(np.uint8).reshape(key.num_pages, -1))


def same(found: list[KvEntry], expected: list[KvEntry]) -> bool:
    return [e.key for e in found] == [e.key for e in expected] and all(
        np.array_equal(a.data, b.data) for a, b in zip(found, expected, strict=True)
    )


# --- bytes ------------------------------------------------------------------------------------------------------------


def packed(e: KvEntry, codec: str = "none") -> bytes:
    return b"".join(Codec.of(codec).encode(e))


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
def test_bytes_come_back(codec: str) -> None:
    e = entry(keys(1)[0])
    assert np.array_equal(Codec.of(codec).decode(packed(e, codec), e.key).data, e.data)


@pytest.mark.parametrize(("codec", "steps"), [("int8", 255), ("int4", 15)])
def test_quantized_bytes_come_back_within_half_a_step(codec: str, steps: int) -> None:
    e = entry(keys(1)[0])
    found = Codec.of(codec).decode(packed(e, codec), e.key).array().astype(np.float64)
    x = e.array().astype(np.float64)
    assert np.abs(found - x).max() <= 1.1 * (x.max() - x.min()) / steps / 2 + 2e-3
    with pytest.raises(RequestError, match="deterministic"):
        Codec.of(codec, deterministic=True)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_no_damaged_bytes_are_taken(codec: str) -> None:
    e = entry(keys(1)[0])
    good, g = packed(e, codec), random.Random(1)
    for _ in range(3000):
        bad = bytearray(good)
        kind = g.randrange(3)
        if kind == 0:
            bad[g.randrange(len(bad))] ^= 1 << g.randrange(8)
        elif kind == 1:
            del bad[g.randrange(len(bad)) :]
        else:
            at = g.randrange(len(bad))
            bad[at : at + 8] = g.randbytes(8)
        if bytes(bad) == good:
            continue
        with suppress(StoreError):
            found = Codec.of(codec).decode(bytes(bad), e.key)
            assert np.array_equal(found.data, e.data)  # only what says nothing of the KV, such as its age, may differ


def test_the_entry_of_another_key_or_model_is_refused() -> None:
    first, second, *_ = keys()
    for key, reasons in ((second, {"key", "tokens"}), (keys(root=OTHER)[0], {"model", "key"})):
        with pytest.raises(StoreError) as caught:
            Codec().decode(packed(entry(first)), key)
        assert caught.value.reason in reasons
    check_entry(packed(entry(first)))


def test_equal_digests_do_not_make_equal_keys() -> None:
    first, second, *_ = keys()
    assert replace(second, digest=first.digest, position=0, parent=first.parent) != first


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield port
        finally:
            server.terminate()


Opener = Callable[[], KvStore]


@pytest.fixture(params=["memory", "disk", "redis", "tiers"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same store again and again, where it outlives its object."""
    if request.param == "memory":
        return lambda: MemoryStore(1 << 24)
    if request.param == "disk":
        return lambda: DiskStore(tmp_path, 1 << 24)
    port = request.getfixturevalue("redis_port")
    url, prefix = f"redis://127.0.0.1:{port}/0", tmp_path.name
    if request.param == "redis":
        return lambda: open_store(f"{url}?timeout_ms=5000&prefix={prefix}")
    return lambda: open_store(f"memory:1MiB,disk:{tmp_path},{url}?timeout_ms=5000&prefix={prefix}")


def test_what_was_put_is_found_up_to_the_first_gap(opener: Opener) -> None:
    store = opener()
    k = keys(4)
    entries = [entry(key, i) for i, key in enumerate(k)]
    store.put([entries[0], entries[1], entries[3]])
    assert store.flush(10)
    assert store.contains(k) == [True, True, False, True]
    assert same(store.get(k), entries[:2])
    assert store.get(keys(root=OTHER)) == []
    assert store.get(keys(seed=9)) == []
    stats = store.stats()
    assert stats.hits >= 2
    assert stats.misses >= 2
    assert {e.num_tokens for e in store.entries()} == {32}
    assert store.verify().bad == ()
    assert store.purge(model=b"v" * 32) == 0
    assert store.purge() >= 3
    assert store.get(k) == []
    store.close()


def test_disk_and_redis_outlive_the_object(opener: Opener) -> None:
    store = opener()
    if isinstance(store, MemoryStore):
        store.close()
        return
    k = keys()
    entries = [entry(key) for key in k]
    store.put(entries)
    store.close()
    again = opener()
    assert same(again.get(k), entries)
    again.close()


def test_memory_keeps_to_its_size() -> None:
    k = keys(8)
    size = entry(k[0]).nbytes
    store = MemoryStore(3 * size + 3 * 1024)
    for key in k:
        store.put([entry(key)])
    assert store.stats().nbytes <= store.stats().capacity_nbytes
    assert store.contains(k)[-1]
    assert not store.contains(k)[0]
    store.audit()


def test_damaged_files_are_misses_with_a_reason(tmp_path: Path) -> None:
    k = keys(1)
    for seed, damage in enumerate(("flip", "cut", "swap", "empty")):
        store = DiskStore(tmp_path / damage, 1 << 24)
        store.put([entry(k[0])])
        path = next(p for p in (tmp_path / damage).rglob("*") if p.is_file())
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-5] ^= 16
        elif damage == "cut":
            del data[-100:]
        elif damage == "swap":
            data = bytearray(packed(entry(keys(1, seed=5)[0])))
        else:
            data.clear()
        path.write_bytes(data)
        assert store.get(k) == []
        assert sum(store.stats().faults.values()) >= 1, damage
        store.put([entry(k[0], seed)])  # and can be stored again
        assert same(store.get(k), [entry(k[0], seed)])


def test_a_full_disk_is_tried_again_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "FULL_PAUSE_S", 0.2)
    store = DiskStore(tmp_path, 1 << 24)
    write, tried = store._files.write, []

    def full_once(*args: Any, **options: Any) -> None:
        tried.append(time.monotonic())
        if len(tried) == 1:
            raise StoreError("full", "no space left on device")
        write(*args, **options)

    monkeypatch.setattr(store._files, "write", full_once)
    while len(tried) < 2 and time.monotonic() < (tried or [time.monotonic()])[0] + 5:
        store.put([entry(keys(1)[0])])  # without a pause of its own
    assert 0.2 <= tried[1] - tried[0] < 2
    assert same(store.get(keys(1)), [entry(keys(1)[0])])
    assert store.stats().faults["full"] > 1


def test_a_directory_that_cannot_be_used_costs_misses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = DiskStore(tmp_path / "file", 1 << 24)
    store.put([entry(keys(1)[0])])
    assert store.get(keys(1)) == []
    assert store.stats().faults


class Server:
    """A TCP server that is no Redis: it accepts, and answers with `reply` or never."""

    def __init__(self, reply: bytes | None) -> None:
        self._reply = reply
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)
                if self._reply is not None:
                    connection.sendall(self._reply)

    def close(self) -> None:
        for each in (*self._open, self._socket):
            each.close()


@pytest.mark.parametrize(
    "reply", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n" * 50, b"$1000000000000\r\n", b":1\r\n" * 9]
)
def test_a_server_that_stalls_or_talks_nonsense_costs_one_timeout(reply: bytes | None) -> None:
    server = Server(reply)
    store = open_store(f"redis://127.0.0.1:{server.port}/0?timeout_ms=200&backoff_ms=60000")
    start = time.monotonic()
    for _ in range(20):
        assert store.get(keys()) == []
        assert store.contains(keys()) == [False] * 3
    assert time.monotonic() - start < 1.5
    assert sum(store.stats().tiers[0].faults.values()) >= 1
    store.close()
    server.close()


def test_no_server_at_all() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = RedisStore(f"redis://127.0.0.1:{port}/0", name="redis", timeout_s=0.2, backoff_s=60)
    store.put([entry(keys(1)[0])])
    assert store.get(keys()) == []
    assert store.stats().faults
    store.close()


def test_values_larger_than_a_part_are_split(redis_port: int, tmp_path: Path) -> None:
    store = open_store(f"redis://127.0.0.1:{redis_port}/0?timeout_ms=5000&part=1KiB&prefix={tmp_path.name}")
    k = keys()
    entries = [entry(key) for key in k]
    store.put(entries)
    store.flush(10)
    assert same(store.get(k), entries)
    store.close()


def test_tiers_count_their_hits_apart_and_promote(tmp_path: Path) -> None:
    first, second = MemoryStore(1 << 20), DiskStore(tmp_path, 1 << 24)
    k = keys()
    second.put([entry(key) for key in k])
    store = TieredStore([first, second])
    assert len(store.get(k)) == 3
    assert store.flush(10)
    assert len(store.get(k)) == 3
    memory, disk = store.stats().tiers
    assert (memory.hits, disk.hits) == (3, 3)
    store.close()


def test_codecs_of_two_parts_are_written_with_a_plus() -> None:
    (tier,) = parse_spec("memory:1MiB?codec=int8+zstd")
    assert tier.options["codec"] == "int8+zstd"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "memory",
        "memory:lots",
        "memory:0",
        "disk:",
        "disk:/x?cap=1XB",
        "disk:/x?kap=1GB",
        "disk:/x,memory:1GiB",
        "redis://",
        "redis://host:99999/0",
        "redis://host/0?timeout_ms=soon",
        "redis://user:secret@host/x",
        "tape:/dev/st0",
        "memory:1MiB?codec=zip",
        "disk:~nobody-of-that-name/x",
    ],
)
def test_mistakes_in_a_specification_are_said_in_one_line(spec: str) -> None:
    with pytest.raises(RequestError) as caught:
        open_store(spec)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
