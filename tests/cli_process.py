"""Runs the installed `gllm` in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gllm_driver

TIMEOUT_S = 120  # a machine that has never compiled the kernels does so in the first test


def command() -> list[str]:
    """The console script beside this Python, or the module where the package is not installed."""
    script = Path(sys.executable).with_name("gllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "gllm_driver"]


def environment(**more: str) -> dict[str, str]:
    """This environment, with the package on the path also where it is not installed."""
    return {**os.environ, "PYTHONPATH": str(Path(gllm_driver.__file__).parents[1]), **more}


@dataclass(frozen=True)
class Done:
    """What a finished process left: bytes, since an output may be anything."""

    code: int
    out: str
    err: str


def gllm(
    *args: str | Path, stdin: bytes | None = None, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """Run to the end, with neither output on a terminal; without `stdin` its standard input is closed."""
    done = subprocess.run(
        [*command(), *map(str, args)],
        input=b"" if stdin is None else stdin,
        capture_output=True,
        env=environment(**(env or {})),
        cwd=cwd,
        timeout=TIMEOUT_S,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def start(*args: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
    """Start and return the process; standard error goes to a pipe unless said otherwise."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([*command(), *map(str, args)], env=environment(), **streams)


def wait_for(process: subprocess.Popen[bytes], line: str) -> None:
    """Read standard error (unbuffered here) up to a line that contains `line`."""
    assert process.stderr is not None
    seen = b""
    while line not in (text := process.stderr.readline().decode()):
        seen += text.encode()
        assert text, f"the process ended without saying {line!r}: {seen.decode()}"
