"""GGUF vocabularies against llama.cpp (golden files, and live in the oracle suite), against the tokenizer.json form of
the same vocabulary, and against a plain reading of SentencePiece's rule."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_goldens import (
    BPE_PRES,
    CONTROL,
    DATA,
    HARD_STRINGS,
    USER_DEFINED,
    LlamaCpp,
    all_metadata,
    bpe_metadata,
    reference_text,
    spm_metadata,
)

from gllm_driver.errors import ModelFormatError, RequestError
from gllm_driver.loaders.pre_tokenizers import PRE_TOKENIZERS
from gllm_driver.loaders.tokenizer import Tokenizer

METADATA = all_metadata()
NAMES = sorted(METADATA)


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_gguf(METADATA[name])


def differs_on_purpose(name: str, text: str) -> bool:
    """Where llama.cpp is known to differ from the tokenizers that the files were made from."""
    if name in ("tekken", "gpt-4o"):  # its expressions for these two simplify the letter classes beyond ASCII
        return not text.isascii()
    if name == "deepseek-coder":  # it reads all spaces beyond ASCII as one control character
        return any(char.isspace() and not char.isascii() for char in text)
    if name.startswith("spm"):  # it merges text into control tokens; SentencePiece does not
        return "<s>" in text or "</s>" in text
    return False


@pytest.mark.parametrize("name", NAMES)
def test_hard_strings_encode_as_llama_cpp_encodes_them(name: str) -> None:
    goldens = json.loads((DATA / "goldens.json").read_text())[name]
    different = [
        text
        for text, want in zip(HARD_STRINGS, goldens, strict=True)
        if tokenizer(name).encode(text, add_special=False) != want
    ]
    allowed = {"tekken": 2, "gpt-4o": 2, "spm": 1, "spm-tied": 3, "spm-no-prefix": 3}.get(name, 0)
    assert len(different) == allowed
    assert all(differs_on_purpose(name, text) for text in different)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_gives_the_text_back(name: str) -> None:
    for text in HARD_STRINGS:
        want = reference_text(name, text)
        if name.startswith("spm"):
            want = want.replace("▁", " ")  # the one character that SentencePiece cannot give back
            if name != "spm-no-prefix" and any(token in text for token in USER_DEFINED):
                continue  # text after a user-defined token gets a space, as in llama.cpp
        assert tokenizer(name).decode(tokenizer(name).encode(text)) == want


def hf_form(pre: str) -> Any:
    """The tokenizer.json of the family, written from the published files and not from our table."""
    from tokenizers import Tokenizer as RustTokenizer

    words = {
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre not in words}
    first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    if pre in words:
        first = {"type": "Split", "pattern": {"Regex": words[pre]}, "behavior": "Isolated", "invert": False}
    steps = [byte_level] if pre == "gpt-2" else [first, byte_level]
    metadata = bpe_metadata(pre)
    tokens = metadata["tokenizer.ggml.tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": n, "content": token, "special": token in CONTROL, **flags}
        for n, token in enumerate(tokens)
        if token in CONTROL + USER_DEFINED
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
            "ignore_merges": pre in ("llama-bpe", "tekken"),
        },
    }
    rust = RustTokenizer.from_str(json.dumps(spec))
    rust.encode_special_tokens = True
    return rust


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_bpe_equals_the_tokenizer_json_of_its_family(pre: str) -> None:
    rust = hf_form(pre)
    for text in HARD_STRINGS:
        assert tokenizer(pre).encode(text, add_special=False) == rust.encode(text).ids
        ids = rust.encode(text).ids
        assert tokenizer(pre).decode(ids) == rust.decode(ids)


def spm_by_definition(metadata: dict[str, Any], text: str) -> list[int]:
    """Merge the adjacent pair with the best score, leftmost first, until none is left; by looking at all of them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    usable = {token: n for n, token in enumerate(tokens) if types[n] in (1, 4, 5)}
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[usable[a + b]], -n) for n, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in usable]
        if not pairs:
            break
        n = -max(pairs)[1]
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    return [n for s in symbols for n in ([usable[s]] if s in usable else [3 + byte for byte in s.encode()])]


@pytest.mark.parametrize("tied", [False, True])
@given(text=st.text(st.sampled_from("aabcdetsr  ▁<s>/\n0é日"), max_size=40))
def test_spm_follows_the_definition(tied: bool, text: str) -> None:
    name = "spm-tied" if tied else "spm"
    if not any(token in text for token in USER_DEFINED):
        assert tokenizer(name).encode(text, add_special=False) == spm_by_definition(METADATA[name], text)


