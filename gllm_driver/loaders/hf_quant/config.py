"""What config.json says about quantization → the scheme that reads it, or an error that says what can be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ModelFormatError
from .schemes import Awq, Gptq, Int8, PackQuantized, Scheme

READABLE = "AWQ (GEMM), GPTQ, compressed-tensors (pack-quantized, int-quantized), bitsandbytes 8-bit, gllm"


def quantization_of(config: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """The quantization section of config.json; None: there is none."""
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None:
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("quant_method"), str):
        raise ModelFormatError("quantization_config must be an object that names its quant_method", path=path)
    return found


def scheme_of(quantization: Mapping[str, Any], path: Path) -> Scheme:
    """The scheme of a quantization section. Raises ModelFormatError for what cannot be read."""
    method = quantization["quant_method"].lower()
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "bitsandbytes": _bitsandbytes}
    if method not in readers:
        raise ModelFormatError(f"weights quantized with {method!r} cannot be read; readable: {READABLE}", path=path)
    return readers[method](quantization, path)


def _integer(section: Mapping[str, Any], key: str, allowed: tuple[int, ...] | None, path: Path) -> int:
    value = section.get(key)
    if type(value) is not int or (allowed is not None and value not in allowed):
        choices = f", expected one of {', '.join(map(str, allowed))}" if allowed else ""
        raise ModelFormatError(f"quantization_config says {key} {str(value)[:40]}{choices}", path=path)
    return value


def _group_size(section: Mapping[str, Any], path: Path) -> int:
    """The group size, 0 for a whole row (−1 in files)."""
    size = _integer(section, "group_size", None, path)
    if size != -1 and size < 1:
        raise ModelFormatError(f"quantization_config says group_size {size}", path=path)
    return max(size, 0)


def _awq(section: Mapping[str, Any], path: Path) -> Scheme:
    version = str(section.get("version", "gemm")).lower()
    if version != "gemm":
        raise ModelFormatError(f"AWQ weights in the {version!r} layout cannot be read, only 'gemm'", path=path)
    if not section.get("zero_point", True):
        raise ModelFormatError("AWQ weights without zero points cannot be read", path=path)
    _integer(section, "bits" if "bits" in section else "w_bit", (4,), path)
    key = "group_size" if "group_size" in section else "q_group_size"
    return Awq(_group_size({"group_size": section.get(key)}, path))


def _gptq(section: Mapping[str, Any], path: Path) -> Scheme:
    layout = str(section.get("checkpoint_format", "gptq")).lower()
    if layout not in ("gptq", "gptq_v2") or section.get("is_marlin_format"):
        name = "marlin" if section.get("is_marlin_format") else layout
        raise ModelFormatError(f"GPTQ weights in the {name!r} layout cannot be read: gptq, gptq_v2", path=path)
    bits = _integer(section, "bits", (2, 3, 4, 8), path)
    return Gptq(bits, _group_size(section, path), int(layout == "gptq"), bool(section.get("desc_act", False)))


def _compressed(section: Mapping[str, Any], path: Path) -> Scheme:
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ModelFormatError("quantization_config has no config_groups", path=path)
    found = {_compressed_group(section, group, path) for group in groups.values()}
    if len(found) != 1:
        raise ModelFormatError("config_groups that quantize differently in one model cannot be read", path=path)
    return found.pop()


def _compressed_group(section: Mapping[str, Any], group: Mapping[str, Any], path: Path) -> Scheme:
    layout = group.get("format") or section.get("format")
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or layout not in ("pack-quantized", "int-quantized"):
        raise ModelFormatError(
            f"compressed-tensors in the {layout!r} layout cannot be read: pack-quantized, int-quantized", path=path
        )
    strategy = weights.get("strategy")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise ModelFormatError(
            f"compressed-tensors type {weights.get('type')!r} per {strategy!r} cannot be read: int by group, channel",
            path=path,
        )
    group_size = _group_size(weights, path) if strategy == "group" else 0
    symmetric = bool(weights.get("symmetric", True))
    if layout == "int-quantized":
        _integer(weights, "num_bits", (8,), path)
        return Int8("weight_scale", group_size, symmetric)
    bits = _integer(weights, "num_bits", (4, 8), path)
    return PackQuantized(bits, group_size, symmetric, weights.get("actorder") in ("group", True))


def _bitsandbytes(section: Mapping[str, Any], path: Path) -> Scheme:
    if not section.get("load_in_8bit"):
        raise ModelFormatError("bitsandbytes weights of 4 bits (nf4, fp4) cannot be read, only of 8 bits", path=path)
    return Int8("SCB")
