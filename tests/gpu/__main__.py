"""Run the CUDA tests on this machine's GPU, group by group, and print a line for each."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

GROUPS = ("driver", "ops", "e2e")
E2E = ("cuda_generation", "cuda_batches", "cuda_upload", "cuda_hopper", "engine_cuda", "kv_store_cuda", "embedding")
NOTHING_TO_RUN = 5  # pytest's exit code: an op that has no kernels of its own has no cases
MAX_LINES = 12  # of failures shown per process


def commands(group: str) -> list[tuple[str, list[str]]]:
    """(name, pytest arguments) of a group's processes."""
    if group == "driver":
        return [("driver", ["tests/driver"])]
    if group == "e2e":
        return [(f"e2e {name}", [f"tests/e2e/test_{name}.py"]) for name in E2E]
    from gllm_driver.ops import CONTRACTS

    return [(f"ops {op}", ["tests/gpu/test_gpu_parity.py", "-k", f"{op}-"]) for op in CONTRACTS]


def run(name: str, arguments: list[str], environment: dict[str, str], timeout_s: float) -> bool:
    """Run one pytest process and print what became of it."""
    command = [sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider", *arguments]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        code, lines = done.returncode, (done.stdout + done.stderr).splitlines()
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        code, lines = 124, [*text.splitlines()[-3:], f"stopped after {timeout_s:.0f} s"]
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error)", line)), "")
    ok = code == 0 or (code == NOTHING_TO_RUN and name.startswith("ops "))
    summary = summary.strip("= ") or (lines[-1] if lines else "no output")
    print(f"{'ok  ' if ok else 'FAIL'} {name:<24}{time.perf_counter() - start:7.1f} s  {summary}", flush=True)
    if not ok:
        problems = [line for line in lines if re.match(r"(FAILED|ERROR|E  |/.*Error|.*Error:)", line)] or lines[-5:]
        for line in problems[:MAX_LINES]:
            print(f"       {line[:240]}", flush=True)
        if len(problems) > MAX_LINES:
            print(f"       … and {len(problems) - MAX_LINES} lines more", flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--simulated", action="store_true", help="use the simulated device, not a GPU")
    parser.add_argument("--timeout", type=float, default=240.0, metavar="S", help="per process (default: 240)")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    environment.pop("GLLM_TEST_GPU", None)
    if not options.simulated:
        environment["GLLM_TEST_GPU"] = "1"
        from gllm_driver.driver import probe

        for gpu in probe():
            print(f"{gpu.device}: {gpu.name}, {'usable' if gpu.usable else 'not usable'}: {gpu.reason}", flush=True)
    results = [
        run(name, arguments, environment, options.timeout)
        for group in options.groups or GROUPS
        for name, arguments in commands(group)
    ]
    print(f"{results.count(True)} of {len(results)} ok")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
