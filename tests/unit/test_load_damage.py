"""Damaged and hostile model files: whatever the bytes, opening ends in a Checkpoint or a ModelFormatError, soon, and
without memory beyond the size of the file."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import CONFIG, GGUF_KEYS, write_gguf, write_hf

from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.open import open_checkpoint

MAX_SECONDS = 1.0
NUMBERS = [0, 1, 0x7F, 0xFF, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ODD_VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 2**31, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf")]
ODD_VALUES += ["", "x", [], [1], ["full_attention"], {}, {"a": 1}, {"full_attention": None}]


def opens_or_explains(path: Path, file_nbytes: int) -> bool:
    """Whether it opened; every exception but ModelFormatError is the test's failure."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    checkpoint, message = None, ""
    try:
        checkpoint = open_checkpoint(path)
    except ModelFormatError as error:
        message = str(error)
    if checkpoint is not None:
        # What opened lies inside its file: summing every byte would crash the process otherwise.
        for tensor in checkpoint.tensors.values():
            assert tensor.owner.nbytes == tensor.nbytes
            tensor.owner.sum()
    assert time.perf_counter() - start < MAX_SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < 4 * file_nbytes + (1 << 20)
    assert "\n" not in message
    assert len(message) < 1000
    return checkpoint is not None


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def replace(path: Path, data: bytes) -> None:
    """A new file under the name: the old one may still be mapped, and must not shrink under its mapping."""
    temporary = path.with_name("temporary")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def damaged(good: bytes, header_nbytes: int, seed: int) -> Iterator[bytes]:
    """Truncations all along the header and at the tail, bit flips, absurd numbers, and shifted bytes."""
    rng = np.random.default_rng(seed)
    for end in [*range(0, header_nbytes, 13), header_nbytes, len(good) - 4096, len(good) - 33, len(good) - 1]:
        yield good[:end]
    for _ in range(200):
        data = bytearray(good)
        for position in rng.integers(0, header_nbytes, rng.integers(1, 4)):
            data[position] ^= 1 << rng.integers(0, 8)
        yield bytes(data)
    for _ in range(150):
        data = bytearray(good)
        position, width = int(rng.integers(0, header_nbytes - 8)), int(rng.choice([4, 8]))
        number = NUMBERS[rng.integers(len(NUMBERS))]
        data[position : position + width] = number.to_bytes(8, "little")[:width]
        yield bytes(data)
    for _ in range(50):
        position = int(rng.integers(0, header_nbytes))
        yield good[:position] + bytes(rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8)) + good[position:]
        yield good[:position] + good[position + int(rng.integers(1, 9)) :]


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quantize="Q8_0")
    good = path.read_bytes()
    assert opens_or_explains(path, len(good))
    header_nbytes = good.index(b"blk.1.ffn_down.weight") + 64
    outcomes = []
    for data in damaged(good, header_nbytes, seed=1):
        replace(path, data)
        outcomes.append(opens_or_explains(path, len(good)))
    assert 0 < sum(outcomes) < len(outcomes) / 2  # a flip in a token's text is no error; most damage is


def test_gguf_numbers_one_by_one(tmp_path: Path) -> None:
    """Every aligned and unaligned 8 bytes of the tensor descriptions replaced by each absurd number."""
    path = tmp_path / "m.gguf"
    write_gguf(path)
    good = path.read_bytes()
    first = good.index(b"token_embd.weight")
    for position in [*range(4, 24), *range(first - 8, first + 60)]:
        for number in NUMBERS[::3]:
            replace(path, good[:position] + number.to_bytes(8, "little") + good[position + 8 :])
            opens_or_explains(path, len(good))


def test_damaged_safetensors(tmp_path: Path) -> None:
    write_hf(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    assert opens_or_explains(tmp_path, len(good))
    header_nbytes = 8 + int.from_bytes(good[:8], "little")
    outcomes = []
    for data in damaged(good, header_nbytes, seed=2):
        replace(path, data)
        outcomes.append(opens_or_explains(tmp_path, len(good)))
    assert sum(outcomes) < len(outcomes) / 10
    replace(path, good)
    assert opens_or_explains(tmp_path, len(good))


@pytest.mark.parametrize(
    "architecture", [("LlamaForCausalLM", "llama"), ("Qwen3ForCausalLM", "qwen3"), ("MistralForCausalLM", "mistral")]
)
def test_odd_values_in_config_json(tmp_path: Path, architecture: tuple[str, str]) -> None:
    write_hf(tmp_path)
    base = {**CONFIG, "architectures": [architecture[0]], "model_type": architecture[1]}
    keys = [*base, "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "attention_bias"]
    keys += ["use_sliding_window", "max_window_layers", "partial_rotary_factor", "original_max_position_embeddings"]
    scalings = [
        {"rope_type": kind, "factor": value, "original_max_position_embeddings": value, key: value}
        for kind in ("linear", "dynamic", "llama3", "yarn")
        for key in ("rope_theta", "low_freq_factor", "attention_factor", "beta_fast", "mscale", "truncate")
        for value in ODD_VALUES
    ]
    configs = [{**base, key: value} for key in keys for value in ODD_VALUES]
    configs += [{**base, "use_sliding_window": True, "layer_types": value} for value in ODD_VALUES]
    configs += [{**base, "rope_scaling": scaling} for scaling in scalings]
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        opens_or_explains(tmp_path, 1 << 20)


def test_odd_values_in_generation_config_json(tmp_path: Path) -> None:
    write_hf(tmp_path)
    for key in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "eos_token_id",
        "bos_token_id",
        "do_sample",
    ):
        for value in ODD_VALUES:
            (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
            opens_or_explains(tmp_path, 1 << 20)


def test_odd_values_in_gguf_keys(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "llama.rope.dimension_count": 16}
    keys = [
        *GGUF_KEYS,
        *extra,
        "llama.rope.freq_base",
        "llama.attention.sliding_window",
        "general.alignment",
        "split.count",
    ]
    path = tmp_path / "m.gguf"
    for key in keys:
        for value in [True, 0, 1, 3, 2**31, 2**32 - 1, 0.0, -1.5, float("nan"), "", "x", [1, 2], ["a", "b"], [0.5]]:
            write_gguf(
                path, {**GGUF_KEYS, **extra, key: value}, tensors={"token_embd.weight": np.zeros((2, 4), np.float32)}
            )
            opens_or_explains(path, 1 << 20)
            path.unlink()
