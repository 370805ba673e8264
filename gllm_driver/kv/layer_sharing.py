"""Which layers share the KV of which, and how (AcrossKV, Qiao et al. 2024: neighbouring layers, no training)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerPlan:
    """Layer l has the KV of layer source[l], times scale[l]; layers that are kept have their own, times 1."""

    source: tuple[int, ...]
    scale: np.ndarray  # f32 [L, 2, H, 1, 1]

    @property
    def kept(self) -> list[int]:
        """The layers others take theirs from, in order."""
        return sorted(set(self.source))

    def shrink(self, pages: np.ndarray) -> np.ndarray:
        """The kept layers of pages [N, L, 2, H, P, D]."""
        return pages[:, self.kept]

    def expand(self, kept: np.ndarray) -> np.ndarray:
        """All layers again, [N, L, 2, H, P, D]; those that were kept have their bits."""
        at = {layer: i for i, layer in enumerate(self.kept)}
        pages = kept[:, [at[layer] for layer in self.source]]
        for layer, source in enumerate(self.source):
            if source != layer:
                pages[:, layer] = (pages[:, layer].astype(np.float32) * self.scale[layer]).astype(kept.dtype)
        return pages


def num_kept(num_layers: int, ratio: int) -> int:
    """Layers of which the KV is kept."""
    return -(-num_layers // ratio)


def plan_layers(pages: np.ndarray, ratio: int) -> LayerPlan:
    """Groups of neighbouring layers, one for each layer that is kept; pages [N, L, 2, H, P, D] say which are alike.

    The two neighbouring groups that are most alike (cosine similarity of keys and of values, mean over their layers)
    are joined until few enough are left. Of a group the layer most like the others is kept. The scale is the best one
    in the least-squares sense for each head, and so near 0 where two layers have nothing in common.
    """
    num_layers, heads = pages.shape[1], pages.shape[3]
    if not len(pages):
        return LayerPlan(tuple(range(num_layers)), np.ones((num_layers, 2, heads, 1, 1), np.float32))
    rows = np.moveaxis(pages.astype(np.float32), 0, 3).reshape(num_layers, 2, heads, -1)
    dots = np.einsum("ichx,jchx->ijch", rows, rows, optimize=True).astype(np.float64)  # [L, L, 2, H]
    squares = np.einsum("iich->ich", dots)
    whole = squares.sum(axis=2)  # [L, 2]
    likeness = (dots.sum(axis=3) / np.maximum(np.sqrt(whole[:, None] * whole), 1e-30)).mean(axis=2)
    groups = [[layer] for layer in range(num_layers)]
    while len(groups) > num_kept(num_layers, ratio):
        best = max(range(len(groups) - 1), key=lambda i: likeness[np.ix_(groups[i], groups[i + 1])].mean())
        groups[best : best + 2] = [groups[best] + groups[best + 1]]
    source = [0] * num_layers
    for group in groups:
        kept = max(group, key=lambda layer: likeness[layer, group].sum())
        for layer in group:
            source[layer] = kept
    scale = [dots[layer, kept] / np.maximum(squares[kept], 1e-30) for layer, kept in enumerate(source)]
    return LayerPlan(tuple(source), np.asarray(scale, np.float32)[..., None, None])
