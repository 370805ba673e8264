"""Hugging Face directories: tokenizer.json and the files around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_goldens import DATA, HARD_STRINGS, bpe_metadata, spm_metadata
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from gllm_driver.errors import ModelFormatError, RequestError
from gllm_driver.loaders.tokenizer import Tokenizer

SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>"]
Writer = Callable[..., Path]


def byte_level() -> Any:
    vocab = json.loads((DATA / "bpe.json").read_text())
    ids = {token: n for n, token in enumerate(vocab["tokens"])}
    rust = RustTokenizer(models.BPE(ids, [tuple(merge.split(" ")) for merge in vocab["merges"]]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(
        [AddedToken("<|bos|>"), AddedToken("<|end|>", rstrip=True, lstrip=True), AddedToken("<|pad|>", normalized=True)]
    )
    rust.add_tokens([AddedToken("<think>", normalized=False)])
    return rust


def llama_like(prepend: str = "normalizer") -> Any:
    """Llama's tokenizer.json: merges made from scores, byte fallback, a dummy space. prepend: who puts the space."""
    metadata = spm_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    pieces = tokens[259 : 259 + len(json.loads((DATA / "spm.json").read_text())["pieces"])]
    ids = {token: n for n, token in enumerate(tokens[: 259 + len(pieces)])}
    known = set(pieces)
    merges = [(p[:n], p[n:]) for p in pieces for n in range(len(p) - 1, 0, -1) if p[:n] in known and p[n:] in known]
    merges += [("<", "s>")]  # as published files have it: text could become BOS
    rust = RustTokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "normalizer":
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return rust


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def write_files(rust: Any, **files: Any) -> Path:
        """files: stem of a .json file → its value."""
        rust.save(str(tmp_path / "tokenizer.json"))
        for stem, value in files.items():
            (tmp_path / f"{stem}.json").write_text(json.dumps(value))
        return tmp_path

    return write_files


def test_byte_level_is_exact(write: Writer) -> None:
    rust = byte_level()
    tok = Tokenizer.from_directory(write(rust))
    rust.encode_special_tokens = True
    for text in HARD_STRINGS:
        ids = rust.encode(text).ids
        assert tok.encode(text) == ids
        assert tok.decode(ids) == rust.decode(ids) == text
    assert tok.vocab_size == rust.get_vocab_size()
    assert tok.id_to_piece(tok.vocab_size - 1) == "<think>"


@pytest.mark.parametrize("prepend", ["normalizer", "metaspace"])
def test_llama_like_is_exact_and_equals_its_gguf_form(write: Writer, prepend: str) -> None:
    rust = llama_like(prepend)
    tok = Tokenizer.from_directory(write(rust))
    metadata = spm_metadata()
    metadata["tokenizer.ggml.token_type"] = [5 if t == 4 else t for t in metadata["tokenizer.ggml.token_type"]]
    gguf = Tokenizer.from_gguf(metadata)
    rust.encode_special_tokens = True
    for text in HARD_STRINGS:
        ids = tok.encode(text)
        if "<s>" not in text and (text or prepend == "normalizer"):
            assert ids == rust.encode(text).ids
        if "<think>" not in text and not (prepend == "metaspace" and text.startswith((" ", "▁"))):
            assert ids == gguf.encode(text)  # Metaspace adds no second space
        assert tok.decode(ids) == rust.decode(ids)


def test_text_does_not_become_bos_though_the_merges_say_so(write: Writer) -> None:
    rust = llama_like()
    tok = Tokenizer.from_directory(write(rust))
    rust.encode_special_tokens = True
    assert 1 in rust.encode("x<s>", add_special_tokens=False).ids  # the hole is real
    ids = tok.encode("x<s> </s> <unk>")
    assert ids[0] == 1
    assert not any(map(tok.is_special, ids[1:]))
    assert tok.decode(ids) == "x<s> </s> <unk>"
    assert tok.id_to_piece(1) == "<s>"
    assert tok.token_to_id("<s>") == 1
    assert tok.decode([1, *tok.encode("a", add_special=False)], skip_special=False) == "<s> a"


