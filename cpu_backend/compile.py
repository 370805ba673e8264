"""From numba functions to machine code on disk, and from there to addresses.

numba types and lowers a kernel to LLVM IR once; the IR is wrapped in a plain C function, optimized and emitted as an
object for the target, and the object is cached under a hash of every kernel source. Loading needs llvmlite alone, so a
warm start imports no numba (0.6 s saved), and nothing of numba's dispatch is on the hot path.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gllm_driver.ops import CONTRACTS
from gllm_driver.types import DTYPES

from .target import Target, current

log = logging.getLogger("gllm_driver.cpu")

Progress = Callable[[str, int, int], None]  # (what is compiled now, how many are done, how many in all)


@dataclass(frozen=True)
class Entry:
    """One compiled function: where its Python source is and what it takes.

    `make` is called with `args` and gives (python function, numba argument types); it is looked up only to compile.
    """

    name: str
    module: str
    make: str
    args: tuple[Any, ...] = ()


def cache_dir() -> Path:
    """Where compiled kernels live: $GLLM_CACHE_DIR, else $XDG_CACHE_HOME/gllm-driver, else ~/.cache/gllm-driver."""
    if explicit := os.environ.get("GLLM_CACHE_DIR"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "gllm-driver"


@cache
def source_key() -> str:
    """Hash of what the machine code depends on: kernel sources, contracts, dtypes, compiler versions, the target."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    contracts = [(c.abi_hash, c.constants) for c in CONTRACTS.values()]
    digest.update(repr((contracts, DTYPES, version("numba"), version("llvmlite"), current())).encode())
    return digest.hexdigest()[:24]


class ObjectCache:
    """Object files by entry name, each led by the SHA-256 of its bytes. Falls back to memory when it cannot write."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._memory: dict[str, bytes] = {}
        self._warned = False

    def get(self, name: str) -> bytes | None:
        if name in self._memory:
            return self._memory[name]
        try:
            data = (self.directory / f"{name}.o").read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            log.warning("compiled kernel %s is damaged and will be rebuilt", self.directory / f"{name}.o")
            return None
        return data[32:]

    def put(self, name: str, code: bytes) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=self.directory)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                os.replace(temporary, self.directory / f"{name}.o")
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._memory[name] = code
            if not self._warned:
                self._warned = True
                log.warning(
                    "compiled kernels cannot be kept in %s (%s): they stay in memory and are compiled again next time; "
                    "set GLLM_CACHE_DIR to a writable directory",
                    self.directory,
                    error.strerror or error,
                )


class Library:
    """Compiled functions of this process by entry name. Compiles what the cache lacks; entries load once."""

    def __init__(self, objects: ObjectCache | None = None) -> None:
        self._objects = objects or ObjectCache(cache_dir() / "cpu" / source_key())
        self._addresses: dict[str, int] = {}
        self._engine: Any = None

    def load(self, entries: Iterable[Entry], progress: Progress | None = None) -> dict[str, int]:
        """Addresses of the entries, compiling and caching the missing ones; `progress` hears only of compilation."""
        wanted = list(entries)
        codes = {e.name: self._objects.get(e.name) for e in wanted if e.name not in self._addresses}
        missing = [e for e in wanted if e.name in codes and codes[e.name] is None]
        for done, entry in enumerate(missing):
            if progress:
                progress(entry.name, done, len(missing))
            code = compile_entry(entry, current())
            self._objects.put(entry.name, code)
            codes[entry.name] = code
        if missing and progress:
            progress("", len(missing), len(missing))
        if codes:
            self._link({name: code for name, code in codes.items() if code is not None})
        return {e.name: self._addresses[e.name] for e in wanted}

    def _link(self, codes: dict[str, bytes]) -> None:
        import llvmlite.binding as llvm

        if self._engine is None:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for code in codes.values():
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        for name in codes:
            self._addresses[name] = self._engine.get_function_address(symbol(name))


def symbol(name: str) -> str:
    return f"gllm_{name}"


def compile_entry(entry: Entry, target: Target) -> bytes:
    """Machine code of an entry as a relocatable object for `target`. Imports numba."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small", jit=False
    )
    module = optimized_module(entry, target, machine)
    return machine.emit_object(module)


def optimized_module(entry: Entry, target: Target, machine: Any) -> Any:
    """The entry's LLVM module, optimized for the target (tests read its assembly)."""
    import llvmlite.binding as llvm

    from .lowering import lower

    function, argument_types = _resolve(entry)
    module = llvm.parse_assembly(lower(function, argument_types, symbol(entry.name)))
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    for fn in module.functions:
        if not fn.is_declaration and fn.name != symbol(entry.name):
            fn.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def _resolve(entry: Entry) -> tuple[Callable, tuple]:
    """The Python function of an entry and its numba argument types."""
    from numba.core import types

    from .structs import Struct
    from .team import TEAM

    made = getattr(importlib.import_module(entry.module), entry.make)
    if entry.name in CONTRACTS:
        struct = Struct(entry.name, CONTRACTS[entry.name].struct)
        return made, (struct, Struct("team", TEAM), types.int64)
    return made(*entry.args)
