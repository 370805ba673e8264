"""The Backend protocol on the CUDA backend: loops of several rows, mixed steps, sampling of rows, swapped pages."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from cuda_models import fresh, load_cuda, tiny
from hostsim import session

import gllm_driver as gllm
from gllm_driver.backends.base import DecodeRow, SampleRow
from gllm_driver.backends.cuda.shapes import bucket
from gllm_driver.backends.cuda.swap import runs
from gllm_driver.config import SamplingConfig
from gllm_driver.errors import CapacityError, DriverError, UnsupportedError
from gllm_driver.placement import Sharing
from gllm_driver.types import BatchInput, PageState, SequenceInput

pytestmark = pytest.mark.hostsim

NUM_PAGES = 64
VOCABULARY = 100  # ids that prompts are made of; every tiny model has more
CONFIGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.9, top_k=40, seed=3),
    SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4, seed=4),
    SamplingConfig(temperature=0.7, min_p=0.05, frequency_penalty=0.2, seed=5),
)
MODELS = (("qwen2_bias", ""), ("llama3_gqa", "q4_0"))


@pytest.fixture(autouse=True)
def stub() -> Iterator[session.Stub | None]:
    """A fresh device; nothing may be left on it."""
    if session.on_real_gpu():
        yield None
        return
    stub = fresh(THREADS="2")
    yield stub
    stub.set_faults("")
    assert stub.live() == {}


def simulated(stub: session.Stub | None) -> session.Stub:
    """The simulated device, for tests that tell it what to do."""
    if stub is None:
        pytest.skip("tells the simulated device what to do")
    return stub


def prompts_of(count: int) -> list[list[int]]:
    """Of different lengths, some beginning a page, some filling one."""
    g = np.random.default_rng(5)
    return [g.integers(0, VOCABULARY, n).tolist() for n in (2, 33, 5, 16, 47, 31, 12, 64)[:count]]


@contextlib.contextmanager
def model(name: str = "qwen2_bias", kind: str = "", *, deterministic: bool = True) -> Iterator[gllm.LLM]:
    """A tiny model with a cache of NUM_PAGES pages, whatever its context."""
    with load_cuda(tiny(name, kind), context_length=64, deterministic=deterministic) as llm:
        config = dataclasses.replace(llm._engine.kv.config, num_pages=NUM_PAGES)
        llm._engine.kv = llm._backend.alloc_kv_cache(config)
        yield llm


class Sequences:
    """Sequences of one model that are prefilled and continued by hand, each with pages of its own, out of order."""

    def __init__(self, llm: gllm.LLM, prompts: Sequence[list[int]], *, reverse: bool = False) -> None:
        self.backend, self.weights, self.kv = llm._backend, llm._engine.weights, llm._engine.kv
        self.prompts = prompts
        numbers = list(range(self.kv.config.num_pages))
        self.pages = [numbers[i :: len(prompts)][:: -1 if reverse else 1] for i in range(len(prompts))]
        self.configs = [CONFIGS[i % len(CONFIGS)] for i in range(len(prompts))]
        self.outputs: list[list[int]] = [[] for _ in prompts]

    def prefill(self, i: int) -> None:
        logits = self.backend.generator_forward_gpu_pure(
            self.weights, self.kv, SequenceInput(self.prompts[i], 0, self.pages[i])
        )
        position = len(self.prompts[i]) - 1
        token = self.backend.sample_from_tensor(logits, self.configs[i], position=position, prompt=self.prompts[i])
        self.outputs[i] = [token]

    def needed(self, i: int) -> int:
        """Pages for the token that comes into the cache next."""
        return (len(self.prompts[i]) + len(self.outputs[i]) - 1) // self.kv.config.page_size + 1

    def row(self, i: int, num_pages: int | None = None) -> DecodeRow:
        output = self.outputs[i]
        position = len(self.prompts[i]) + len(output) - 1
        return DecodeRow(
            output[-1], position, self.pages[i][:num_pages], self.configs[i], self.prompts[i], list(output)
        )

    def decode(self, members: Sequence[int], steps: int, *, between: Callable[[int], None] = lambda step: None) -> None:
        """Continue some of them in one loop, which has at each time the pages it needs and no more."""
        given = [self.needed(i) for i in members]
        loop = self.backend.start_decode(
            self.weights, self.kv, [self.row(i, n) for i, n in zip(members, given, strict=True)]
        )
        for step in range(steps):
            for row, i in enumerate(members):
                if self.needed(i) > given[row]:
                    given[row] = self.needed(i)
                    loop.set_pages(row, self.pages[i][: given[row]])
            for i, token in zip(members, loop.step(), strict=True):
                self.outputs[i].append(token)
            between(step)
        loop.close()

    def contents(self, i: int) -> bytes:
        """KV of every token that is in the cache."""
        config = self.kv.config
        data = self.backend.copy_pages_to_host(self.kv, self.pages[i][: self.needed(i)])
        tokens = len(self.prompts[i]) + len(self.outputs[i]) - 1
        heads = config.num_layers * 2 * config.num_kv_heads
        per_token = data.reshape(len(data), heads, config.page_size, -1).transpose(0, 2, 1, 3)
        return per_token.reshape(len(data) * config.page_size, -1)[:tokens].tobytes()


def alone(llm: gllm.LLM, prompts: Sequence[list[int]], steps: int) -> tuple[list[list[int]], list[bytes]]:
    """What each sequence says, and its KV, with nobody beside it."""
    outputs, contents = [], []
    for i in range(len(prompts)):
        own = Sequences(llm, prompts)
        own.prefill(i)
        own.decode([i], steps)
        outputs.append(own.outputs[i])
        contents.append(own.contents(i))
    return outputs, contents


@pytest.mark.parametrize(("name", "kind"), MODELS)
@pytest.mark.parametrize("count", [3, 8])
def test_rows_of_a_loop_get_the_bits_they_get_alone(name: str, kind: str, count: int) -> None:
    """Different lengths, sampling and penalties, pages that grow past the width of the page table."""
    prompts = prompts_of(count)
    with model(name, kind) as llm:
        expected, contents = alone(llm, prompts, 20)
        together = Sequences(llm, prompts, reverse=True)
        for i in range(count):
            together.prefill(i)
        together.decode(range(count), 20)
        assert together.outputs == expected
        assert [together.contents(i) for i in range(count)] == contents
        assert len({tuple(output) for output in expected}) == count


def test_loops_end_and_begin_again_with_other_members() -> None:
    """Twelve rows are more than one exact shape: some of a step's rows are nobody's."""
    prompts = prompts_of(8)
    with model() as llm:
        expected, _ = alone(llm, prompts, 12)
        together = Sequences(llm, prompts)
        for i in range(len(prompts)):
            together.prefill(i)
        for members in ((0, 1, 2, 3, 4), (4, 2), (0,), (7, 5, 6, 1, 3)):
            together.decode(members, 3)
        for output, whole in zip(together.outputs, expected, strict=True):
            assert output == whole[: len(output)]
            assert len(output) >= 4


def test_rows_that_pad_a_loop_harm_nobody() -> None:
    prompts = [p for p in prompts_of(8) for _ in range(2)][:9]
    assert bucket(len(prompts)) > len(prompts)
    with model() as llm:
        expected, contents = alone(llm, prompts, 4)
        together = Sequences(llm, prompts)
        for i in range(len(prompts)):
            together.prefill(i)
        together.decode(range(len(prompts)), 4)
        assert together.outputs == expected
        assert [together.contents(i) for i in range(len(prompts))] == contents


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_chunks_and_decodes_share_steps_without_a_trace(name: str, kind: str) -> None:
    """Steps padded in tokens, sequences and rows of logits; logits only where they are wanted."""
    prompts = prompts_of(5)
    with model(name, kind) as llm:
        expected, contents = alone(llm, prompts, 3)
        backend = llm._backend
        them = Sequences(llm, prompts)  # page 0 is one of theirs
        them.prefill(0)
        them.prefill(2)
        weights, kv = them.weights, them.kv
        for first, last in ((0, 11), (11, 23), (23, 33)):  # prompt 1 in three chunks, 0 and 2 go on beside it
            chunk = SequenceInput(prompts[1][first:last], first, them.pages[1], wants_logits=last == 33)
            decodes = [SequenceInput([row.token], row.position, row.pages) for row in (them.row(0), them.row(2))]
            batch = [decodes[0], chunk, decodes[1]]
            if last == 33:
                batch += [SequenceInput(prompts[i], 0, them.pages[i]) for i in (3, 4)]
            logits = backend.batch_forward_gpu_pure(weights, kv, BatchInput(batch))
            assert (logits[1] is None) == (last != 33)
            members = [0, 1, 2, 3, 4][: len(batch)]
            rows = []
            for i, each in zip(members, logits, strict=True):
                if each is not None:
                    position = len(prompts[i]) + len(them.outputs[i]) - 1
                    rows.append(SampleRow(each, them.configs[i], position, prompts[i], them.outputs[i]))
            wanting = [i for i, each in zip(members, logits, strict=True) if each is not None]
            for i, token in zip(wanting, backend.sample_rows(rows), strict=True):
                them.outputs[i].append(token)
        them.decode([1, 3, 4], 3)
        assert them.outputs == expected
        assert [them.contents(i) for i in range(len(prompts))] == contents


def test_rows_are_sampled_in_any_order_and_more_than_once() -> None:
    prompts = prompts_of(3)
    with model(deterministic=False) as llm:
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        batch = [SequenceInput(p, 0, [2 * i + 8 * i, 2 * i + 1, 40 + 8 * i]) for i, p in enumerate(prompts)]
        logits = backend.batch_forward_gpu_pure(weights, kv, BatchInput(batch))
        assert all(each is not None for each in logits)
        order = [2, 0, 2, 1, 2]
        rows = [SampleRow(logits[i], CONFIGS[n % 4], 40 + n, prompts[i], [n]) for n, i in enumerate(order)]
        one_by_one = [backend.sample_rows([row])[0] for row in rows]
        assert backend.sample_rows(rows) == one_by_one
        best = [int(backend.to_host(logits[i].row).argmax()) for i in range(3)]
        assert backend.sample_rows([SampleRow(each, CONFIGS[0], 0) for each in reversed(logits)]) == best[::-1]
        calls = session.stub().num_calls("cuStreamSynchronize") if not session.on_real_gpu() else 0
        backend.sample_rows([SampleRow(each, CONFIGS[0], 0) for each in logits])
        if not session.on_real_gpu():
            assert session.stub().num_calls("cuStreamSynchronize") == calls + 1
        backend.extend(weights, kv, batch[0])
        with pytest.raises(ValueError, match="overwritten"):
            backend.sample_rows(rows)


def test_steps_of_many_rows_move_their_tokens_alone_and_allocate_nothing() -> None:
    prompts = prompts_of(4)
    with model(deterministic=False) as llm:
        them = Sequences(llm, prompts)
        for i in range(4):
            them.prefill(i)
        backend = them.backend
        loop = backend.start_decode(them.weights, them.kv, [them.row(i) for i in range(4)])
        loop.step()
        before, allocations = backend.traffic(), backend.device.allocations()
        for _ in range(100):
            loop.step()
        after = backend.traffic()
        moved = after.h2d_bytes - before.h2d_bytes + after.d2h_bytes - before.d2h_bytes
        assert 0 < moved <= 8 * 4 * 100
        assert backend.device.allocations() == allocations


def test_a_loop_runs_ahead_once_the_host_has_cost_it_a_step(stub: session.Stub | None) -> None:
    stub = simulated(stub)
    prompts = prompts_of(3)
    with model() as llm:
        expected, contents = alone(llm, prompts, 20)
        them = Sequences(llm, prompts)
        for i in range(3):
            them.prefill(i)
        stub.set_faults("")  # counts from here
        begun: list[int] = []

        def between(step: int) -> None:
            begun.append(stub.num_calls("cuGraphLaunch") - step - 1)
            if step == 5:
                time.sleep(0.5)  # a step takes less

        them.decode(range(3), 20, between=between)
        assert begun[:6] == [0] * 6
        assert set(begun[7:]) == {0, 1}  # 0 where a row has no page yet for the next position
        assert begun[7:].count(1) > 6
        assert them.outputs == expected
        assert [them.contents(i) for i in range(3)] == contents


def test_a_position_without_a_page_is_refused() -> None:
    with model(deterministic=False) as llm:
        them = Sequences(llm, prompts_of(4))
        for i in (1, 3):
            them.prefill(i)
        loop = them.backend.start_decode(them.weights, them.kv, [them.row(1, 3), them.row(3, 1)])
        with pytest.raises(ValueError, match="row 1 of the decode loop has 1 pages, none for position 16"):
            loop.step()
        loop.set_pages(1, them.pages[3][:2])
        assert len(loop.step()) == 2
        loop.close()
        loop.close()
        with pytest.raises(ValueError, match="closed"):
            loop.step()


# ---- the engine


OPTIONS = ({"temperature": 0.0}, {"temperature": 0.9, "top_k": 40, "seed": 3, "repetition_penalty": 1.2})


@pytest.mark.parametrize("kv_tokens", [None, 192])
def test_requests_that_share_steps_say_what_they_say_alone(kv_tokens: int | None) -> None:
    """With room for all, and with so little that some must leave the device and come back."""
    prompts = [p * 2 for p in prompts_of(5)]
    with load_cuda(tiny("qwen2_bias"), context_length=160, deterministic=True) as llm:
        expected = [
            llm.generate(prompt, max_tokens=24, ignore_eos=True, **options).tokens
            for options in OPTIONS
            for prompt in prompts
        ]
    sharing = Sharing(max_batch=8, chunk_size=16, kv_tokens=kv_tokens)
    with load_cuda(tiny("qwen2_bias"), context_length=160, deterministic=True, sharing=sharing) as llm:
        streams = [
            llm.stream(prompt, max_tokens=24, ignore_eos=True, **options) for options in OPTIONS for prompt in prompts
        ]
        assert [stream.read_all().tokens for stream in streams] == expected
        if kv_tokens is not None:
            stats = llm._backend.swap_stats(llm._engine.kv)
            assert 0 < stats.pages_in <= stats.pages_out


# ---- swapping


def test_pages_are_swapped_while_others_decode_and_nobody_notices() -> None:
    """Out, their pages given to a row that is decoding, back to other pages, in the course of one loop."""
    prompts = prompts_of(5)
    with model() as llm:
        expected, contents = alone(llm, prompts, 12)
        backend = llm._backend
        them = Sequences(llm, prompts)
        kv = them.kv
        backend.alloc_swap_space(kv, 8)
        for i in range(5):
            them.prefill(i)
        out = them.pages[4][:3]
        free = [them.pages[i][-3 - n] for i in (0, 1) for n in range(2)]

        def between(step: int) -> None:
            if step == 2:
                backend.swap_out_pages(kv, out, [5, 6, 1])
                assert not session.on_real_gpu() or backend.swap_stats(kv).pages_out <= 3
                grown = them.needed(1)
                them.pages[1][grown : grown + 3] = out  # the row grows into pages whose copy may be under way
            if step == 8:
                backend.swap_in_pages(kv, [5, 6, 1], free[:3])
                them.pages[4][:3] = free[:3]

        them.decode([0, 1, 2, 3], 12, between=between)
        them.decode([4], 12)
        assert them.outputs == expected
        assert [them.contents(i) for i in range(5)] == contents
        stats = backend.swap_stats(kv)
        assert (stats.pages_out, stats.pages_in) == (3, 3)
        assert stats.nbytes_in == stats.nbytes_out == 3 * kv.config.page_nbytes


def test_swapping_changes_no_bit_and_slots_are_used_again_at_once() -> None:
    with model("llama3_gqa", "q8_0", deterministic=False) as llm:
        backend, kv = llm._backend, llm._engine.kv
        g = np.random.default_rng(0)
        data = g.integers(0, 256, (8, kv.config.page_nbytes), np.uint8)
        pages, slots = [9, 3, 4, 5, 20, 21, 1, 0], [0, 1, 2, 3, 7, 5, 6, 4]
        backend.alloc_swap_space(kv, 8)
        backend.copy_pages_from_host(kv, pages, data)
        backend.swap_out_pages(kv, pages, slots)
        backend.copy_pages_from_host(kv, pages, np.full(kv.config.page_nbytes, 255, np.uint8))
        backend.swap_in_pages(kv, slots[:4], [40, 41, 42, 43])
        backend.swap_out_pages(kv, pages[:4], slots[:4])  # 255 into the slots, after they were read
        backend.swap_in_pages(kv, slots, [30, 31, 32, 33, 34, 35, 36, 37])
        assert np.array_equal(backend.copy_pages_to_host(kv, [40, 41, 42, 43]), data[:4])
        assert (backend.copy_pages_to_host(kv, [30, 31, 32, 33]) == 255).all()
        assert np.array_equal(backend.copy_pages_to_host(kv, [34, 35, 36, 37]), data[4:])
        stats = backend.swap_stats(kv)
        assert (stats.pages_out, stats.pages_in) == (12, 12)
        assert stats.seconds_in >= 0


def test_a_copy_out_comes_after_the_steps_that_wrote_the_pages() -> None:
    with model() as llm:
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        prompt, pages = prompts_of(2)[1], [4, 2, 6]
        backend.alloc_swap_space(kv, 3)
        backend.extend(weights, kv, SequenceInput(prompt, 0, pages))
        backend.swap_out_pages(kv, pages, [2, 1, 0])
        kv.host_slots.wait()  # for the copies alone, whatever has become of the steps
        backend.swap_in_pages(kv, [2, 1, 0], [10, 11, 12])
        moved, stayed = backend.copy_pages_to_host(kv, [10, 11, 12]), backend.copy_pages_to_host(kv, pages)
        assert stayed[:2].any()
        assert np.array_equal(moved, stayed)


def test_a_loop_waits_for_pages_that_come_in_while_it_lives() -> None:
    prompts = prompts_of(2)
    with model() as llm:
        expected, _ = alone(llm, prompts, 6)
        backend, them = llm._backend, Sequences(llm, prompts)
        backend.alloc_swap_space(them.kv, 3)
        them.prefill(1)
        pages = them.pages[1][:3]
        backend.swap_out_pages(them.kv, pages, [0, 1, 2])
        backend.copy_pages_from_host(them.kv, pages, np.zeros(them.kv.config.page_nbytes, np.uint8))
        loop = backend.start_decode(them.weights, them.kv, [them.row(1)])
        backend.swap_in_pages(them.kv, [0, 1, 2], pages)
        assert [loop.step()[0] for _ in range(6)] == expected[1][1:]
        loop.close()


def test_neighbouring_pages_in_neighbouring_slots_are_one_copy() -> None:
    assert list(runs([5, 3, 4, 9], [2, 0, 1, 3])) == [(3, 0, 3), (9, 3, 1)]
    assert list(runs([5, 6, 7], [2, 1, 0])) == [(5, 2, 1), (6, 1, 1), (7, 0, 1)]
    assert list(runs([], [])) == []


@pytest.mark.parametrize(
    ("name", "call"), [("cuMemcpyDtoHAsync", "out"), ("cuMemcpyHtoDAsync", "in"), ("cuEventRecord", "out")]
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_copy_that_fails_leaves_what_it_was_to_copy(
    stub: session.Stub | None, name: str, call: str, number: int
) -> None:
    stub = simulated(stub)
    prompts = prompts_of(3)
    with model() as llm:
        expected, contents = alone(llm, prompts, 8)
        backend = llm._backend
        them = Sequences(llm, prompts)
        backend.alloc_swap_space(them.kv, 6)
        for i in range(3):
            them.prefill(i)
        pages, slots, others = them.pages[1][:3], [0, 2, 4], [60, 50, 40]
        if call == "in":
            backend.swap_out_pages(them.kv, pages, slots)
        stub.set_faults(f"{name}:{number}=999")
        move = backend.swap_out_pages if call == "out" else lambda kv, p, s: backend.swap_in_pages(kv, s, others)
        with pytest.raises(DriverError):
            move(them.kv, pages, slots)
        stub.set_faults("")
        them.decode([0, 2], 8)  # the others go on
        if call == "in":
            backend.swap_in_pages(them.kv, slots, others)
            them.pages[1][:3] = others
        them.decode([1], 8)
        assert them.outputs == expected
        assert [them.contents(i) for i in range(3)] == contents


def test_swap_space_that_cannot_be_had_or_does_not_fit_the_call(stub: session.Stub | None) -> None:
    with model(deterministic=False) as llm:
        backend, kv = llm._backend, llm._engine.kv
        with pytest.raises(UnsupportedError, match="no swap space"):
            backend.swap_out_pages(kv, [0], [0])
        if stub is not None:
            stub.set_faults("cuMemHostAlloc:1=2")
            with pytest.raises(CapacityError, match="no room on the host for 4 swapped KV pages"):
                backend.alloc_swap_space(kv, 4)
        backend.alloc_swap_space(kv, 4)
        for pages, slots, error in (
            ([64], [0], "page 64"),
            ([0], [4], "slot 4 of a KV cache of 4 slots"),
            ([0, 0], [0, 1], "a page comes twice"),
            ([0, 1], [2, 2], "a slot comes twice"),
            ([0, 1], [2], "2 pages and 1 slots"),
        ):
            with pytest.raises((IndexError, ValueError), match=error):
                backend.swap_out_pages(kv, pages, slots)
            with pytest.raises((IndexError, ValueError), match=error):
                backend.swap_in_pages(kv, slots, pages)
        assert {m.state for m in backend.get_page_states(kv).values()} == {PageState.STANDBY}
        backend.alloc_swap_space(kv, 2)  # another size: the old space is given back
        backend.swap_out_pages(kv, [5], [1])


def test_shapes_are_few_and_near() -> None:
    assert [bucket(n) for n in range(1, 18)] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20]
    for n in range(1, 5000):
        assert n <= bucket(n) <= max(n + 1, n * 1.25)
        assert bucket(bucket(n)) == bucket(n)
    assert len({bucket(n) for n in range(1, 4097)}) < 70
