"""Vectors and scores of sequences on both backends, against a float64 model and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import fresh, load_cuda
from hostsim import session
from oracle import numpy_model, tiny_models

import gllm_driver as gllm
from gllm_driver.backends import pooling
from gllm_driver.embedding import pooling_of
from gllm_driver.errors import CapacityError, ModelFormatError, RequestError
from gllm_driver.llm import demo_model_path

Load = Callable[[Path], gllm.LLM]
ROWS = ["llama2_mha", "qwen3_tied"]
LENGTHS = (1, 37, 5, 16, 64)
BOUND = 3e-5  # of the largest element; f32 models


def sequences(row: tiny_models.Row) -> list[list[int]]:
    g = np.random.default_rng(5)
    return [g.integers(3, row.sizes[0], n).tolist() for n in LENGTHS]


def in_f32(name: str) -> tiny_models.Row:
    return replace(tiny_models.BY_NAME[name], dtype="f32")


def hidden(row: tiny_models.Row, tokens: list[int]) -> np.ndarray:
    """Final hidden states, float64 [T, D]: logits of an output matrix that changes nothing."""
    weights = {**tiny_models.weights(row), "lm_head.weight": np.eye(row.sizes[1])}
    return numpy_model.logits(tiny_models.config(row), weights, tokens)


def expected(row: tiny_models.Row, mode: str) -> np.ndarray:
    of: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "last": lambda h: h[-1],
        "cls": lambda h: h[0],
        "mean": lambda h: h.mean(axis=0),
    }
    return np.stack([of[mode](hidden(row, tokens)) for tokens in sequences(row)])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.hostsim)])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    if request.param == "cpu":
        yield lambda path: gllm.load(path, device="cpu", threads=2, context_length=128)
        return
    if session.on_real_gpu():
        yield lambda path: load_cuda(path, context_length=128)
        return
    stub = fresh(THREADS="2")
    yield lambda path: load_cuda(path, context_length=128)
    assert stub.live() == {}


def close(found: np.ndarray, wanted: np.ndarray, bound: float = BOUND) -> bool:
    return found.shape == wanted.shape and bool(np.abs(found - wanted).max() <= bound * np.abs(wanted).max())


@pytest.mark.parametrize("name", ROWS)
def test_pooled_hidden_states(load: Load, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = in_f32(name)
    with load(tiny_models.build(row, tmp_path / "m")) as llm:
        for mode in pooling.POOLINGS:
            wanted = expected(row, mode)
            found = llm.embed(sequences(row), pooling=mode, normalize=False)
            assert found.dtype == np.float32
            assert close(found, wanted), mode
            unit = llm.embed(sequences(row), pooling=mode)
            assert close(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True)), mode
            alone = np.concatenate([llm.embed([each], pooling=mode, normalize=False) for each in sequences(row)])
            assert close(alone, wanted), mode
            with monkeypatch.context() as patch:  # in small steps, across sequences
                patch.setattr(pooling, "STEP_TOKENS", 11)
                assert close(llm.embed(sequences(row), pooling=mode, normalize=False), wanted), mode
        assert np.array_equal(llm.embed(sequences(row))[0], llm.embed(sequences(row), pooling="last")[0])
        assert len(llm.generate([5, 6, 7], max_tokens=3, temperature=0).tokens) == 3  # goes on as before
        llm._engine.audit()


def test_only_the_vectors_cross_the_bus(tmp_path: Path) -> None:
    if not session.on_real_gpu():
        fresh(THREADS="2")
    row = in_f32("llama2_mha")
    with load_cuda(tiny_models.build(row, tmp_path / "m"), context_length=128) as llm:
        llm.embed([[3, 4, 5]])
        before = llm._backend.traffic()
        llm.embed(sequences(row), pooling="mean")
        after = llm._backend.traffic() - before
        assert after.d2h_bytes == 4 * len(LENGTHS) * row.sizes[1]
        assert after.h2d_bytes < 16_384  # ids, positions, page tables, pieces


test_only_the_vectors_cross_the_bus = pytest.mark.hostsim(test_only_the_vectors_cross_the_bus)


def with_head(directory: Path, labels: int, bare: bool = False) -> tuple[Path, np.ndarray]:
    """A tiny model for classification; `bare`: names without "model.", no head at all."""
    row = in_f32("qwen3_tied" if bare else "llama2_mha")
    tensors = dict(tiny_models.weights(row))
    tensors.pop("lm_head.weight", None)
    head = np.random.default_rng(3).standard_normal((labels, row.sizes[1])).astype(np.float32)
    if bare:
        tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
    else:
        tensors["score.weight"] = head
    directory.mkdir()
    config = {**tiny_models.config(row), "id2label": {str(i): f"l{i}" for i in range(labels)}, "pad_token_id": 0}
    config["architectures"] = ["LlamaForSequenceClassification"]
    if bare:
        config["architectures"] = ["Qwen3Model"]
    (directory / "config.json").write_text(json.dumps(config))
    tiny_models.write_safetensors(directory / "model.safetensors", tensors, "f32")
    return directory, head


def raw_scores(llm: gllm.LLM, tokens: list[list[int]], ids: list[int] | None) -> np.ndarray:
    return llm._engine.compute_whole(
        tokens, lambda backend, weights, kv, batch: backend.rerank_forward_gpu_pure(weights, kv, batch, ids=ids)
    )


@pytest.mark.parametrize("labels", [1, 3])
def test_a_head_scores_sequences(load: Load, tmp_path: Path, labels: int) -> None:
    path, head = with_head(tmp_path / "m", labels)
    row = in_f32("llama2_mha")
    with load(path) as llm:
        assert close(raw_scores(llm, sequences(row), None), expected(row, "last") @ head.T.astype(np.float64))


def test_tokens_score_sequences(load: Load, tmp_path: Path) -> None:
    for name in ROWS:
        row = in_f32(name)
        weights = tiny_models.weights(row)
        output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).astype(np.float64)
        with load(tiny_models.build(row, tmp_path / name)) as llm:
            found = raw_scores(llm, sequences(row), [17, 4])
            assert close(found, expected(row, "last") @ output[[17, 4]].T)
            with pytest.raises(RequestError, match="no head"):
                raw_scores(llm, [[3, 4]], None)


def test_packed_output_matrices_score_too(load: Load) -> None:
    with load(demo_model_path()) as llm:
        tokens = [llm.tokenizer.encode("import os"), llm.tokenizer.encode("def f(")]
        wanted = np.stack([llm.logits(each)[-1][[40, 9, 300]] for each in tokens])
        assert close(raw_scores(llm, tokens, [40, 9, 300]), wanted, 0.02)


def test_models_without_any_head_load(load: Load, tmp_path: Path) -> None:
    path, _ = with_head(tmp_path / "m", 1, bare=True)
    row = in_f32("qwen3_tied")
    with load(path) as llm:
        assert close(llm.embed(sequences(row), normalize=False), expected(row, "last"))


def test_texts(tmp_path: Path) -> None:
    with gllm.load(device="cpu", threads=1) as llm:
        found = llm.embed(["def f(x):\n    return x", "import os", "def g(y):\n    return y"])
        assert found[0] @ found[2] > found[0] @ found[1]
        assert llm.embed([]).shape == (0, llm.arch.hidden_size)
        scores = llm.rerank("q", ["a", "b"], template="{query} {document}", answers=("x", "y"))
        logits = [llm.logits(llm.tokenizer.encode(f"q {d}"))[-1].astype(np.float64) for d in "ab"]
        ids = [llm.tokenizer.encode(answer)[-1] for answer in "xy"]
        assert scores == pytest.approx([1 / (1 + np.exp(x[ids[1]] - x[ids[0]])) for x in logits], rel=0.05)
        assert llm.rerank("q", []) == []
        for call, problem in (
            (lambda: llm.embed("text"), "list"),
            (lambda: llm.embed([[5], []]), "empty"),
            (lambda: llm.embed(["x"], pooling="max"), "max"),  # type: ignore[arg-type]
            (lambda: llm.rerank("q", "document"), "list"),
            (lambda: llm.rerank("q", ["d"], template="{x}"), "template"),
            (lambda: llm.rerank("q", ["d"], template="{query.x}"), "template"),
            (lambda: llm.rerank("q", ["d"], answers=("two words and more", "y")), "one token"),
        ):
            with pytest.raises(RequestError, match=problem):
                call()
        with pytest.raises(CapacityError):
            llm.embed([[5] * (llm.context_length + 1)])


def test_the_models_own_pooling(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) is None
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    for mode, wanted in (("lasttoken", "last"), ("mean_tokens", "mean"), ("cls_token", "cls")):
        config = {"word_embedding_dimension": 64, "pooling_mode_max_tokens": False, f"pooling_mode_{mode}": True}
        (folder / "config.json").write_text(json.dumps(config))
        assert pooling_of(tmp_path) == wanted
    (folder / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelFormatError, match="max_tokens"):
        pooling_of(tmp_path)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelFormatError, match="must be a JSON object"):
        pooling_of(tmp_path)


@pytest.mark.oracle
def test_beside_transformers(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    path, _ = with_head(tmp_path / "m", 1)
    row = in_f32("llama2_mha")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad(), gllm.load(path, device="cpu", context_length=128) as llm:
        wanted = np.concatenate([model(torch.tensor([each])).logits.numpy() for each in sequences(row)])
        assert close(raw_scores(llm, sequences(row), None), wanted)
        states = [model.model(torch.tensor([each])).last_hidden_state[0].numpy() for each in sequences(row)]
        assert close(llm.embed(sequences(row), normalize=False), np.stack([state[-1] for state in states]))
        mean = llm.embed(sequences(row), pooling="mean", normalize=False)
        assert close(mean, np.stack([state.mean(axis=0) for state in states]))