def test_unigram_vocabularies_do_not_read_special_tokens_either(write: Writer) -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -2.0), *((char, -5.0 - n) for n, char in enumerate("abcs<>"))]
    rust = RustTokenizer(models.Unigram(pieces, unk_id=0))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens(["<unk>", "<s>"])
    tok = Tokenizer.from_directory(write(rust))
    assert [tok.id_to_piece(n) for n in tok.encode("a<s>b")] == ["▁", "a", "<", "s", ">", "b"]
    assert tok.decode(tok.encode("a<s>b cab")) == "a<s>b cab"


@pytest.mark.parametrize("special", SPECIALS)
def test_special_tokens_in_a_text_are_text_whatever_their_flags(write: Writer, special: str) -> None:
    tok = Tokenizer.from_directory(write(byte_level()))
    for text in (special, f"a {special} b", f"{special}{special}", f"\n{special}\n"):
        ids = tok.encode(text)
        assert not any(map(tok.is_special, ids))
        assert tok.decode(ids) == text


def test_post_processor_and_config_decide_on_bos_and_eos(write: Writer) -> None:
    rust = byte_level()
    bos, end = rust.token_to_id("<|bos|>"), rust.token_to_id("<|end|>")
    plain = rust.encode("hi").ids
    names = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>"}}
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, plain),
        ({"add_bos_token": True}, [bos, *plain]),
        ({"add_bos_token": True, "add_eos_token": True}, [bos, *plain, end]),
        ({"add_bos_token": False}, plain),
    ]
    for flags, want in cases:
        tok = Tokenizer.from_directory(write(rust, tokenizer_config=names | flags))
        assert tok.encode("hi") == want
        assert (tok.bos_token_id, tok.bos_token, tok.eos_token) == (bos, "<|bos|>", "<|end|>")
    rust.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", pair="$A $B", special_tokens=[("<|bos|>", bos), ("<|end|>", end)]
    )
    assert Tokenizer.from_directory(write(rust, tokenizer_config=names)).encode("hi") == [bos, *plain, end]
    off = names | {"add_bos_token": False, "add_eos_token": False}
    assert Tokenizer.from_directory(write(rust, tokenizer_config=off)).encode("hi") == [bos, *plain, end]


def test_all_ends_of_generation_are_collected(write: Writer) -> None:
    path = write(
        byte_level(),
        special_tokens_map={"eos_token": "<|end|>"},
        generation_config={"eos_token_id": [3, 5]},
        config={"eos_token_id": 7},
    )
    tok = Tokenizer.from_directory(path)
    assert tok.eos_token_ids == {3, 5, tok.token_to_id("<|end|>")}
    (path / "generation_config.json").unlink()
    assert Tokenizer.from_directory(path).eos_token_ids == {7, tok.token_to_id("<|end|>")}


def test_tokens_that_only_the_config_knows(write: Writer) -> None:
    rust = byte_level()
    new = rust.get_vocab_size()
    think = rust.token_to_id("<think>")
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(new): {"content": "<|new|>", "special": True}},
        "additional_special_tokens": ["<think>", "<|not there|>"],
    }
    tok = Tokenizer.from_directory(write(rust, tokenizer_config=config))
    assert tok.token_to_id("<|new|>") == new
    assert tok.is_special(new)
    assert tok.is_special(think)
    assert think not in tok.encode("a<think>b")
    config["added_tokens_decoder"] = {"5": {"content": "<|new|>", "special": True}}
    with pytest.raises(ModelFormatError, match=r"tokenizer_config.json: .*'<\|new\|>' the id 5"):
        Tokenizer.from_directory(write(rust, tokenizer_config=config))
    for broken in ({"five": {"content": "a"}}, {"5": {}}, {"5": "a"}, [{"content": "a"}]):
        with pytest.raises(ModelFormatError, match=r"tokenizer_config.json: added_tokens_decoder must give tokens"):
            Tokenizer.from_directory(write(rust, tokenizer_config={"added_tokens_decoder": broken}))


