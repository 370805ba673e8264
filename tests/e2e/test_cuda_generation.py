"""Whole models by the CUDA backend against the CPU backend, on the simulated device or (GLLM_TEST_GPU=1) a real GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import fresh, kernels, load_cuda, tiny
from hostsim import session
from oracle import numpy_model, tiny_models, to_gguf

import gllm_driver as gllm
from gllm_driver.backends.base import DecodeRow
from gllm_driver.config import SamplingConfig
from gllm_driver.types import BatchInput, SequenceInput

pytestmark = pytest.mark.hostsim

CONTEXT = 96
# Rounding of the stored type, relative to the largest logit. Block types are computed, and their KV cache kept, in f16.
BOUNDS = {"f32": 2e-5, "f16": 4e-3, "bf16": 3e-2, "q8_0": 4e-3, "q4_0": 4e-3}
CPU_BLOCKS_BOUND = 0.1  # the CPU rounds the activations that meet block types to 8 bits
MODELS = [
    *(row.name for row in tiny_models.ROWS if row.name != "llama31_nested"),
    *(f"{name}.{kind}" for name in ("llama3_gqa", "qwen3_tied") for kind in ("q8_0", "q4_0", "f16")),
    "odd_llama.f16",
]
DRAWS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test starts on a fresh device and leaves nothing on it."""
    if session.on_real_gpu():
        yield
        return
    stub = fresh(THREADS="2")
    yield
    assert stub.live() == {}


def open_tiny(name: str) -> tuple[Path, tiny_models.Row, str]:
    """Path, row and stored type of a MODELS entry."""
    row_name, _, file_type = name.partition(".")
    row = tiny_models.BY_NAME[row_name]
    return tiny(row_name, file_type), row, file_type or row.dtype


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_it_says_on_the_cpu(name: str) -> None:
    compare_with_the_cpu(name)


@pytest.mark.parametrize("cc", ["6.1", "7.5"])
@pytest.mark.parametrize("name", ["llama3_gqa.q4_0", "qwen3_tied.f16", "qwen2_bias"])
def test_devices_for_which_there_are_no_tensor_core_kernels(cc: str, name: str) -> None:
    if session.on_real_gpu():
        pytest.skip("needs a device of that compute capability")
    fresh(THREADS="2", CC=cc)
    compare_with_the_cpu(name, kernels=kernels(cc.replace(".", "")))


def compare_with_the_cpu(name: str, **options: Any) -> None:
    """Logits within the type's rounding; greedy and drawn tokens equal. Of other types than f32, greedy ones may be
    chosen on a near tie, and drawn ones are equal at first, but for blocks: there the CPU rounds activations."""
    path, row, kind = open_tiny(name)
    prompt = tiny_models.prompt(row)
    with load_cuda(path, context_length=CONTEXT, **options) as llm:
        greedy = llm.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).tokens
        drawn = llm.generate(prompt, max_tokens=12, ignore_eos=True, **DRAWS).tokens
        logits = llm.logits([*prompt, *greedy])
    with gllm.load(path, device="cpu", context_length=CONTEXT) as cpu:
        expected = cpu.logits([*prompt, *greedy])
        expected_greedy = cpu.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).tokens
        expected_drawn = cpu.generate(prompt, max_tokens=12, ignore_eos=True, **DRAWS).tokens
    bound = cpu_bound = BOUNDS[kind] * np.abs(expected).max()
    if kind.startswith("q"):
        exact = numpy_model.logits(tiny_models.config(row), to_gguf.dequantized(row, path), [*prompt, *greedy])
        cpu_bound = CPU_BLOCKS_BOUND * np.abs(exact).max()
        assert np.abs(expected - exact).max() <= cpu_bound
        expected = exact
    error = np.abs(logits - expected).max()
    assert error <= bound, f"logits differ by {error:.2e}, allowed {bound:.2e}"
    if kind == "f32":
        assert (greedy, drawn) == (expected_greedy, expected_drawn)
        return
    own = expected[len(prompt) - 1 : -1]
    margin = own.max(-1) - own[np.arange(len(greedy)), greedy]
    assert (margin <= 2 * bound).all(), f"chosen {margin.max():.2e} below the best, allowed {2 * bound:.2e}"
    ranks = np.sort(own, -1)
    if (ranks[:, -1] - ranks[:, -2]).min() > 2 * cpu_bound:  # no near tie on the way
        assert greedy == expected_greedy
    if kind in ("f16", "bf16"):  # a draw may tip over where probabilities differ; what was drawn before is the same
        same = next((i for i in range(len(drawn)) if drawn[i] != expected_drawn[i]), len(drawn))
        assert same >= 3, f"drawn {drawn}, on the CPU {expected_drawn}"


