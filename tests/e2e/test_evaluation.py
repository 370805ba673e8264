"""Perplexity and comparison of whole models, on both backends and from the command line."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_process import start, wait_for
from cuda_models import fresh, load_cuda, tiny
from hostsim import session
from oracle import numpy_model, tiny_models, to_gguf

import gllm_driver as gllm
from gllm_driver.cli import run
from gllm_driver.errors import CapacityError, RequestError
from gllm_driver.llm import demo_model_path
from gllm_driver.placement import Sharing

CONTEXT, NUM_TOKENS = 40, 130
TEXT = Path(numpy_model.__file__).read_text(encoding="utf-8")  # Python code, as the demonstration model knows it
DEMO = str(demo_model_path())

Load = Callable[..., gllm.LLM]


def load_cpu(path: Path, **options: object) -> gllm.LLM:
    return gllm.load(path, device="cpu", **options)  # type: ignore[arg-type]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.hostsim)])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """Loads a model on one of the backends, which is empty before and after."""
    if request.param == "cpu":
        yield load_cpu
        return
    if session.on_real_gpu():
        yield load_cuda
        return
    stub = fresh(THREADS="2")
    yield load_cuda
    assert stub.live() == {}


def text_of(row: tiny_models.Row, num_tokens: int = NUM_TOKENS) -> list[int]:
    return np.random.default_rng(row.seed).integers(0, row.sizes[0], num_tokens).tolist()


def exact(row: tiny_models.Row, weights: numpy_model.Weights, tokens: list[int], first: int) -> np.ndarray:
    """ln p of every token from `first` on, f64 [len(tokens) - first, vocab], of a window by the float64 model."""
    logits = numpy_model.logits(tiny_models.config(row), weights, tokens)[first:]
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def exact_nll(row: tiny_models.Row, weights: numpy_model.Weights, tokens: list[int]) -> np.ndarray:
    """−ln p of what llama-perplexity scores: of each window of CONTEXT tokens, the second half."""
    found = []
    for begin in range(0, len(tokens) - CONTEXT + 1, CONTEXT):
        window = tokens[begin : begin + CONTEXT]
        rows = exact(row, weights, window, CONTEXT // 2)
        found += [-rows[j, window[CONTEXT // 2 + 1 + j]] for j in range(CONTEXT - CONTEXT // 2 - 1)]
    return np.array(found)


@pytest.mark.parametrize("name", ["qwen2_bias", "llama3_gqa", "mpt"])
def test_perplexity_is_that_of_the_float64_model(name: str, load: Load) -> None:
    row = tiny_models.BY_NAME[name]
    tokens = text_of(row)
    nll = exact_nll(row, tiny_models.weights(row), tokens)
    heard: list[tuple[int, int]] = []
    with load(tiny(name), dtype="f32", context_length=CONTEXT) as llm:
        found = gllm.perplexity(
            llm, tokens, context=CONTEXT, progress=lambda done, total, _: heard.append((done, total))
        )
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    error = math.sqrt(((nll**2).mean() - nll.mean() ** 2) / (len(nll) - 1))
    assert found.nll.error == pytest.approx(error, rel=1e-3)
    assert found.perplexity.error == pytest.approx(error * math.exp(nll.mean()), rel=1e-3)
    assert (found.reading.windows, found.reading.tokens, found.reading.text_tokens) == (3, 57, NUM_TOKENS)
    assert heard[-1] == (3, 3)


def test_windows_that_are_read_together_change_nothing(load: Load) -> None:
    row = tiny_models.BY_NAME["llama3_gqa"]
    tokens = text_of(row)
    results = []
    for at_once in (1, 2, 3):
        sharing = Sharing(kv_tokens=at_once * 48, prefix_reuse=False)
        options = {"sharing": sharing, "deterministic": True} if load is load_cuda else {"kv_tokens": at_once * 48}
        with load(tiny("llama3_gqa"), context_length=CONTEXT, **options) as llm:
            assert llm.sequences_at_once(CONTEXT, CONTEXT // 2) == at_once
            results.append(gllm.perplexity(llm, tokens, context=CONTEXT).perplexity)
            llm._engine.audit()
            assert llm._engine.pool.num_used == 0
    assert results[0] == results[1] == results[2]


def test_a_stride_scores_the_last_tokens_of_longer_windows(load: Load) -> None:
    row, stride = tiny_models.BY_NAME["llama3_gqa"], 10
    tokens, length = text_of(row, 100), CONTEXT + 5
    nll = []
    for begin in range(0, 100 - length, stride):
        window = tokens[begin : begin + length]
        rows = exact(row, tiny_models.weights(row), window, length - stride - 1)
        nll += [-rows[j, window[length - stride + j]] for j in range(stride)]
    with load(tiny("llama3_gqa"), dtype="f32", context_length=length) as llm:
        found = gllm.perplexity(llm, tokens, context=CONTEXT, stride=stride)
        with pytest.raises(CapacityError, match="a window of 55 tokens does not fit in the context of 45"):
            gllm.perplexity(llm, tokens, context=CONTEXT, stride=30)
    assert found.reading.windows == 6
    assert found.perplexity.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_a_quantized_model_beside_its_original(load: Load) -> None:
    row = tiny_models.BY_NAME["llama3_gqa"]
    tokens, weights = text_of(row), tiny_models.weights(row)
    rough = to_gguf.dequantized(row, tiny("llama3_gqa", "q4_0"))
    kl, same = [], []
    for begin in range(0, NUM_TOKENS - CONTEXT + 1, CONTEXT):
        window = tokens[begin : begin + CONTEXT]
        a, b = (exact(row, w, window, CONTEXT // 2)[:-1] for w in (weights, rough))
        kl += (np.exp(a) * (a - b)).sum(1).tolist()
        same += (a.argmax(1) == b.argmax(1)).tolist()
    nll_a, nll_b = exact_nll(row, weights, tokens), exact_nll(row, rough, tokens)
    # f32 on both sides: what differs from the float64 models then is rounding, not the types' own arithmetic.
    with (
        load(tiny("llama3_gqa"), dtype="f32", context_length=CONTEXT) as a,
        load(_as_f32(row, rough), dtype="f32", context_length=CONTEXT) as b,
    ):
        found = gllm.compare(a, b, tokens, context=CONTEXT)
    assert found.perplexity_a.value == pytest.approx(math.exp(nll_a.mean()), rel=1e-4)
    assert found.perplexity_b.value == pytest.approx(math.exp(nll_b.mean()), rel=1e-4)
    assert found.ratio.value == pytest.approx(math.exp((nll_b - nll_a).mean()), rel=1e-4)
    assert found.ratio.error == pytest.approx(found.ratio.value * (nll_b - nll_a).std() / math.sqrt(56), rel=1e-3)
    assert found.kl.value == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.kl.error == pytest.approx(np.std(kl) / math.sqrt(56), rel=1e-3)
    assert found.kl_percentiles["50"] == pytest.approx(np.median(kl), rel=1e-3)
    assert found.kl_percentiles["max"] == pytest.approx(np.max(kl), rel=1e-3)
    assert found.same_top.value == pytest.approx(np.mean(same))
    assert found.same_top.error == pytest.approx(math.sqrt(np.mean(same) * (1 - np.mean(same)) / 56))


def _as_f32(row: tiny_models.Row, weights: tiny_models.Weights) -> Path:
    """The row's directory with these weights."""
    directory = tiny(row.name).with_name(f"{row.name}-rough")
    if not directory.exists():
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(tiny_models.config(row)))
        tiny_models.write_safetensors(directory / "model.safetensors", weights, "f32")
    return directory


