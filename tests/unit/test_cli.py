"""The command line's own part: parsing, checks before a model is opened, where output goes, exit codes.

The model is a fake here, so that errors and interrupts come at will; tests/e2e/test_cli_process.py runs the real thing.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import gllm_driver
from gllm_driver.cli import run
from gllm_driver.cli.console import Console, one_line
from gllm_driver.cli.outcome import Interrupted
from gllm_driver.errors import ModelFormatError
from gllm_driver.generation import GenerationResult, Timings
from gllm_driver.types import Traffic


class FakeStream:
    """Yields `pieces`; an exception among them is raised in its place."""

    def __init__(self, pieces: Sequence[str | BaseException]) -> None:
        self._pieces = iter(pieces)
        self._seen: list[str] = []
        self._reason = "interrupted"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces, None)
        if piece is None:
            self._reason = "length"
            raise StopIteration
        if isinstance(piece, BaseException):
            raise piece
        self._seen.append(piece)
        return piece

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @property
    def result(self) -> GenerationResult:
        timings = Timings(0.5, 0.25, 0.125, 12.0, 16.0)
        return GenerationResult(
            "".join(self._seen), list(range(len(self._seen))), 3, self._reason, timings, Traffic(8, 4), "cpu"
        )


class FakeModel:
    """Records how it was loaded and asked."""

    def __init__(self) -> None:
        self.pieces: list[str | BaseException] = ["Hello", ", ", "world"]
        self.load_error: BaseException | None = None
        self.loaded: dict[str, Any] | None = None
        self.prompt: Any = None
        self.options: dict[str, Any] = {}
        self.messages: list[dict[str, str]] = []
        self.closed = False

    def load(self, path: str | None = None, **options: Any) -> FakeModel:
        self.loaded = {"path": path, **options}
        if self.load_error:
            raise self.load_error
        return self

    def stream(self, prompt: Any, **options: Any) -> FakeStream:
        self.prompt, self.options = prompt, options
        return FakeStream(self.pieces)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        self.messages = messages
        return [7, 8, 9]

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(gllm_driver, "load", fake.load)
    return fake


@pytest.fixture(autouse=True)
def terminal_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    log = logging.getLogger("gllm_driver")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_text_goes_to_stdout_without_the_prompt(model: FakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "Say it:"]) == 0
    assert capfd.readouterr() == ("Hello, world\n", "")
    assert model.prompt == "Say it:"
    assert model.closed


def test_a_line_end_is_added_only_where_there_is_none(model: FakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    model.pieces = ["one\n"]
    run(["generate", "x"])
    assert capfd.readouterr().out == "one\n"
    model.pieces = []
    run(["generate", "x"])
    assert capfd.readouterr().out == ""


def test_options_reach_the_model(model: FakeModel) -> None:
    line = (
        "generate x --model m --device cuda:1 --dtype bf16 --threads 3 --context 99 --max-tokens 5 --temperature 0.5 "
        "--top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 "
        "--seed 18446744073709551615 --stop a --stop b --ignore-eos --deterministic"
    )
    assert run(line.split()) == 0
    assert model.loaded is not None
    del model.loaded["progress"]
    assert model.loaded == {
        "path": "m",
        "device": "cuda:1",
        "dtype": "bf16",
        "threads": 3,
        "kv_store": None,
        "kv_distill": None,
        "context_length": 99,
        "deterministic": True,
    }
    assert model.options == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 2**64 - 1,
        "stop": ("a", "b"),
        "ignore_eos": True,
    }


def test_sampling_options_left_out_are_left_to_the_model(model: FakeModel) -> None:
    run(["generate", "x"])
    assert model.options == {"max_tokens": 256, "stop": (), "ignore_eos": False}


def test_prompts(model: FakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("@für\r\n\n".encode())
    for words, expected in [
        (["plain "], "plain "),
        ([f"@{file}"], "@für\r\n"),
        (["@@dataclass"], "@dataclass"),
        (["@@@"], "@@"),
        (["--", "-x"], "-x"),
        (["--tokens", "3, 1,2"], (3, 1, 2)),
    ]:
        assert run(["generate", *words]) == 0
        assert model.prompt == expected
    for data, expected in [(b"from a pipe\n", "from a pipe"), (b"two\r\n", "two"), (b"a\n\n", "a\n")]:
        for words in ([], ["-"]):
            pipe_in(monkeypatch, data)
            assert run(["generate", *words]) == 0
            assert model.prompt == expected


def test_chat(model: FakeModel) -> None:
    assert run(["generate", "--chat", "--system", "Be brief.", "Hi"]) == 0
    assert model.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert model.prompt == [7, 8, 9]
    assert run(["generate", "--chat", "Hi"]) == 0
    assert model.messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("generate", "Missing PROMPT"),
        ("generate a b", "put it in quotes"),
        ("generate x --tokens 1", "exclude each other"),
        ("generate --chat --tokens 1", "exclude each other"),
        ("generate x --system s", "--system needs --chat"),
        ("generate x --temprature 1", "Did you mean '--temperature'?"),
        ("generat x", "No such command 'generat'"),
        ("generate x --device gpu", "'gpu' is none of auto, cpu, cuda, cuda:N"),
        ("generate x --device cuda:", "is none of"),
        ("generate x --dtype int3", "'auto', 'f32', 'f16', 'bf16'"),
        ("generate x --max-tokens 0", "--max-tokens"),
        ("generate x --threads 0", "--threads"),
        ("generate x --context -1", "--context"),
        ("generate x --temperature -1", "temperature must be"),
        ("generate x --temperature nan", "temperature must be"),
        ("generate x --repetition-penalty 1e-50", "repetition_penalty must be"),
        ("generate x --device cuda:²", "is none of auto, cpu, cuda, cuda:N"),
        ("generate x --temperature 1e300", "a number ≥ 0 that f32 holds"),
        ("generate x --presence-penalty=-1e300", "presence_penalty must be"),
        ("generate x --top-k -1", "top_k must be"),
        ("generate x --top-p 0", "top_p must be"),
        ("generate x --top-p 1.5", "top_p must be"),
        ("generate x --min-p 1", "min_p must be"),
        ("generate x --repetition-penalty 0", "repetition_penalty must be"),
        ("generate x --presence-penalty inf", "presence_penalty must be"),
        ("generate x --seed -1", "--seed"),
        ("generate x --seed 18446744073709551616", "--seed"),
        (
            "generate x --temperature 0 --top-k 5",
            "--temperature 0 always takes the best token and contradicts --top-k 5",
        ),
        ("generate x --temperature 0 --top-p 0.5", "contradicts --top-p 0.5"),
        ("generate x --temperature 0 --min-p 0.5", "contradicts --min-p 0.5"),
        ("generate --tokens 1,,2", "got ''"),
        ("generate --tokens 1,-2", "got '-2'"),
        ("generate --tokens x", "got 'x'"),
        ("generate --tokens 99999999999999999999", "got '99999999999999999999'"),
        ("generate @no/such/file", "cannot read the prompt file 'no/such/file'"),
        ("generate @", "cannot read the prompt file"),
    ],
)
def test_wrong_usage(model: FakeModel, capfd: pytest.CaptureFixture[str], line: str, problem: str) -> None:
    assert run(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert problem in err
    assert model.loaded is None, "checked before any model is opened"


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([""], "the prompt is empty"),
        (["--tokens", ""], "got ''"),
        (["x", "--stop", ""], "must not be empty"),
        (["x", "--model", ""], "must not be empty"),
        (["\udcff"], "not valid UTF-8"),
        (["--chat", "x", "--system", "\udcff"], "not valid UTF-8"),
        (["@a\0b"], "cannot read the prompt file"),
    ],
)
def test_wrong_text(model: FakeModel, capfd: pytest.CaptureFixture[str], args: list[str], problem: str) -> None:
    assert run(["generate", *args]) == 2
    err = capfd.readouterr().err
    assert problem in err
    assert err.count("\n") == 1
    assert model.loaded is None


@pytest.mark.parametrize(("data", "problem"), [(b"", "empty"), (b"\n", "empty"), (b"a\xffb", "UTF-8 (at byte 1)")])
def test_wrong_standard_input(
    model: FakeModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    data: bytes,
    problem: str,
) -> None:
    pipe_in(monkeypatch, data)
    assert run(["generate"]) == 2
    assert problem in capfd.readouterr().err
    assert model.loaded is None


@pytest.mark.parametrize("options", ["--top-k 0", "--top-k 1", "--top-p 1", "--min-p 0", "--seed 3"])
def test_greedy_bears_what_changes_nothing(model: FakeModel, options: str) -> None:
    assert run(["generate", "x", "--temperature", "0", *options.split()]) == 0


def test_json_is_one_object_and_nothing_else(model: FakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    model.pieces = ["é", "😀\n"]
    assert run(["generate", "x", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "prompt_tokens": 3,
        "tokens": [0, 1],
        "text": "é😀\n",
        "finish_reason": "length",
        "device": "cpu",
        "timings": {
            "load_s": 0.5,
            "prefill_s": 0.25,
            "decode_s": 0.125,
            "prefill_tokens_per_s": 12.0,
            "decode_tokens_per_s": 16.0,
        },
        "traffic": {
            **{"h2d_bytes": 8, "d2h_bytes": 4},
            **{"kv_out_bytes": 0, "kv_out_s": 0.0, "kv_in_bytes": 0, "kv_in_s": 0.0},
        },
    }


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_was_generated(
    model: FakeModel, capfd: pytest.CaptureFixture[str], signum: int, code: int
) -> None:
    model.pieces = ["partial", Interrupted(signum), "never"]
    assert run(["generate", "x"]) == code
    out, err = capfd.readouterr()
    assert out == "partial\n"
    assert err.startswith("interrupted: prompt 3 tokens")
    assert model.closed

    model.pieces = ["partial", Interrupted(signum), "never"]
    assert run(["generate", "x", "--json", "--quiet"]) == code
    out, err = capfd.readouterr()
    assert err == ""
    printed = json.loads(out)
    assert (printed["text"], printed["finish_reason"]) == ("partial", "interrupted")


def test_an_interrupt_while_loading(model: FakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    model.load_error = Interrupted(signal.SIGINT)
    assert run(["generate", "x", "--json"]) == 130
    assert capfd.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelFormatError("is empty", path="m.gguf"), 2, "error: m.gguf: is empty\n"),
        (MemoryError("Unable to allocate 9 GiB"), 2, "error: out of memory (Unable to allocate 9 GiB): give"),
        (OSError(12, "Cannot allocate memory"), 2, "error: out of memory"),
        (ValueError("two\nlines"), 70, "error: ValueError: two lines (a bug in gllm-driver; run again with --debug"),
        (EOFError(), 70, "error: EOFError (a bug in gllm-driver"),
        (FileNotFoundError(2, "No such file"), 70, "a bug in gllm-driver"),
    ],
)
def test_failures_are_one_line(
    model: FakeModel, capfd: pytest.CaptureFixture[str], error: Exception, code: int, message: str
) -> None:
    model.load_error = error
    assert run(["generate", "x", "--quiet"]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1

    assert run(["generate", "x", "--debug"]) == code
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert message in err


def test_a_failure_amid_the_text(model: FakeModel, capfd: pytest.CaptureFixture[str]) -> None:
    model.pieces = ["some", ModelFormatError("it broke")]
    assert run(["generate", "x"]) == 2
    assert capfd.readouterr() == ("some\n", "error: it broke\n")
    assert model.closed


def test_a_terminal_sees_notes_and_bars(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(["generate", "x"]) == 0
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "demonstration model" in lines[0]
    assert lines[1] == ("prompt 3 tokens in 0.25 s (12.0/s), output 3 tokens in 0.12 s (16.0/s), loaded in 0.50 s, cpu")
    for quiet in ([], ["--quiet"]):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert run(["generate", "x", "--model", "m", *quiet]) == 0
        assert sys.stderr.getvalue().count("\n") == 1 - len(quiet)  # type: ignore[attr-defined]


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    console = Console()
    console.progress("compile", 0, 2)
    assert "compiling kernels" in err.getvalue()
    console.progress("compile", 2, 2)
    shown = err.getvalue()
    console.progress("load", 1, 10)  # short stages show nothing
    console.progress("load", 10, 10)
    with console.printing() as output:
        output.write("text")
        console.progress("compile", 0, 2)  # and nothing is drawn into the text
    assert err.getvalue() == shown

    monkeypatch.setattr(sys, "stderr", err := Terminal())
    quiet = Console()
    quiet.quiet = True
    quiet.progress("compile", 0, 2)
    assert err.getvalue() == ""


def test_one_line_shows_no_control_characters() -> None:
    assert one_line("a\nb \x1b[31m\udcff é") == "a b \\x1b[31m\\udcff é"


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"], ["generate", "--help"], ["info", "--help"]):
        assert run(args) == 0
        out, err = capfd.readouterr()
        assert "Exit codes:" in out
        assert "130" in out
        assert err == ""
    assert run(["--version"]) == 0
    assert capfd.readouterr().out == f"gllm {gllm_driver.__version__}\n"


def test_info_says_what_is_repacked() -> None:
    from gllm_driver.cli.info import _computation, _type_line
    from gllm_driver.types import DTYPES

    facts = _computation(DTYPES["tq2_0"])
    assert facts["computed"]["cpu"] == "repacked to q4_0"
    facts |= {"tensors": 1, "nbytes": 66}
    assert _type_line("tq2_0", facts).startswith("tq2_0     1 tensor, 66 B, 2.062 bits per weight, repacked to q4_0")
    two = facts | {"computed": {"cpu": "native", "cuda": "repacked to f16"}}
    assert _type_line("q4_k", two).endswith("native on cpu, repacked to f16 on cuda")


def test_info(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tiny_files import write_gguf

    write_gguf(tmp_path / "m.gguf", quantize="Q8_0")
    assert run(["info", "--json", "--model", str(tmp_path / "m.gguf")]) == 0
    facts = json.loads(capfd.readouterr().out)
    devices = {device["kind"]: device for device in facts["devices"]}
    assert devices["cpu"]["usable"]
    assert all(device["reason"] for device in devices.values())
    model = facts["model"]
    # 2 × embedding, 2 layers of q, k, v, o, gate, up, down and two norms, the last norm
    matrices = 2 * 96 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert model["parameters"] == matrices + 5 * 64
    native = {"computed": {"cpu": "native", "cuda": "native"}}
    assert model["tensor_types"] == {
        "q8_0": {"tensors": 16, "nbytes": matrices // 32 * 34, "bits_per_weight": 8.5, **native},
        "f32": {"tensors": 5, "nbytes": 5 * 64 * 4, "bits_per_weight": 32, **native},
    }
    assert model["nbytes"] == matrices // 32 * 34 + 5 * 64 * 4
    assert model["context_length"] == 256
    assert (model["kv_dtype"], model["kv_nbytes_per_token"]) == ("f16", 2 * 2 * 2 * 16 * 2)

    assert run(["info", "--model", str(tmp_path / "m.gguf")]) == 0
    out = capfd.readouterr().out
    assert f"parameters  {model['parameters']:,}" in out
    assert "q8_0      16 tensors, " in out
    assert ", 8.5 bits per weight, native\n" in out
    assert facts["kernel_cache"] in out
    assert run(["info", "--context", "100"]) == 2
    assert "--context needs --model" in capfd.readouterr().err
    assert run(["info", "--model", str(tmp_path)]) == 2
    assert "open one of them: m.gguf" in capfd.readouterr().err
