"""A Hugging Face tokenizer in GGUF's words encodes as it did; one that GGUF cannot say is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_files
from test_tokenizer_hf import byte_level, llama_like
from tokenizer_goldens import HARD_STRINGS
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers

from gllm_driver.convert.gguf_vocab import vocabulary
from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.loaders.pre_tokenizers import PRE_TOKENIZERS
from gllm_driver.loaders.tokenizer import Tokenizer
from gllm_driver.models.checkpoint import Checkpoint


def checkpoint(folder: Path, rust: Any, extra_rows: int = 5, **config: Any) -> Checkpoint:
    """A model whose embeddings have a few rows more than the tokenizer has tokens."""
    tiny_files.write_hf(folder, {k: v for k, v in tiny_files.CONFIG.items() if "token_id" not in k})
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    opened = open_checkpoint(folder)
    return replace(opened, arch=replace(opened.arch, vocab_size=rust.get_vocab_size() + extra_rows))


def byte_level_with(regexes: tuple[str, ...]) -> Any:
    from tokenizers import Regex

    rust = byte_level()
    splits = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in regexes]
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return rust


def check_same(model: Checkpoint) -> dict[str, Any]:
    values = vocabulary(model)
    theirs, ours = Tokenizer.from_directory(model.path.parent), Tokenizer.from_gguf(values)
    for text in HARD_STRINGS:
        ids = theirs.encode(text)
        if "<think>" not in text:
            assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.eos_token_ids >= theirs.eos_token_ids
    assert len(values["tokenizer.ggml.tokens"]) == model.arch.vocab_size
    return values


def test_gpt2_words(tmp_path: Path) -> None:
    config = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "chat_template": "{{ messages }}"}
    values = check_same(checkpoint(tmp_path, byte_level(), **config))
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert PRE_TOKENIZERS[values["tokenizer.ggml.pre"]].patterns == PRE_TOKENIZERS["gpt-2"].patterns
    assert values["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "smollm", "deepseek-v3"])
def test_words_of_other_vocabularies(tmp_path: Path, name: str) -> None:
    values = check_same(checkpoint(tmp_path, byte_level_with(PRE_TOKENIZERS[name].patterns)))
    assert PRE_TOKENIZERS[values["tokenizer.ggml.pre"]].patterns == PRE_TOKENIZERS[name].patterns


def test_sentencepiece(tmp_path: Path) -> None:
    values = check_same(checkpoint(tmp_path, llama_like(), bos_token="<s>", eos_token="</s>"))
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_bos_token"] is True


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="cuts words by a rule of its own"):
        vocabulary(checkpoint(tmp_path, byte_level_with((r"\p{L}+x?",))))
    unigram = RustTokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.decoder = llama_like().decoder
    with pytest.raises(ModelFormatError, match="is no BPE vocabulary"):
        vocabulary(checkpoint(tmp_path, unigram))
    with pytest.raises(ModelFormatError, match="embeddings"):
        vocabulary(checkpoint(tmp_path, byte_level(), extra_rows=-2))


def test_a_model_without_tokenizer_runs_on_ids(tmp_path: Path) -> None:
    tiny_files.write_hf(tmp_path)
    assert vocabulary(open_checkpoint(tmp_path)) == {"tokenizer.ggml.model": "no_vocab"}
