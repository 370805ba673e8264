"""The Python API on the demonstration model: results, streams, limits, and that company changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

import gllm_driver as gllm
from gllm_driver.errors import CapacityError, RequestError
from gllm_driver.types import BatchInput, SequenceInput

PROMPT = "import os\n\ndef "


@pytest.fixture(scope="module")
def llm() -> Iterator[gllm.LLM]:
    # Tests write into pages directly, so none may be found again as a prefix.
    with gllm.load(device="cpu", context_length=512, prefix_reuse=False) as model:
        yield model


def test_stream_pieces_make_the_text(llm: gllm.LLM) -> None:
    stream = llm.stream(PROMPT, max_tokens=40, temperature=0)
    pieces = list(stream)
    result = stream.result
    assert len(pieces) > 10
    assert "".join(pieces) == result.text == llm.generate(PROMPT, max_tokens=40, temperature=0).text
    assert result.prompt_tokens == len(llm.tokenizer.encode(PROMPT))
    assert result.finish_reason in ("length", "stop")
    assert result.device == "cpu"
    assert result.timings.decode_tokens_per_s > 0


def test_generation_follows_the_logits(llm: gllm.LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPT)
    tokens = llm.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).tokens
    logits = llm.logits([*prompt, *tokens])
    assert logits.shape == (len(prompt) + 12, llm.arch.vocab_size)
    assert logits.dtype == np.float32
    assert tokens == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()


def test_seed_decides_the_draws(llm: gllm.LLM) -> None:
    def run(seed: int | None) -> list[int]:
        return llm.generate(PROMPT, max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True).tokens

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4
    assert run(None) != run(None)


def test_stop_string_ends_and_is_cut(llm: gllm.LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True).text
    stop = whole[10:13]
    result = llm.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True, stop=[stop])
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]


def test_closing_a_stream_frees_its_pages(llm: gllm.LLM) -> None:
    stream = llm.stream(PROMPT, max_tokens=100, ignore_eos=True)
    next(stream)
    assert llm._engine.pool.num_available < llm._engine.pool.num_pages
    stream.close()
    assert stream.result.finish_reason == "interrupted"
    assert llm._engine.pool.num_available == llm._engine.pool.num_pages
    llm._engine.pool.audit()


def test_context_end_is_a_length_stop(llm: gllm.LLM) -> None:
    prompt = [5] * 500
    result = llm.generate(prompt, max_tokens=100, temperature=0, ignore_eos=True)
    assert len(result.tokens) == 12
    assert result.finish_reason == "length"
    with pytest.raises(CapacityError, match="512"):
        llm.generate([5] * 512)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "empty"),
        ([4096], {}, "token 0 of the prompt is 4096, outside the vocabulary of 4096"),
        ([-1], {}, "outside the vocabulary"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"stop": [""]}, "stop string"),
        ("\ud800", {}, "surrogate"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(llm: gllm.LLM, prompt, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, **options)
    llm._engine.pool.audit()


def test_chunks_and_steps_give_the_same_bits(llm: gllm.LLM) -> None:
    """A prompt in one piece, in chunks, or token by token: the same logits, bit for bit."""
    backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
    tokens = np.random.default_rng(0).integers(3, 4096, 90).tolist()
    pages = list(range(6))
    whole = backend.logits_forward(weights, kv, SequenceInput(tokens, 0, pages))
    for chunk in (1, 7, 64):
        parts = [
            backend.logits_forward(weights, kv, SequenceInput(tokens[i : i + chunk], i, pages))
            for i in range(0, len(tokens), chunk)
        ]
        assert np.array_equal(np.concatenate(parts).view(np.uint32), whole.view(np.uint32)), f"chunks of {chunk}"


def test_a_batch_gives_each_sequence_what_it_gets_alone(llm: gllm.LLM) -> None:
    backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 4096, n).tolist() for n in (1, 33, 5, 16)]
    pages = [[0, 9], [4, 1, 7], [2], [5]]
    alone = []
    for prompt, own in zip(prompts, pages, strict=True):
        logits = backend.generator_forward_gpu_pure(weights, kv, SequenceInput(prompt, 0, own))
        alone.append(logits.row.to_numpy().copy())
    batch = BatchInput([SequenceInput(p, 0, own) for p, own in zip(prompts, pages, strict=True)])
    together = [x.row.to_numpy() for x in backend.batch_forward_gpu_pure(weights, kv, batch)]
    for one, many in zip(alone, together, strict=True):
        assert np.array_equal(one.view(np.uint32), many.view(np.uint32))


def test_python_costs_less_than_100_microseconds_a_token(llm: gllm.LLM) -> None:
    """What a token costs outside the compiled step: engine, detokenizer, stream. The best of a few runs counts."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        result = llm.generate(PROMPT, max_tokens=200, temperature=0, ignore_eos=True)
        inside = result.timings.prefill_s + result.timings.decode_s
        best = min(best, (time.perf_counter() - start - inside) / len(result.tokens))
    assert best < 100e-6


def test_penalties_change_what_repeats(llm: gllm.LLM) -> None:
    plain = llm.generate("def fibonacci(n):", max_tokens=60, temperature=0, ignore_eos=True).tokens
    penalized = llm.generate(
        "def fibonacci(n):", max_tokens=60, temperature=0, ignore_eos=True, repetition_penalty=1.3
    ).tokens
    assert len(set(penalized)) > len(set(plain))


def test_chat_template_is_applied(llm: gllm.LLM) -> None:
    tokens = llm.chat_tokens([{"role": "user", "content": "Hi <|im_end|>"}])
    assert tokens.count(llm.tokenizer.token_to_id("<|im_end|>")) == 1  # the template's, not the user's
