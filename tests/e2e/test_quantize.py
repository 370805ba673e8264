"""`gllm quantize`: what it writes loads, means what it should, and is whole or not there."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gllm_driver as gllm
from gllm_driver.cli.app import run
from gllm_driver.llm import demo_model_path

TEXT = Path(json.__file__).read_text()
PROMPT = "def fibonacci(n):"


def quantize(out: Path, *options: str, model: Path | None = None) -> int:
    return run(["quantize", str(model or demo_model_path()), str(out), *options, "--quiet"])


def logits(path: Path | None) -> np.ndarray:
    with gllm.load(path, device="cpu", threads=1) as llm:
        return llm.logits(llm.tokenizer.encode(TEXT[:1500])).astype(np.float64)


def divergence(path: Path, exact: np.ndarray) -> float:
    """Mean KL divergence of a file's predictions from the exact ones, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (exact, logits(path)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return logits(None)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(Path(subprocess.__file__).read_text()[:20_000])
    return path


@pytest.mark.parametrize(
    ("type_name", "most"), [("q8_0", 1e-4), ("q6_k", 0.01), ("q5_k", 0.03), ("q4_k", 0.1), ("q4_0", 0.15)]
)
def test_gguf_types(tmp_path: Path, exact: np.ndarray, type_name: str, most: float) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(out, "--type", type_name) == 0
    assert divergence(out, exact) < most
    fields = gguf.GGUFReader(out).fields
    before = gguf.GGUFReader(demo_model_path()).fields
    assert set(before) - set(fields) == set()  # the vocabulary and all else is carried over
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize(("type_name", "most"), [("int8", 1e-3), ("int4", 0.15), ("int4_32m", 0.15)])
def test_native_types(tmp_path: Path, exact: np.ndarray, type_name: str, most: float) -> None:
    assert quantize(tmp_path / "out", "--type", type_name) == 0
    assert divergence(tmp_path / "out", exact) < most


def test_the_methods_are_better_than_rounding(tmp_path: Path, exact: np.ndarray, calibration: Path) -> None:
    found = {}
    for method in ("rtn", "hqq", "gptq"):
        options = ["--calib", str(calibration), "--calib-tokens", "4096"] if method == "gptq" else []
        out = tmp_path / method
        assert quantize(out, "--type", "int4_64z", "--method", method, *options) == 0
        found[method] = divergence(out, exact)
    assert found["hqq"] < found["rtn"]
    assert found["gptq"] < 0.9 * found["rtn"]


def test_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "out.gguf", "--type", "q4_0", "--keep", "*ffn_down*=q8_0", "--json") == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert 4.5 < report["bits_per_weight"] < 6
    names = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert names["blk.0.ffn_down.weight"] == "Q8_0"
    assert names["blk.0.ffn_up.weight"] == "Q4_0"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--type q9_0", "q9_0"),
        ("--type q4_0 --keep nothing*=q8_0", "matches no matrix"),
        ("--type q4_0 --keep ffn", "PATTERN=TYPE"),
        ("--type int4 --method gptq", "--calib"),
        ("--type int4 --block 48", "48"),
        ("--type q4_0 --calib no-such-file", "no-such-file"),
    ],
)
def test_mistakes(tmp_path: Path, capfd: pytest.CaptureFixture[str], options: str, problem: str) -> None:
    out = tmp_path / ("out.gguf" if "q" in options.split()[1] else "out")
    assert quantize(out, *options.split()) == 2
    error = capfd.readouterr().err
    assert problem in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    assert quantize(out, "--type", "q4_0") == 2
    assert "--force" in capfd.readouterr().err
    assert out.read_text() == "mine"
    assert quantize(out, "--type", "q4_0", "--force") == 0
    assert quantize(out, "--type", "q8_0", "--force", model=out) == 2
    assert "IN" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "type_name"), [("out.gguf", "q4_0"), ("out", "int4")])
def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, name: str, type_name: str) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-m", "gllm_driver", "quantize", str(demo_model_path()), str(tmp_path / name)]
    root = Path(gllm.__file__).parents[1]
    done = subprocess.run(
        [*command, "--type", type_name, "--quiet"], cwd=root, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.oracle
@pytest.mark.parametrize("type_name", ["q8_0", "q6_k", "q4_k", "q4_0"])
def test_llama_cpp_reads_it_and_says_the_same(tmp_path: Path, type_name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out = tmp_path / "out.gguf"
    assert quantize(out, "--type", type_name) == 0
    with gllm.load(out, device="cpu", threads=1, dtype="auto") as llm:
        prompt = llm.tokenizer.encode(PROMPT)
        ours = llm.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True).tokens
    llama = llama_cpp.Llama(str(out), n_ctx=128, n_threads=1, verbose=False)
    theirs: list[int] = []
    tokens = list(prompt)
    for _ in range(16):
        llama.eval(tokens)
        tokens = [int(np.argmax(np.array(llama._ctx.get_logits()[: llama.n_vocab()])))]
        theirs += tokens
    assert ours == theirs
