"""The files of a CUBIN build: which binaries there are to have, what each is made from, and their manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gllm_driver.ops.header import headers

from .nvcc import BuildError

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++17", "-O3")
HOST_ONLY = {"hostsim.h", "hostsim_hopper.h"}  # the simulated device's half of wrappers; nvcc never sees them
MANIFEST_FORMAT = 1

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One binary to have: an op for an architecture."""

    op: str
    arch: str

    @property
    def file(self) -> str:
        """Its path below cubin/, which is also its key in the manifest."""
        return f"sm_{self.arch}/{self.op}.cubin"


@dataclass(frozen=True)
class Tree:
    """The folders of one checkout."""

    root: Path = ROOT

    @property
    def kernels(self) -> Path:
        return self.root / "kernels_cu"

    @property
    def cubin(self) -> Path:
        return self.root / "cubin"

    @property
    def manifest(self) -> Path:
        return self.cubin / "manifest.json"

    def read_manifest(self) -> Manifest:
        """The manifest; empty when there is none. BuildError when it is damaged."""
        if not self.manifest.exists():
            return {"format": MANIFEST_FORMAT, "files": {}}
        try:
            manifest: Manifest = json.loads(self.manifest.read_text())
            known = manifest["format"] == MANIFEST_FORMAT and isinstance(manifest["files"], dict)
        except (ValueError, KeyError, TypeError) as error:
            raise BuildError(f"{self.manifest} is damaged ({error}): delete it and build again") from error
        if not known:
            raise BuildError(f"{self.manifest} has a format this script does not know: delete it and build again")
        return manifest

    def sources(self) -> list[str]:
        """Ops that have a kernel file."""
        return sorted(path.stem for path in self.kernels.glob("*.cu"))

    def special_sources(self, arch: str) -> list[str]:
        """Ops that have a kernel file for one architecture alone, besides their own: kernels that only it can run."""
        return sorted(path.stem for path in self.kernels.glob(f"sm_{arch}/*.cu"))

    def source(self, target: Target) -> str:
        """The file a binary is compiled from, below kernels_cu."""
        is_special = target.op in self.special_sources(target.arch)
        return f"sm_{target.arch}/{target.op}.cu" if is_special else f"{target.op}.cu"

    def closure(self, source: str) -> dict[str, str]:
        """Text of a source file and everything it includes, by path below kernels_cu."""
        generated = {f"generated/{name}": text for name, text in headers().items()}
        texts: dict[str, str] = {}
        waiting = [source]
        while waiting:
            name = waiting.pop()
            if name in texts:
                continue
            text = generated.get(name)
            if text is None:
                path = self.kernels / name
                if not path.is_file():
                    raise BuildError(f"{source} includes {name}, which does not exist in {self.kernels}")
                text = path.read_text()
            texts[name] = text
            included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)
            folder = os.path.dirname(name)
            waiting += [os.path.normpath(os.path.join(folder, i)) for i in included if i not in HOST_ONLY]
        return texts

    def source_hash(self, target: Target, nvcc_version: str) -> str:
        """Changes whenever the binary may: sources, includes, generated headers, flags, architecture, compiler."""
        texts = sorted(self.closure(self.source(target)).items())
        inputs = json.dumps([texts, FLAGS, target.arch, nvcc_version])
        return hashlib.sha256(inputs.encode()).hexdigest()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One build at a time in a checkout: the manifest is read, changed and written."""
        import fcntl

        self.cubin.mkdir(exist_ok=True)
        with (self.cubin / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
