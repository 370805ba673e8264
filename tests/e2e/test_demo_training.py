"""The demo model's tools from training to model card, at a size that takes seconds; torch, transformers and llama.cpp
check the files independently."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

TOOLS = Path(__file__).parents[2] / "tools"
TEXT = "def add(a, b):\n    '''Sum of a and b.'''\n    return a + b\n\n\nclass A:\n\tx = 0x1F  # é 世界\n"
RUN = ["--steps", "4", "--batch", "2", "--context", "64", "--evaluations", "2", "--device", "cpu"]
SHAPE = ["--layers", "2", "--hidden", "128", "--intermediate", "96", "--head-dim", "32", "--vocab-size", "400"]


@pytest.fixture(scope="module")
def tools() -> SimpleNamespace:
    sys.path.insert(0, str(TOOLS))
    try:
        import demo_corpus
        import demo_model
        import make_demo_gguf
        import train_demo
    finally:
        sys.path.remove(str(TOOLS))
    return SimpleNamespace(corpus=demo_corpus, model=demo_model, gguf=make_demo_gguf, train=train_demo)


@pytest.fixture(scope="module")
def packed(tools: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.xz"
    documents = tuple(tools.corpus.Document(f"module_{i}.py", TEXT.replace("add", f"add{i}")) for i in range(150))
    dialogues = tuple(tools.corpus.dialogues(list(documents)))
    tools.corpus.pack(tools.corpus.Corpus("a test's text", documents, dialogues), path)
    return path


@pytest.fixture(scope="module")
def trained(tools: SimpleNamespace, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    tools.train.main(["--packed", str(packed), "--out", str(out), *RUN, *SHAPE])
    return out


def hf_logits(folder: Path, ids: list[int]) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def encode(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_training_lowers_the_loss(trained: Path) -> None:
    lines = (trained / "loss.csv").read_text().splitlines()
    first, last = (float(line.split(",")[-1]) for line in (lines[1], lines[-1]))
    assert last < first
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["tokens"] == 4 * 2 * 64


def test_transformers_computes_the_logits_of_the_training_model(tools: SimpleNamespace, trained: Path) -> None:
    from safetensors.torch import load_file

    config = json.loads((trained / "config.json").read_text())
    fields = tools.model.DemoConfig.__dataclass_fields__
    model = tools.model.DemoModel(tools.model.DemoConfig(**{name: config[name] for name in fields}), 0.1).eval()
    state = load_file(trained / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in state.items()})
    ids = encode(trained, TEXT)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    assert relative_error(ours, hf_logits(trained, ids)) < 1e-5


@pytest.mark.parametrize(("matrix_type", "tolerance"), [("f32", 1e-3), ("q8_0", 3e-2)])
def test_llama_cpp_computes_the_logits_of_transformers(
    tools: SimpleNamespace, trained: Path, tmp_path: Path, matrix_type: str, tolerance: float
) -> None:
    # The tolerances are llama.cpp's: it rounds the KV cache to f16, and activations to int8 where weights are Q8_0.
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "demo.gguf"
    tools.gguf.main(["export", str(trained), str(path), "--type", matrix_type])
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    ids = encode(trained, TEXT)
    assert llama.tokenize(TEXT.encode(), add_bos=True, special=False) == ids
    llama.eval(ids)
    assert relative_error(np.array(llama.scores[: len(ids)]), hf_logits(trained, ids)) < tolerance


def test_dequantize_inverts_export(tools: SimpleNamespace, trained: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tools.gguf.main(["export", str(trained), str(tmp_path / "demo.gguf"), "--type", "f16"])
    config = json.loads((trained / "config.json").read_text())
    got = tools.gguf.dequantize(tmp_path / "demo.gguf", config)
    for name, weight in load_file(trained / "model.safetensors").items():
        np.testing.assert_array_equal(got[name], weight.astype(np.float32), err_msg=name)


def test_the_card_is_filled_from_the_metrics(
    tools: SimpleNamespace, trained: Path, packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyError, match="q8_0"):
        tools.gguf.main(["card", str(trained), str(tmp_path)])
    tools.gguf.main(["export", str(trained), str(tmp_path / "demo.gguf"), "--packed", str(packed)])
    tools.gguf.main(["card", str(trained), str(tmp_path)])
    card = (tmp_path / "demo-model.md").read_text()
    metrics = json.loads((trained / "metrics.json").read_text())
    assert f"{metrics['held_out']['bits_per_byte']:.5g}" in card
    assert f"{metrics['q8_0']['nbytes']:,} bytes" in card
    assert "--steps 4" in card
    assert "${" not in card
    assert (tmp_path / "demo-loss.png").read_bytes()[:4] == b"\x89PNG"