def test_spm_on_dense_vocabularies_with_random_scores() -> None:
    """Every short string over two letters is a token, so merges overlap everywhere."""
    rng = random.Random(5)
    pieces = [
        f"{n:0{length}b}".replace("0", "a").replace("1", "▁") for length in (1, 2, 3, 4) for n in range(2**length)
    ]
    metadata = {**spm_metadata()}
    for _ in range(40):
        metadata["tokenizer.ggml.tokens"] = spm_metadata()["tokenizer.ggml.tokens"][:259] + pieces
        metadata["tokenizer.ggml.scores"] = [0.0] * 259 + [-float(rng.randrange(8)) for _ in pieces]
        metadata["tokenizer.ggml.token_type"] = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
        dense = Tokenizer.from_gguf(metadata)
        for _ in range(20):
            text = "".join(rng.choice("aa ") for _ in range(rng.randrange(1, 30)))
            assert dense.encode(text, add_special=False) == spm_by_definition(metadata, text)


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_a_text_are_text(name: str) -> None:
    tok = tokenizer(name)
    for special in tok.special_tokens.values():
        for text in (special.content, f"a{special.content}b", f" {special.content} "):
            ids = tok.encode(text, add_special=False)
            assert not any(map(tok.is_special, ids))
            assert tok.decode(ids) == text


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    bos, eos = tokenizer("gpt-2").bos_token_id, tokenizer("gpt-2").token_to_id("<|endoftext|>")
    plain = tokenizer("gpt-2").encode("a", add_special=False)
    assert tokenizer("gpt-2").encode("a") == plain
    assert tokenizer("llama-bpe").encode("a") == [bos, *tokenizer("llama-bpe").encode("a", add_special=False)]
    assert tokenizer("spm").encode("") == [1]
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert Tokenizer.from_gguf(bpe_metadata("gpt-2") | both).encode("a") == [bos, *plain, eos]
    neither = {"tokenizer.ggml.add_bos_token": False}
    assert Tokenizer.from_gguf(spm_metadata() | neither).encode("") == []


def test_tokens_that_end_a_generation() -> None:
    tok = tokenizer("qwen2")
    assert {tok.id_to_piece(n) for n in tok.eos_token_ids} == {"<|im_end|>", "<|endoftext|>", "<|eot_id|>"}
    eot = {"tokenizer.ggml.eot_token_id": 300}
    assert Tokenizer.from_gguf(spm_metadata() | eot).eos_token_ids == {2, 300}
    harmony = bpe_metadata("gpt-4o")
    names = ["<|end|>", "<|return|>", "<|call|>"]
    tokens = harmony["tokenizer.ggml.tokens"][: -len(names)] + names
    tok = Tokenizer.from_gguf(harmony | {"tokenizer.ggml.tokens": tokens})
    assert {tok.id_to_piece(n) for n in tok.eos_token_ids} >= {"<|return|>", "<|call|>"}
    assert tok.token_to_id("<|end|>") not in tok.eos_token_ids


@pytest.mark.parametrize("name", ["gpt-2", "spm"])
def test_pieces_and_ids(name: str) -> None:
    tok = tokenizer(name)
    tokens = METADATA[name]["tokenizer.ggml.tokens"]
    assert tok.vocab_size == len(tokens)
    assert [tok.id_to_piece(n) for n in range(len(tokens))] == tokens
    assert [tok.token_to_id(token) for token in tokens] == list(range(len(tokens)))
    assert tok.token_to_id("no such token") is None
    assert tok.decode([len(tokens) + 5]) == ""  # a padding row of the embedding table
    with pytest.raises(RequestError, match="not in the vocabulary"):
        tok.id_to_piece(len(tokens))
    with pytest.raises(RequestError, match="negative"):
        tok.decode([-1])


@pytest.mark.parametrize("name", ["gpt-2", "spm"])
def test_lone_surrogates_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"lone surrogate U\+D83D at character 2"):
        tokenizer(name).encode("ab\ud83d")


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    tok = tokenizer("spm")
    assert tok.decode([1, *tok.encode("hi", add_special=False), 2]) == "hi"
    assert tok.decode([1, *tok.encode("hi", add_special=False), 2], skip_special=False) == "<s> hi</s>"


def test_broken_bytes_become_replacement_characters() -> None:
    assert tokenizer("spm").decode([3 + 0xE2, 3 + 0x82, 3 + 0xE2, 3 + ord("a")]) == "\ufffd\ufffda"
    byte = tokenizer("gpt-2").token_to_id("â")  # byte 0xE2
    assert byte is not None
    assert tokenizer("gpt-2").decode([byte]) == "\ufffd"