def test_a_model_is_like_itself(load: Load) -> None:
    tokens = text_of(tiny_models.BY_NAME["qwen2_bias"])
    path = tiny("qwen2_bias")
    with load(path, context_length=CONTEXT) as a, load(path, context_length=CONTEXT) as b:
        found = gllm.compare(a, b, tokens, context=CONTEXT)
    assert (found.kl.value, found.kl.error, found.kl_percentiles["max"]) == (0, 0, 0)
    assert (found.same_top.value, found.same_top.error) == (1, 0)
    assert (found.ratio.value, found.ratio.error) == (1, 0)
    assert found.perplexity_a == found.perplexity_b


def test_models_of_other_vocabularies_are_refused() -> None:
    def other(token: int) -> bytes:
        return b"???" if token == 300 else own(token)

    with (
        gllm.load(device="cpu", context_length=64) as a,
        gllm.load(tiny("qwen2_bias"), device="cpu", context_length=64) as b,
        gllm.load(device="cpu", context_length=64) as c,
    ):
        with pytest.raises(RequestError, match=f"different vocabularies, of 4096 and {b.arch.vocab_size} tokens"):
            gllm.compare(a, b, TEXT, context=64)
        own, c.tokenizer.token_bytes = c.tokenizer.token_bytes, other  # type: ignore[method-assign]
        with pytest.raises(RequestError, match="different vocabularies: token 300 is "):
            gllm.compare(a, c, TEXT, context=64)


