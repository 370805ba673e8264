"""nvcc: where it is, what it knows, and one source file compiled to a CUBIN with the figures of its kernels."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

MINIMUM = (13, 0)  # the CUBINs then need a driver of CUDA 13 or newer (580)
OF_RECORD = "13.0"  # committed binaries come from this one, so that anyone can make the same bytes


class BuildError(Exception):
    """What the user reads; no traceback."""


@dataclass(frozen=True)
class Nvcc:
    """A compiler that ran: its path, "13.0.88", and the architectures it can target ("80", "90", …)."""

    path: Path
    version: str
    archs: tuple[str, ...]

    def check_arch(self, arch: str) -> None:
        """Raise BuildError unless `arch` is one it knows; 90a and 100f are features of 90 and 100."""
        base = arch[:-1] if arch[-1:] in ("a", "f") else arch
        if base not in self.archs or (base != arch and int(base) < 90):
            raise BuildError(
                f"nvcc {self.version} does not know architecture {arch!r}; it knows {', '.join(self.archs)}, "
                "and those from 90 with an a behind"
            )

    def compile(self, source: Path, arch: str, flags: list[str], out: Path, cwd: Path) -> tuple[str, str]:
        """`compile_cubin` by this one."""
        return compile_cubin(self, source, arch, flags, out, cwd)


def candidates() -> list[tuple[str, Path]]:
    """Every place an nvcc may be, with the words for it: PATH, CUDA_HOME, the wheels of the cuda-build extra."""
    found: list[tuple[str, Path]] = []
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(("PATH", Path(on_path)))
    home = os.environ.get("CUDA_HOME")
    if home:
        found.append(("CUDA_HOME", Path(home) / "bin" / "nvcc"))
    found += [("the cuda-build extra", Path(entry or ".") / "nvidia/cu13/bin/nvcc") for entry in sys.path]
    return [(where, path) for where, path in found if path.is_file()]


def version_of(path: Path) -> str:
    """ "13.0.88". BuildError when it does not run or says something else."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{path} does not run: {error}") from error
    version = re.search(r"\bV(\d+\.\d+\.\d+)", done.stdout)
    if done.returncode or not version:
        raise BuildError(f"{path} --version says nothing useful: {(done.stdout + done.stderr).strip()[:200]!r}")
    return version[1]


def find() -> Nvcc:
    """The nvcc to build with: the first that is the builder of record, else the first that is new enough.

    Raises BuildError naming what was found and what to install.
    """
    advice = "install one with: pip install '.[cuda-build]'"
    usable: list[tuple[str, Path]] = []
    refused: list[str] = []
    for where, path in candidates():
        try:
            version = version_of(path)
        except BuildError as error:
            refused.append(str(error))
            continue
        if tuple(map(int, version.split(".")[:2])) < MINIMUM:
            refused.append(f"{path} ({where}) is {version}")
        else:
            usable.append((version, path))
    if not usable:
        if refused:
            raise BuildError(f"nvcc {OF_RECORD} or newer is needed: {'; '.join(refused)}; {advice}")
        raise BuildError(f"no nvcc on PATH, in CUDA_HOME or in the Python packages; {advice}")
    version, path = next((u for u in usable if u[0].startswith(OF_RECORD + ".")), usable[0])
    listed = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True)
    archs = re.findall(r"compute_(\d+)\b", listed.stdout)
    return Nvcc(path, version, tuple(sorted(archs, key=int)))


@dataclass(frozen=True)
class KernelFigures:
    """What one kernel takes, as ptxas reports it; `max_threads` is its __launch_bounds__."""

    registers: int
    stack_nbytes: int
    spill_store_nbytes: int
    spill_load_nbytes: int
    static_smem_nbytes: int
    max_threads: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def compile_cubin(nvcc: Nvcc, source: Path, arch: str, flags: list[str], out: Path, cwd: Path) -> tuple[str, str]:
    """Run nvcc: (command, what ptxas and the compiler said). BuildError with the compiler's own file:line messages."""
    command = [str(nvcc.path), *flags, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", "-o", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    said = done.stdout + done.stderr
    if done.returncode:
        messages = "\n".join(line for line in said.splitlines() if line.strip() and not _is_figure(line))
        hint = "" if shutil.which("gcc") or shutil.which("clang") else "\nnvcc needs a host compiler: install gcc"
        raise BuildError(f"{source} does not compile for sm_{arch}:\n{messages}{hint}")
    return " ".join(command), said


def _is_figure(line: str) -> bool:
    return line.startswith(("ptxas info", "    ")) and "error" not in line


def warnings_in(said: str) -> list[str]:
    return [line for line in said.splitlines() if "warning" in line.lower()]


def losses_in(said: str) -> list[str]:
    """Complaints of ptxas that mean a much slower kernel of warpgroups: products one by one, registers kept."""
    signs = ("Potential Performance Loss", "setmaxnreg ignored")
    return [line for line in said.splitlines() if any(sign in line for sign in signs)]


_FUNCTION = re.compile(r"Compiling entry function '(?P<name>\w+)'")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SMEM = re.compile(r"(?P<smem>\d+) bytes smem")


def figures(said: str, cubin: bytes) -> dict[str, KernelFigures]:
    """Figures of every kernel in a CUBIN, from `ptxas -v` and from the file itself. BuildError if they disagree."""
    threads = max_threads(cubin)
    found: dict[str, KernelFigures] = {}
    for part in said.split("ptxas info    : Compiling entry function ")[1:]:
        name = _FUNCTION.search("Compiling entry function " + part)
        stack, used, smem = _STACK.search(part), _USED.search(part), _SMEM.search(part)
        if not (name and stack and used):
            raise BuildError(f"ptxas reports in a form this script does not know: {part[:200]!r}")
        found[name["name"]] = KernelFigures(
            registers=int(used["registers"]),
            stack_nbytes=int(stack["stack"]),
            spill_store_nbytes=int(stack["stores"]),
            spill_load_nbytes=int(stack["loads"]),
            static_smem_nbytes=int(smem["smem"]) if smem else 0,
            max_threads=threads.get(name["name"], 0),
        )
    if set(found) != set(threads):
        raise BuildError(f"ptxas reports kernels {sorted(found)}, the CUBIN holds {sorted(threads)}")
    return dict(sorted(found.items()))


_EIATTR_MAX_THREADS = 0x05
_FORMAT_SIZED = 4  # an entry of .nv.info whose 16-bit value is the size of what follows


def max_threads(cubin: bytes) -> dict[str, int]:
    """Kernel name → threads of its __launch_bounds__ (0: none), from the CUBIN's .nv.info sections.

    Raises BuildError for bytes that are no 64-bit little-endian ELF file.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise BuildError("the compiler's output is no ELF file")
    table, count, names_at = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    strings = headers[names_at][4] if headers else 0
    found: dict[str, int] = {}
    for name_at, _, _, _, offset, nbytes in headers:
        name = cubin[strings + name_at : cubin.index(b"\0", strings + name_at)].decode()
        if name.startswith(".text."):
            found.setdefault(name[len(".text.") :], 0)
        if name.startswith(".nv.info."):
            found[name[len(".nv.info.") :]] = _max_threads_entry(cubin[offset : offset + nbytes])
    return found


def _max_threads_entry(section: bytes) -> int:
    at = 0
    while at < len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _FORMAT_SIZED:
            if attribute == _EIATTR_MAX_THREADS:
                x, y, z = struct.unpack_from("<III", section, at)
                return int(x * y * z)
            at += value
    return 0
