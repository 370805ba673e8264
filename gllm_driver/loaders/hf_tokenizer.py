"""The tokenizer files of a Hugging Face directory as a `Tokenizer`.

tokenizer.json is the `tokenizers` package's own format. What transformers adds is read from tokenizer_config.json and
special_tokens_map.json: which tokens are special, whether BOS and EOS are added, and the chat template.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError
from .codecs import PieceDecoder, RustCodec, checked
from .jsonfile import read_object
from .tokenizer import SpecialToken, SpecialTokens, Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_directory(path: Path) -> Tokenizer:
    """Raises ModelFormatError naming the file."""
    file = path / "tokenizer.json"
    if not file.is_file():
        if (path / "tokenizer.model").is_file():
            raise ModelFormatError(
                "has only a SentencePiece tokenizer.model; a tokenizer.json is needed (AutoTokenizer.from_pretrained("
                "…).save_pretrained(…) of transformers writes one)",
                path=path,
            )
        raise ModelFormatError("no such file; the directory has no tokenizer", path=file)
    # Later files win: the map is older than the config.
    config = _optional(path / "special_tokens_map.json") | _optional(path / "tokenizer_config.json")
    rust = _load_rust(file)
    _declare_special(rust, config, path)
    added = rust.get_added_tokens_decoder()
    by_id = {
        token_id: SpecialToken(token_id, token.content, token.lstrip, token.rstrip)
        for token_id, token in added.items()
        if token.special
    }
    ids = {name: rust.token_to_id(text) for name in _NAMED if (text := _content(config.get(name))) is not None}
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    prefix, suffix = _affixes(rust, config, bos, eos, path)
    decoder = PieceDecoder.from_json(_state(rust.decoder), file)
    pieces: dict[int, str] = {}
    if _text_reaches(rust, by_id.values()):
        pieces = {token_id: token.content for token_id, token in by_id.items()}
        rust = _sealed(rust, pieces, file)
    raw_ids = frozenset(added.keys() - by_id.keys())
    specials = SpecialTokens(by_id, bos, _end_ids(path) | ({eos} if eos is not None else set()), eos, prefix, suffix)
    vocab_size = max(rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    codec = RustCodec(rust, decoder, vocab_size=vocab_size, raw_ids=raw_ids, pieces=pieces)
    return Tokenizer(codec, specials, _chat_template(path, config))


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _load_rust(file: Path) -> Any:
    from tokenizers import Tokenizer as RustTokenizer

    rust = checked(lambda: RustTokenizer.from_file(str(file)), "is no tokenizer this version can read", file)
    rust.no_truncation()
    rust.no_padding()
    return rust


def _content(token: Any) -> str | None:
    """A token is written as its text, or as {"content": text, …}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _declare_special(rust: Any, config: Mapping[str, Any], path: Path) -> None:
    """Make the tokens special that the config calls so, and add those that tokenizer.json lacks."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token_id, token in _listed(config, path):
        known = rust.token_to_id(token["content"])
        if known is None:
            rust.add_tokens([AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})])
            known = rust.token_to_id(token["content"])
        if known != token_id:
            raise ModelFormatError(
                f"added_tokens_decoder gives {token['content']!r} the id {token_id}, tokenizer.json {known}",
                path=path / "tokenizer_config.json",
            )
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = [config.get(name) for name in _NAMED] + list(extra.values() if isinstance(extra, dict) else extra)
    is_special = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    texts = [text for token in named if (text := _content(token)) is not None and text not in is_special]
    rust.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in texts if _exists(rust, text)])


def _listed(config: Mapping[str, Any], path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The added tokens of the config by id. Raises ModelFormatError."""
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        listed = {"": listed}
    for key, token in listed.items():
        if not (key.isascii() and key.isdigit() and isinstance(token, dict) and _content(token)):
            raise ModelFormatError(
                f"added_tokens_decoder must give tokens by their ids, got {key!r}: {token!r:.80}",
                path=path / "tokenizer_config.json",
            )
    return sorted(((int(key), token) for key, token in listed.items()), key=lambda pair: pair[0])


def _exists(rust: Any, text: str) -> bool:
    return rust.token_to_id(text) is not None


def _affixes(
    rust: Any, config: Mapping[str, Any], bos: int | None, eos: int | None, path: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and after a text: what the post-processor of tokenizer.json adds (transformers 5 asks nothing
    else), or, where there is none, what add_bos_token and add_eos_token say."""
    wanted = {name: config.get(f"add_{name}") for name in ("bos_token", "eos_token")}
    if rust.post_processor is None:
        for name, token_id in (("bos_token", bos), ("eos_token", eos)):
            if wanted[name] and token_id is None:
                raise ModelFormatError(f"add_{name} is set but there is no {name}", path=path / "tokenizer_config.json")
        return (bos,) if wanted["bos_token"] and bos is not None else (), (
            (eos,) if wanted["eos_token"] and eos is not None else ()
        )
    plain = rust.encode("a", add_special_tokens=False).ids
    whole = rust.encode("a").ids
    start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def _end_ids(path: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json: an id, or several."""
    for name in ("generation_config.json", "config.json"):
        ids = _optional(path / name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(token_id, int) for token_id in ids):
                raise ModelFormatError(f"eos_token_id must be one token id or several, got {ids}", path=path / name)
            return frozenset(ids)
    return frozenset()


def _chat_template(path: Path, config: Mapping[str, Any]) -> Any:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"is not UTF-8: {error}", path=file) from None
    return _optional(path / "chat_template.json").get("chat_template", config.get("chat_template"))


def _state(part: Any) -> Any:
    """A part of a Rust tokenizer as the JSON it is written as; None for none."""
    return None if part is None else json.loads(part.__getstate__())


def _text_reaches(rust: Any, specials: Iterable[SpecialToken]) -> bool:
    """Whether plain text could become a special token: some vocabularies can merge its characters into it."""
    rust.encode_special_tokens = True
    unknown = getattr(rust.model, "unk_token", None)
    for token in specials:
        text = token.content
        if text == unknown:
            continue
        if any(_exists(rust, text[:n]) and _exists(rust, text[n:]) for n in range(1, len(text))):
            return True
        if any(token.id in rust.encode(s, add_special_tokens=False).ids for s in (text, f"x{text}", f"x {text} y")):
            return True
    return False


def _sealed(rust: Any, pieces: Mapping[int, str], file: Path) -> Any:
    """The same tokenizer with special tokens under random names, and without the merges that lead to them."""
    from tokenizers import Tokenizer as RustTokenizer

    salt = "".join(chr(0xF0000 + byte) for byte in secrets.token_bytes(12))
    renamed = {text: f"{salt}{token_id}" for token_id, text in pieces.items()}
    spec = json.loads(rust.to_str())
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {renamed.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not renamed.keys() & {m[0], m[1], m[0] + m[1]}]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    spec["post_processor"] = None  # `_affixes` has read it, and it names the tokens
    return checked(lambda: RustTokenizer.from_str(json.dumps(spec)), "cannot be made safe for user text", file)
