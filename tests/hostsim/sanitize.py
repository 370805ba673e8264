#!/usr/bin/env python3
"""Run a command on the simulated device built with a sanitizer: `sanitize.py asan pytest tests/driver -q`.

asan: AddressSanitizer sees every access outside device, pinned and shared memory, reads too.
tsan: ThreadSanitizer sees accesses of a block's threads that no barrier puts in order.
The host's own Python stays as it is: the sanitizer's library is preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostsim import build

LIBRARIES = {"asan": "libasan.so", "tsan": "libtsan.so"}
OPTIONS = {
    # Fibers leave frames behind, and Python does not free all at exit: neither is a finding.
    "asan": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1:abort_on_error=0"},
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1:exitcode=66"},
}


def environment(sanitizer: str, ops: list[str] | None = None) -> dict[str, str]:
    """The variables under which a process runs on the sanitized build, which is made if it has to be."""
    folder = build.build(sanitizer=sanitizer, ops=ops)
    library = subprocess.run(
        ["g++", f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    preload = " ".join(filter(None, [library, os.environ.get("LD_PRELOAD")]))
    return (
        os.environ
        | OPTIONS[sanitizer]
        | {
            "LD_PRELOAD": preload,
            "GLLM_HOSTSIM": str(folder),
            "GLLM_SANITIZER": sanitizer,
        }
    )


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] not in LIBRARIES:
        print(f"usage: {sys.argv[0]} asan|tsan command …", file=sys.stderr)
        return 2
    return subprocess.run(sys.argv[2:], env=environment(sys.argv[1]), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
