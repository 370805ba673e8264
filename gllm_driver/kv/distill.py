"""Making KV smaller at the price of exactness: several neighbouring tokens become one, or several layers share one.

Arrays of pages are [N, L, 2, H, P, D]: N pages of one sequence in order, L layers, keys and values, H KV heads, P
tokens a page, D elements a head; f32, f16 or bf16. Arithmetic is f32. All of it runs on the host.

Merging tokens: of `ratio` neighbouring pages the tokens are taken in windows of `ratio`, and one page holds what the
windows become. A page table that names this page `ratio` times is as long as before. So each token keeps its position
and needs no new rotation, and each merged entry has the softmax weight of the tokens it stands for, because attention
meets it as many times. What is saved is memory; attention reads as many entries as before.

Merging neighbours by similarity follows KVMerger (Wang et al. 2024), keeping the first tokens exact follows
StreamingLLM (Xiao et al. 2023), sharing KV among neighbouring layers follows AcrossKV of SwiftKV (Qiao et al. 2024).
SwiftKV trains the model for it; nothing is trained here.

With ALiBi or a sliding window, which go by the place in the page table, a merged entry is met at places up to
(ratio − 1) · P tokens from those it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..config import DistillConfig
from ..ops.fused_qkv_rope import rotate
from .layer_sharing import LayerPlan, plan_layers

KEY, VALUE = 0, 1


@dataclass(frozen=True)
class Rope:
    """How keys were rotated: radians per position of each pair, f64 [R], and how pairs lie in a head (ops/…rope)."""

    inv_freq: np.ndarray
    style: int = 0


@dataclass(frozen=True)
class KvSimilarity:
    """Cosine similarities, first of keys, then of values.

    between_layers: f64 [2, n, n], of all heads and tokens of two layers as one vector. between_tokens: f64
    [2, n, T − 1], of token t and t + 1 in each layer, mean over heads; keys as if both stood at the same position.
    """

    layers: tuple[int, ...]
    between_layers: np.ndarray
    between_tokens: np.ndarray


def compute_kv_similarity(
    kv: np.ndarray, layers: Sequence[int] | None = None, *, num_tokens: int | None = None, rope: Rope | None = None
) -> KvSimilarity:
    """How alike layers are, and neighbouring tokens. kv: pages of a sequence whose first `num_tokens` tokens count.

    layers: which to compare, by default all. Raises IndexError for a layer that does not exist.
    """
    chosen = tuple(range(kv.shape[1])) if layers is None else tuple(layers)
    tokens = _tokens(kv[:, list(chosen)])[:, :, :, :num_tokens].astype(np.float64)  # [n, 2, H, T, D]
    flat = np.moveaxis(tokens, 1, 0).reshape(2, len(chosen), -1)
    norms = np.linalg.norm(flat, axis=2)
    between_layers = (flat @ flat.swapaxes(1, 2)) / np.maximum(norms[:, :, None] * norms[:, None], _TINY)
    before, after = tokens[..., :-1, :], tokens[..., 1:, :].copy()
    if rope is not None:
        after[:, KEY] = rotated(after[:, KEY], np.full(after.shape[:1] + after.shape[2:4], -1.0), rope)
    between_tokens = cosine(before, after).mean(axis=2).swapaxes(0, 1)
    return KvSimilarity(chosen, between_layers, between_tokens)


@dataclass(frozen=True)
class MergedKv:
    """KV with merged tokens: pages [M, L, 2, H, P, D], and for each original page the one read for it."""

    pages: np.ndarray
    table: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    def restored(self) -> np.ndarray:
        """What attention reads: as many pages as there were."""
        return self.pages[list(self.table)]


@dataclass(frozen=True)
class SharedKv:
    """KV of layers that share: `whole` pages [E, L, 2, H, P, D], and of the others the kept layers alone.

    Attention needs every layer's KV, so this is a form to store or swap in, which `restored` ends.
    """

    whole: np.ndarray
    kept: np.ndarray  # [N − E, layers kept, 2, H, P, D]
    is_whole: np.ndarray  # bool [N]
    plan: LayerPlan

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes + self.kept.nbytes + self.plan.scale.nbytes

    def restored(self) -> np.ndarray:
        """All layers of all pages, [N, L, 2, H, P, D]: layers that were left out have what they share."""
        pages = np.empty((len(self.is_whole), *self.whole.shape[1:]), self.whole.dtype)
        pages[self.is_whole] = self.whole
        pages[~self.is_whole] = self.plan.expand(self.kept)
        return pages


def distill_kv_pages(
    pages: np.ndarray,
    ratio: int = 2,
    method: Literal["tokens", "layers"] = "tokens",
    *,
    sinks: int = DistillConfig.sinks,
    window: int = DistillConfig.window,
    num_tokens: int | None = None,
    rope: Rope | None = None,
    sharpness: float = math.inf,
) -> MergedKv | SharedKv:
    """The KV of one sequence in fewer bytes; pages [N, L, 2, H, P, D] of which the first `num_tokens` tokens count.

    At least the first `sinks` tokens and the last `window` stay as they are, bit for bit, in whole pages. Between them,
    with method "tokens", `ratio` pages become one wherever so many are left, and with "layers" one of `ratio` layers is
    kept. `rope` and `sharpness` are those of `merge_pages`. Raises RequestError for a ratio or method there is not.
    """
    DistillConfig(ratio, method, sinks, window)
    page_size = pages.shape[4]
    length = len(pages) * page_size if num_tokens is None else num_tokens
    start, stop = exact_bounds(length, page_size, sinks, window)
    if method == "layers":
        is_whole = np.ones(len(pages), bool)
        is_whole[start:stop] = False
        old = pages[~is_whole]
        plan = plan_layers(old, ratio)
        return SharedKv(pages[is_whole], plan.shrink(old), is_whole, plan)
    count = (stop - start) // ratio
    end = start + count * ratio
    merged = [merge_pages(pages[i : i + ratio], rope, sharpness=sharpness) for i in range(start, end, ratio)]
    together = np.concatenate([pages[:start], *(page[None] for page in merged), pages[end:]])
    repeated = [start + i // ratio for i in range(count * ratio)]
    return MergedKv(together, (*range(start), *repeated, *range(start + count, len(together))))


def exact_bounds(num_tokens: int, page_size: int, sinks: int, window: int) -> tuple[int, int]:
    """The pages start … stop − 1 that hold neither one of the first `sinks` tokens nor one of the last `window`."""
    start = -(-min(sinks, num_tokens) // page_size)
    return start, max(start, (num_tokens - window) // page_size)


def merge_pages(pages: np.ndarray, rope: Rope | None, *, sharpness: float = math.inf) -> np.ndarray:
    """One page [L, 2, H, P, D] for `ratio` neighbouring ones [ratio, L, 2, H, P, D].

    Entry j stands for tokens j · ratio … (j + 1) · ratio − 1 of them: the mean of their keys and of their values,
    weighted by `similarity_weights`, in each head by itself. Keys are turned to the weighted mean of their positions
    before they are added; without `rope` they are added as they are, as is right where nothing was rotated.
    """
    ratio, page_size = len(pages), pages.shape[4]
    tokens = _tokens(pages)
    windows = tokens.reshape(*tokens.shape[:3], page_size, ratio, -1)  # [L, 2, H, P, ratio, D]
    keys, values = windows[:, KEY], windows[:, VALUE]
    offsets = np.arange(ratio, dtype=np.float64)
    level = keys if rope is None else rotated(keys, np.broadcast_to(-offsets, keys.shape[:-1]), rope)
    weights = similarity_weights(level, values, sharpness)  # [L, H, P, ratio]
    if rope is not None:
        keys = rotated(keys, (weights @ offsets)[..., None] - offsets, rope)
    merged = np.stack([(weights[..., None] * part).sum(axis=-2) for part in (keys, values)], axis=1)
    return merged.astype(pages.dtype)


def similarity_weights(keys: np.ndarray, values: np.ndarray, sharpness: float) -> np.ndarray:
    """Weights of the tokens of each window, [..., w] with sum 1, for keys and values [..., w, D].

    softmax(sharpness · (cos(k, mean k) + cos(v, mean v))): the more a token is like the window's mean, the more it
    counts. 0 is the plain mean; with infinity the most typical token stands for all of them.
    """
    of_keys, of_values = (cosine(part, part.mean(axis=-2, keepdims=True)) for part in (keys, values))
    likeness = of_keys + of_values
    if math.isinf(sharpness):
        best = likeness.argmax(axis=-1)[..., None]
        return (np.arange(keys.shape[-2]) == best).astype(np.float32)
    weights = np.exp(sharpness * (likeness - likeness.max(axis=-1, keepdims=True)))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def rotated(keys: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """keys [..., D] turned by so many positions, [...], forward or (negative) back; the type stays."""
    angles = positions.reshape(-1)[:, None] * rope.inv_freq  # [n, R]
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(keys.dtype)
    return rotate(keys.reshape(-1, 1, keys.shape[-1]), table, rope.style).reshape(keys.shape)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the angles between vectors [..., D]; 0 where one of them is 0."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(norms, _TINY)


def _tokens(pages: np.ndarray) -> np.ndarray:
    """Pages [N, L, 2, H, P, D] as tokens in order, f32 [L, 2, H, N · P, D]."""
    rows = np.moveaxis(pages.astype(np.float32), 0, 3)
    return rows.reshape(*rows.shape[:3], -1, rows.shape[-1])


_TINY = 1e-30
