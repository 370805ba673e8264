"""Logits and greedy tokens of a GGUF file by llama.cpp. Needs llama-cpp-python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np


@contextmanager
def load(path: Path, context_length: int = 64) -> Iterator[llama_cpp.Llama]:
    """The model with an f32 KV cache and no flash attention: as exact as llama.cpp computes."""
    llm = llama_cpp.Llama(
        model_path=str(path),
        n_ctx=context_length,
        n_batch=context_length,
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    try:
        yield llm
    finally:
        llm.close()


def logits(llm: llama_cpp.Llama, tokens: Sequence[int]) -> np.ndarray:
    """Float32 [T, vocab] from one batch."""
    llm.reset()
    llm.eval(list(tokens))
    return np.array(llm.scores[: len(tokens)], dtype=np.float32)


def greedy(llm: llama_cpp.Llama, tokens: Sequence[int], num_tokens: int) -> list[int]:
    """The most likely continuation through llama.cpp's own KV cache."""
    llm.reset()
    llm.eval(list(tokens))
    out: list[int] = []
    while len(out) < num_tokens:
        out.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval([out[-1]])
    return out
