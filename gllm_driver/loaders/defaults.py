"""What a model's authors recommend for generation: generation_config.json, or GGUF's keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.checkpoint import GenerationDefaults
from ..models.fields import MAX_SIZE, Fields

# GGUF keys of tokens that end a turn or a text; each file says the ones it has.
_GGUF_END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


NO_TOKEN = 2**32 - 1  # how GGUF's u32 spells "there is none"


def defaults_of_hf(config: Mapping[str, Any], generation: Mapping[str, Any], path: Path) -> GenerationDefaults:
    """From generation_config.json, with config.json's token ids where it names none.

    As in transformers, `do_sample: false` means greedy decoding whatever the other numbers say (temperature 0 here),
    and `do_sample: true` without a temperature means 1.

    Raises ModelFormatError when a value is of the wrong type or range.
    """
    ids = {key: generation.get(key) for key in ("eos_token_id", "bos_token_id")}
    ids = {key: config.get(key) if value is None else value for key, value in ids.items()}
    temperature = generation.get("temperature")
    if generation.get("do_sample") is not None:
        samples = Fields(generation, path).flag("do_sample", False)
        temperature = 0.0 if not samples else 1.0 if temperature is None else temperature
    return _defaults(
        Fields({**generation, **ids, "temperature": temperature}, path),
        sampling=("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        eos=("eos_token_id",),
        bos="bos_token_id",
    )


def defaults_of_gguf(metadata: Mapping[str, Any], path: Path) -> GenerationDefaults:
    """From the tokenizer's special tokens and `general.sampling.*`; ModelFormatError as in `defaults_of_hf`."""
    known = {key: value for key, value in metadata.items() if type(value) is not int or value != NO_TOKEN}
    return _defaults(
        Fields(known, path),
        sampling=tuple(f"general.sampling.{name}" for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat")),
        eos=_GGUF_END_TOKENS,
        bos="tokenizer.ggml.bos_token_id",
    )


def _defaults(fields: Fields, sampling: tuple[str, ...], eos: tuple[str, ...], bos: str) -> GenerationDefaults:
    temperature, top_k, top_p, min_p, repetition_penalty = sampling

    def number(key: str, low: float, high: float) -> float | None:
        value = fields.values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            raise fields.wrong(key, f"a number in {low:g} … {high:g}")
        return float(value)

    ends: list[int] = []
    for key in eos:
        value = fields.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token <= MAX_SIZE for token in ids):
            raise fields.wrong(key, "a token id or a list of them")
        ends += ids
    return GenerationDefaults(
        temperature=number(temperature, 0.0, 1e6),
        # Some files spell "all" as −1.
        top_k=max(fields.integer(top_k, low=-1), 0) if fields.has(top_k) else None,
        top_p=number(top_p, 1e-9, 1.0),
        min_p=number(min_p, 0.0, 1.0),
        repetition_penalty=number(repetition_penalty, 1e-9, 1e6),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=fields.integer(bos, low=0) if fields.has(bos) else None,
    )
