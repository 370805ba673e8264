"""`gllm quantize`: what it writes loads, means what it should, and is whole or not there."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cli_process
import gguf
import numpy as np
import pytest
import tiny_files

import gllm_driver as gllm
from gllm_driver.cli.app import run
from gllm_driver.convert.plan import plan_of
from gllm_driver.convert.run import Job
from gllm_driver.convert.target import put
from gllm_driver.embedding import pooling_of
from gllm_driver.errors import RequestError
from gllm_driver.llm import demo_model_path
from gllm_driver.loaders.open import open_checkpoint

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
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of the demo model: calibrating takes time by the layer."""
    reader = gguf.GGUFReader(demo_model_path())
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith(("GGUF.", "general."))}
    tensors = {
        t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32)
        for t in reader.tensors
        if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < 2
    }
    path = tmp_path_factory.mktemp("shallow") / "model.gguf"
    tiny_files.write_gguf(path, fields | {"llama.block_count": 2}, tensors)
    return path


@pytest.fixture(scope="module")
def shallow_exact(shallow: Path) -> np.ndarray:
    return logits(shallow)


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


def test_the_methods_are_better_than_rounding(
    tmp_path: Path, shallow: Path, shallow_exact: np.ndarray, calibration: Path
) -> None:
    found = {}
    for method in ("rtn", "hqq", "gptq"):
        options = ["--calib", str(calibration), "--calib-tokens", "4096"] if method == "gptq" else []
        out = tmp_path / method
        assert quantize(out, "--type", "int4_64z", "--method", method, *options, model=shallow) == 0
        found[method] = divergence(out, shallow_exact)
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
        ("--type q9_0", "the type 'q9_0' is unknown; known: int8, int4"),
        ("--type q4_0 --block 64", "blocks of q4_0 have their own"),
        ("--type int4 --method rtn --calib x", "leave out --calib"),
        ("--type q4_k --method hqq", "use --method search"),
        ("--type q4_0 --keep *=int2_64m", "a GGUF file cannot hold int2_64m"),
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


@pytest.mark.parametrize(("name", "type_name"), [("out.gguf", "q6_k"), ("out", "int4")])
def test_an_interrupt_leaves_nothing(tmp_path: Path, name: str, type_name: str) -> None:
    process = cli_process.start("quantize", demo_model_path(), tmp_path / name, "--type", type_name)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode() == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_two_bits_keep_what_is_sensitive(tmp_path: Path, exact: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "out", "--type", "int2", "--json") == 0
    types = {t["name"]: (t["type"], t["reason"]) for t in json.loads(capfd.readouterr().out)["tensors"]}
    assert types["token_embd.weight"] == ("int4_64m", "sensitive")
    assert types["blk.3.attn_v.weight"] == types["blk.3.ffn_down.weight"] == ("int4_64m", "sensitive")
    assert types["blk.3.ffn_up.weight"] == ("int2_64m", "")
    assert divergence(tmp_path / "out", exact) < 1
    assert quantize(tmp_path / "low", "--type", "int2", "--keep", "*down*=int8", "--keep", "*=int2_32", "--json") == 0
    low = {t["name"]: t["type"] for t in json.loads(capfd.readouterr().out)["tensors"]}
    assert set(low.values()) == {"int2_32", "int8_32"}


def test_calibrated_rounding_helps(tmp_path: Path, shallow: Path, shallow_exact: np.ndarray, calibration: Path) -> None:
    same = ["--type", "int2", "--keep", "token_embd*=q8_0"]  # words are not rounded by what enters a matrix
    assert quantize(tmp_path / "plain", *same, model=shallow) == 0
    options = ["--calib", str(calibration), "--calib-tokens", "4096"]
    assert quantize(tmp_path / "helped", *same, *options, model=shallow) == 0
    assert divergence(tmp_path / "helped", shallow_exact) < 0.7 * divergence(tmp_path / "plain", shallow_exact)


def test_importance_helps(tmp_path: Path, exact: np.ndarray, calibration: Path) -> None:
    plain, helped = tmp_path / "plain.gguf", tmp_path / "helped.gguf"
    assert quantize(plain, "--type", "q2_k") == 0
    assert quantize(helped, "--type", "q2_k", "--calib", str(calibration), "--calib-tokens", "4096") == 0
    assert divergence(helped, exact) < 0.99 * divergence(plain, exact)


def tiny(folder: Path, change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None) -> Path:
    tensors = tiny_files.tensors_of(tiny_files.gguf_shapes())
    change(tensors)
    tiny_files.write_gguf(folder / "model.gguf", tensors=tensors)
    return folder / "model.gguf"


