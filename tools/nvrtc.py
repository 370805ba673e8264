"""NVRTC of CUDA 12.9, as a compiler at build time: for architectures that nvcc 13 no longer knows.

It comes as Python wheels, needs no host compiler, and compiles a text: what the sources expect of the C++ library and
of newer architectures is put before them.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .nvcc import BuildError

OF_RECORD = "12.9"  # the last that knows sm_61
ARCHS = ("60", "61", "62", "70", "72")

# Pascal keeps a copy of a parameter whose address is taken; NVRTC's front end spells offsetof so.
_PRELUDE = """#undef __grid_constant__
#define __grid_constant__
#define offsetof(type, member) __INTADDR__(&(((type *)0)->member))
#line 1
"""
_HEADERS = {
    b"cstdint": b"""#pragma once
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
""",
    b"cstddef": b"#pragma once\n",
}


@dataclass(frozen=True)
class Nvrtc:
    """The library, CUDA's headers, and the version of the wheel ("12.9.86")."""

    library: Path
    headers: Path
    version: str

    def check_arch(self, arch: str) -> None:
        """Raise BuildError unless `arch` is one it is meant for."""
        if arch not in ARCHS:
            raise BuildError(f"NVRTC {self.version} is for architectures {', '.join(ARCHS)}, got {arch!r}")

    def compile(self, source: Path, arch: str, flags: list[str], out: Path, cwd: Path) -> tuple[str, str]:
        """(what would be typed, what the compiler said). BuildError with the compiler's own file:line messages.

        Of `flags` the language's version is taken; optimization is the default.
        """
        library = ctypes.CDLL(str(self.library))
        options = [f for f in flags if f.startswith("-std=")]
        options += [
            f"--gpu-architecture=sm_{arch}",
            "--ptxas-options=-v",
            f"-I{cwd / source.parent}",
            f"-I{self.headers}",
        ]
        program = ctypes.c_void_p()
        text = (_PRELUDE + (cwd / source).read_text()).encode()
        names = (ctypes.c_char_p * len(_HEADERS))(*_HEADERS)
        headers = (ctypes.c_char_p * len(_HEADERS))(*_HEADERS.values())
        made = library.nvrtcCreateProgram(
            ctypes.byref(program), text, str(source).encode(), len(_HEADERS), headers, names
        )
        if made:
            raise BuildError(f"{source}: NVRTC failed with code {made}")
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = library.nvrtcCompileProgram(program, len(options), given)
            said = _text(library, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise BuildError(f"{source} does not compile for sm_{arch}:\n{said.strip()}")
            out.write_bytes(_text(library, "CUBIN", program))
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))
        # the architectures are old: that is why it is here. Its ptxas marks some lines otherwise than nvcc's.
        lines = [line for line in said.splitlines() if "Architectures prior to" not in line]
        return f"nvrtc {' '.join(options)} {source}", "\n".join(
            line.replace("ptxas         .", "", 1) for line in lines
        )


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def find() -> Nvrtc:
    """The one in the wheels of the cuda-build extra. BuildError saying what to install."""
    for entry in sys.path:
        root = Path(entry or ".") / "nvidia"
        library, headers = root / "cuda_nvrtc/lib/libnvrtc.so.12", root / "cuda_runtime/include"
        if library.is_file() and (headers / "cuda_fp16.h").is_file():
            return Nvrtc(library, headers, metadata.version("nvidia-cuda-nvrtc-cu12"))
    raise BuildError(
        f"architectures below 75 are built by NVRTC {OF_RECORD}, which is not installed: pip install '.[cuda-build]'"
    )
