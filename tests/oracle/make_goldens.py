"""Write tests/data/goldens/tiny_models.npz from transformers: `python -m tests.oracle.make_goldens` in the repository.

Refuses results on which a test could not lean: when transformers and the float64 model disagree, when a greedy token
wins by a hair, or when the cached and the uncached pass of transformers choose different tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import goldens, hf_oracle, numpy_model, tiny_models

MIN_MARGIN = 0.1  # of the best over the second best logit, in standard deviations of the logits
MAX_DISAGREEMENT = 1e-5  # of transformers in f32 with float64: its own rounding, no more


def make(row: tiny_models.Row, directory: Path) -> goldens.Golden:
    """The golden results of one row; RuntimeError when they are not to be trusted."""
    tiny_models.build(row, directory)
    model = hf_oracle.load(directory, "f32")
    prompt = tiny_models.prompt(row)
    greedy = hf_oracle.greedy(model, prompt, tiny_models.NUM_GREEDY)
    tokens = prompt + greedy
    logits = hf_oracle.logits(model, tokens)

    config, weights = tiny_models.config(row), tiny_models.weights(row)
    exact = numpy_model.logits(config, weights, tokens)
    disagreement = goldens.relative_error(logits, exact)
    if not (disagreement <= MAX_DISAGREEMENT):
        raise RuntimeError(f"{row.name}: transformers and the float64 model differ by {disagreement:.3g}")
    exact_greedy, margin = numpy_model.greedy(config, weights, prompt, tiny_models.NUM_GREEDY)
    if not (margin >= MIN_MARGIN):
        raise RuntimeError(f"{row.name}: a greedy token leads by {margin:.3g} standard deviations; change the seed")
    uncached = logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    if not (greedy == uncached == exact_greedy):
        raise RuntimeError(f"{row.name}: greedy {greedy}, without a cache {uncached}, in float64 {exact_greedy}")

    positions = list(goldens.POSITIONS)
    rounding = {}
    for dtype in ("f16", "bf16"):
        rounded = hf_oracle.logits(hf_oracle.load(directory, dtype), tokens)
        rounding[dtype] = goldens.rms_error(rounded[positions], exact[positions])
    errors = f"f32 {disagreement:.1e}  f16 {rounding['f16']:.1e}  bf16 {rounding['bf16']:.1e}"
    print(f"{row.name:20s} {errors}  margin {margin:.2f}")
    return goldens.Golden(tiny_models.fingerprint(row), tokens, greedy, logits[positions], rounding)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        results = {row.name: make(row, Path(scratch) / row.name) for row in tiny_models.ROWS}
    goldens.save(results)
    print(f"{goldens.PATH.name}: {len(results)} rows, {goldens.PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
