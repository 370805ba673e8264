"""A Redis server stops, stalls, is full or answers garbage in mid-run: outputs are equal, waiting is bounded."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import gllm_driver as gllm

TIMEOUT_S = 0.2
PROMPTS = [[random.Random(seed).randrange(3, 200) for _ in range(600)] for seed in range(4)]
DRAWN = {"max_tokens": 8, "temperature": 1.5, "seed": 3, "ignore_eos": True}
FAULTS = ("stopped", "stalled", "full", "garbage")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    command = [program, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield server
        finally:
            server.kill()


def answer_garbage(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            connection.sendall(b"$99999999999\r\n\x00garbage" * 20)


@pytest.fixture(scope="module")
def computed() -> list[list[int]]:
    with gllm.load(device="cpu", threads=1) as llm:
        return [llm.generate(prompt, **DRAWN).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_in_mid_run_costs_no_output(computed: list[list[int]], fault: str, tmp_path: Path) -> None:
    import redis

    port = free_port()
    url = f"redis://127.0.0.1:{port}/0?timeout_ms={TIMEOUT_S * 1e3:.0f}&backoff_ms=60000"
    with (
        redis_server(tmp_path, port) as server,
        gllm.load(device="cpu", threads=1, kv_store=url, deterministic=True) as llm,
        socket.socket() as listener,
    ):
        sharing = llm._engine._core.sharing
        sharing.costs._always = True
        assert llm.generate(PROMPTS[0], **DRAWN).tokens == computed[0]
        assert sharing._saver.flush(10)
        assert sharing._config.store.flush(10)
        assert llm.metrics.store.saved_chunks
        with llm.stream(PROMPTS[1], **DRAWN) as stream:  # runs while the server fails
            next(stream._handle)
            if fault == "stalled":
                server.send_signal(signal.SIGSTOP)
            elif fault == "full":
                with redis.Redis(port=port) as client:
                    client.config_set("maxmemory-policy", "noeviction")
                    client.config_set("maxmemory", 1)
            else:
                server.kill()
                server.wait()
            if fault == "garbage":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen()
                threading.Thread(target=answer_garbage, args=(listener,), daemon=True).start()
            assert stream._handle.result() == computed[1]
        for at in (2, 3, 0, 1):
            start = time.perf_counter()
            with llm.stream(PROMPTS[at], **DRAWN) as stream:
                next(stream._handle)
                first = time.perf_counter() - start
                assert stream._handle.result() == computed[at]
            assert first < 2 * TIMEOUT_S + 3  # computing takes far less than the three seconds
        assert sharing._config.store.flush(10)
        assert sum(sharing._config.store.stats().tiers[0].faults.values())
        if fault == "garbage":
            listener.shutdown(socket.SHUT_RDWR)
