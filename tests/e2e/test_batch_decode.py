"""The Backend protocol with several sequences: each gets the bits it gets alone, whoever shares its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

import gllm_driver as gllm
from gllm_driver.backends.base import DecodeRow, SampleRow
from gllm_driver.config import SamplingConfig
from gllm_driver.errors import UnsupportedError
from gllm_driver.types import BatchInput, PageState, SequenceInput

STEPS = 40
CONFIGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.9, top_k=40, seed=3),
    SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4, seed=4),
    SamplingConfig(temperature=0.7, min_p=0.05, frequency_penalty=0.2, seed=5),
)


@pytest.fixture(scope="module")
def llm() -> Iterator[gllm.LLM]:
    with gllm.load(device="cpu", context_length=1024, max_batch=1, prefix_reuse=False) as model:
        yield model


def prompts(llm: gllm.LLM) -> list[list[int]]:
    tokens = llm.tokenizer.encode("import os\n\n\ndef test_walk(tmp_path):\n    for root, dirs, files in os.walk(")
    return [tokens[:1], tokens[:7], tokens[:17], tokens]


def prefill(llm: gllm.LLM, prompt: list[int], config: SamplingConfig, pages: list[int]) -> int:
    engine = llm._engine
    logits = engine.backend.generator_forward_gpu_pure(engine.weights, engine.kv, SequenceInput(prompt, 0, pages))
    return engine.backend.sample_from_tensor(logits, config, position=len(prompt) - 1, prompt=prompt)


def expected(llm: gllm.LLM, prompt: list[int], config: SamplingConfig) -> list[int]:
    """The sequence alone, by the engine."""
    return llm.generate(
        prompt,
        max_tokens=STEPS + 1,
        ignore_eos=True,
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
    ).tokens


def row(
    token: int, prompt: list[int], output: Sequence[int], config: SamplingConfig, pages: Sequence[int]
) -> DecodeRow:
    return DecodeRow(token, len(prompt) + len(output) - 1, pages, config, prompt, output)


def test_rows_of_a_loop_decode_as_alone_while_their_pages_grow(llm: gllm.LLM) -> None:
    engine, backend = llm._engine, llm._engine.backend
    pages = [list(range(16 * i, 16 * i + 8)) for i in range(4)]
    given = [1, 1, 2, 3]
    outputs, rows = [], []
    for i, (prompt, config) in enumerate(zip(prompts(llm), CONFIGS, strict=True)):
        outputs.append([prefill(llm, prompt, config, pages[i])])
        rows.append(row(outputs[i][0], prompt, outputs[i], config, pages[i][: given[i]]))
    loop = backend.start_decode(engine.weights, engine.kv, rows)
    for _ in range(STEPS):
        for i, prompt in enumerate(prompts(llm)):
            needed = (len(prompt) + len(outputs[i])) // 16 + 1
            if needed > given[i]:
                given[i] = needed
                loop.set_pages(i, pages[i][:needed])
        for output, token in zip(outputs, loop.step(), strict=True):
            output.append(token)
    loop.close()
    assert outputs == [expected(llm, p, c) for p, c in zip(prompts(llm), CONFIGS, strict=True)]
    assert len({tuple(output) for output in outputs}) == 4
    with pytest.raises(ValueError, match="closed"):
        loop.step()


def test_loops_may_end_and_begin_again_in_the_middle(llm: gllm.LLM) -> None:
    engine, backend = llm._engine, llm._engine.backend
    pages = [list(range(20 * i, 20 * i + 8)) for i in range(4)]
    outputs = [[prefill(llm, p, c, pages[i])] for i, (p, c) in enumerate(zip(prompts(llm), CONFIGS, strict=True))]
    for members in ((0, 1, 2, 3), (3, 1), (0,), (2, 0), (1, 2, 3)):
        rows = [row(outputs[i][-1], prompts(llm)[i], outputs[i], CONFIGS[i], pages[i]) for i in members]
        loop = backend.start_decode(engine.weights, engine.kv, rows)
        for _ in range(8):
            for i, token in zip(members, loop.step(), strict=True):
                outputs[i].append(token)
        loop.close()
    for i, (prompt, config) in enumerate(zip(prompts(llm), CONFIGS, strict=True)):
        assert outputs[i] == expected(llm, prompt, config)[: len(outputs[i])]
        assert len(outputs[i]) > 15


def test_chunks_and_decodes_share_a_step(llm: gllm.LLM) -> None:
    engine, backend = llm._engine, llm._engine.backend
    long, short = prompts(llm)[3], prompts(llm)[1]
    config = CONFIGS[2]
    alone = expected(llm, short, config)
    first = prefill(llm, short, config, [40, 41, 42])
    chunk = SequenceInput(long[:9], 0, [50, 51], wants_logits=False)
    decode = SequenceInput([first], len(short), [40, 41, 42])
    none, logits = backend.batch_forward_gpu_pure(engine.weights, engine.kv, BatchInput([chunk, decode]))
    assert none is None
    assert logits is not None
    rest = SequenceInput(long[9:], 9, [50, 51])
    assert backend.sample_rows([SampleRow(logits, config, len(short), short, [first])]) == [alone[1]]
    decode = SequenceInput([alone[1]], len(short) + 1, [40, 41, 42])
    both = backend.batch_forward_gpu_pure(engine.weights, engine.kv, BatchInput([rest, decode]))
    assert both[0] is not None
    assert both[1] is not None
    tokens = backend.sample_rows(
        [
            SampleRow(both[0], CONFIGS[3], len(long) - 1, long),
            SampleRow(both[1], config, len(short) + 1, short, alone[:2]),
        ]
    )
    assert tokens == [expected(llm, long, CONFIGS[3])[0], alone[2]]
    with pytest.raises(ValueError, match="overwritten"):
        backend.sample_rows([SampleRow(logits, config, len(short))])


def test_swapping_changes_no_bit(llm: gllm.LLM) -> None:
    engine, backend = llm._engine, llm._engine.backend
    backend.alloc_swap_space(engine.kv, 5)
    prompt, config = prompts(llm)[3], CONFIGS[1]
    pages = [7, 3, 5, 9]
    output = [prefill(llm, prompt, config, pages)]
    for slots, moved in (([4, 0, 2, 1], [11, 12, 13, 2]), ([0, 1, 2, 3], [3, 5, 7, 9])):
        loop = backend.start_decode(engine.weights, engine.kv, [row(output[-1], prompt, output, config, pages)])
        output += [loop.step()[0] for _ in range(10)]
        loop.close()
        before = backend.copy_pages_to_host(engine.kv, pages)
        backend.swap_out_pages(engine.kv, pages, slots)
        backend.copy_pages_from_host(engine.kv, pages, np.full(engine.kv.config.page_nbytes, 0xFF, np.uint8))
        backend.swap_in_pages(engine.kv, slots, moved)
        pages = moved
        assert np.array_equal(backend.copy_pages_to_host(engine.kv, pages), before)
    assert output == expected(llm, prompt, config)[: len(output)]
    for call in (backend.swap_out_pages, lambda kv, p, s: backend.swap_in_pages(kv, s, p)):
        with pytest.raises(IndexError, match="slot 5 of a KV cache of 5 slots"):
            call(engine.kv, [0, 1], [0, 5])
        with pytest.raises(IndexError, match="page 64"):
            call(engine.kv, [64, 1], [0, 1])


def test_page_states_come_from_the_tracker(llm: gllm.LLM) -> None:
    engine, backend = llm._engine, llm._engine.backend
    kv = backend.alloc_kv_cache(engine.kv.config)
    assert {m.state for m in backend.get_page_states(kv).values()} == {PageState.STANDBY}
    assert len(backend.get_page_states(kv)) == kv.config.num_pages
    with pytest.raises(UnsupportedError, match="no swap space"):
        backend.swap_out_pages(kv, [0], [0])

    class Tracker:
        def page_states(self) -> dict:
            return {1: "what the tracker says"}

    kv.tracker = Tracker()
    assert backend.get_page_states(kv) == {1: "what the tracker says"}
