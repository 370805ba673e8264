"""The command `gllm` as a user runs it: the real script, the demo model, pipes, signals, files that are broken."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli_process import TIMEOUT_S, command, environment, gllm, start, wait_for
from tiny_files import gguf_shapes, tensors_of, write_gguf

import gllm_driver
from gllm_driver.llm import demo_model_path

PROMPT = "def fibonacci(n):"
LONG = ("generate", PROMPT, "--max-tokens", "1000", "--ignore-eos", "--threads", "1", "--debug")


@pytest.fixture(scope="module")
def greedy() -> dict:
    """What the demo model says to PROMPT, as --json reports it. Also warms the kernel cache for the tests after it."""
    done = gllm("generate", PROMPT, "--max-tokens", "24", "--temperature", "0", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def test_verbose_says_how_it_went() -> None:
    done = gllm("generate", PROMPT, "--max-tokens", "3", "--ignore-eos", "--threads", "1", "--verbose")
    assert done.code == 0
    assert "3 output in 3 steps" in done.err
    assert "KV pages" in done.err
    refused = gllm("generate", PROMPT, "--quiet", "--verbose")
    assert refused.code == 2


def test_json(greedy: dict) -> None:
    assert set(greedy) == {"prompt_tokens", "tokens", "text", "finish_reason", "device", "timings", "traffic"}
    assert greedy["prompt_tokens"] > 2
    assert len(greedy["tokens"]) <= 24
    assert all(type(token) is int for token in greedy["tokens"])
    assert greedy["text"].strip()
    assert greedy["finish_reason"] == ("length" if len(greedy["tokens"]) == 24 else "stop")
    assert greedy["device"] == "cpu"
    timings = greedy["timings"]
    assert set(timings) == {"load_s", "prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert all(value > 0 for value in timings.values())
    assert set(greedy["traffic"].values()) == {0}


def test_every_way_to_give_a_prompt(greedy: dict, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    options = ("--max-tokens", "24", "--temperature", "0")
    plain = gllm("generate", PROMPT, *options)
    text = greedy["text"]
    assert (plain.code, plain.out, plain.err) == (0, text if text.endswith("\n") else text + "\n", "")
    assert gllm("generate", "-", *options, stdin=PROMPT.encode()) == plain
    assert gllm("generate", *options, stdin=PROMPT.encode() + b"\n") == plain
    assert gllm("generate", "@prompt.txt", *options, "--model", demo_model_path(), cwd=tmp_path) == plain


def test_token_ids_in_and_out(greedy: dict) -> None:
    with gllm_driver.load() as llm:
        ids = llm.tokenizer.encode(PROMPT)
    done = gllm("generate", "--tokens", ",".join(map(str, ids)), "--max-tokens", "24", "--temperature", "0", "--json")
    assert json.loads(done.out)["tokens"] == greedy["tokens"]
    out_of_range = gllm("generate", "--tokens", "1,4000000000,2")
    assert (out_of_range.code, out_of_range.out) == (2, "")
    assert "token 1 of the prompt is 4000000000, outside the vocabulary of" in out_of_range.err


def test_stop_string(greedy: dict) -> None:
    stop = greedy["text"][5:8]
    done = gllm("generate", PROMPT, "--max-tokens", "24", "--temperature", "0", "--json", "--stop", "≠", "--stop", stop)
    result = json.loads(done.out)
    assert result["text"] == greedy["text"][: greedy["text"].index(stop)]
    assert result["finish_reason"] == "stop"


def test_a_seed_repeats_its_draws() -> None:
    line = ("generate", PROMPT, "--max-tokens", "32", "--temperature", "1.5", "--ignore-eos", "--seed")
    first = gllm(*line, "1")
    assert first.code == 0
    assert gllm(*line, "1") == first
    assert gllm(*line, "2").out != first.out


def test_chat() -> None:
    done = gllm("generate", "--chat", "Write a function.", "--max-tokens", "8", "--json")
    assert done.code == 0
    assert json.loads(done.out)["prompt_tokens"] > 4


def test_text_arrives_piece_by_piece() -> None:
    process = start(*LONG)
    assert process.stdout is not None
    wait_for(process, "generating")
    pieces: list[bytes] = []
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        pieces.append(piece)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert len(pieces) > 20, "text written at once would come in one piece"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_text_cleanly(signum: int) -> None:
    process = start(*LONG)
    assert process.stdout is not None
    wait_for(process, "generating")
    first = os.read(process.stdout.fileno(), 1 << 16)
    process.send_signal(signum)
    rest, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signum, err
    out = (first + rest).decode()
    assert out.strip()
    assert out.endswith("\n")
    assert "interrupted: prompt" in err.decode()
    assert "Traceback" not in err.decode()


def test_a_signal_ends_json_with_the_object() -> None:
    process = start(*LONG, "--json")
    wait_for(process, "generating")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, err
    result = json.loads(out)
    assert result["finish_reason"] == "interrupted"
    assert len(result["tokens"]) < 1000


def test_a_signal_while_loading() -> None:
    process = start(*LONG)
    wait_for(process, "loading")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert out.strip() == b""


def test_a_reader_that_has_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("generate", PROMPT, stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (141, b"")


def test_an_output_that_cannot_be_written() -> None:
    with open("/dev/full", "wb") as full:
        process = start("generate", PROMPT, "--max-tokens", "8", stdout=full)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert err.decode() == f"error: cannot write to standard output: {os.strerror(errno.ENOSPC)}\n"


def test_a_terminal_and_a_kernel_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """The folder would lie below a file, which not even root can write."""
    (tmp_path / "file").write_bytes(b"")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [*command(), "generate", PROMPT, "--max-tokens", "8"],
        env=environment(GLLM_CACHE_DIR=str(tmp_path / "file" / "cache")),
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
    )
    os.close(slave)
    shown = _read_terminal(master)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, shown
    assert out.strip()
    assert "demonstration model" in shown
    assert "compiling kernels" in shown
    assert shown.count("warning: compiled kernels cannot be kept in") == 1
    assert "output 8 tokens in" in shown


def _read_terminal(master: int) -> str:
    shown = b""
    try:
        while part := os.read(master, 1 << 16):
            shown += part
    except OSError as error:  # how Linux says that the other side has closed
        if error.errno != errno.EIO:
            raise
    os.close(master)
    return shown.decode()


def test_prompts_that_do_not_fit() -> None:
    long = gllm("generate", "--context", "4", "--tokens", "1,2,3,4")
    assert (long.code, long.out) == (2, "")
    assert "the prompt has 4 tokens and leaves no room in a context of 4" in long.err
    wide = gllm("generate", "x", "--context", "100000000")
    assert (wide.code, wide.out) == (2, "")
    assert wide.err.startswith("error: ")
    full = gllm("generate", "--context", "8", "--tokens", "1,2,3", "--ignore-eos", "--json")
    assert len(json.loads(full.out)["tokens"]) == 5
    assert json.loads(full.out)["finish_reason"] == "length"


def test_a_device_that_cannot_be_used() -> None:
    devices = {device.kind: device for device in gllm_driver.devices()}
    if devices["cuda"].usable:
        pytest.skip("this machine has a usable GPU")
    done = gllm("generate", "x", "--device", "cuda")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: device 'cuda' is not usable: {devices['cuda'].reason}\n"


def _broken(folder: Path) -> dict[str, str]:
    """Broken model files, and what the error must name."""
    whole = folder / "whole.gguf"
    write_gguf(whole, quantize="Q8_0")
    data = whole.read_bytes()
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "magic.gguf").write_bytes(b"GGUX" + data[4:])
    (folder / "cut.gguf").write_bytes(data[:-100])
    (folder / "header.gguf").write_bytes(data[:200])
    write_gguf(folder / "arch.gguf", architecture="mamba")
    tensors = tensors_of(gguf_shapes())
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan
    write_gguf(folder / "nan.gguf", tensors=tensors)
    (folder / "hf").mkdir()
    return {
        "missing.gguf": "no such file",
        "empty.gguf": "empty.gguf",
        "magic.gguf": "magic.gguf",
        "cut.gguf": "tensor '",
        "header.gguf": "header.gguf",
        "arch.gguf": "'mamba' is not supported; supported: llama",
        "nan.gguf": "blk.1.ffn_up.weight",
        "hf": "model.safetensors",
        "no/such": "no/such",  # looks like a hub id; the hub is off
    }


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    for name, named in _broken(tmp_path).items():
        path = name if name == "no/such" else tmp_path / name
        done = gllm("generate", "--tokens", "1", "--model", path, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
        assert (done.code, done.out) == (2, ""), (name, done)
        assert done.err.startswith("error: "), done.err
        assert done.err.count("\n") == 1, done.err
        assert named in done.err


def test_help_and_version_are_quick() -> None:
    """They import nothing heavy; the bound is wide, for a machine that does other work."""
    fastest_s = float("inf")
    for args in (("--help",), ("--version",), ("generate", "--help")):
        begin = time.perf_counter()
        assert gllm(*args).code == 0
        fastest_s = min(fastest_s, time.perf_counter() - begin)
    assert fastest_s < 1.0
    code = "import sys, gllm_driver.cli as c; c.run(['generate', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert set(done.stderr.split()).isdisjoint({"numpy", "numba", "llvmlite", "tokenizers", "gguf", "tqdm", "jinja2"})


def test_the_demo_model_says_that_it_is_one() -> None:
    reader = gguf.GGUFReader(demo_model_path())
    field = reader.fields["general.description"]
    assert "emonstration" in bytes(field.parts[-1]).decode()
