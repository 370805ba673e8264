"""Cubins without a compiler: ELF files that say of kernels what nvcc's would, and hold no instructions.

The simulated device runs kernels from the host build and reads only the tables, so these serve for test kernels; a real
device refuses them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MACHINE_CUDA = 190
_ENTRY = 0x10  # st_other of a kernel
_PARAM_INFO, _MAX_THREADS, _REGISTERS = 0x17, 0x05, 0x2F  # attributes of .nv.info sections
_SIZED = 4
_SYMTAB, _STRTAB, _PROGBITS, _NOBITS = 2, 3, 1, 8


@dataclass(frozen=True)
class FakeKernel:
    """A kernel's parameters (bytes each), launch bounds, registers, static shared memory."""

    param_nbytes: Sequence[int] = ()
    max_threads: int = 1024
    num_registers: int = 32
    static_smem_nbytes: int = 0


def fake_cubin(kernels: Mapping[str, FakeKernel], sm: int = 80, abi_version: int = 8) -> bytes:
    """The file. `abi_version` 7 is that of CUDA 12, 8 that of CUDA 13: they keep the architecture in other bits."""
    names = _Strings()
    symbol_names = _Strings()
    sections: list[tuple[str, int, bytes, int]] = []  # name, type, contents, linked section
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    registers = b""
    for i, (name, kernel) in enumerate(kernels.items(), 1):
        symbols += struct.pack("<IBBHQQ", symbol_names.add(name), 0x12, _ENTRY, 1, 0, 0)
        registers += _attribute(_REGISTERS, struct.pack("<II", i, kernel.num_registers))
        info = _attribute(_MAX_THREADS, struct.pack("<III", kernel.max_threads, 1, 1))
        offset = 0
        for ordinal, nbytes in enumerate(kernel.param_nbytes):
            info += _attribute(_PARAM_INFO, struct.pack("<IHHI", 0, ordinal, offset, nbytes << 18))
            offset += -(-nbytes // 8) * 8
        sections.append((f".nv.info.{name}", _PROGBITS, info, 0))
        if kernel.static_smem_nbytes:
            sections.append((f".nv.shared.{name}", _NOBITS, bytes(kernel.static_smem_nbytes), 0))
    sections.append((".nv.info", _PROGBITS, registers, 0))
    sections.append((".strtab", _STRTAB, symbol_names.data, 0))
    sections.append((".symtab", _SYMTAB, symbols, len(sections)))
    for name, *_ in sections:
        names.add(name)
    names.add(".shstrtab")
    sections.append((".shstrtab", _STRTAB, names.data, 0))

    body, headers = b"", bytes(64)
    for name, kind, contents, link in sections:
        at = 64 + len(body)
        entry_nbytes = 24 if kind == _SYMTAB else 0
        headers += struct.pack("<IIQQQQIIQQ", names.at[name], kind, 0, 0, at, len(contents), link, 0, 8, entry_nbytes)
        body += b"" if kind == _NOBITS else contents + bytes(-len(contents) % 8)
    flags = sm << 8 if abi_version >= 8 else sm
    ident = b"\x7fELF" + bytes([2, 1, 1, 0x41, abi_version]) + bytes(7)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH",
        2,
        _MACHINE_CUDA,
        1,
        0,
        0,
        64 + len(body),
        flags,
        64,
        56,
        0,
        64,
        len(sections) + 1,
        len(sections),
    )
    return header + body + headers


def _attribute(code: int, value: bytes) -> bytes:
    return struct.pack("<BBH", _SIZED, code, len(value)) + value


class _Strings:
    """A string table."""

    def __init__(self) -> None:
        self.data = b"\0"
        self.at: dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self.at:
            self.at[text] = len(self.data)
            self.data += text.encode() + b"\0"
        return self.at[text]
