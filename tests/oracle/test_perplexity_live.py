"""`gllm perplexity` and `gllm compare` against llama.cpp's logits of the same file and text, scored in float64.

What llama-perplexity does with them is written out here once more, loop by loop: `pytest -m oracle`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import gllm_driver as gllm
from gllm_driver.llm import demo_model_path

from . import numpy_model, tiny_models, to_gguf

pytestmark = pytest.mark.oracle

CONTEXT = 128
BOUND = 5e-3  # over some 500 tokens; both engines round activations to 8 bits before they meet q8_0 weights
TEXT = Path(numpy_model.__file__).read_text(encoding="utf-8")[:3000]


@pytest.fixture(scope="module")
def llama_cpp_oracle() -> ModuleType:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from . import llama_cpp_oracle

    return llama_cpp_oracle


def log_p(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def windows(tokens: Sequence[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """(window, first position whose logits count) of llama-perplexity, without and with --ppl-stride."""
    if not stride:
        for chunk in range(len(tokens) // context):
            yield list(tokens[chunk * context : (chunk + 1) * context]), context // 2
        return
    context += stride // 2
    for chunk in range((len(tokens) - context + stride - 1) // stride):
        yield list(tokens[chunk * stride : chunk * stride + context]), context - stride - 1


def reading(
    oracle: ModuleType, path: Path, tokens: Sequence[int], context: int, stride: int = 0, bos: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(−ln p of each scored token, ln p of all tokens in its place) by llama.cpp."""
    nll, rows = [], []
    with oracle.load(path, context_length=context + stride) as llm:
        for window, first in windows(tokens, context, stride):
            read = window if bos is None else [bos, *window[1:]]
            own = log_p(oracle.logits(llm, read))
            for j in range(first, len(window) - 1):
                nll.append(-own[j, window[j + 1]])
                rows.append(own[j])
    return np.array(nll), np.array(rows)


def check(found: gllm.PerplexityResult, nll: np.ndarray) -> None:
    assert found.reading.tokens == len(nll)
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=BOUND)
    error = math.sqrt(((nll**2).mean() - nll.mean() ** 2) / (len(nll) - 1))
    assert found.perplexity.error == pytest.approx(math.exp(nll.mean()) * error, rel=2 * BOUND)


@pytest.mark.parametrize("stride", [0, 48])
def test_perplexity_of_the_demonstration_model(stride: int, llama_cpp_oracle: ModuleType) -> None:
    with llama_cpp_oracle.load(demo_model_path(), context_length=64) as theirs:
        tokens = theirs.tokenize(TEXT.encode(), add_bos=True, special=False)
    nll, _ = reading(llama_cpp_oracle, demo_model_path(), tokens, CONTEXT, stride)
    with gllm.load(device="cpu", context_length=CONTEXT + stride // 2) as llm:
        assert llm.tokenizer.encode(TEXT) == tokens
        check(gllm.perplexity(llm, TEXT, context=CONTEXT, stride=stride or None), nll)


@pytest.mark.parametrize("file_type", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama3_gqa", "qwen3_tied"])
def test_perplexity_of_tiny_models(
    name: str, file_type: to_gguf.FileType, llama_cpp_oracle: ModuleType, tmp_path: Path
) -> None:
    row = tiny_models.BY_NAME[name]
    path = to_gguf.convert(row, tmp_path / "model.gguf", file_type)
    tokens = np.random.default_rng(row.seed).integers(0, row.sizes[0], 700).tolist()
    nll, _ = reading(llama_cpp_oracle, path, tokens, 64)
    with gllm.load(path, device="cpu", context_length=64) as llm:
        found = gllm.perplexity(llm, tokens, context=64)
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=BOUND if file_type != "f32" else 1e-4)


def test_comparison_of_a_quantized_model(llama_cpp_oracle: ModuleType, tmp_path: Path) -> None:
    row = tiny_models.BY_NAME["llama3_gqa"]
    a, b = (to_gguf.convert(row, tmp_path / f"{kind}.gguf", kind) for kind in ("f32", "q4_0"))  # type: ignore[arg-type]
    tokens = np.random.default_rng(row.seed).integers(0, row.sizes[0], 700).tolist()
    _, of_a = reading(llama_cpp_oracle, a, tokens, 64)
    _, of_b = reading(llama_cpp_oracle, b, tokens, 64)
    kl = (np.exp(of_a) * (of_a - of_b)).sum(axis=1)
    with (
        gllm.load(a, device="cpu", context_length=64) as first,
        gllm.load(b, device="cpu", context_length=64) as second,
    ):
        found = gllm.compare(first, second, tokens, context=64)
    assert found.kl.value == pytest.approx(kl.mean(), rel=0.02)
    assert found.same_top.value == pytest.approx((of_a.argmax(1) == of_b.argmax(1)).mean(), abs=0.02)