def test_weights_that_are_no_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.ffn_up.weight"][5, 7] = np.nan

    model, out = tiny(tmp_path / "in", spoil), tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    assert quantize(out, "--type", "q4_0", model=model) == 2
    error = capfd.readouterr().err
    assert "'blk.1.ffn_up.weight': holds NaN or infinite values, the first in row 5" in error
    assert error.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_rows_of_no_whole_blocks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny(tmp_path)
    assert quantize(tmp_path / "out.gguf", "--type", "q4_k", model=model) == 2
    assert "has rows of 64, no whole number of q4_k blocks of 256" in capfd.readouterr().err
    assert quantize(tmp_path / "out", "--type", "int4", "--block", "128", model=model) == 2
    assert "int4_128m blocks of 128" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_calibration_that_gives_no_numbers(tmp_path: Path) -> None:
    def overflow(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_norm.weight"] *= np.float32(1e25)  # the inputs are finite, their squares are not

    checkpoint = open_checkpoint(tiny(tmp_path, overflow))
    plan = plan_of(checkpoint, "int8", None, [])
    ids = np.arange(64, dtype=np.int32).reshape(2, 32)
    with pytest.raises(RequestError, match=r"calibration text cannot be used: entering 'blk\.0\.ffn_gate\.weight'"):
        calibrate(checkpoint, plan, ids)


def calibrate(checkpoint: Any, plan: Any, ids: np.ndarray) -> None:
    class Nowhere:
        def write(self, name: str, data: np.ndarray) -> None:
            pass

    with ThreadPoolExecutor(1) as pool:
        Job(checkpoint, plan, "gptq", pool, Nowhere(), None).calibrated(ids)


@pytest.mark.parametrize(
    ("text", "problem"), [(b"", "has 0 tokens"), (b"short", "at least 256"), (b"a\xff", "no UTF-8 (at byte 1)")]
)
def test_calibration_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: bytes, problem: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(text)
    assert quantize(tmp_path / "out", "--type", "int4", "--calib", str(file)) == 2
    assert problem in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_directory_is_replaced_only_if_it_is_a_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "out", tiny(tmp_path / "in")
    assert quantize(out, "--type", "int8", model=model) == 0
    before = (out / "model.safetensors").stat().st_size
    assert quantize(out, "--type", "int4", model=model) == 2
    assert quantize(out, "--type", "int4", "--force", model=model) == 0
    assert (out / "model.safetensors").stat().st_size < before
    link = tmp_path / "link"
    link.symlink_to(out, target_is_directory=True)
    assert quantize(link, "--type", "int8", "--force", model=model) == 0
    assert not link.is_symlink()
    assert (out / "model.safetensors").stat().st_size < before  # what the link pointed to
    shutil.rmtree(link)
    (out / "thesis.tex").touch()
    assert quantize(out, "--type", "int8", "--force", model=model) == 2
    assert "holds more than a model ('thesis.tex')" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_an_interrupt_while_a_directory_is_replaced_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "model", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(new, old)
    assert (old / "config.json").read_text() == "model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "new"]


def test_what_comes_with_a_model_goes_along(tmp_path: Path) -> None:
    model = tmp_path / "in"
    tiny_files.write_hf(model)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert quantize(tmp_path / "out", "--type", "int8", model=model) == 0
    assert pooling_of(tmp_path / "out") == "cls"
    assert quantize(tmp_path / "out", "--type", "int4", "--force", model=model) == 0


def test_a_gguf_file_of_any_name(tmp_path: Path) -> None:
    shutil.copyfile(demo_model_path(), tmp_path / "demo-model")
    assert quantize(tmp_path / "out", "--type", "int8", model=tmp_path / "demo-model") == 0
    assert quantize(tmp_path / "again.gguf", "--type", "q4_0", model=tmp_path / "out") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two tensors, here of 8.4 MB, and 500 MB are the bound for any number of threads."""
    shapes = {"token_embd.weight": (1024, 2048), "output_norm.weight": (2048,)}
    for i in range(7):
        layer = {"attn_norm": (2048,), "ffn_norm": (2048,), "attn_q": (64, 2048), "attn_k": (64, 2048)}
        layer |= {"attn_v": (64, 2048), "attn_output": (2048, 64)}
        layer |= {"ffn_gate": (1024, 2048), "ffn_up": (1024, 2048), "ffn_down": (2048, 1024)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    keys = tiny_files.GGUF_KEYS | {"llama.block_count": 7, "llama.embedding_length": 2048}
    keys |= {"llama.attention.head_count": 1, "llama.attention.head_count_kv": 1, "llama.attention.key_length": 64}
    keys |= {"llama.attention.value_length": 64, "llama.feed_forward_length": 1024, "llama.vocab_size": 1024}
    keys = {k: v for k, v in keys.items() if not k.startswith("tokenizer")}
    some = np.random.Generator(np.random.PCG64(1)).standard_normal((2048, 2048)).astype(np.float32)
    tensors = {name: some[: s[0], : s[1]] if len(s) == 2 else some[0] for name, s in shapes.items()}
    tiny_files.write_gguf(tmp_path / "model.gguf", keys, tensors)
    assert (tmp_path / "model.gguf").stat().st_size > 180e6
    # VmHWM, since ru_maxrss counts what the parent had when it forked
    script = (
        "import sys\nfrom gllm_driver.cli.app import run\nprint(run(sys.argv[1:]), open('/proc/self/status').read())"
    )
    arguments = [
        "quantize",
        str(tmp_path / "model.gguf"),
        str(tmp_path / "out.gguf"),
        "--type",
        "q4_0",
        "--threads",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=cli_process.environment(), capture_output=True, text=True
    )
    code, *status = done.stdout.split("blk.*.ffn_down")[1].split("\n", 2)[2].split()
    assert code == "0", done.stderr
    assert int(status[status.index("VmHWM:") + 1]) * 1024 < 2 * 8.4e6 + 130e6


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