def test_a_model_without_vocabulary_takes_ids_only() -> None:
    metadata = {"general.architecture": "llama", "llama.vocab_size": 99, "tokenizer.ggml.model": "no_vocab"}
    tok = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.eos_token_id": 2**32 - 1, "tokenizer.ggml.eot_token_id": 7})
    assert tok.vocab_size == 99
    assert tok.eos_token_ids == {7}
    for call in (lambda: tok.encode("a"), lambda: tok.decode([1]), lambda: tok.id_to_piece(1)):
        with pytest.raises(RequestError, match="token ids"):
            call()


def test_the_largest_id_means_that_there_is_none() -> None:
    metadata = bpe_metadata("gpt-2") | {"tokenizer.ggml.bos_token_id": 2**32 - 1}
    assert Tokenizer.from_gguf(metadata).bos_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": [1]}, r"tokenizer\.ggml\.model is \[1\]"),
        ({"pre": ["gpt-2"]}, r"tokenizer\.ggml\.pre is \['gpt-2'\]"),
        ({"tokens": [1, 2]}, "must hold strs, got int"),
        ({"merges": np.arange(3)}, "must hold strs, got int"),
        ({"token_type": ["a"]}, "must hold ints, got str"),
        ({"eos_token_id": "5"}, "must be a token id, got '5'"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'.*known: gpt2, llama, no_vocab"),
        ({"pre": "klingon"}, r"tokenizer\.ggml\.pre is 'klingon'.*known: .*qwen2"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokens": "abc"}, "must be an array, got str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "holds 'a' twice"),
        ({"token_type": [1]}, "has 1 entries for"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["ab"]}, "entry 0 must be two pieces and a space, got 'ab'"),
        ({"merges": ["a nope"]}, r"tokenizer\.ggml\.merges is broken"),
        ({"eos_token_id": 10**6}, r"eos_token_id is 1000000, the vocabulary has"),
        ({"bos_token_id": None, "add_bos_token": True}, "a BOS is to be added"),
    ],
)
def test_broken_bpe_files_are_refused(change: dict[str, Any], message: str) -> None:
    metadata = bpe_metadata("gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ModelFormatError, match=message) as caught:
        Tokenizer.from_gguf({k: v for k, v in metadata.items() if v is not None}, path="m.gguf")
    assert str(caught.value).startswith("m.gguf: ")
    assert "\n" not in str(caught.value)


def test_broken_spm_files_are_refused() -> None:
    with pytest.raises(ModelFormatError, match="scores has 1 entries"):
        Tokenizer.from_gguf(spm_metadata() | {"tokenizer.ggml.scores": [0.0]})
    with pytest.raises(ModelFormatError, match="must hold floats, got str"):
        Tokenizer.from_gguf(spm_metadata() | {"tokenizer.ggml.scores": ["a"]})
    scores = spm_metadata()["tokenizer.ggml.scores"]
    with pytest.raises(ModelFormatError, match="no finite number"):
        Tokenizer.from_gguf(spm_metadata() | {"tokenizer.ggml.scores": [float("nan"), *scores[1:]]})


def test_a_missing_pre_tokenizer_is_said_aloud() -> None:
    metadata = bpe_metadata("default")
    del metadata["tokenizer.ggml.pre"]
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer"):
        tok = Tokenizer.from_gguf(metadata)
    assert tok.encode("12345 ab") == tokenizer("default").encode("12345 ab")


def test_the_table_of_pre_tokenizers_works_throughout() -> None:
    for name in PRE_TOKENIZERS:
        tok = Tokenizer.from_gguf(bpe_metadata(name))
        assert tok.decode(tok.encode(HARD_STRINGS[6])) == HARD_STRINGS[6]


def test_bytes_that_are_no_utf8_in_the_vocabulary_survive() -> None:
    metadata = bpe_metadata("gpt-2")
    broken = b"\xff\xfe".decode("utf-8", "surrogateescape")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], broken]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    tok = Tokenizer.from_gguf(metadata)
    assert tok.token_bytes(tok.vocab_size - 1) == b"\xff\xfe"


@pytest.mark.oracle
@pytest.mark.parametrize("name", [*BPE_PRES, "spm", "spm-tied", "spm-no-prefix"])
def test_random_texts_encode_as_in_llama_cpp(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    llama = LlamaCpp(METADATA[name], tmp_path)
    rng = random.Random(7)
    alphabet = "".join(HARD_STRINGS)
    for _ in range(1500):
        start = rng.randrange(len(alphabet))
        parts = [alphabet[start : start + rng.randrange(20)], *rng.choices(alphabet, k=rng.randrange(12))]
        text = reference_text(name, "".join(parts))
        if not differs_on_purpose(name, text):
            assert tokenizer(name).encode(text) == llama.encode(text, add_bos=bool(tokenizer(name).encode(""))), text
