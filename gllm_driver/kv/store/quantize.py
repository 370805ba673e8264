"""Lossy KV of 8 or 4 bits, in the way of KIVI (Liu et al. 2024): keys per channel, values per token.

A key channel is large or small for all tokens, so keys share a minimum and a scale along tokens; values have no such
channels and share them along the head. Half of a body's bits are kept at most; what that costs is the user's to judge.
"""

from __future__ import annotations

import numpy as np

from .base import KvEntry, numpy_dtype
from .keys import KvChunkKey, KvLayout

QUANTIZATIONS = ("none", "int8", "int4")
GROUP_PAGES = 4  # pages over which a key channel shares one minimum and scale; the last group may have fewer

_BITS = {"int8": 8, "int4": 4}


def packed_nbytes(quantization: str, layout: KvLayout, num_pages: int) -> int:
    """Bytes of a body before compression: the quants of all pages, then f32 minima and scales of keys, of values."""
    if quantization == "none":
        return num_pages * layout.page_nbytes
    keys = num_pages * layout.num_layers * layout.num_kv_heads * layout.page_size * layout.head_dim
    groups = -(-num_pages // GROUP_PAGES)
    key_pairs = groups * layout.num_layers * layout.num_kv_heads * layout.head_dim
    value_pairs = keys // layout.head_dim
    return 2 * _quant_nbytes(keys, quantization) + 8 * (key_pairs + value_pairs)


def quantize(entry: KvEntry, quantization: str) -> np.ndarray | None:
    """A packed body, u8; None when a number of the entry, or a range of them, is not finite: no scale could hold it."""
    levels = 2 ** _BITS[quantization] - 1
    kv = entry.array().astype(np.float32)  # [pages, layers, 2, kv_heads, page_size, head_dim]
    keys, values = kv[:, :, 0], kv[:, :, 1]  # [pages, layers, kv_heads, page_size, head_dim]
    starts = np.arange(0, len(keys), GROUP_PAGES)
    with np.errstate(all="ignore"):
        key_low = np.minimum.reduceat(keys.min(axis=3), starts)  # [groups, layers, kv_heads, head_dim]
        key_scale = (np.maximum.reduceat(keys.max(axis=3), starts) - key_low) / np.float32(levels)
        value_low = values.min(axis=4)  # [pages, layers, kv_heads, page_size]
        value_scale = (values.max(axis=4) - value_low) / np.float32(levels)
    if not (np.isfinite(key_scale).all() and np.isfinite(value_scale).all()):  # NaN and infinity come through both
        return None
    parts = (
        _pack(_quants(keys, _along_tokens(key_low, len(keys)), _along_tokens(key_scale, len(keys)), levels), levels),
        _pack(_quants(values, value_low[..., None], value_scale[..., None], levels), levels),
        *(part.astype("<f4").reshape(-1).view(np.uint8) for part in (key_low, key_scale, value_low, value_scale)),
    )
    return np.concatenate(parts)


def dequantize(body: np.ndarray, key: KvChunkKey, quantization: str) -> np.ndarray:
    """Pages from a packed body of exactly `packed_nbytes`: u8 [num_pages, page_nbytes]. Any bytes are valid input."""
    layout, pages = key.root.layout, key.num_pages
    heads, dim = layout.num_kv_heads, layout.head_dim
    shape = (pages, layout.num_layers, heads, layout.page_size, dim)
    count = int(np.prod(shape))
    quants = _quant_nbytes(count, quantization)
    pairs = body[2 * quants :].view("<f4")
    num_key = -(-pages // GROUP_PAGES) * layout.num_layers * heads * dim
    num_value = count // dim
    key_low, key_scale, value_low, value_scale = np.split(pairs, np.cumsum([num_key, num_key, num_value]))
    kv = np.empty(key.shape, np.float32)
    group_shape = (-1, layout.num_layers, heads, dim)
    with np.errstate(all="ignore"):
        kv[:, :, 0] = _unpack(body[:quants], count, quantization).reshape(shape)
        kv[:, :, 0] *= _along_tokens(key_scale.reshape(group_shape), pages)
        kv[:, :, 0] += _along_tokens(key_low.reshape(group_shape), pages)
        kv[:, :, 1] = _unpack(body[quants : 2 * quants], count, quantization).reshape(shape)
        kv[:, :, 1] *= value_scale.reshape(*shape[:-1], 1)
        kv[:, :, 1] += value_low.reshape(*shape[:-1], 1)
        return kv.astype(numpy_dtype(layout.dtype), copy=False).view(np.uint8).reshape(pages, layout.page_nbytes)


def _along_tokens(groups: np.ndarray, pages: int) -> np.ndarray:
    """[groups, layers, kv_heads, head_dim] → [pages, layers, kv_heads, 1, head_dim]"""
    return np.repeat(groups, GROUP_PAGES, axis=0)[:pages, :, :, None, :]


def _quants(x: np.ndarray, low: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    step = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint((x - low) / step), 0, levels).astype(np.uint8)


def _quant_nbytes(count: int, quantization: str) -> int:
    """Bytes of `count` quants, whole f32 so that scales behind them are aligned."""
    return -(-count * _BITS[quantization] // 32) * 4


def _pack(quants: np.ndarray, levels: int) -> np.ndarray:
    """Bytes as they are, or two 4-bit quants in one byte, the first in the low half."""
    flat = quants.reshape(-1)
    flat = np.pad(flat, (0, -len(flat) % (4 if levels == 255 else 8)))
    return flat if levels == 255 else flat[0::2] | flat[1::2] << 4


def _unpack(data: np.ndarray, count: int, quantization: str) -> np.ndarray:
    if quantization == "int8":
        return data[:count]
    return np.stack((data & 15, data >> 4), axis=-1).reshape(-1)[:count]
