"""Small vocabularies, hard strings, and what llama.cpp makes of them.

`python tests/unit/tokenizer_goldens.py` trains the vocabularies, writes them as GGUF files to a temporary folder, lets
llama.cpp encode the hard strings and writes tests/data/tokenizer/. It needs llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data" / "tokenizer"

HARD_STRINGS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "Hello, world!",
    "hello   world",
    "\n",
    "\n\n\n",
    "\r\n",
    "a\r\nb\r\n\r\n  c",
    "\t",
    "\t\tx\t y",
    " \n \n  \n",
    "if x:\n    return  y\n\n\n        # done\n",
    "end of line   ",
    "   start of line",
    "a\u00a0b\u00a0\u00a0c",
    "\u2003em\u2009thin\u3000ideographic\u205fmath",
    "line\u2028para\u2029next\u0085nel",
    "zero\u200bwidth\u200djoin\ufeffbom",
    "I'm you're he's we'll they'd I've can't",
    "I'M YOU'RE HE'S WE'LL THEY'D I'VE CAN'T",
    "I'm'S 'tis rock'n'roll '' 's",
    "1 12 123 1234 12345 1234567890123",
    "3.14159e-10 0xDEADBEEF 1,000,000",
    "v1.2.3-rc4+build5",
    "²³¹ ½¼ Ⅷ ٣٤٥ १२३ 一二三 ①②",
    "😀",
    "😀😃 emoji 👍🏽 tone",
    "👨‍👩‍👧‍👦 family 🏳️‍🌈 flag",
    "🇩🇪🇫🇷🇯🇵 flags 🇺",
    "日本語のテキスト、漢字とかな。カタカナ！",
    "中文分词测试：你好，世界！",
    "한국어 텍스트 시험",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Привет, мир! Ёжик",
    "Ελληνικά Ὀδυσσεύς",
    "e\u0301 cafe\u0301 a\u0308\u0323 n\u0303 \u0301alone",
    "é café ä ñ Å \u212b \u2126",
    "ﬁ ﬂ Ǆ ß ẞ İ ı",
    "\x00",
    "a\x00b\x01\x02\x1b[31mred\x1b[0m\x7f",
    "\ue000 private \U000f0000 use \uffff",
    "\ufffd\ufffe",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𓀀𓀁",
    "<s>",
    "</s>",
    "x<s>y</s>z <unk> <0x0A> <0xFF>",
    "<|im_start|>system\nyou are<|im_end|>\n<|endoftext|>",
    "<|begin_of_text|><|eot_id|> [INST] hi [/INST]",
    "<|im_start",
    "<think>hm</think><tool> <tool>x</tool>",
    "▁▁ ▁a a▁b",
    "((((((((((((((((()))))))))))))))))",
    "/* -*- */ //\n /// path/to/file\n",
    "!?!?!?... --- === +++ $$$ ^^^ ~~~ ``` |||",
    "camelCaseWord HTTPServer snake_case_word SCREAMING_CASE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abcabcabcabcabababababcabcaaabbbccc",
    "https://example.com/a?b=c&d=%20e#f me@example.org",
    "def fibonacci(n):\n\tif n < 2:\n\t\treturn n\n\treturn fibonacci(n-1) + fibonacci(n-2)\n",
    "the the the  the\tthe\nthe",
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>"]
USER_DEFINED = ["<think>", "</think>", "<tool>", "  \n"]
BPE_PRES = [
    "default",
    "gpt-2",
    "smollm",
    "starcoder",
    "llama-bpe",
    "smaug-bpe",
    "qwen2",
    "qwen35",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "deepseek-coder",
    "falcon",
    "seed-coder",
]


def reference_text(pre: str, text: str) -> str:
    """llama.cpp does not normalize; the tokenizers behind these two do, so it is given the normal form."""
    return unicodedata.normalize("NFC", text) if pre in ("qwen2", "qwen35") else text


def bpe_metadata(pre: str) -> dict[str, Any]:
    vocab = json.loads((DATA / "bpe.json").read_text())
    tokens = [*vocab["tokens"], *CONTROL, *USER_DEFINED]
    num_normal = len(vocab["tokens"])
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * num_normal + [3] * len(CONTROL) + [4] * len(USER_DEFINED),
        "tokenizer.ggml.merges": vocab["merges"],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
    }


def spm_metadata(*, tied: bool = False) -> dict[str, Any]:
    """tied: only five different scores, so ties decide most merges."""
    vocab = json.loads((DATA / "spm.json").read_text())
    pieces = vocab["pieces"]
    scores = [float(-(n * 7919 % 5) if tied else -n) for n in range(len(pieces))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces, *USER_DEFINED]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores + [-1000.0] * len(USER_DEFINED),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4] * len(USER_DEFINED),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def all_metadata() -> dict[str, dict[str, Any]]:
    spm = {"spm": spm_metadata(), "spm-tied": spm_metadata(tied=True)}
    spm["spm-no-prefix"] = {**spm_metadata(), "tokenizer.ggml.add_space_prefix": False}
    return {pre: bpe_metadata(pre) for pre in BPE_PRES} | spm


class LlamaCpp:
    """llama.cpp over a vocabulary alone."""

    def __init__(self, metadata: dict[str, Any], folder: Path) -> None:
        import gguf
        import llama_cpp

        file = folder / "vocab.gguf"
        writer = gguf.GGUFWriter(file, metadata["general.architecture"])
        for key, value in metadata.items():
            if key == "general.architecture":
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self._llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=add_bos, special=False) if text or add_bos else []


def _train() -> None:
    """Merges learnt from whole lines, so that words, spaces and signs join across any pre-tokenizer's borders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines = [line for text in HARD_STRINGS for line in text.splitlines(keepends=True)] * 3
    lines += inspect.getsource(json.decoder).splitlines(keepends=True)
    lines += inspect.getsource(argparse).splitlines(keepends=True)[:800]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=1400, initial_alphabet=alphabet, show_progress=False)
    )
    spec = json.loads(byte_level.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    _write("bpe.json", {"tokens": tokens, "merges": [" ".join(merge) for merge in spec["merges"]]})

    spm = Tokenizer(models.BPE())
    spm.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    spm.train_from_iterator(
        [line.replace("\n", "") for line in lines], trainers.BpeTrainer(vocab_size=1200, show_progress=False)
    )
    spec = json.loads(spm.to_str())["model"]
    pieces = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    # As in Llama's own: merged pieces first, then characters, of which some are left to byte fallback.
    chars = [piece for piece in pieces if len(piece) == 1 and piece.isprintable() and ord(piece) < 0x3000]
    merged = [piece for piece in pieces if len(piece) > 1 and set(piece) <= set(chars)]
    runs = ["▁" * n for n in (2, 4, 8, 3)]
    known = set(merged)
    _write("spm.json", {"pieces": [run for run in runs if run not in known] + merged + chars})


def _write(name: str, value: Any) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def main() -> None:
    _train()
    goldens: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, metadata in all_metadata().items():
            llama = LlamaCpp(metadata, Path(folder))
            goldens[name] = [llama.encode(reference_text(name, text)) for text in HARD_STRINGS]
    _write("goldens.json", goldens)


if __name__ == "__main__":
    main()