def test_a_window_begins_with_bos_where_the_model_adds_it(load: Load) -> None:
    with load(demo_model_path(), context_length=64) as llm:
        tokens = llm.tokenizer.encode(TEXT)[:127]
        llm.tokenizer._specials = replace(llm.tokenizer._specials, prefix_ids=(3,))
        nll = []
        for window in ([3, *tokens[:63]], tokens[63:127]):  # the text itself begins with BOS, as it is tokenized once
            logits = llm.logits([3, *window[1:]])[32:-1].astype(np.float64)
            lse = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
            nll.append(lse - logits[np.arange(31), window[33:]])
        found = gllm.perplexity(llm, TEXT, context=64, max_windows=2)
    assert found.nll.value == pytest.approx(np.mean(nll), rel=1e-3)


def test_logits_that_are_no_numbers_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = text_of(tiny_models.BY_NAME["qwen2_bias"])
    with load_cpu(tiny("qwen2_bias"), context_length=CONTEXT) as llm:
        forward, calls = llm._backend.logits_forward, []

        def damaged(*args: object) -> np.ndarray:
            calls.append(1)
            logits = forward(*args)  # type: ignore[arg-type]
            if len(calls) == 2:
                logits[3, 5] = np.nan
            return logits

        monkeypatch.setattr(llm._backend, "logits_forward", damaged)
        with pytest.raises(RequestError, match="in window 2, after token 24:"):
            gllm.perplexity(llm, tokens, context=CONTEXT)
        llm._engine.audit()
        assert llm._engine.pool.num_used == 0
        assert gllm.perplexity(llm, tokens, context=CONTEXT).perplexity.value > 1


# ---- the command line


def test_perplexity_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    line = ["--context", "128", "--device", "cpu", "--threads", "1"]
    assert run(["perplexity", str(text), *line]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert run(["perplexity", f"@{text}", *line, "--json", "--model", DEMO]) == 0
    found = json.loads(capfd.readouterr().out)
    assert out.startswith(f"perplexity {found['perplexity']['value']:.4f} ± {found['perplexity']['error']:.4f}\n")
    assert set(found) == {
        *("model", "perplexity", "nll", "text_tokens", "windows", "length", "tokens", "context", "stride", "seconds"),
    }
    assert set(found["model"]) == {"path", "family", "device", "types", "load_s"}
    assert set(found["model"]["types"]["weights"]) == {"q8_0", "f32"}
    assert found["model"]["types"]["kv"] == "f16"
    assert found["windows"] == found["text_tokens"] // 128
    assert found["tokens"] == found["windows"] * 63
    assert 1 < found["perplexity"]["value"] < 50  # it has learnt Python
    with gllm.load(device="cpu", context_length=128) as llm:
        assert gllm.perplexity(llm, TEXT.removesuffix("\n"), context=128).perplexity.value == pytest.approx(
            found["perplexity"]["value"]
        )


def test_comparison_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    line = ["compare", DEMO, DEMO, str(text), "--context", "64", "--windows", "3", "--device", "cpu"]
    assert run(line) == 0
    out = capfd.readouterr().out
    assert "KL divergence      0.000000 ± 0.000000 nats\n" in out
    assert "same top token     100.000 ± 0.000 %\n" in out
    assert run([*line, "--json", "--stride", "32"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["perplexity_a"] == found["perplexity_b"]
    assert found["kl"] == {
        "value": 0,
        "error": 0,
        "percentiles": dict.fromkeys(("50", "90", "95", "99", "99.9", "max"), 0),
    }
    assert (found["windows"], found["length"], found["tokens"]) == (3, 80, 96)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["no-such-file"], "cannot read the file 'no-such-file'"),
        (["latin1"], "the text in latin1 is not valid UTF-8 (at byte 2)"),
        (["empty"], "the text is too short: it has 0 tokens"),
        (["short"], "a window needs 512; give a longer text or a smaller context"),
        (["short", "--context", "99999"], "context_length 99999 is more than the 1024 tokens"),
        (["short", "--context", "2"], "a context of 2 has no tokens to score"),
        (["short", "--context", "8", "--stride", "9"], "the stride must be from 1 to the context of 8, got 9"),
        (["short", "--stride", "0"], "Invalid value for '--stride'"),
        (["short", "--modle", "x"], "No such option '--modle'"),
        ([], "Missing argument 'FILE'"),
        (["short", "--model", "no-such.gguf"], "no-such.gguf"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1").write_bytes(b"ca\xe9")
    Path("empty").write_bytes(b"\n")
    Path("short").write_text("def f(x):\n    return x\n")
    assert run(["perplexity", "--device", "cpu", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert problem in err


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(TEXT * 400)
    process = start("perplexity", text, "--device", "cpu", "--threads", "1", "--debug")
    wait_for(process, "reading the text")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"interrupted" in err