def test_truncation_and_padding_in_the_file_do_not_touch_prompts(write: Writer) -> None:
    rust = byte_level()
    rust.enable_truncation(4)
    rust.enable_padding(length=16)
    tok = Tokenizer.from_directory(write(rust))
    assert tok.decode(tok.encode("a long enough text to be cut")) == "a long enough text to be cut"


def test_text_after_other_tokens_gets_no_first_space(write: Writer) -> None:
    tok = Tokenizer.from_directory(write(llama_like("metaspace")))
    ids = tok.encode_segments(["a", 2, "er", 2])
    assert [tok.id_to_piece(n) for n in ids] == ["▁a", "</s>", "er", "</s>"]
    tok = Tokenizer.from_directory(write(llama_like("normalizer")))
    assert tok.decode(tok.encode_segments([1, "er"]), skip_special=False) == "<s> er"


@pytest.mark.parametrize("where", ["tokenizer_config", "chat_template", "jinja"])
def test_chat_templates_are_found(write: Writer, where: str) -> None:
    files = {} if where == "jinja" else {where: {"chat_template": "{{ 1 }}"}}
    path = write(byte_level(), **files)
    if where == "jinja":
        (path / "chat_template.jinja").write_text("{{ 1 }}")
    assert Tokenizer.from_directory(path).chat_template == "{{ 1 }}"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ModelFormatError, match=r"a tokenizer\.json is needed"):
        Tokenizer.from_directory(tmp_path)
    for broken in ("", "{", '{"version": "1.0"}', "[]"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelFormatError, match=r"tokenizer\.json: is no tokenizer") as caught:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(caught.value)


def test_ids_may_have_gaps(write: Writer) -> None:
    rust = RustTokenizer(models.BPE({"a": 0, "b": 1, "ab": 7}, [("a", "b")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    tok = Tokenizer.from_directory(write(rust))
    assert tok.vocab_size == 8
    assert tok.encode_segments(["ab", "ba"]) == [7, 1, 0]
    assert tok.decode([0, 3, 7]) == "aab"
    with pytest.raises(RequestError, match="token id 3 is not in the vocabulary"):
        tok.id_to_piece(3)


def test_unknown_decoders_are_refused(write: Writer) -> None:
    rust = byte_level()
    rust.decoder = decoders.WordPiece()
    with pytest.raises(ModelFormatError, match=r"decoder .*WordPiece.* is not supported; known: ByteLevel"):
        Tokenizer.from_directory(write(rust))


def test_lone_surrogates_are_refused(write: Writer) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        Tokenizer.from_directory(write(byte_level())).encode("\udc80")


@pytest.mark.oracle
@pytest.mark.parametrize("make", [byte_level, llama_like, lambda: llama_like("metaspace")])
def test_transformers_agrees(write: Writer, make: Callable[[], Any]) -> None:
    transformers = pytest.importorskip("transformers")
    rust = make()
    bos = "<s>" if rust.token_to_id("<s>") is not None else "<|bos|>"
    for flags in ({}, {"add_bos_token": False}):
        config = {"bos_token": bos, "eos_token": bos, "tokenizer_class": "PreTrainedTokenizerFast"} | flags
        path = write(rust, tokenizer_config=config)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        ours = Tokenizer.from_directory(path)
        for text in HARD_STRINGS:
            if "<s>" not in text and "</s>" not in text and "<unk>" not in text and text:
                ids = theirs.encode(text)
                assert ours.encode(text) == ids
                assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_vocabulary_in_the_tests_is_the_one_of_the_gguf_tests() -> None:
    assert byte_level().token_to_id("Ġ") == bpe_metadata("gpt-2")["tokenizer.ggml.tokens"].index("Ġ")
