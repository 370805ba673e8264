"""Modules: loaded cubins, and the library that finds each op's kernels in the shipped ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CubinError, DriverError, NoKernelImage
from ..ops import CONTRACTS
from .arch import choose_archs
from .gate import call, cleanup, cu
from .launch import Function
from .manifest import FOLDER, CubinEntry, check_cubin, read_manifest

if TYPE_CHECKING:
    from .device import Device

_NOT_FOUND = 500
_NO_BINARY_FOR_GPU = 209


class Module:
    """A cubin loaded into a device."""

    def __init__(self, device: Device, image: bytes, name: str = "module", arch: str | None = None) -> None:
        """Load `image`, which must be a cubin (for `arch`, if given). Raises CubinError, NoKernelImage, DriverError."""
        check_cubin(image, arch, name)
        self.device = device
        self.name = name
        self._functions: dict[str, Function] = {}
        with device:
            self.handle: Any = call(cu.cuModuleLoadData, image)
        device.keep(self)

    def function(self, symbol: str) -> Function:
        """The kernel of this name. Raises CubinError when the module does not have it."""
        if symbol not in self._functions:
            with self.device:
                try:
                    handle = call(cu.cuModuleGetFunction, self.handle, symbol.encode())
                except DriverError as error:
                    if error.code == _NOT_FOUND:
                        raise CubinError(f"{self.name}: no kernel {symbol}") from error
                    raise
                self._functions[symbol] = Function(symbol, handle)
        return self._functions[symbol]

    def symbols(self) -> list[str]:
        """Names of all kernels."""
        with self.device:
            count = call(cu.cuModuleGetFunctionCount, self.handle)
            handles = call(cu.cuModuleEnumerateFunctions, count, self.handle) if count else []
            return sorted(call(cu.cuFuncGetName, handle).decode() for handle in handles)

    def close(self) -> None:
        """Unload; its functions must not be launched any more."""
        handle, self.handle = self.handle, None
        if handle is not None:
            cleanup(cu.cuModuleUnload, handle, context=self.device.context)
            self.device.drop(self)


class KernelLibrary:
    """The kernels of every op for one device, each op's module loaded at its first use."""

    def __init__(self, device: Device, folder: Path = FOLDER) -> None:
        """Read the manifest. Raises CubinError; NoKernelImage when nothing in it runs on the device."""
        self.device = device
        self.manifest = read_manifest(folder)
        self.archs = choose_archs(self.manifest.archs, device.cc)
        if not self.archs:
            raise self._no_image("any op", self.manifest.archs)
        self._modules: dict[str, Module] = {}  # by file

    @property
    def digest(self) -> str:
        """Names the binaries for this device: equal where they are the same, whatever the folder."""
        files = sorted((e.op, e.sha256) for e in self._used())
        return hashlib.sha256(repr(files).encode()).hexdigest()[:24]

    def function(self, symbol: str) -> Function:
        """The kernel `<op>__<variant>`, from the best binary that has it. Raises CubinError, NoKernelImage."""
        entries = self.entries(symbol.partition("__")[0])
        holding = [entry for entry in entries if symbol in entry.kernels]
        return self.module((holding or entries)[0]).function(symbol)

    def module(self, entry: CubinEntry) -> Module:
        """The module of a binary, loaded at its first use."""
        if entry.file not in self._modules:
            op = entry.op
            contract = CONTRACTS.get(op)
            if contract is not None and contract.abi_hash != entry.abi_hash:
                raise CubinError(
                    f"{entry.file}: built for other arguments of {op} (ABI {entry.abi_hash}, this version has "
                    f"{contract.abi_hash}); run build_cubins.py, or reinstall the package"
                )
            self._modules[entry.file] = Module(self.device, self.manifest.read(entry), entry.file, entry.built_for)
        return self._modules[entry.file]

    def entries(self, op: str) -> list[CubinEntry]:
        """The binaries of an op that run on this device, the best first: the one made for exactly this device may hold
        only kernels that no other can.
        """
        archs = self.manifest.archs_of(op)
        if not archs:
            raise CubinError(f"no kernels for op {op} in {self.manifest.folder}")
        chosen = choose_archs(archs, self.device.cc)
        if not chosen:
            raise self._no_image(op, archs)
        return [self.manifest.entries[op, arch] for arch in chosen]

    def load_all(self) -> None:
        """Load every op's modules now."""
        for entry in self._used():
            self.module(entry)

    def _used(self) -> list[CubinEntry]:
        """All binaries for this device, but for whole sets behind the best one, which has every kernel of theirs."""
        behind = self.archs[1:]
        ops = dict.fromkeys(op for op, _ in self.manifest.entries)
        return [entry for op in ops for entry in self.entries(op) if entry.arch not in behind]

    def _no_image(self, what: str, archs: list[str] | tuple[str, ...]) -> NoKernelImage:
        there_are = ", ".join(f"sm_{a}" for a in archs) or "none"
        explanation = (
            f"no kernels of {what} for compute capability {self.device.cc[0]}.{self.device.cc[1]} ({there_are})"
        )
        return NoKernelImage(_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "load kernels", explanation)
