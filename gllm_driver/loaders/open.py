"""`open_checkpoint`: from a path or a hub id to a `Checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError
from ..models.arch import Arch
from ..models.checkpoint import Checkpoint, GenerationDefaults
from ..models.families import FAMILIES
from ..models.gguf_keys import arch_of_gguf
from ..models.hf_config import arch_of_config
from ..models.names import NameTable, match_slots
from ..types import Tensor
from . import gguf, safetensors
from .defaults import defaults_of_gguf, defaults_of_hf
from .fused import split_fused
from .hf_quant import PackedTensor, with_matrices
from .hub import fetch_from_hub
from .jsonfile import read_object
from .mapping import StoredTensor

# org/name, then @revision and :file.gguf, each optional.
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[\w./ -]+\.gguf))?",
    re.ASCII,
)


GGUF_METADATA = "metadata.gguf"  # in a directory made from a GGUF file: its key-value pairs, tokenizer included


def open_checkpoint(path_or_id: str | Path, *, progress: bool | None = None, describe_only: bool = False) -> Checkpoint:
    """Describe a model and map its weights into memory; only packed matrices of other quantizers are converted.

    `path_or_id`: a Hugging Face directory (config.json and safetensors), a `.gguf` file (the first part, if split), a
    `.safetensors` file with its config.json beside it, or a hub id: `org/name`, `org/name@revision`,
    `org/name:file.gguf`. What exists as a path, or is written like one, is never looked up on the hub.
    `progress` False silences the hub's progress bars. describe_only: types, shapes and sizes are wanted, not values;
    matrices that would be converted are then memory that holds nothing.

    Raises ModelFormatError (path, tensor, offset) for anything unreadable, HubError when the hub cannot deliver.
    """
    path = Path(path_or_id).expanduser()
    if not _exists(path):
        match = None if isinstance(path_or_id, Path) else _hub_id(path_or_id)
        if match is None:
            raise ModelFormatError(
                "no such file or directory (hub models are written org/name, org/name@revision or org/name:file.gguf)",
                path=path_or_id,
            )
        path = fetch_from_hub(match["repo"], revision=match["revision"], file=match["file"], progress=progress)
    try:
        if path.is_dir():
            return _open_directory(path, describe_only)
        if path.suffix == ".safetensors":
            return _open_hf(path, path.parent, safetensors.read_safetensors(path), describe_only)
        return _open_gguf(path)
    except OSError as error:  # a folder that may be listed but not searched, a disk that fails
        raise ModelFormatError(f"cannot be read: {error.strerror}", path=path) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be searched, a NUL
        raise ModelFormatError(f"cannot be looked up: {error}", path=path) from error


def _hub_id(text: str) -> re.Match[str] | None:
    match = _HUB_ID.fullmatch(text)
    if match is None or (match["file"] is None and text.endswith((".gguf", ".safetensors", ".json", ".bin"))):
        return None
    return match


def _open_directory(folder: Path, describe_only: bool) -> Checkpoint:
    index, single = folder / safetensors.INDEX_NAME, folder / safetensors.SINGLE_NAME
    if index.exists():
        return _open_hf(index, folder, safetensors.read_safetensors_index(index), describe_only)
    if single.exists():
        return _open_hf(single, folder, safetensors.read_safetensors(single), describe_only)
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if ggufs:
        raise ModelFormatError(f"is a directory of GGUF files; open one of them: {', '.join(ggufs)[:200]}", path=folder)
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; it has {', '.join(others)[:200]}, which can be opened as a file" if others else ""
    if any(folder.glob("pytorch_model*.bin")):
        hint = "; pytorch_model.bin is not readable, convert it to safetensors"
    raise ModelFormatError(f"holds neither {safetensors.SINGLE_NAME} nor {safetensors.INDEX_NAME}{hint}", path=folder)


def _open_hf(weights: Path, folder: Path, files: Mapping[str, StoredTensor], describe_only: bool) -> Checkpoint:
    config = read_object(folder / "config.json")
    stored = with_matrices(files, config, folder / "config.json")
    if (folder / GGUF_METADATA).exists():
        return _open_described(weights, folder / GGUF_METADATA, stored, describe_only)
    generation_path = folder / "generation_config.json"
    generation = read_object(generation_path) if generation_path.exists() else {}
    arch = arch_of_config(config, stored.keys(), folder / "config.json")
    metadata: dict[str, Any] = {"config": config, "generation_config": generation}
    for key, name in _TOKENIZER_FILES.items():
        metadata[key] = folder / name if (folder / name).exists() else None
    defaults = defaults_of_hf(config, generation, generation_path if generation else folder / "config.json")
    names = FAMILIES[arch.family].hf_names.fitting(stored)
    return _checkpoint(weights, arch, names, stored, safetensors.READABLE, defaults, metadata, describe_only)


def _open_described(
    weights: Path, description: Path, stored: Mapping[str, StoredTensor | PackedTensor], describe_only: bool
) -> Checkpoint:
    """Safetensors with GGUF's names, and GGUF's key-value pairs beside them (convert/target.py)."""
    metadata = gguf.read_gguf(description).metadata
    arch = arch_of_gguf(metadata, stored, description)
    defaults = defaults_of_gguf(metadata, description)
    names = FAMILIES[arch.family].gguf_names
    return _checkpoint(weights, arch, names, stored, safetensors.READABLE, defaults, metadata, describe_only)


# Keys of `Checkpoint.metadata` for Hugging Face directories: Path, or None where the file is absent.
_TOKENIZER_FILES = {
    "tokenizer_file": "tokenizer.json",
    "tokenizer_config_file": "tokenizer_config.json",
    "chat_template_file": "chat_template.jinja",
}


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf.read_gguf(path)
    arch = arch_of_gguf(file.metadata, file.tensors, path)
    defaults = defaults_of_gguf(file.metadata, path)
    names = FAMILIES[arch.family].gguf_names
    return _checkpoint(path, arch, names, file.tensors, gguf.READABLE, defaults, file.metadata)


def _checkpoint(
    path: Path,
    arch: Arch,
    names: NameTable,
    stored: Mapping[str, StoredTensor | PackedTensor],
    readable: Mapping[str, Any] | tuple[str, ...],
    defaults: GenerationDefaults,
    metadata: Mapping[str, Any],
    describe_only: bool = False,
) -> Checkpoint:
    sources = match_slots(arch, names, stored, path)

    def open_one(name: str) -> Tensor:
        tensor = stored[name]
        return tensor.reserve() if describe_only and isinstance(tensor, PackedTensor) else tensor.open(readable)

    distinct = sorted(set(sources.values()))
    with ThreadPoolExecutor() as pool:  # packed tensors are converted here
        opened = dict(zip(distinct, pool.map(open_one, distinct), strict=True))
    tensors = split_fused(arch, names, sources, opened)
    for file in {id(stored[name].file): stored[name].file for name in sources.values()}.values():
        file.will_need()
    return Checkpoint(path, arch, tensors, sources, defaults, metadata)
