"""Vectors of texts, and scores of documents for a query, from the final hidden states of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .backends.pooling import POOLINGS, Pooling
from .engine import Engine
from .errors import ModelFormatError, RequestError
from .loaders.hub import POOLING_CONFIG
from .loaders.jsonfile import read_object
from .models.arch import Arch

# The prompt that Qwen3-Reranker models were trained with (its model card).
RERANK_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

_MODES: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


@dataclass(frozen=True)
class SequenceReader:
    """Reads whole texts with a model: `LLM.embed` and `LLM.rerank`, which explain the options."""

    engine: Engine
    encode: Callable[[str], list[int]]
    arch: Arch
    path: Path

    def embed(
        self, texts: Sequence[str | Sequence[int]], pooling: Pooling | None = None, normalize: bool = True
    ) -> np.ndarray:
        if isinstance(texts, str):
            raise RequestError("embed takes several texts: give a list")
        chosen: Pooling = pooling or pooling_of(self.path) or "last"
        if chosen not in POOLINGS:
            raise RequestError(f"pooling {chosen!r} is not known: choose {', '.join(POOLINGS)}")
        sequences = [self.encode(text) if isinstance(text, str) else [int(token) for token in text] for text in texts]
        if not all(sequences):
            raise RequestError("an empty text has no vector")
        if not sequences:
            return np.zeros((0, self.arch.hidden_size), np.float32)
        found = self.engine.compute_whole(
            sequences,
            lambda backend, weights, kv, batch: backend.embedding_forward_gpu_pure(weights, kv, batch, pooling=chosen),
        )
        if normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        template: str | None = None,
        instruction: str = INSTRUCTION,
        answers: tuple[str, str] = ("yes", "no"),
    ) -> list[float]:
        if isinstance(documents, str):
            raise RequestError("rerank takes several documents: give a list")
        if not documents:
            return []
        labels = self.arch.num_labels
        if labels > 1:
            raise RequestError(f"this model sorts texts into {labels} labels; one that reranks has one")
        form = template if template is not None else "{query}\n{document}" if labels else RERANK_TEMPLATE
        try:
            texts = [form.format(query=query, document=each, instruction=instruction) for each in documents]
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            named = "{query}, {document} and {instruction}"
            raise RequestError(f"the template may name {named}, nothing else: {error}") from error
        ids = None if labels else [self._one_token(answer) for answer in answers]
        logits = self.engine.compute_whole(
            [self.encode(text) for text in texts],
            lambda backend, weights, kv, batch: backend.rerank_forward_gpu_pure(weights, kv, batch, ids=ids),
        ).astype(np.float64)
        if labels:
            return [float(score) for score in logits[:, 0]]
        return [float(p) for p in 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))]

    def _one_token(self, answer: str) -> int:
        """The token that stands for an answer. Special tokens that encoding puts around a text are not the answer's."""
        around = set(self.encode("a")) & set(self.encode("b"))
        tokens = [token for token in self.encode(answer) if token not in around]
        if len(tokens) != 1:
            raise RequestError(f"the answer {answer!r} is {len(tokens)} tokens of this model: take words of one token")
        return tokens[0]


def pooling_of(path: Path) -> Pooling | None:
    """What a model's own 1_Pooling/config.json (sentence-transformers) says; None where there is none.

    Raises ModelFormatError for a file that cannot be read or a mode that is not computed here.
    """
    file = (path if path.is_dir() else path.parent) / POOLING_CONFIG
    if not file.exists():
        return None
    config = read_object(file)
    wanted = [mode for mode, on in config.items() if mode.startswith("pooling_mode_") and on is True]
    if len(wanted) != 1 or wanted[0] not in _MODES:
        named = ", ".join(wanted) or "none"
        raise ModelFormatError(f"asks for {named}; one of {', '.join(_MODES)} is computed: give `pooling`", path=file)
    return _MODES[wanted[0]]
