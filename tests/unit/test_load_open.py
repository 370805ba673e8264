"""`open_checkpoint` from end to end: directories, single files, what is found beside the weights, and what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny_files import CONFIG, GGUF_KEYS, LAYERS, gguf_shapes, hf_shapes, tensors_of, write_gguf, write_hf

from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders import open as load_open
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.models.arch import tensor_slots
from gllm_driver.models.checkpoint import Checkpoint, GenerationDefaults


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo: str, **kwargs: Any) -> Path:
        raise AssertionError(f"the hub was asked for {repo}")

    monkeypatch.setattr(load_open, "fetch_from_hub", refuse)


def check_tensors(checkpoint: Checkpoint, written: dict[str, np.ndarray]) -> None:
    shapes = tensor_slots(checkpoint.arch)
    assert checkpoint.tensors.keys() == checkpoint.sources.keys() == shapes.keys()
    for slot, tensor in checkpoint.tensors.items():
        array = written[checkpoint.sources[slot]]
        assert tensor.shape == shapes[slot] == array.shape
        assert tensor.owner.tobytes() == array.tobytes()
        assert tensor.owner.ctypes.data == tensor.address


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_directory(tmp_path: Path, dtype: Any, num_shards: int) -> None:
    written = write_hf(tmp_path, tensors=tensors_of(hf_shapes(), dtype), num_shards=num_shards)
    checkpoint = open_checkpoint(str(tmp_path))
    check_tensors(checkpoint, written)
    assert checkpoint.nbytes == sum(array.nbytes for array in written.values())
    assert checkpoint.sources["layers.1.q"] == "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.metadata["config"] == CONFIG
    assert checkpoint.metadata["generation_config"] == {}
    assert checkpoint.metadata["tokenizer_file"] is None


def test_single_file_with_its_config_beside_it(tmp_path: Path) -> None:
    written = write_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    check_tensors(open_checkpoint(tmp_path / "other.safetensors"), written)
    with pytest.raises(ModelFormatError, match=r"neither model.safetensors nor .*it has other.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFormatError, match=r"config.json: no such file"):
        open_checkpoint(tmp_path / "other.safetensors")


def test_gguf(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    check_tensors(checkpoint, written)
    assert checkpoint.metadata["tokenizer.ggml.tokens"] == GGUF_KEYS["tokenizer.ggml.tokens"]
    assert checkpoint.defaults == GenerationDefaults(eos_token_ids=(2,), bos_token_id=1)


def test_tied_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tensors=tensors_of(gguf_shapes(tied=True)))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.arch.tie_word_embeddings
    assert "lm_head" not in checkpoint.tensors


def test_rope_factors_of_gguf(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    written = write_gguf(tmp_path / "m.gguf", tensors={**tensors_of(gguf_shapes()), "rope_freqs.weight": factors})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    check_tensors(checkpoint, written)
    assert checkpoint.arch.rope_scaling.kind == "factors"


def test_norms_of_another_float_type_are_fine(tmp_path: Path) -> None:
    tensors = tensors_of(hf_shapes(), ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    check_tensors(open_checkpoint_of(tmp_path, tensors), tensors)


def open_checkpoint_of(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Checkpoint:
    write_hf(folder, {**CONFIG, **config}, tensors)
    return open_checkpoint(folder)


def test_errors_name_the_tensor_and_the_file(tmp_path: Path) -> None:
    tensors = tensors_of(hf_shapes())
    with pytest.raises(ModelFormatError, match=r"model.safetensors, tensor 'x': has no place"):
        open_checkpoint_of(tmp_path, {**tensors, "x": np.zeros(1, np.float32)})
    with pytest.raises(ModelFormatError, match=rf"says 3 layers, .* of {LAYERS}"):
        open_checkpoint_of(tmp_path, tensors, num_hidden_layers=3)
    with pytest.raises(
        ModelFormatError, match=r"tensor 'model.embed_tokens.weight': has shape \[96, 64\], expected \[97"
    ):
        open_checkpoint_of(tmp_path, tensors, vocab_size=97)
    with pytest.raises(ModelFormatError, match=r"'model.norm.weight': has type I32, which this version cannot read"):
        open_checkpoint_of(tmp_path, {**tensors, "model.norm.weight": np.zeros(64, np.int32)})


def test_quantized_gguf_of_an_unreadable_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quantize="Q8_0")
    data = path.read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    path.write_bytes(data[:at] + (15).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        ModelFormatError, match=r"tensor 'blk.0.attn_q.weight': has type Q8_K, which this version cannot"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "absent",
        "./absent",
        "../a/b",
        "/absent/model",
        "~/absent/model",
        "a/b/c",
        "a/b.gguf",
        "a/b.safetensors",
        "",
        "a\0/b",
    ],
)
def test_what_looks_like_a_path_is_never_a_hub_id(text: str) -> None:
    with pytest.raises(
        ModelFormatError, match=r"no such file or directory|neither model.safetensors|cannot be looked up"
    ):
        open_checkpoint(text)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(ModelFormatError, match="no such file or directory"):
        open_checkpoint(Path("org/name"))


def test_an_existing_path_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_hf(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    check_tensors(open_checkpoint("org/name"), written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None, None)),
        ("org/name@v1.0", ("org/name", "v1.0", None)),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3", None)),
        ("org/name:m-Q8_0.gguf", ("org/name", None, "m-Q8_0.gguf")),
        ("org/name@main:sub/m.gguf", ("org/name", "main", "sub/m.gguf")),
    ],
)
def test_hub_ids(text: str, expected: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path)
    asked: list[tuple[Any, ...]] = []

    def fetch(repo: str, *, revision: str | None, file: str | None, progress: bool | None) -> Path:
        asked.append((repo, revision, file, progress))
        return tmp_path

    monkeypatch.setattr(load_open, "fetch_from_hub", fetch)
    assert open_checkpoint(text, progress=False).path == tmp_path / "model.safetensors"
    assert asked == [(*expected, False)]


def test_directories_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    for name, problem in [
        ("x.txt", "neither model.safetensors nor model.safetensors.index.json$"),
        ("pytorch_model.bin", "convert it to safetensors"),
        ("m.gguf", "a directory of GGUF files; open one of them: m.gguf"),
    ]:
        (tmp_path / name).touch()
        with pytest.raises(ModelFormatError, match=problem):
            open_checkpoint(tmp_path)


def test_files_of_the_tokenizer_are_found(tmp_path: Path) -> None:
    write_hf(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("")
    metadata = open_checkpoint(tmp_path).metadata
    assert metadata["tokenizer_file"] == tmp_path / "tokenizer.json"
    assert metadata["tokenizer_config_file"] is None
    assert metadata["chat_template_file"] == tmp_path / "chat_template.jinja"


# -- what the authors recommend --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, GenerationDefaults(eos_token_ids=(2,), bos_token_id=1)),
        ({"eos_token_id": [5, 6, 5]}, GenerationDefaults(eos_token_ids=(5, 6), bos_token_id=1)),
        ({"eos_token_id": 5, "bos_token_id": 0}, GenerationDefaults(eos_token_ids=(5,), bos_token_id=0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.1},
            GenerationDefaults(0.6, 20, 0.95, 0.0, 1.1, (2,), 1),
        ),
        ({"do_sample": True, "top_k": -1}, GenerationDefaults(1.0, 0, eos_token_ids=(2,), bos_token_id=1)),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults(0.0, eos_token_ids=(2,), bos_token_id=1)),
    ],
)
def test_generation_config(tmp_path: Path, generation: Any, expected: GenerationDefaults) -> None:
    write_hf(tmp_path)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(tmp_path).defaults == expected


def test_bad_generation_config_names_its_file(tmp_path: Path) -> None:
    write_hf(tmp_path)
    for generation, problem in [
        ({"top_p": 2}, "top_p must be"),
        ({"eos_token_id": "x"}, "eos_token_id must be"),
        ([], "object"),
    ]:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        with pytest.raises(ModelFormatError, match=rf"generation_config.json: .*{problem}"):
            open_checkpoint(tmp_path)


def test_gguf_recommendations(tmp_path: Path) -> None:
    keys = {
        **GGUF_KEYS,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.75,
        "general.sampling.min_p": 0.25,
        "general.sampling.penalty_repeat": 1.5,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.bos_token_id": 2**32 - 1,
    }
    write_gguf(tmp_path / "m.gguf", keys)
    expected = GenerationDefaults(0.5, 20, 0.75, 0.25, 1.5, (2, 7), None)
    assert open_checkpoint(tmp_path / "m.gguf").defaults == expected


def test_reading_models_imports_no_heavy_package() -> None:
    heavy = ["numba", "tokenizers", "safetensors", "gguf", "huggingface_hub", "jinja2", "torch"]
    code = f"import sys, gllm_driver.loaders.open; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
