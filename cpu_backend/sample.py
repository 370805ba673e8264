"""sample: a sequence is the unit of work. Thresholds come from histograms over the bits of the logits.

The order-preserving 32-bit key of a logit is cut into digits of 11, 11 and 10 bits; three passes of a histogram from
the top find the exact key at which a count (top_k) or a probability mass (top_p, summed in units of 2⁻⁴⁰ as integers)
is reached. Probabilities and scores come from z = (logit − best) / temperature ≤ 0.
"""

from __future__ import annotations

import math

from numba import njit, types

from gllm_driver.ops.sample import PARAM_WORDS, SEEN_IN_PROMPT

from .attention import exp
from .philox import gumbel, philox
from .simd import LANES, f32_at, f32_bits, hmax, i32_at, i64_at, load_f32, put_f32, put_i32, put_i64, splat, vmax
from .sync import take
from .workspace import DIGIT_BITS

MINUS_INF = float("-inf")
# −ln(−ln u) lies in (−2.82, 16.7): a token this far below the best cannot win the draw.
DRAW_REACH = 20.5
MASS_UNIT = float(1 << 40)


@njit
def greatest(row, V):
    """Maximum of a row, NaN ignored; −inf when there is no number."""
    best = splat(types.float32(MINUS_INF))
    i = 0
    while i + LANES <= V:
        best = vmax(load_f32(row + 4 * i), best)
        i += LANES
    top = hmax(best)
    while i < V:
        value = f32_at(row + 4 * i)
        if value > top:
            top = value
        i += 1
    return top


@njit
def argmax(row, V, best):
    """Lowest index whose logit is the maximum `best`."""
    i = 0
    while f32_at(row + 4 * i) != best:
        i += 1
    return i


@njit
def penalized(logit, count, repetition, presence, frequency):
    output = count & (SEEN_IN_PROMPT - 1)
    if count != 0:
        if logit > 0:
            logit = logit / repetition
        else:
            logit = logit * repetition
    if output > 0:
        logit = logit - presence - frequency * types.float32(output)
    return logit


@njit
def key_at(address):
    """Order-preserving key of the logit at an address, in [1, 2³²); 0 for NaN. −0 and +0 share one key."""
    logit = f32_at(address)
    if logit != logit:
        return 0
    bits = f32_bits(logit + types.float32(0.0))
    if bits & 0x80000000 != 0:
        return bits ^ 0xFFFFFFFF
    return bits | 0x80000000


@njit
def mass_at(address):
    return types.int64(exp(f32_at(address)) * types.float32(MASS_UNIT))


@njit
def threshold(row, z, V, wanted, by_mass, floor, bins):
    """Greatest key such that the logits with keys ≥ it (and ≥ floor) number, or weigh, at least `wanted`."""
    prefix, above = 0, 0
    for level in range(3):
        shift, width = 0, 32 - 2 * DIGIT_BITS
        if level < 2:
            shift, width = 32 - DIGIT_BITS * (level + 1), DIGIT_BITS
        for i in range(1 << width):
            put_i64(bins + 8 * i, 0)
        for i in range(V):
            key = key_at(row + 4 * i)
            if key >= floor and key >> (shift + width) == prefix:
                digit = bins + 8 * ((key >> shift) & ((1 << width) - 1))
                amount = 1
                if by_mass:
                    amount = mass_at(z + 4 * i)
                put_i64(digit, i64_at(digit) + amount)
        digit = (1 << width) - 1
        while digit > 0 and above + i64_at(bins + 8 * digit) < wanted:
            above += i64_at(bins + 8 * digit)
            digit -= 1
        prefix = (prefix << width) | digit
    return max(prefix, floor)


@njit
def total_mass(row, z, V, floor):
    total = 0
    for i in range(V):
        if key_at(row + 4 * i) >= floor:
            total += mass_at(z + 4 * i)
    return total


