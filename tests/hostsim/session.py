"""The simulated device inside a test process: built, loaded in place of the driver, and told what to do.

With GLLM_TEST_GPU=1 the real driver is used instead: then there is no stub, and tests that need one are skipped.
GLLM_HOSTSIM names a folder that is built already.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from . import build
from .direct import HostKernels
from .fake_cubin import FakeKernel, fake_cubin

LIVE = ("device memory", "pinned memory", "streams", "events", "graphs", "graph execs", "modules", "contexts")


def on_real_gpu() -> bool:
    """Whether tests are to run on the machine's own GPU."""
    return os.environ.get("GLLM_TEST_GPU", "") not in ("", "0")


def is_sanitized() -> bool:
    """Whether sanitize.py runs this process: then bugs planted on purpose end it."""
    return "GLLM_SANITIZER" in os.environ


@functools.cache
def folder() -> Path:
    """The build, made now unless GLLM_HOSTSIM names one."""
    given = os.environ.get("GLLM_HOSTSIM")
    return Path(given).resolve() if given else build.build()


class Stub:
    """The stub driver of this process: settings, injected faults, counters."""

    def __init__(self) -> None:
        path = folder() / build.DRIVER_LIBRARY
        self._library = library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # found by its SONAME from now on
        library.hostsim_num_calls.restype = ctypes.c_uint64
        library.hostsim_num_live.restype = ctypes.c_uint64
        library.hostsim_last_message.restype = ctypes.c_char_p

    def reset(self, **settings: str) -> None:
        """Start anew, as a fresh process would: `reset(CC="9.0", MEM="1000000")` sets HOSTSIM_CC, HOSTSIM_MEM."""
        for name in [n for n in os.environ if n.startswith("HOSTSIM_") and n != "HOSTSIM_KERNELS"]:
            del os.environ[name]
        os.environ.update({f"HOSTSIM_{name}": value for name, value in settings.items()})
        self._library.hostsim_reset()

    def set_faults(self, faults: str) -> None:
        """ "cuMemAlloc:3=2": the third cuMemAlloc from now returns 2; * for every call."""
        self._library.hostsim_set_faults(faults.encode())

    def num_calls(self, name: str) -> int:
        """Calls of an entry point since the last reset or set_faults."""
        return int(self._library.hostsim_num_calls(name.encode()))

    def live(self) -> dict[str, int]:
        """Objects that exist, by kind; kinds without any left out."""
        counts = {kind: int(self._library.hostsim_num_live(kind.encode())) for kind in LIVE}
        return {kind: n for kind, n in counts.items() if n}

    def last_message(self) -> str:
        """What the stub last said on stderr."""
        return str(self._library.hostsim_last_message().decode())


@functools.cache
def stub() -> Stub:
    """The stub, loaded into this process."""
    return Stub()


def cubin_for_tests(prefix: str, sm: int = 80, max_threads: int = 128) -> bytes:
    """A cubin for the kernels of tests/hostsim/kernels/<prefix>.cu, as far as the simulated device cares."""
    host = HostKernels(folder())
    kernels = {n: FakeKernel(host.param_nbytes(n), max_threads) for n in host.names() if n.startswith(f"{prefix}__")}
    return fake_cubin(kernels, sm)
