"""The vocabulary inside a GGUF file (`tokenizer.ggml.*` keys; GGUF specification and llama.cpp) as a `Tokenizer`."""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError, RequestError
from .codecs import PieceDecoder, RustCodec, checked
from .defaults import NO_TOKEN
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .spm import SpmCodec, byte_ids_of
from .tokenizer import SpecialToken, SpecialTokens, Tokenizer


class TokenType(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Files name one EOS; chat models stop at others too, which their generation_config.json listed and GGUF has no key for.
END_OF_TURN = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    }
)
_MODELS = ("gpt2", "llama", "no_vocab")
_PREFIX = "tokenizer.ggml."


class NoTextCodec:
    """A model without a vocabulary: token ids only."""

    has_text = False
    strips_leading_space = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, continues: bool) -> list[int]:
        raise self._error()

    def piece(self, token_id: int) -> str:
        raise self._error()

    def piece_bytes(self, token_id: int) -> bytes:
        raise self._error()

    def id_of(self, piece: str) -> int | None:
        return None

    @staticmethod
    def _error() -> RequestError:
        return RequestError("this model file has no vocabulary; give the prompt, and take the answer, as token ids")


def load_gguf(metadata: Mapping[str, Any], path: Path | str | None = None) -> Tokenizer:
    """Raises ModelFormatError naming the key; a UserWarning where the file leaves the pre-tokenizer open."""
    model = metadata.get(_PREFIX + "model", "no_vocab")
    template = metadata.get("tokenizer.chat_template")
    if isinstance(model, str) and model in ("no_vocab", "none"):
        size = metadata.get(f"{metadata.get('general.architecture')}.vocab_size", 0)
        bos, *ends = (_token_id(metadata, name, path) for name in ("bos_token_id", "eos_token_id", "eot_token_id"))
        specials = SpecialTokens({}, bos, frozenset(token_id for token_id in ends if token_id is not None))
        return Tokenizer(NoTextCodec(int(size)), specials, template)
    if not isinstance(model, str) or model not in _MODELS:
        raise ModelFormatError(
            f"tokenizer.ggml.model is {model!r}, which is not supported; known: {', '.join(_MODELS)}", path=path
        )
    vocab = _Vocab(metadata, path)
    codec, add_bos = _spm_codec(vocab) if model == "llama" else _bpe_codec(vocab)
    return Tokenizer(codec, vocab.special_tokens(add_bos, is_spm=model == "llama"), template)


def _token_id(metadata: Mapping[str, Any], name: str, path: Path | str | None) -> int | None:
    token_id = metadata.get(_PREFIX + name)
    if token_id is None or token_id == NO_TOKEN:
        return None
    if type(token_id) is not int:
        raise ModelFormatError(f"{_PREFIX}{name} must be a token id, got {token_id!r}", path=path)
    return token_id


