"""The manifest of the shipped kernel binaries, and what a file must be to be one of them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CubinError

FORMAT = 1
FOLDER = Path(__file__).parents[2] / "cubin"

_ELF_HEADER = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_ELF64, _LITTLE_ENDIAN, _MACHINE_CUDA = 2, 1, 190
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NO_BITS = 8  # a section that takes no space in the file
_FATBIN_MAGICS = (b"\x50\xed\x55\xba", b"\xb1\x43\x62\x46")


@dataclass(frozen=True)
class CubinEntry:
    """One binary: an op for an architecture."""

    file: str  # below the folder; one built for an earlier architecture where the code is the same
    op: str
    arch: str
    built_for: str  # the architecture its file names
    abi_hash: str
    sha256: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Every binary there is, by op and architecture."""

    folder: Path
    entries: Mapping[tuple[str, str], CubinEntry]

    @property
    def archs(self) -> tuple[str, ...]:
        """Architectures that have every op, in ascending order."""
        ops = {op for op, _ in self.entries}
        names = {arch for _, arch in self.entries}
        complete = [a for a in names if all((op, a) in self.entries for op in ops)]
        return tuple(sorted(complete, key=lambda a: (int(a.rstrip("af")), a)))

    def archs_of(self, op: str) -> list[str]:
        """Architectures that have this op."""
        return [arch for name, arch in self.entries if name == op]

    def read(self, entry: CubinEntry) -> bytes:
        """The binary, checked against its entry. Raises CubinError."""
        path = self.folder / entry.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CubinError(f"{path}: {error.strerror}; reinstall the package") from error
        check_cubin(data, entry.built_for, str(path))
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CubinError(f"{path}: not the file the manifest describes; reinstall the package")
        return data


def read_manifest(folder: Path = FOLDER) -> Manifest:
    """Read `manifest.json` of a folder of binaries. Raises CubinError."""
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CubinError(f"{path} does not exist: this installation has no CUDA kernels") from error
    except (OSError, ValueError) as error:
        raise CubinError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CubinError(f"{path}: format {raw.get('format') if isinstance(raw, dict) else raw!r}, expected {FORMAT}")
    entries = {}
    try:
        for name, e in raw["files"].items():
            file = e.get("same_as", name)
            built_for = raw["files"][file]["arch"]
            entry = CubinEntry(file, e["op"], e["arch"], built_for, e["abi_hash"], e["sha256"], tuple(e["kernels"]))
            entries[entry.op, entry.arch] = entry
    except (KeyError, TypeError, AttributeError) as error:
        raise CubinError(f"{path} is damaged: {error!r}") from error
    return Manifest(folder, entries)


def check_cubin(data: bytes, arch: str | None, where: str) -> None:
    """Refuse everything but a whole cubin (for `arch`, if given): nothing is ever compiled at run time.

    Raises CubinError naming `where`.
    """
    if data[:4] in _FATBIN_MAGICS:
        raise CubinError(f"{where}: a fatbin; only cubins are loaded")
    if data[:4] != b"\x7fELF":
        is_ptx = b".version" in data[:4096]
        raise CubinError(f"{where}: {'PTX' if is_ptx else 'no ELF file'}; only cubins are loaded")
    if len(data) < _ELF_HEADER.size:
        raise CubinError(f"{where}: cut off after {len(data)} bytes")
    fields = _ELF_HEADER.unpack_from(data)
    _, elf_class, endian, _, _, abi_version, _, machine, *_ = fields
    section_offset, flags, section_nbytes, num_sections = fields[11], fields[12], fields[16], fields[17]
    if (elf_class, endian, machine) != (_ELF64, _LITTLE_ENDIAN, _MACHINE_CUDA):
        raise CubinError(f"{where}: an ELF file for machine {machine}, not for an NVIDIA GPU")
    _check_whole(data, section_offset, section_nbytes, num_sections, where)
    sm = (flags >> 8 if abi_version >= 8 else flags) & 0xFF
    if arch is not None and str(sm) != arch.rstrip("af"):
        raise CubinError(f"{where}: built for sm_{sm}, expected sm_{arch}")


def _check_whole(data: bytes, offset: int, header_nbytes: int, count: int, where: str) -> None:
    """Every section lies inside the file."""
    end = offset + header_nbytes * count
    if header_nbytes == _SECTION_HEADER.size and end <= len(data):
        for i in range(count):
            _, kind, _, _, start, nbytes, *_ = _SECTION_HEADER.unpack_from(data, offset + i * header_nbytes)
            end = max(end, start + nbytes if kind != _NO_BITS else 0)
    if header_nbytes != _SECTION_HEADER.size or end > len(data):
        raise CubinError(f"{where}: cut off or damaged: {len(data)} bytes, its tables speak of {end}")
