"""What distilling KV costs: the demonstration model on its held-out text, and a control of random weights.

python benchmarks/kv_distillation.py [--windows 60] [--context 896] [--model M.gguf FILE]

For each ratio, method, exact window and weighting: bytes of a context's KV, and perplexity of the tokens that follow,
to that after exact KV (with the error of the paired difference); beside it the newest tokens in as many bytes, and the
exact ends alone. "naive": rotated keys are added as they lie. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import gllm_driver as gllm  # noqa: E402
from gllm_driver.config import DistillConfig  # noqa: E402
from gllm_driver.distillation import cost  # noqa: E402
from tools import demo_corpus  # noqa: E402

# (ratio, method, window, sharpness, whether keys are turned first)
WAYS = [
    *((ratio, "tokens", 256, math.inf, True) for ratio in (2, 4, 8)),
    *((ratio, "tokens", 64, math.inf, True) for ratio in (2, 4, 8)),
    (2, "tokens", 256, 0.0, True),
    (4, "tokens", 256, 0.0, True),
    (2, "tokens", 256, 0.0, False),
    (4, "tokens", 256, 0.0, False),
    *((ratio, "layers", 256, math.inf, True) for ratio in (2, 4, 8)),
]


def held_out(llm: gllm.LLM) -> list[int]:
    """Token ids of the files that the demonstration model was not trained on, in a fixed shuffled order."""
    _, documents = demo_corpus.collect([]).split()
    random.Random(3).shuffle(documents)
    end = demo_corpus.SPECIAL_TOKENS.index(demo_corpus.END_OF_TEXT)
    return [token for document in documents for token in (*llm.tokenizer.encode(document.text), end)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model, with --file; without it, the demonstration model")
    parser.add_argument("--file", type=Path, help="a text; random token ids without it")
    parser.add_argument("--context", type=int, default=896)
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    length = arguments.context + arguments.continuation
    with gllm.load(
        arguments.model, device=arguments.device, threads=arguments.threads, context_length=length, prefix_reuse=False
    ) as llm:
        if arguments.file is not None:
            tokens = llm.tokenizer.encode(arguments.file.read_text(encoding="utf-8"))
        elif arguments.model is None:
            tokens = held_out(llm)
        else:
            tokens = random.Random(1).choices(range(3, llm.arch.vocab_size), k=arguments.windows * length)
        print("| ratio | method | window | bytes | perplexity | newest tokens | ends alone |")
        print("|---|---|---|---|---|---|---|")
        for ratio, method, window, sharpness, turned in WAYS:
            found = cost(
                llm._engine,
                tokens,
                llm._engine.rope if turned else None,
                DistillConfig(ratio, method, window=window),
                context=arguments.context,
                continuation=arguments.continuation,
                max_windows=arguments.windows,
                sharpness=sharpness,
            )
            exact = found.exact.value
            how = (
                method
                if method == "layers" or math.isinf(sharpness)
                else "tokens, mean"
                if turned
                else "tokens, mean, naive"
            )
            print(
                f"| {ratio} | {how} | {window} | {100 * (found.nbytes_after / found.nbytes_before - 1):+.0f} % | "
                f"{100 * (found.ratio.value - 1):+.2f} ± {100 * found.ratio.error:.2f} % | "
                f"{100 * (found.shorter.value / exact - 1):+.2f} % | {100 * (found.ends.value / exact - 1):+.2f} % |",
                flush=True,
            )
        print(f"\nExact: perplexity {exact:.3f}; {found.tokens:,} tokens, {found.windows} contexts of {found.context}.")


if __name__ == "__main__":
    main()