class _Vocab:
    """The keys, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any], path: Path | str | None) -> None:
        self.metadata = metadata
        self.path = path
        tokens = self.list_of("tokens", str)
        self.tokens: list[str] = [token or f"[EMPTY_{n}]" for n, token in enumerate(tokens)]
        self.ids = {token: n for n, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for n, token in enumerate(self.tokens) if self.ids[token] != n)
            raise self.error("tokens", f"holds {twice!r} twice")
        types = self.list_of("token_type", int, default=[TokenType.NORMAL] * len(self.tokens))
        if len(types) != len(self.tokens):
            raise self.error("token_type", f"has {len(types)} entries for {len(self.tokens)} tokens")
        self.types: list[int] = list(types)
        for token in END_OF_TURN & self.ids.keys():  # some files call them normal
            self.types[self.ids[token]] = TokenType.CONTROL
        for key in ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"):
            token_id = self.id_of(key)
            if token_id is not None:
                self.types[token_id] = TokenType.CONTROL

    def error(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{_PREFIX}{key} {problem}", path=self.path)

    def list_of(self, key: str, *kinds: type, default: Sequence[Any] | None = None) -> Sequence[Any]:
        """An array whose elements are of one of `kinds`."""
        value = self.metadata.get(_PREFIX + key, default)
        if value is None:
            raise self.error(key, "is missing")
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, (list, tuple)):
            raise self.error(key, f"must be an array, got {type(value).__name__}")
        found = set(map(type, value)) - set(kinds)
        if found and not all(issubclass(kind, kinds) for kind in found):
            raise self.error(key, f"must hold {kinds[0].__name__}s, got {found.pop().__name__}")
        return value

    def id_of(self, key: str) -> int | None:
        token_id = _token_id(self.metadata, key, self.path)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise self.error(key, f"is {token_id}, the vocabulary has {len(self.tokens)} tokens")
        return token_id

    def of_type(self, *types: TokenType) -> Iterable[int]:
        return (n for n, kind in enumerate(self.types) if kind in types)

    def special_tokens(self, add_bos: bool, *, is_spm: bool) -> SpecialTokens:
        bos, eos = self.id_of("bos_token_id"), self.id_of("eos_token_id")
        if is_spm:  # the defaults of llama.cpp, which old files rely on
            bos = self._default_control(1) if bos is None else bos
            eos = self._default_control(2) if eos is None else eos
        add_bos = bool(self.metadata.get(_PREFIX + "add_bos_token", add_bos))
        add_eos = bool(self.metadata.get(_PREFIX + "add_eos_token", False))
        if add_bos and bos is None:
            raise self.error("bos_token_id", "is missing, but a BOS is to be added")
        if add_eos and eos is None:
            raise self.error("eos_token_id", "is missing, but an EOS is to be added")
        by_id = {n: SpecialToken(n, self.tokens[n]) for n in self.of_type(TokenType.CONTROL, TokenType.UNKNOWN)}
        ends = END_OF_TURN & self.ids.keys()
        if {"<|return|>", "<|call|>"} <= ends:  # there <|end|> closes a message, not the turn (o200k_harmony)
            ends -= {"<|end|>"}
        named = (eos, self.id_of("eot_token_id"), self.id_of("eom_token_id"))
        return SpecialTokens(
            by_id,
            bos_token_id=bos,
            eos_token_id=eos,
            eos_token_ids=frozenset({n for n in named if n is not None} | {self.ids[token] for token in ends}),
            prefix_ids=(bos,) if add_bos and bos is not None else (),
            suffix_ids=(eos,) if add_eos and eos is not None else (),
        )

    def _default_control(self, token_id: int) -> int | None:
        is_control = token_id < len(self.types) and self.types[token_id] == TokenType.CONTROL
        return token_id if is_control else None


def _spm_codec(vocab: _Vocab) -> tuple[SpmCodec, bool]:
    values = vocab.list_of("scores", float, int)
    if len(values) != len(vocab.tokens):
        raise vocab.error("scores", f"has {len(values)} entries for {len(vocab.tokens)} tokens")
    if not all(map(math.isfinite, values)):
        raise vocab.error("scores", "holds a value that is no finite number")
    # Control, unknown and byte tokens are left out, as in SentencePiece: merging must never turn text into them.
    scores = {
        vocab.tokens[n]: values[n] for n in vocab.of_type(TokenType.NORMAL, TokenType.UNUSED, TokenType.USER_DEFINED)
    }
    unknown_id = vocab.id_of("unknown_token_id")
    if unknown_id is None:
        unknown_id = next(iter(vocab.of_type(TokenType.UNKNOWN)), None)
    byte_ids = byte_ids_of({vocab.tokens[n]: n for n in vocab.of_type(TokenType.BYTE)})
    if byte_ids is None and unknown_id is None:
        raise vocab.error("tokens", "has neither all 256 byte tokens nor an unknown token")
    codec = SpmCodec(
        vocab.tokens,
        scores,
        vocab.ids,
        user_defined=[vocab.tokens[n] for n in vocab.of_type(TokenType.USER_DEFINED)],
        byte_ids=byte_ids,
        unknown_id=unknown_id,
        add_space_prefix=bool(vocab.metadata.get(_PREFIX + "add_space_prefix", True)),
    )
    return codec, True


def _bpe_codec(vocab: _Vocab) -> tuple[RustCodec, bool]:
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as RustTokenizer

    rule = _pre_tokenizer(vocab)
    # A special token, or bytes that are no UTF-8, must not be reachable from text: it gets a name that byte-level text
    # cannot spell (NUL is not in its alphabet), and keeps its true one in `pieces`.
    pieces = {n: vocab.tokens[n] for n in vocab.of_type(TokenType.CONTROL, TokenType.UNKNOWN)}
    pieces |= {n: vocab.tokens[n] for n in _not_utf8(vocab.tokens)}
    ids = dict(vocab.ids)
    for token_id, token in pieces.items():
        del ids[token]
        ids[f"\0{token_id}"] = token_id
    merges = [tuple(merge.split(" ")) for merge in vocab.list_of("merges", str)]
    if any(len(merge) != 2 for merge in merges):
        wrong = next(n for n, merge in enumerate(merges) if len(merge) != 2)
        raise vocab.error("merges", f"entry {wrong} must be two pieces and a space, got {' '.join(merges[wrong])!r}")
    bpe = checked(
        lambda: models.BPE(ids, merges, ignore_merges=rule.ignore_merges), f"{_PREFIX}merges is broken", vocab.path
    )
    rust = RustTokenizer(bpe)
    _set_pre_tokenizer(rust, rule)
    user_defined = [n for n in vocab.of_type(TokenType.USER_DEFINED) if n not in pieces]
    rust.add_tokens([AddedToken(vocab.tokens[n], normalized=False, special=False) for n in user_defined])
    codec = RustCodec(
        rust,
        PieceDecoder(byte_level=True),
        vocab_size=len(vocab.tokens),
        raw_ids=frozenset(user_defined),
        pieces=pieces,
    )
    return codec, rule.add_bos


def _not_utf8(tokens: Sequence[str]) -> list[int]:
    """Places of tokens whose bytes are no UTF-8 (surrogates stand for them). Looks at all at once: nearly never any."""
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        return [n for n, token in enumerate(tokens) if any("\ud800" <= char <= "\udfff" for char in token)]
    return []


def _pre_tokenizer(vocab: _Vocab) -> PreTokenizer:
    name = vocab.metadata.get(_PREFIX + "pre")
    if name is None:
        warnings.warn(f"{vocab.path or 'the GGUF file'} does not name its pre-tokenizer; using 'default'", stacklevel=2)
        name = "default"
    rule = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rule is None:
        raise vocab.error("pre", f"is {name!r}, which is not supported; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    return rule


def _set_pre_tokenizer(rust: Any, rule: PreTokenizer) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if rule.nfc:
        rust.normalizer = normalizers.NFC()
