"""Two processes share a directory and a Redis server while they are killed again and again: is any output another?

python benchmarks/kv_store_soak.py --seconds 180

The demonstration model in deterministic mode; every generation is compared with the computed one, and the directory is
verified at the end. Exit code 1 where something differs. Without a redis-server only the directory is shared.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

from kv_store_serving import redis_server

import gllm_driver as gllm
from gllm_driver.kv.store import open_store

DRAWN = {"max_tokens": 4, "temperature": 1.5, "seed": 3, "ignore_eos": True}


def prompts(count: int) -> list[list[int]]:
    """Some begin alike."""
    begins = [[random.Random(seed).randrange(3, 200) for _ in range(512)] for seed in range(max(1, count // 3))]
    rng = random.Random(99)
    return [begins[at % len(begins)] + [rng.randrange(3, 200) for _ in range(80)] for at in range(count)]


def serve(spec: str, count: int, seed: int) -> None:
    """One of the processes: generates until it is killed, one line of JSON for each generation."""
    rng, known = random.Random(seed), prompts(count)
    with gllm.load(device="cpu", threads=1, deterministic=True, kv_store=spec) as llm:
        llm._engine._core.sharing.costs._always = True
        while True:
            llm._engine._core.absorb()
            llm._engine._core.open_books()  # nothing of earlier prompts is on the device
            at = rng.randrange(count)
            result = llm.generate(known[at], **DRAWN)
            print(json.dumps([at, result.tokens, result.cached_tokens]), flush=True)


class Worker:
    """A process that serves, its lines going into a queue."""

    def __init__(self, spec: str, count: int, seed: int, lines: queue.SimpleQueue[str]) -> None:
        command = [sys.executable, __file__, "--serve", spec, "--prompts", str(count), "--seed", str(seed)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, args=(lines,))
        self._thread.start()

    def _read(self, lines: queue.SimpleQueue[str]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("]\n"):  # whole: the last one may have been cut by the kill
                lines.put(line)

    def died(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()


def soak(seconds: float, count: int, seed: int) -> int:
    """Runs it and prints one paragraph; the number of things that were wrong."""
    rng = random.Random(seed)
    with gllm.load(device="cpu", threads=1, deterministic=True) as llm:
        expected = [llm.generate(prompt, **DRAWN).tokens for prompt in prompts(count)]
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    kills = generations = cached = wrong = crashes = 0
    with tempfile.TemporaryDirectory(prefix="gllm-kv-") as folder, redis_server(Path(folder)) as redis:
        disk = f"disk:{folder}/kv?cap=8MiB"  # less than all prompts: files are evicted as well
        spec = f"memory:2MiB,{disk}" + (f",{redis}?timeout_ms=2000&ttl=5" if redis else "")
        workers = [Worker(spec, count, rng.randrange(2**31), lines) for _ in range(2)]
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                time.sleep(min(rng.uniform(1, 4), max(0.0, end - time.monotonic())))
                at = rng.randrange(2)
                crashes += sum(worker.died() for worker in workers)
                workers[at].kill()
                kills += 1
                if time.monotonic() < end:
                    workers[at] = Worker(spec, count, rng.randrange(2**31), lines)
        finally:
            for worker in workers:
                worker.kill()
        while not lines.empty():
            prompt, tokens, found = json.loads(lines.get())
            generations += 1
            cached += found > 0
            wrong += tokens != expected[prompt]
        with closing(open_store(disk)) as store:
            report = store.verify()
    print(
        f"{seconds:.0f} s, {kills} kills: {generations} generations, {cached} with KV from the store, "
        f"{wrong} other than computed, {crashes} processes ended by themselves; "
        f"{len(report.bad)} damaged of {report.num_checked} files"
    )
    return wrong + crashes + len(report.bad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.prompts, args.seed)
    sys.exit(1 if soak(args.seconds, args.prompts, args.seed) else 0)