def test_the_demonstration_model_says_what_it_says_on_the_cpu() -> None:
    with load_cuda(context_length=64) as llm:
        result = llm.generate("import os\n\ndef ", max_tokens=8, temperature=0, ignore_eos=True)
    with gllm.load(device="cpu", context_length=64) as cpu:
        expected = cpu.generate("import os\n\ndef ", max_tokens=8, temperature=0, ignore_eos=True)
    assert result.tokens == expected.tokens
    assert result.text == expected.text
    assert result.device == "cuda:0"


@pytest.mark.parametrize("name", ["qwen2_bias", "llama3_gqa.q8_0"])
def test_graphs_change_nothing(name: str) -> None:
    path, row, _ = open_tiny(name)
    prompt, found = tiny_models.prompt(row), []
    for use_graphs in (True, False):
        with load_cuda(path, context_length=CONTEXT, use_graphs=use_graphs) as llm:
            tokens = llm.generate(prompt, max_tokens=10, temperature=0, ignore_eos=True).tokens
            drawn = llm.generate(prompt, max_tokens=10, ignore_eos=True, **DRAWS).tokens
            backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
            rows = []
            for position, token in enumerate(prompt[:4]):  # the same shape again and again: captured the second time
                logits = backend.generator_forward_gpu_pure(weights, kv, SequenceInput([token], position, [2, 1]))
                rows.append(backend.to_host(logits.row))
            found.append((tokens, drawn, np.array(rows).tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "name", ["qwen2_bias", "llama3_gqa", "mistral_wide_heads", "llama3_gqa.q8_0", "qwen3_tied.q4_0"]
)
def test_company_and_chunks_change_no_bit_in_deterministic_mode(name: str) -> None:
    """Alone or in a batch, whole or in pieces: the same bits."""
    path, row, _ = open_tiny(name)
    g = np.random.default_rng(1)
    prompts = [g.integers(0, row.sizes[0], n).tolist() for n in (1, 33, 5, 18)]
    pages = [[0, 9], [4, 1, 7], [2], [5, 3]]
    with load_cuda(path, context_length=160, deterministic=True) as llm:
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        alone = [
            backend.to_host(backend.generator_forward_gpu_pure(weights, kv, SequenceInput(p, 0, own)).row)
            for p, own in zip(prompts, pages, strict=True)
        ]
        batch = BatchInput([SequenceInput(p, 0, own) for p, own in zip(prompts, pages, strict=True)])
        together = [backend.to_host(x.row) for x in backend.batch_forward_gpu_pure(weights, kv, batch)]
        for one, many, prompt in zip(alone, together, prompts, strict=True):
            assert one.tobytes() == many.tobytes(), f"{len(prompt)} tokens in company"
        next_tokens = [int(row.argmax()) for row in alone]
        steps = [
            SequenceInput([t], len(p), own) for t, p, own in zip(next_tokens, prompts, pages, strict=True) if len(p) > 1
        ]
        decoded = [backend.to_host(x.row) for x in backend.batch_forward_gpu_pure(weights, kv, BatchInput(steps))]
        for step, many in zip(steps, decoded, strict=True):
            one = backend.to_host(backend.generator_forward_gpu_pure(weights, kv, step).row)
            assert one.tobytes() == many.tobytes(), f"decoding at {step.position} in company"
        tokens = prompts[1]
        whole = backend.logits_forward(weights, kv, SequenceInput(tokens, 0, pages[1]))
        for chunk in (3, 7, 20):  # a piece of one token is decoded, by other kernels
            parts = [
                backend.logits_forward(weights, kv, SequenceInput(tokens[i : i + chunk], i, pages[1]))
                for i in range(0, len(tokens), chunk)
            ]
            assert np.concatenate(parts).tobytes() == whole.tobytes(), f"chunks of {chunk}"


@pytest.mark.parametrize("name", ["llama3_gqa", "llama3_gqa.q4_0"])
def test_a_hundred_steps_move_eight_bytes_each_at_most_and_allocate_nothing(name: str) -> None:
    path, row, _ = open_tiny(name)
    with load_cuda(path, context_length=192) as llm:
        backend, engine = llm._backend, llm._engine
        prompt = tiny_models.prompt(row)
        pages = list(range(12))
        backend.generator_forward_gpu_pure(engine.weights, engine.kv, SequenceInput(prompt, 0, pages))
        config = SamplingConfig(temperature=0.8, top_k=20, seed=3)
        loop = backend.start_decode(engine.weights, engine.kv, [DecodeRow(5, len(prompt), pages, config)])
        loop.step()
        traffic, before = backend.traffic(), backend.device.allocations()
        tokens = [loop.step()[0] for _ in range(100)]
        moved = backend.traffic()
        assert moved.h2d_bytes - traffic.h2d_bytes == 0
        assert 0 < moved.d2h_bytes - traffic.d2h_bytes <= 800
        assert backend.device.allocations() == before
        assert len(set(tokens)) > 10
        again = backend.start_decode(engine.weights, engine.kv, [DecodeRow(5, len(prompt), pages, config)])
        assert backend.device.allocations().num_driver_allocs > before.num_driver_allocs  # two at a time
        del again, loop
        settled = backend.device.allocations()
        third = backend.start_decode(engine.weights, engine.kv, [DecodeRow(5, len(prompt), pages, config)])
        assert backend.device.allocations() == settled, "a decoder that is free was not taken"
        assert [third.step()[0] for _ in range(5)][1:] == tokens[:4]


@pytest.mark.parametrize("dtype", ["auto", "f32", "f16", "bf16"])
@pytest.mark.parametrize("model", [None, "qwen3_tied", "qwen2_bias", "llama3_gqa"])
def test_a_decode_step_has_at_most_six_kernels_a_layer(model: str | None, dtype: str) -> None:
    """With a context long enough to be cut into spans that must be merged; and the whole step is one graph."""
    path = open_tiny(model)[0] if model else None
    with load_cuda(path, dtype=dtype, context_length=CONTEXT if model else 1024) as llm:
        backend, engine = llm._backend, llm._engine
        decoder = backend._decoders.take(engine.weights, engine.kv, 1, engine.kv.config.num_pages, False)
        around = [s for s in decoder.program.symbols if s.partition("__")[0] in ("embedding", "rope_table", "sample")]
        assert (
            len(decoder.program.symbols) <= 6 * llm.arch.num_layers + len(around) + 2
        )  # and the last norm and product
        attention = [s for s in decoder.program.symbols if s.partition("__")[0] == "paged_attention"]
        assert len(attention) == llm.arch.num_layers
        graph = decoder.program._graph
        assert graph.num_kernels == len(decoder.program.symbols)
        assert graph.num_nodes == graph.num_kernels


def test_steps_of_one_shape_may_follow_each_other_without_waiting() -> None:
    """The second one's inputs must not overtake the first one's on their way to the device."""
    path, row, _ = open_tiny("llama3_gqa")
    tokens, pages = tiny_models.prompt(row), [2, 0, 1]
    with load_cuda(path, context_length=CONTEXT, deterministic=True) as llm:
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        whole = backend.logits_forward(weights, kv, SequenceInput(tokens, 0, pages))
        backend.copy_pages_from_host(kv, pages, np.zeros(kv.config.page_nbytes, np.uint8))
        backend.extend(weights, kv, SequenceInput(tokens[:16], 0, pages))
        backend.extend(weights, kv, SequenceInput(tokens[16:32], 16, pages))
        rest = backend.logits_forward(weights, kv, SequenceInput(tokens[32:], 32, pages))
    assert rest.tobytes() == whole[32:].tobytes()


def test_a_sequence_goes_on_after_the_workspace_has_moved() -> None:
    path, row, _ = open_tiny("llama3_gqa")
    prompt = tiny_models.prompt(row)
    with load_cuda(path, context_length=CONTEXT) as llm:
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        found = []
        for disturb in (False, True):
            backend.generator_forward_gpu_pure(weights, kv, SequenceInput(prompt[:4], 0, [0, 1]))
            loop = backend.start_decode(weights, kv, [DecodeRow(5, 4, [0, 1], SamplingConfig())])
            tokens = [loop.step(), loop.step()]
            if disturb:
                generation = backend.runtime.workspace.generation
                backend.logits_forward(weights, kv, SequenceInput(prompt, 0, [3, 4, 5]))
                assert backend.runtime.workspace.generation > generation
                backend.device.trim()
            found.append(tokens + [loop.step() for _ in range(6)])
        assert found[0] == found[1]
        del loop
        again = backend.start_decode(weights, kv, [DecodeRow(5, 4, [0, 1], SamplingConfig())])
        assert again.decoder.generation == backend.runtime.workspace.generation  # the old one's memory is let go


def test_prompts_of_growing_length_leave_no_old_workspace_behind() -> None:
    path, row, _ = open_tiny("llama3_gqa")
    tokens = (tiny_models.prompt(row) * 40)[:400]
    taken = []
    for lengths in ((8, 24, 60, 130, 390), (390,)):
        with load_cuda(path, context_length=512) as llm:
            for length in lengths:
                llm.generate(tokens[:length], max_tokens=3, temperature=0, ignore_eos=True)
            llm.generate(tokens[:390], max_tokens=3, temperature=0.5, top_k=5, seed=1, ignore_eos=True)
            taken.append(llm._backend.device.allocations().live_nbytes)
    assert taken[0] <= 1.02 * taken[1], taken


def test_pages_go_to_the_host_and_back() -> None:
    path, row, _ = open_tiny("llama3_gqa")
    tokens = tiny_models.prompt(row)
    with load_cuda(path, context_length=CONTEXT) as llm:
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        backend.extend(weights, kv, SequenceInput(tokens[:32], 0, [0, 1, 2]))
        saved = backend.copy_pages_to_host(kv, [0, 1])
        rest = SequenceInput(tokens[32:], 32, [0, 1, 2])
        expected = backend.logits_forward(weights, kv, rest)
        backend.copy_pages_from_host(kv, [4, 3], saved)
        moved = backend.logits_forward(weights, kv, SequenceInput(tokens[32:], 32, [4, 3, 5]))
        assert moved.tobytes() == expected.tobytes()
        with pytest.raises(IndexError, match="page 6 of a KV cache of 6"):
            backend.copy_pages_to_host(kv, [6])


def test_weights_are_converted_where_dtype_asks() -> None:
    path, row, _ = open_tiny("qwen2_bias")  # f32 as stored
    prompt = tiny_models.prompt(row)
    for dtype in ("f16", "bf16"):
        with load_cuda(path, context_length=CONTEXT, dtype=dtype) as llm:
            assert llm._engine.weights.tensors["layers.0.q"].dtype.name == dtype
            assert llm._engine.weights.tensors["layers.0.attn_norm"].dtype.name == "f32"
            logits = llm.logits(prompt)
        with gllm.load(path, device="cpu", context_length=CONTEXT, dtype=dtype) as cpu:
            expected = cpu.logits(prompt)
        assert np.abs(logits - expected).max() <= BOUNDS[dtype] * np.abs(expected).max()


def test_no_runtime_library_enters_the_process() -> None:
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/e2e']\n"
        "from hostsim import session\n"
        "session.on_real_gpu() or session.stub()\n"
        "from cuda_models import load_cuda, tiny\n"
        "with load_cuda(tiny('qwen2_bias'), context_length=64) as llm:\n"
        "    llm.generate([1, 2, 3], max_tokens=3, ignore_eos=True)\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda.so' in maps\n"
        "assert 'libcudart' not in maps and 'libcublas' not in maps\n"
        "assert 'cuda.bindings.runtime' not in sys.modules and 'torch' not in sys.modules\n"
        "print('clean')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout == "clean\n", done.stderr