@njit
def draw(row, z, V, floor, lowest, seed, position):
    """Gumbel-max over the entries with key ≥ floor and z ≥ lowest."""
    low = types.uint64(0xFFFFFFFF)
    k0, k1 = types.uint64(seed) & low, types.uint64(seed) >> types.uint64(32)
    p0, p1 = types.uint64(position) & low, types.uint64(position) >> types.uint64(32)
    best, choice, group = types.float32(MINUS_INF), -1, -1
    w0 = w1 = w2 = w3 = types.uint64(0)
    for i in range(V):
        value = f32_at(z + 4 * i)
        if not value >= lowest or key_at(row + 4 * i) < floor:
            continue
        if i // 4 != group:
            group = i // 4
            w0, w1, w2, w3 = philox(types.uint64(group), types.uint64(0), p0, p1, k0, k1)
        lane = i % 4
        word = w0
        if lane == 1:
            word = w1
        elif lane == 2:
            word = w2
        elif lane == 3:
            word = w3
        score = value + gumbel(word)
        if score > best:
            best, choice = score, i
    return choice


@njit
def penalize(logits, counts, V, params, out):
    repetition, presence, frequency = f32_at(params + 12), f32_at(params + 16), f32_at(params + 20)
    for i in range(V):
        logit = penalized(f32_at(logits + 4 * i), i32_at(counts + 4 * i), repetition, presence, frequency)
        put_f32(out + 4 * i, logit)


@njit
def has_penalties(params):
    one, zero = types.float32(1.0), types.float32(0.0)
    return f32_at(params + 12) != one or f32_at(params + 16) != zero or f32_at(params + 20) != zero


@njit
def choose(row, V, params, position, z, bins):
    """The token for one row of (penalized) logits; z [V] and bins are scratch."""
    temperature, top_p, min_p = f32_at(params), f32_at(params + 4), f32_at(params + 8)
    top_k = i32_at(params + 24)
    best = greatest(row, V)
    if best == types.float32(MINUS_INF):
        return -1
    if temperature == types.float32(0.0) or best == types.float32(math.inf):
        return argmax(row, V, best)
    for i in range(V):
        value = (f32_at(row + 4 * i) - best) / temperature
        if not value <= types.float32(0.0):
            value = types.float32(MINUS_INF)
        put_f32(z + 4 * i, value)
    floor = 0
    if 0 < top_k < V:
        floor = threshold(row, z, V, top_k, False, 0, bins)
    if top_p < types.float32(1.0):
        wanted = types.int64(math.ceil(types.float64(top_p) * types.float64(total_mass(row, z, V, floor))))
        floor = threshold(row, z, V, max(wanted, 1), True, floor, bins)
    lowest = types.float32(-DRAW_REACH)
    if min_p > types.float32(0.0):
        lowest = max(lowest, types.float32(math.log(min_p)))
    return draw(row, z, V, floor, lowest, i64_at(params + 32), position)


def kernel(a, team, thread):
    bins = team.private + thread * team.private_nbytes
    s = take(team, 1)
    while s < a.S:
        position = i64_at(a.positions + 8 * s)
        params = a.params + 4 * PARAM_WORDS * s
        row, counts = a.logits + 4 * s * a.V, 0
        z = team.shared + 8 * s * a.V
        if a.counts != 0:
            counts = a.counts + 4 * s * a.V
            if has_penalties(params):
                penalize(row, counts, a.V, params, z + 4 * a.V)
                row = z + 4 * a.V
        token = choose(row, a.V, params, position, z, bins)
        put_i32(a.tokens + 4 * s, token)
        if counts != 0 and token >= 0:
            put_i32(counts + 4 * token, i32_at(counts + 4 * token) + 1)
        if a.ids != 0:
            put_i32(a.ids + 4 * s, max(token, 0))
            put_i64(a.positions + 8 * s, position + 1)
        s = take(team, 1)
