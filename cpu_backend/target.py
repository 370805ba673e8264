"""What the kernels are compiled for: the host CPU, or a named level for cross-compilation and for tests.

One process compiles for one target. `GLLM_CPU_TARGET` (host, x86-64-v3, x86-64-v4, aarch64) overrides the choice; a
level below the host's own runs there too, which is how the AVX2 paths are tested on an AVX-512 machine.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

from gllm_driver.errors import BackendUnavailableError

IntDot = Literal["avx512-vnni", "avx-vnni", "avx2", "neon-dotprod", "generic"]

_V3 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2,+xsave"
_V4 = _V3 + ",+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,+avx512vnni"


@dataclass(frozen=True)
class Target:
    """A CPU as LLVM knows it, and the two choices our kernels make by it."""

    name: str
    triple: str
    cpu: str
    features: str
    lanes: int  # f32 lanes of the vectors kernels are written with
    int_dot: IntDot  # instruction for dot products of bytes


NAMED = {
    "x86-64-v3": Target("x86-64-v3", "x86_64-unknown-linux-gnu", "x86-64-v3", _V3, 8, "avx2"),
    "x86-64-v4": Target("x86-64-v4", "x86_64-unknown-linux-gnu", "x86-64-v4", _V4, 16, "avx512-vnni"),
    "aarch64": Target("aarch64", "aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod", 4, "neon-dotprod"),
}


@functools.cache
def current() -> Target:
    """The target of this process."""
    name = os.environ.get("GLLM_CPU_TARGET", "host")
    if name == "host":
        return _host()
    if name not in NAMED:
        raise BackendUnavailableError("cpu", f"GLLM_CPU_TARGET={name!r} is not one of host, {', '.join(NAMED)}")
    return NAMED[name]


def _host() -> Target:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    has = features.get
    lanes, int_dot = 4, "generic"
    if has("avx512f") and has("avx512bw") and has("avx512vl"):
        lanes, int_dot = 16, "avx512-vnni" if has("avx512vnni") else "avx2"
    elif has("avx2") and has("fma") and has("f16c"):
        lanes, int_dot = 8, "avx-vnni" if has("avxvnni") else "avx2"
    elif has("neon") and has("dotprod"):
        int_dot = "neon-dotprod"
    return Target(
        "host",
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        features.flatten(),
        lanes,
        int_dot,  # type: ignore[arg-type]
    )
