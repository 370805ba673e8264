"""The tokenizer of a Hugging Face directory as the `tokenizer.*` keys of GGUF, checked by encoding with both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError
from ..loaders.codecs import fallback_byte
from ..loaders.gguf_vocab import TokenType
from ..loaders.jsonfile import read_object
from ..loaders.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from ..loaders.tokenizer import Tokenizer
from ..models.checkpoint import Checkpoint

_PREFIX = "tokenizer.ggml."
# Words, code, digits, spaces, accents, scripts without spaces, an emoji: what vocabularies cut differently.
_SAMPLES = (
    "Hello, world! It's 12345 o'clock, they'll say.",
    'def f(x):\n    return {"a": [x ** 2, 0x1F]}  # \t done\n\n\n',
    "Zażółć gęślą jaźń; Größe, naïve café — Ελληνικά, Русский текст",
    "你好，世界。日本語のテキスト 한국어 🙂👍🏽",
    "   leading and trailing   ",
)
_GPT2_SPLIT = PRE_TOKENIZERS["gpt-2"].patterns[-1]


def vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys; a model without tokenizer.json gets "no_vocab", which runs on token ids.

    Raises ModelFormatError for a tokenizer that GGUF has no words for.
    """
    file = checkpoint.metadata.get("tokenizer_file")
    if file is None:
        return {_PREFIX + "model": "no_vocab"}
    spec, tokenizer = read_object(file), Tokenizer.from_directory(file.parent)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise _unsaid(file, "is no BPE vocabulary")
    tokens, types = _tokens(spec, model, tokenizer, checkpoint.arch.vocab_size, file)
    values: dict[str, Any] = {"tokens": tokens, "token_type": types}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    if model.get("byte_fallback"):
        values |= {"model": "llama", "scores": _scores(tokens, merges), "add_space_prefix": _adds_space(tokenizer)}
    else:
        values |= {"model": "gpt2", "pre": _pre(spec, model, file), "merges": merges}
    values = {_PREFIX + key: value for key, value in {**values, **_special(tokenizer)}.items()}
    template = tokenizer.chat_template
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    if template:
        values["tokenizer.chat_template"] = template
    _compare(tokenizer, values, file)
    return values


def _unsaid(file: Path, problem: str) -> ModelFormatError:
    return ModelFormatError(f"{problem}, which GGUF cannot say; a type of our own keeps the tokenizer", path=file)


def _tokens(
    spec: Mapping[str, Any], model: Mapping[str, Any], tokenizer: Tokenizer, size: int, file: Path
) -> tuple[list[str], list[int]]:
    """Text and type of every id up to the rows of the embedding matrix."""
    tokens = {token_id: token for token, token_id in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    if model.get("byte_fallback"):
        types |= {i: TokenType.BYTE for i, token in tokens.items() if fallback_byte(token) is not None}
    for added in spec.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    for token_id, special in tokenizer.special_tokens.items():
        tokens[token_id] = special.content
        types[token_id] = TokenType.UNKNOWN if special.content == model.get("unk_token") else TokenType.CONTROL
    if max(tokens, default=-1) >= size:
        raise ModelFormatError(f"has ids up to {max(tokens)}, the model {size} embeddings", path=file)
    for missing in set(range(size)) - tokens.keys():
        tokens[missing], types[missing] = f"[PAD{missing}]", TokenType.UNUSED
    return [tokens[i] for i in range(size)], [int(types[i]) for i in range(size)]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair with the best score first: the earlier a merge, the better."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(tokenizer: Tokenizer) -> bool:
    return tokenizer.strips_leading_space


def _pre(spec: Mapping[str, Any], model: Mapping[str, Any], file: Path) -> str:
    """The name of the rule by which this tokenizer cuts words."""
    found: list[str] = []
    step = spec.get("pre_tokenizer") or {}
    for part in step.get("pretokenizers", [step]):
        match part:
            case {"type": "Split", "pattern": {"Regex": str(regex)}}:
                found.append(regex)
            case {"type": "Digits", "individual_digits": True}:
                found.append(r"\p{N}")
            case {"type": "ByteLevel", "use_regex": False}:
                pass
            case {"type": "ByteLevel"}:
                found.append(_GPT2_SPLIT)
            case _:
                raise _unsaid(file, f"cuts words by {str(part.get('type'))[:40]}")
    nfc = (spec.get("normalizer") or {}).get("type") == "NFC"
    wanted = PreTokenizer(tuple(found), nfc, bool(model.get("ignore_merges")))
    same = [name for name, rule in PRE_TOKENIZERS.items() if rule.patterns == wanted.patterns]
    for name in same:
        rule = PRE_TOKENIZERS[name]
        if (rule.nfc, rule.ignore_merges) == (wanted.nfc, wanted.ignore_merges):
            return name
    if not same:
        raise _unsaid(file, "cuts words by a rule of its own")
    return same[0]


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = sorted(tokenizer.eos_token_ids)
    eos = tokenizer.token_to_id(tokenizer.eos_token) if tokenizer.eos_token else next(iter(ends), None)
    ids = {"bos": tokenizer.bos_token_id, "eos": eos, "eot": next((end for end in ends if end != eos), None)}
    around = tokenizer.encode("")
    found: dict[str, Any] = {f"{name}_token_id": token_id for name, token_id in ids.items() if token_id is not None}
    return {**found, "add_bos_token": ids["bos"] in around, "add_eos_token": len(around) > 0 and around[-1] == eos}


def _compare(tokenizer: Tokenizer, values: Mapping[str, Any], file: Path) -> None:
    made = Tokenizer.from_gguf(values, file)
    for text in _SAMPLES:
        if made.encode(text) != tokenizer.encode(text):
            raise _unsaid(file, f"cuts {text[:20]!r} … in a way of its own")
