"""What quantization costs the demo model: the table of docs/quantization.md.

    python benchmarks/quantization_table.py build FOLDER   quantize in every way of WAYS, with `gllm quantize`
    python benchmarks/quantization_table.py judge FOLDER   perplexity and divergence on the held-out text
    python benchmarks/quantization_table.py speed FOLDER   decoding, one sequence; let nothing else compute meanwhile
    python benchmarks/quantization_table.py table FOLDER   print the table

The text is the standard library of the Python that runs this: held-out files to judge, training files to calibrate
(tools/demo_corpus.py; a file's path decides, so the halves are those of the model's training). Each step adds to
FOLDER/results.json, and what is there is not done again. The baseline is the demo model in f16.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import gllm_driver as gllm
from gllm_driver.convert.plan import parse_keep
from gllm_driver.convert.run import Options, quantize
from gllm_driver.llm import demo_model_path

CALIBRATION_CHARACTERS = 1_500_000
JUDGED_WINDOWS = 24  # of 512 tokens, the second half of each is scored
ALL_TWO_BITS = ("*=int2_64m",)
KEPT_IN_EIGHT = ("token_embd*=int8", "*attn_v*=int8", "*ffn_down*=int8")  # what `gllm quantize` keeps in 4 bits
# name: (type, method, calibrated, keep)
WAYS: dict[str, tuple[str, str | None, bool, tuple[str, ...]]] = {
    "f16": ("f16", None, False, ()),
    "q8_0": ("q8_0", None, False, ()),
    "int8": ("int8", None, False, ()),
    "q6_k": ("q6_k", None, False, ()),
    "q5_k": ("q5_k", None, False, ()),
    "q4_k": ("q4_k", None, False, ()),
    "q4_k, weighed": ("q4_k", None, True, ()),
    "q4_0": ("q4_0", "rtn", False, ()),
    "q4_0, search": ("q4_0", "search", False, ()),
    "q4_0, gptq": ("q4_0", "gptq", True, ()),
    "int4, rtn": ("int4", "rtn", False, ()),
    "int4, search": ("int4", "search", False, ()),
    "int4, hqq": ("int4", "hqq", False, ()),
    "int4, gptq": ("int4", "gptq", True, ()),
    "q2_k": ("q2_k", None, False, ()),
    "q2_k, weighed": ("q2_k", None, True, ()),
    "int2, rtn": ("int2", "rtn", False, ()),
    "int2, search": ("int2", "search", False, ()),
    "int2, hqq": ("int2", "hqq", False, ()),
    "int2, gptq": ("int2", "gptq", True, ()),
    "int2_32m, gptq": ("int2_32m", "gptq", True, ()),
    "int2, gptq, int8 kept": ("int2", "gptq", True, KEPT_IN_EIGHT),
    "int2_32m, gptq, int8 kept": ("int2_32m", "gptq", True, KEPT_IN_EIGHT),
    "int2 everywhere, rtn": ("int2", "rtn", False, ALL_TWO_BITS),
    "int2 everywhere, gptq": ("int2", "gptq", True, ALL_TWO_BITS),
    "int1, search": ("int1", "search", False, ()),
    "int1, gptq": ("int1", "gptq", True, ()),
}


def texts(folder: Path, tokenizer: Any) -> list[int]:
    """Held-out token ids; writes the calibration text into the folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import demo_corpus

    training, held_out = demo_corpus.collect([]).split()
    for documents in (training, held_out):
        random.Random(3).shuffle(documents)
    text, calibration = "", folder / "calibration.txt"
    for document in training:
        text += document.text + "\n"
        if len(text) > CALIBRATION_CHARACTERS:
            break
    calibration.write_text(text, encoding="utf-8")
    end = demo_corpus.SPECIAL_TOKENS.index(demo_corpus.END_OF_TEXT)
    return [token for document in held_out for token in (*tokenizer.encode(document.text), end)]


def path_of(folder: Path, name: str) -> Path:
    stem = name.replace(", ", "-").replace(" ", "-")
    return folder / (stem if WAYS[name][0].startswith("int") else f"{stem}.gguf")


def build(folder: Path, results: dict[str, Any]) -> None:
    for name, (type_name, method, calibrated, keep) in WAYS.items():
        if path_of(folder, name).exists():
            continue
        calib = folder / "calibration.txt" if calibrated else None
        options = Options(type_name, method=method, calib=calib, keep=[parse_keep(each) for each in keep])
        report = quantize(str(demo_model_path()), path_of(folder, name), options)
        results.setdefault(name, {}).update(nbytes=report.nbytes, bits=report.bits_per_weight)
        print(name, f"{report.bits_per_weight:.3f} bits", flush=True)
        save(folder, results)


def judge(folder: Path, results: dict[str, Any], tokens: list[int]) -> None:
    with gllm.load(path_of(folder, "f16"), device="cpu", context_length=512) as exact:
        for name in built(results):
            if "perplexity" in results[name]:
                continue
            with gllm.load(path_of(folder, name), device="cpu", context_length=512) as llm:
                found = gllm.compare(exact, llm, tokens, context=512, max_windows=JUDGED_WINDOWS)
            results[name] |= {
                "perplexity": found.perplexity_b.value,
                "ratio": found.ratio.value,
                "ratio_error": found.ratio.error,
                "kl": found.kl.value,
                "same_top": found.same_top.value,
            }
            print(name, f"{found.perplexity_b.value:.4f}, {100 * (found.ratio.value - 1):+.2f} %", flush=True)
            save(folder, results)


def speed(folder: Path, results: dict[str, Any]) -> None:
    """Each model and the baseline in turn; the ratio is the median of those within a round."""
    with gllm.load(path_of(folder, "f16"), device="cpu", context_length=512) as exact:
        for name in built(results):
            with gllm.load(path_of(folder, name), device="cpu", context_length=512) as llm:
                rounds = [(decoded_per_s(llm), decoded_per_s(exact)) for _ in range(5)]
            results[name]["decode"] = statistics.median(own for own, _ in rounds)
            results[name]["decode_ratio"] = statistics.median(own / base for own, base in rounds)
            save(folder, results)


def decoded_per_s(llm: gllm.LLM) -> float:
    timings = llm.generate("def f(x):\n", max_tokens=200, temperature=0, ignore_eos=True).timings
    return timings.decode_tokens_per_s


def built(results: dict[str, Any]) -> list[str]:
    return [name for name in WAYS if name in results]


def save(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> None:
    print(
        "| type, method | bits per weight | bytes | perplexity | against f16 | KL, nats | same top | tok/s | of f16's |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in built(results):
        r = results[name]
        print(
            f"| {name} | {r['bits']:.2f} | {r['nbytes']:,} | {r['perplexity']:.3f} | {100 * (r['ratio'] - 1):+.2f} % "
            f"| {r['kl']:.4f} | {100 * r['same_top']:.1f} % | {r['decode']:,.0f} | {r['decode_ratio']:.2f} |"
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["build", "judge", "speed", "table"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if args.step in ("build", "judge"):
        with gllm.load(None, device="cpu") as llm:
            tokens = texts(args.folder, llm.tokenizer)
        build(args.folder, results) if args.step == "build" else judge(args.folder, results, tokens)
    elif args.step == "speed":
        speed(args.folder, results)
    else:
        table(results)


if __name__ == "__main__":
    main(sys.argv[1:])
