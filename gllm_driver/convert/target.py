"""Where a quantized model goes: a GGUF file, or a directory like Hugging Face's. It appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import RequestError, WriteError
from ..loaders.hub import POOLING_CONFIG
from ..loaders.open import GGUF_METADATA
from ..models.checkpoint import Checkpoint
from ..quant.native_file import NativeFileWriter, quantization_section
from .gguf_metadata import gguf_pairs, rope_factors
from .gguf_writer import GgufWriter
from .plan import Plan, is_from_gguf, types_of

WEIGHTS = "model.safetensors"
# What goes along from a Hugging Face directory. Whatever else it holds stays behind.
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json", POOLING_CONFIG, "LICENSE", "README.md"),
)
_OURS = {WEIGHTS, "config.json", GGUF_METADATA, *(Path(name).parts[0] for name in _COMPANIONS)}


class TensorWriter(Protocol):
    """What both kinds of file have: tensors go in one by one, in the order announced."""

    def write(self, name: str, data: np.ndarray) -> None: ...


def check_target(source: Path, out: Path, *, is_gguf: bool, force: bool) -> None:
    """Raises RequestError for a name that does not go with the type or is the source's, WriteError for a place that
    cannot be written or is taken."""
    if is_gguf != (out.suffix == ".gguf"):
        kind = (
            "a GGUF file: give OUT a name that ends in .gguf" if is_gguf else "a directory: OUT must not end in .gguf"
        )
        raise RequestError(f"a model of this type is {kind}, got {str(out)!r}")
    if out.exists() and source.exists() and (out.resolve() in (source.resolve(), *source.resolve().parents)):
        raise RequestError(f"OUT would replace IN: {str(out)!r}")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise WriteError(f"{parent}: no such directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError(f"{parent}: no permission to write there")
    if not os.path.lexists(out):
        return
    if not force:
        raise WriteError(f"{out}: is there already; --force replaces it")
    if is_gguf != out.is_file():
        raise WriteError(f"{out}: is {'no file' if is_gguf else 'no directory'}, and is not replaced")
    if out.is_dir():
        others = sorted(entry.name for entry in out.iterdir() if entry.name not in _OURS)
        if others:
            raise WriteError(f"{out}: holds more than a model ({others[0]!r}), and is not replaced")


@contextlib.contextmanager
def target(checkpoint: Checkpoint, plan: Plan, out: Path) -> Iterator[TensorWriter]:
    """A writer for the plan's tensors. Leaving the context puts the model in its place; an error leaves nothing.

    Raises WriteError when the disk is full, or fails otherwise.
    """
    with _explained(out):
        free = shutil.disk_usage(out.absolute().parent).free
        if free < plan.nbytes:
            raise WriteError(f"{out}: needs {plan.nbytes:,} bytes, {free:,} are free there")
        with _gguf(checkpoint, plan, out) if plan.is_gguf else _directory(checkpoint, plan, out) as writer:
            yield writer


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"{out}: cannot be written: {error.strerror or error}; nothing of it is left") from error


@contextlib.contextmanager
def _gguf(checkpoint: Checkpoint, plan: Plan, out: Path) -> Iterator[TensorWriter]:
    tensors: dict[str, Any] = {output.name: (output.dtype, output.shape) for output in plan.outputs}
    factors = None if is_from_gguf(checkpoint) else rope_factors(checkpoint.arch)
    if factors is not None:
        from ..types import F32

        tensors = {"rope_freqs.weight": (F32, factors.shape), **tensors}
    with GgufWriter(out, gguf_pairs(checkpoint, plan.dtype), tensors) as writer:
        if factors is not None:
            writer.write("rope_freqs.weight", factors)
        yield writer


@contextlib.contextmanager
def _directory(checkpoint: Checkpoint, plan: Plan, out: Path) -> Iterator[TensorWriter]:
    temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        _companions(checkpoint, plan, temporary)
        tensors = {output.name: (output.dtype, output.shape) for output in plan.outputs}
        with NativeFileWriter(temporary / WEIGHTS, tensors) as writer:
            yield writer
        put(temporary, out.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _companions(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Everything but the weights: the description with the types, and the tokenizer."""
    config: dict[str, Any] = {}
    if is_from_gguf(checkpoint):
        with GgufWriter(folder / GGUF_METADATA, gguf_pairs(checkpoint, None), {}):
            pass
    else:
        config = {k: v for k, v in checkpoint.metadata["config"].items() if k != "compression_config"}
        source = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        for name in _COMPANIONS:
            if (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)
    config["quantization_config"] = quantization_section(types_of(plan))
    with open(folder / "config.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def put(temporary: Path, out: Path) -> None:
    """Give the directory its name, in the place of an older one (`check_target` has looked at it)."""
    if not out.exists():
        temporary.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        if not os.path.lexists(out):
            old.rename(out)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)
