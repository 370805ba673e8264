"""`gllm info`: what can run here, and what a model consists of."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib import metadata
from math import prod
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from .console import Console
from .options import TextType
from .outcome import EXIT_CODES, guarded

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from ..types import DType

PACKAGES = ("numpy", "numba", "llvmlite", "cuda-bindings", "tokenizers", "safetensors", "gguf")


@click.command(epilog=EXIT_CODES, short_help="List devices and versions, describe a model.")
@click.option("--model", type=TextType(), metavar="M", help="Describe this model too; a hub id is downloaded first.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Say what memory the model needs with room for N tokens; nothing is reserved.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the log.")
@guarded
def info(*, model: str | None, context: int | None, as_json: bool, debug: bool) -> None:
    """List the devices, why each can or cannot be used, and the versions; with --model, describe a model."""
    console: Console = click.get_current_context().obj
    console.configure(quiet=False, debug=debug)
    if context is not None and model is None:
        raise click.UsageError("--context needs --model: it says what that model takes")
    facts = _installation()
    if model is not None:
        from ..loaders.open import open_checkpoint

        checkpoint = open_checkpoint(model, progress=None if console.interactive else False, describe_only=True)
        facts["model"] = describe(checkpoint)
        if context is not None:
            facts["model"]["memory"] = memory(checkpoint, context)
    with console.printing() as output:
        output.write(json.dumps(facts, ensure_ascii=False) if as_json else "\n".join(_lines(facts)))
        output.end_line()


def _installation() -> dict[str, Any]:
    from ..backends.select import devices, kernel_cache_dir

    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernel_cache": str(kernel_cache_dir()),
        "devices": [asdict(device) for device in devices()],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model consists of, from its headers: counts in elements and tokens, sizes in bytes."""
    from ..config import KvCacheConfig
    from ..placement import default_kv_dtype

    arch = checkpoint.arch
    tensors = {tensor.address: tensor for tensor in checkpoint.tensors.values()}.values()
    kinds: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        if tensor.dtype.name not in kinds:
            kinds[tensor.dtype.name] = {"tensors": 0, "nbytes": 0, **_computation(tensor.dtype)}
        kind = kinds[tensor.dtype.name]
        kind["tensors"] += 1
        kind["nbytes"] += tensor.nbytes
    dtype = default_kv_dtype(checkpoint)
    one_token = KvCacheConfig(1, arch.num_layers, arch.num_kv_heads, arch.head_dim, page_size=1, dtype=dtype)
    return {
        "path": str(checkpoint.path),
        "family": arch.family,
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "nbytes": checkpoint.nbytes,
        "tensor_types": kinds,
        "context_length": arch.context_length,
        "vocab_size": arch.vocab_size,
        "kv_dtype": dtype,
        "kv_nbytes_per_token": one_token.nbytes,
        "arch": asdict(arch),
    }


def memory(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """Bytes that one sequence of `context` tokens takes on each kind of device: weights, KV cache, workspace."""
    from ..backends.footprint import Sizes, footprint
    from ..backends.select import computed_weights, num_processors, scratch_of
    from ..config import KvCacheConfig
    from ..models.decoder import model_weights
    from ..placement import CPU_IDLE_CHUNK, CUDA_IDLE_CHUNK, PAGE_SIZE, default_kv_dtype

    arch, model = checkpoint.arch, model_weights(checkpoint, context)
    dtype = default_kv_dtype(checkpoint)
    kv = KvCacheConfig(-(-context // PAGE_SIZE), arch.num_layers, arch.num_kv_heads, arch.head_dim, PAGE_SIZE, dtype)
    found: dict[str, Any] = {"context_length": context}
    for kind, chunk in (("cpu", CPU_IDLE_CHUNK), ("cuda", CUDA_IDLE_CHUNK)):
        sizes = Sizes(kv, arch.vocab_size, chunk, num_processors())
        need = footprint(model, sizes, computed_weights()[kind], scratch_of(kind), packs=kind == "cuda")
        found[kind] = {**asdict(need), "total": need.total}
    return found


def _computation(dtype: DType) -> dict[str, Any]:
    """How dense a stored type is, and what each kind of device computes with: "native", or what it repacks it to."""
    from ..backends.select import computed_weights
    from ..quant.repack import repacked_dtype

    targets = {device: repacked_dtype(dtype, computed) for device, computed in computed_weights().items()}
    return {
        "bits_per_weight": 8 * dtype.block_nbytes / dtype.block_size,
        "computed": {d: "native" if t is dtype else f"repacked to {t.name}" for d, t in targets.items()},
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    lines = [f"gllm-driver {facts['version']}, Python {facts['python']}, {facts['platform']}", packages, "devices"]
    for device in facts["devices"]:
        usable = "usable" if device["usable"] else "not usable"
        lines.append(f"  {device['name']:<8}{usable}: {device['reason']} ({device['description']})")
    lines.append(f"compiled kernels are kept in {facts['kernel_cache']}")
    return lines + (_model_lines(facts["model"]) if "model" in facts else [])


def _model_lines(model: dict[str, Any]) -> list[str]:
    arch = model["arch"]
    sizes = (
        f"{arch['num_layers']} layers, hidden {arch['hidden_size']}, feed-forward {arch['intermediate_size']}, "
        f"{arch['num_heads']} heads and {arch['num_kv_heads']} KV heads of {arch['head_dim']}"
    )
    return [
        f"model {model['path']}",
        f"  family      {model['family']}: {sizes}",
        f"  parameters  {model['parameters']:,}",
        f"  weights     {_size(model['nbytes'])}",
        *(f"    {_type_line(name, kind)}" for name, kind in model["tensor_types"].items()),
        f"  vocabulary  {model['vocab_size']:,} tokens",
        f"  context     {model['context_length']:,} tokens",
        f"  KV cache    {_size(model['kv_nbytes_per_token'])} per token ({model['kv_dtype']})",
        *(_memory_lines(model["memory"], model["context_length"]) if "memory" in model else ()),
    ]


def _memory_lines(memory: dict[str, Any], made_for: int) -> list[str]:
    context = memory["context_length"]
    beyond = f" (more than the {made_for:,} it was made for)" if context > made_for else ""
    lines = [f"  memory for {context:,} tokens{beyond}"]
    for kind in ("cpu", "cuda"):
        need = memory[kind]
        parts = ", ".join(f"{name} {_size(need[key])}" for key, name in _PARTS.items())
        lines.append(f"    {kind:<10}{_size(need['total'])}: {parts}")
    return lines


_PARTS = {"weights": "weights", "kv": "KV cache", "workspace": "workspace"}


def _type_line(name: str, kind: dict[str, Any]) -> str:
    ways = kind["computed"]
    words = [f"{way} on {device}" for device, way in ways.items()] if len(set(ways.values())) > 1 else ways["cpu"]
    how = words if isinstance(words, str) else ", ".join(words)
    count = f"{kind['tensors']} tensor{'s' if kind['tensors'] > 1 else ''}"
    return f"{name:<10}{count}, {_size(kind['nbytes'])}, {kind['bits_per_weight']:.4g} bits per weight, {how}"


def _size(nbytes: int) -> str:
    power = min((max(nbytes, 1).bit_length() - 1) // 10, 4)
    return f"{nbytes / 1024**power:.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
