"""What a KV store is worth: repeated prompts from each tier against computing them, and a zipf workload.

python benchmarks/kv_store_serving.py --model random.gguf --tokens 2000
python benchmarks/kv_store_serving.py --zipf

The device's own prefix reuse is emptied before every request, so that the store is what is measured. Redis is a server
of its own on the loopback interface; without a redis-server on the PATH its row is left out. Prints Markdown.
"""

from __future__ import annotations

import argparse
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import gllm_driver as gllm

GB = 1e9


@contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """The URL of a server that keeps nothing on disk; None where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()


def settle(llm: gllm.LLM) -> None:
    """Wait until everything that was computed is in the store."""
    sharing = llm._engine._core.sharing
    if sharing is not None:
        assert sharing._saver.flush(120)
        assert sharing._config.store.flush(120)


def forget_device(llm: gllm.LLM) -> None:
    """As after an hour of other requests: nothing of earlier prompts is on the device. Nothing may be running."""
    llm._engine._core.absorb()
    llm._engine._core.open_books()


def once(llm: gllm.LLM, prompt: Sequence[int], max_tokens: int) -> tuple[float, float, list[int], int]:
    """Seconds to the first token and to the end, the tokens, and how many of the prompt were not computed."""
    start = time.perf_counter()
    with llm.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True) as stream:
        handle = stream._handle
        next(handle)
        first = time.perf_counter() - start
        tokens = handle.result()
        return first, time.perf_counter() - start, tokens, handle.progress.cached_tokens


def tiers(args: argparse.Namespace) -> None:
    """TTFT and throughput of one long prompt again and again, from each tier."""
    prompt = [random.Random(1).randrange(3, 4000) for _ in range(args.tokens)]
    with tempfile.TemporaryDirectory(prefix="gllm-kv-") as folder, redis_server(Path(folder)) as redis:
        specs = {"memory": "memory:8GiB", "disk": f"disk:{folder}/kv?cap=20GiB"}
        if redis is not None:
            specs["Redis"] = f"{redis}?timeout_ms=5000"
        specs |= {"memory, no checksums": "memory:8GiB?verify=0"} if args.more else {}
        print(f"\n{args.tokens}-token prompt, {args.output} tokens of output, median of {args.repeats}\n")
        print("| from | first token | requests/s | of computing | loaded tokens | store |")
        print("|---|---|---|---|---|---|")
        base = expected = None
        for name, spec in {"computed": None, **specs}.items():
            context = args.tokens + args.output
            with gllm.load(
                args.model, device=args.device, threads=args.threads, context_length=context, kv_store=spec
            ) as llm:
                once(llm, prompt[:64], 2)
                if spec is not None:  # the first time it is computed and stored
                    once(llm, prompt, 1)
                    settle(llm)
                times = []
                for _ in range(args.repeats if spec else max(1, args.repeats // 3)):
                    forget_device(llm)
                    times.append(once(llm, prompt, args.output))
                first, total = median(t[0] for t in times), median(t[1] for t in times)
                expected = expected or times[0][2]
                assert all(t[2] == expected for t in times), f"{name}: another output than computed"
                base = base or total
                store = llm.metrics.store
                rate = f"{store.tiers[0].gb_per_s:.2f} GB/s" if store is not None and store.tiers else ""
                cells = f"{first * 1e3:.0f} ms", f"{1 / total:.2f}", f"{base / total:.1f} ×", f"{times[-1][3]}", rate
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


def zipf(args: argparse.Namespace) -> None:
    """Requests for few popular and many rare prompts: what share of their tokens comes from which tier."""
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 4000) for _ in range(args.tokens)] for _ in range(args.prompts)]
    weights = [1 / (rank + 1) ** args.exponent for rank in range(args.prompts)]
    order = rng.choices(range(args.prompts), weights, k=args.requests)
    with tempfile.TemporaryDirectory(prefix="gllm-kv-") as folder, redis_server(Path(folder)) as redis:
        options = {"device": args.device, "threads": args.threads, "context_length": args.tokens + args.output}
        # Room for as many requests as run together, so that prefixes leave the device soon.
        options |= {"kv_tokens": 4 * (args.tokens + args.output), "max_batch": 4}
        with gllm.load(args.model, **options) as llm:
            page_nbytes, page_size = llm._engine.kv.config.page_nbytes, llm._engine.kv.config.page_size
        size = args.tokens // page_size * page_nbytes * args.prompts // 10
        spec = f"memory:{size},disk:{folder}/kv?cap={5 * size}"
        spec += f",{redis}?timeout_ms=5000" if redis is not None else ""
        results = {}
        for name, given in (("computed", None), ("store", spec)):
            with gllm.load(args.model, kv_store=given, **options) as llm:
                start = time.perf_counter()
                outputs = []
                for at in range(0, len(order), 4):
                    batch = [prompts[i] for i in order[at : at + 4]]
                    outputs += llm.generate_batch(batch, max_tokens=args.output, temperature=0, ignore_eos=True)
                results[name] = time.perf_counter() - start, [r.tokens for r in outputs], llm.metrics
        (slow, expected, before), (fast, found, metrics) = results["computed"], results["store"]
        assert found == expected, "another output than computed"
        store = metrics.store
        assert store is not None
        print(
            f"\nzipf: {args.requests} requests for {args.prompts} prompts of {args.tokens} tokens (exponent "
            f"{args.exponent:g}), {args.output} of output, 4 at a time; memory for a tenth of them, disk for half\n"
        )
        print("| | requests/s | prompt tokens not computed | first token p50 / p99 |")
        print("|---|---|---|---|")
        for name, (seconds, _, m) in results.items():
            ttft = m.time_to_first_token
            print(
                f"| {name} | {args.requests / seconds:.2f} | {m.prefix_hit_rate:.0%} | {ttft.p50 * 1e3:.0f} / "
                f"{ttft.p99 * 1e3:.0f} ms |"
            )
        print(f"\nthroughput × {slow / fast:.1f}; the device alone had {before.prefix_hit_rate:.0%} of the tokens\n")
        print(f"chunks asked of the store: {store.hit_rate:.0%} found\n\n    " + str(store).replace("\n", "\n    "))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model; without it, the demonstration model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt")
    parser.add_argument("--output", type=int, default=8, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--more", action="store_true", help="variants of the stores as well")
    parser.add_argument("--zipf", action="store_true", help="the zipf workload instead")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--exponent", type=float, default=1.0)
    arguments = parser.parse_args()
    (zipf if arguments.zipf else tiers)(arguments)
