"""A short run of the soak: processes that share a store and are killed at any moment never make another output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_processes_leave_a_store_that_gives_computed_outputs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/kv_store_soak.py"), "--seconds", "12"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kills: (\d+) generations, (\d+) with KV", done.stdout)
    assert found is not None, done.stdout
    assert all(int(number) for number in found.groups()), done.stdout
