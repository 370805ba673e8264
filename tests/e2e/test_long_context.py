"""One token decoded at position 2,100,000: logits and what is written to the cache, against float64, on both backends.

The cache is filled from outside, with keys and values that differ at every position, in pages out of order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostsim import session

from gllm_driver.config import KvCacheConfig
from gllm_driver.models.arch import Arch, tensor_slots
from gllm_driver.models.checkpoint import Checkpoint
from gllm_driver.models.decoder import model_weights
from gllm_driver.ops._attention import alibi_slopes
from gllm_driver.types import SequenceInput, Tensor

PAGE_SIZE, TOKEN = 64, 5
FARTHEST = 2_100_000
POSITIONS = (FARTHEST, 1_048_577, 65_535)  # from the farthest on, so that what one writes another does not see
ROPE = Arch(
    family="llama",
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    context_length=1 << 22,
    rotary_dim=64,
)
ALIBI = Arch(
    **{
        **{name: getattr(ROPE, name) for name in ROPE.__dataclass_fields__},
        **{"family": "mpt", "rotary_dim": 0, "alibi_max_bias": 20.0},  # a slope that reaches far
        **{"norm": "layer", "gated_mlp": False, "activation": "gelu", "tie_word_embeddings": True},
    }
)


def weights(arch: Arch) -> dict[str, np.ndarray]:
    g = np.random.Generator(np.random.PCG64(3))
    found = {}
    for slot, shape in tensor_slots(arch).items():
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        if slot.endswith(".q"):
            scale *= 3  # attention picks a few of two million keys, wherever they are
        found[slot] = (g.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
    return found


class Content:
    """What is cached: page after page of the sequence one of a prime number of pages of random numbers."""

    def __init__(self) -> None:
        g = np.random.Generator(np.random.PCG64(4))
        shape = (2053, 2, PAGE_SIZE, ROPE.head_dim)
        self.distinct = g.standard_normal(shape, np.float32).astype(np.float16)  # [n, K and V, PAGE_SIZE, Dh]
        self.which = g.integers(0, len(self.distinct), FARTHEST // PAGE_SIZE + 1)  # of each page of the sequence

    def attend(self, q: np.ndarray, slopes: np.ndarray, new: np.ndarray, position: int) -> np.ndarray:
        """q [H, Dh] over the tokens before `position` and the new one, K and V [2, Dh], at it: [H, Dh] f64."""
        keys, values = self.distinct.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1, q.shape[1])
        slots = (self.which[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)[:position]
        out = np.empty(q.shape)
        for head, slope in enumerate(slopes):
            scores = (keys @ q[head])[slots] - slope * np.arange(position, 0, -1) * q.shape[1] ** 0.5
            scores = np.append(scores, new[0] @ q[head]) * q.shape[1] ** -0.5
            weights = np.exp(scores - scores.max())
            of_slot = np.bincount(slots, weights[:-1], len(values))
            out[head] = (of_slot @ values + weights[-1] * new[1]) / weights.sum()
        return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v * 0.5 * (1 + erf(v / 2**0.5)) for v in x])


def norm(x: np.ndarray, weight: np.ndarray, arch: Arch) -> np.ndarray:
    x = x - x.mean() if arch.norm == "layer" else x
    return x / np.sqrt((x * x).mean() + arch.norm_eps) * weight


def expected(arch: Arch, w: Mapping[str, np.ndarray], content: Content, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [vocab] after TOKEN at `position`, and its key and value [2, Dh], in float64 from the definitions."""
    w = {slot: array.astype(np.float64) for slot, array in w.items()}
    x, half = w["embed"][TOKEN], arch.head_dim // 2
    h = norm(x, w["layers.0.attn_norm"], arch)
    q = (w["layers.0.q"] @ h).reshape(arch.num_heads, -1)
    k, v = w["layers.0.k"] @ h, w["layers.0.v"] @ h
    if arch.rotary_dim:
        turn = np.exp(1j * position * arch.rope_theta ** (-np.arange(half) / half))
        for row in (*q, k):
            turned = (row[:half] + 1j * row[half:]) * turn
            row[:half], row[half:] = turned.real, turned.imag
    new = np.stack([k, v])
    slopes = alibi_slopes(arch.num_heads, arch.alibi_max_bias)
    heads = content.attend(q, slopes, new.astype(np.float16).astype(np.float64), position)
    x = x + w["layers.0.o"] @ heads.reshape(-1)
    h = norm(x, w["layers.0.ffn_norm"], arch)
    up = w["layers.0.up"] @ h
    up = silu(w["layers.0.gate"] @ h) * up if arch.gated_mlp else gelu(up)
    x = norm(x + w["layers.0.down"] @ up, w["final_norm"], arch)
    return w.get("lm_head", w["embed"]) @ x, new


@pytest.fixture(scope="module")
def content() -> Content:
    return Content()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.hostsim)])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "cpu":
        from gllm_driver.backends.cpu import CpuBackend

        opened: Any = CpuBackend()
    else:
        from cuda_models import fresh, open_cuda

        if not session.on_real_gpu():
            fresh(THREADS="2")
        opened = open_cuda()
    yield opened
    opened.close()


@pytest.mark.parametrize("arch", [ROPE, ALIBI], ids=["rope", "alibi"])
def test_a_token_is_decoded_two_million_tokens_on(arch: Arch, backend: Any, content: Content) -> None:
    w = weights(arch)
    tensors = {slot: Tensor.from_numpy(array) for slot, array in w.items()}
    checkpoint = Checkpoint(Path("long"), arch, tensors, {slot: slot for slot in w})
    handle = backend.upload_weights(model_weights(checkpoint, FARTHEST + 1))
    num_pages = len(content.which)
    kv = backend.alloc_kv_cache(KvCacheConfig(num_pages + 3, 1, 1, arch.head_dim, PAGE_SIZE, "f16"))
    pages = (np.random.Generator(np.random.PCG64(5)).permutation(num_pages) + 2).tolist()
    cached = content.distinct[content.which].reshape(num_pages, -1)
    backend.copy_pages_from_host(kv, pages, cached.view(np.uint8))
    for position in POSITIONS if backend.name == "cpu" or session.on_real_gpu() else POSITIONS[:1]:
        logits, slot = expected(arch, w, content, position)
        found = backend.logits_forward(handle, kv, SequenceInput([TOKEN], position, pages))[0]
        error = np.abs(found - logits).max() / np.abs(logits).max()
        assert error <= 1e-4, f"logits at {position} differ by {error:.2e}"
        page = backend.copy_pages_to_host(kv, [pages[position // PAGE_SIZE]]).view(np.float16)
        written = page.reshape(2, PAGE_SIZE, -1)[:, position % PAGE_SIZE].astype(np.float64)
        assert np.abs(written - slot).max() <= 1e-3 * np.abs(slot).max()
