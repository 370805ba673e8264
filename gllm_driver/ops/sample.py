"""sample: choose the next token of each sequence on the device, and advance the device's step state.

No sort of the vocabulary: top-k and top-p are thresholds found by histograms over the bits of the logits, with
probabilities summed as integers, so that the sums do not depend on their order. Every backend follows these steps:

1. NaN logits become −inf. Penalties, in the order repetition, presence, frequency (SamplingConfig has their meaning),
   apply only where counts are given; a token is seen if its count has SEEN_IN_PROMPT or an output occurrence, and
   presence and frequency look at output occurrences alone.
2. best = the largest logit. −inf: the row holds no number and yields −1. Temperature 0, or best +inf: the token is the
   lowest id whose logit is best. Otherwise z = (logit − best) / temperature; subtracting first keeps a tiny
   temperature from overflowing.
3. top_k (0 keeps all): keep z ≥ the k-th largest, ties with it included (logits that f32 cannot tell apart in z tie).
4. top_p (1 keeps all): with probabilities renormalized over what is kept, keep tiers of equal z, best first, until
   their sum reaches top_p.
5. min_p: keep probabilities ≥ min_p × the largest one.
6. Gumbel-max: the kept token with the largest z − ln(−ln u) wins, the lowest id among equals.
   u = (word >> 9 + 0.5) · 2⁻²³, where both factors and the sum are exact in f32 and u is never 0 or 1 (24 bits and a
   half would round to 1 once in 2²⁴, and that token would win with a score of +inf).
   `word` is output `id mod 4` of Philox4x32-10 (Salmon et al. 2011) at counter (id // 4, 0, low and high half of
   position), key (low and high half of seed): the draw depends on seed, position and token id alone.
7. The chosen token's count is raised by one. With ids, ids[s] becomes the token and positions[s] grows by one. The −1
   of a row without numbers is not counted and enters ids as 0: a step already under way must not look up row −1.
"""

from __future__ import annotations

from ._sample_cases import cases
from ._sample_params import PARAM_FIELDS, PARAM_WORDS, PARAMS, SEEN_IN_PROMPT, pack_params, token_counts
from ._sample_reference import reference
from .contract import Array, Contract, Rule

__all__ = ["CONTRACT", "PARAMS", "PARAM_FIELDS", "PARAM_WORDS", "SEEN_IN_PROMPT", "pack_params", "token_counts"]

CONTRACT = Contract(
    name="sample",
    doc=(
        "tokens[s] = the choice for logits[s] under params[s] at positions[s] (the position of the token that produced "
        "the logits). Order: penalties, temperature, top_k, top_p, min_p, draw; temperature 0 is argmax, ties to the "
        "lowest id. top_k keeps ties with the k-th best; top_p keeps whole tiers of equal logits. With counts, the "
        "chosen token's count is raised. With ids, ids[s] becomes the token and positions[s] grows by one, so that the "
        "next step runs without the host. A row without any number yields −1."
    ),
    dims={"S": "sequences", "V": "vocabulary size"},
    arrays=(
        Array("logits", ("S", "V")),
        Array("params", ("S", PARAM_WORDS), ("i32",)),
        Array("counts", ("S", "V"), ("i32",), role="inout", optional=True, doc="needed by penalties"),
        Array("tokens", ("S",), ("i32",), role="out"),
        Array("ids", ("S",), ("i32",), role="inout", optional=True),
        Array("positions", ("S",), ("i64",), role="inout"),
    ),
    constants={"PARAM_WORDS": PARAM_WORDS, "SEEN_IN_PROMPT": SEEN_IN_PROMPT},
    rules=(Rule(lambda v: v["V"] < 1 << 30, "the vocabulary has fewer than 2**30 tokens"),),
    reference=reference,
    cases=cases,
)
