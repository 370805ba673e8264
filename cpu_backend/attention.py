"""The tile both attention ops are made of: a few query rows against a span of the paged KV cache, softmax online.

A span covers SPAN absolute context positions and its result is folded into the running one in order, both when one
thread does all spans (flash_attention) and when they are spread over threads (paged_attention); a query's result is the
same bits whichever op, tile or chunk computed it.
"""

from __future__ import annotations

from numba import njit, types

from .layout import dtype_row_nbytes, kv_row
from .simd import (
    LANES,
    call_address,
    f32_at,
    fma,
    hmax,
    hsum,
    i64_at,
    lane0,
    load_f32,
    put_f32,
    ramp,
    splat,
    store_f32,
    vexp,
    vmax,
)
from .workspace import SCORE_BLOCK

MINUS_INF = float("-inf")


@njit
def exp(x):
    return lane0(vexp(splat(x)))


@njit
def scale_row(x, n, factor):
    k = 0
    while k + LANES <= n:
        store_f32(x + 4 * k, load_f32(x + 4 * k) * splat(factor))
        k += LANES
    while k < n:
        put_f32(x + 4 * k, f32_at(x + 4 * k) * factor)
        k += 1


@njit
def fill_row(x, n, value):
    for k in range(n):
        put_f32(x + 4 * k, value)


@njit
def load_queries(q, stride, tokens, heads, Dh, scale, out):
    """Copy the query rows of one KV head group, token by token, times scale: out [tokens · heads, Dh]."""
    for t in range(tokens):
        for k in range(heads * Dh):
            put_f32(out + 4 * (t * heads * Dh + k), f32_at(q + t * stride + 4 * k) * scale)


@njit
def alibi_slope(head, num_heads, max_bias):
    """The slope of a query head: `alibi_slopes` in gllm_driver/ops/_attention.py."""
    n = 1
    while 2 * n <= num_heads:
        n *= 2
    steps = 2 * (head + 1)
    if head >= n:
        steps = 2 * (head - n) + 1
    share = types.float32(steps) / types.float32(2 * n)
    return exp(types.float32(-0.6931471805599453) * max_bias * share)


@njit
def _add_alibi(scores, rows, heads, first_head, num_heads, max_bias, first, p0):
    """Add slope · (key position − query position) to scores [rows, SCORE_BLOCK] of the keys from `first` on.

    Taken from the distance, which f32 holds exactly up to 2**24, and not from the position.
    """
    for r in range(rows):
        slope = splat(alibi_slope(first_head + r % heads, num_heads, max_bias))
        for k in range(0, SCORE_BLOCK, LANES):
            distance = splat(types.float32(first + k - (p0 + r // heads))) + ramp()
            s = scores + 4 * (r * SCORE_BLOCK + k)
            store_f32(s, fma(slope, distance, load_f32(s)))


@njit
def _softmax_rows(scores, rows, heads, first, n, p0, window, m, l, o, Dh):
    """Turn scores [rows, SCORE_BLOCK] of n positions from `first` on into weights; rescale the running result."""
    for r in range(rows):
        s = scores + 4 * r * SCORE_BLOCK
        position = p0 + r // heads
        low = first
        if window > 0:
            low = max(first, position - window + 1)
        high = min(first + n, position + 1)  # one past the last visible position
        if low >= high:
            fill_row(s, SCORE_BLOCK, types.float32(0.0))
            continue
        fill_row(s, low - first, types.float32(MINUS_INF))
        fill_row(s + 4 * (high - first), SCORE_BLOCK - (high - first), types.float32(MINUS_INF))
        greatest = splat(types.float32(MINUS_INF))
        for k in range(0, SCORE_BLOCK, LANES):
            greatest = vmax(load_f32(s + 4 * k), greatest)
        old = f32_at(m + 4 * r)
        new = max(old, hmax(greatest))
        if new == types.float32(MINUS_INF):
            new = types.float32(0.0)
        shift, total = splat(new), splat(types.float32(0.0))
        for k in range(0, SCORE_BLOCK, LANES):
            weight = vexp(load_f32(s + 4 * k) - shift)
            store_f32(s + 4 * k, weight)
            total = total + weight
        factor = exp(old - new)
        put_f32(m + 4 * r, new)
        put_f32(l + 4 * r, f32_at(l + 4 * r) * factor + hsum(total))
        if factor != types.float32(1.0):
            scale_row(o + 4 * r * Dh, Dh, factor)


@njit
def _weigh_values(team, a, sequence, head, scores, tokens, heads, first, n, p0, o):
    """o += weights · V for one score block, page by page. Rows never touch values they cannot see, not even times 0."""
    weigh = i64_at(team.weigh + 8 * a.kv_dtype)
    row_nbytes = dtype_row_nbytes(a.kv_dtype, a.Dh)
    position = first
    while position < first + n:
        count = min(a.P - position % a.P, first + n - position)
        v = kv_row(a, sequence, position, 1, head)
        s = scores + 4 * (position - first)
        seen_by_all = position + count - 1 <= p0
        if a.window > 0 and position < p0 + tokens - a.window:
            seen_by_all = False
        if seen_by_all:
            call_address(weigh, (s, 4 * SCORE_BLOCK, tokens * heads, v, row_nbytes, count, a.Dh, o, 4 * a.Dh))
        else:
            for t in range(tokens):
                low, high = position, min(position + count, p0 + t + 1)
                if a.window > 0:
                    low = max(low, p0 + t - a.window + 1)
                if low < high:
                    row = t * heads
                    call_address(
                        weigh,
                        (
                            s + 4 * (row * SCORE_BLOCK + low - position),
                            4 * SCORE_BLOCK,
                            heads,
                            v + (low - position) * row_nbytes,
                            row_nbytes,
                            high - low,
                            a.Dh,
                            o + 4 * row * a.Dh,
                            4 * a.Dh,
                        ),
                    )
        position += count


@njit
def attend_span(team, a, sequence, head, q, tokens, heads, p0, start, stop, m, l, o, scores):
    """Softmax state (m, l [rows], o [rows, Dh]; rows = tokens · heads) of queries from p0 on over start … stop − 1.

    q is [rows, Dh], scaled. The state is started afresh.
    """
    rows = tokens * heads
    matmul = i64_at(team.matmul + 8 * a.kv_dtype)
    row_nbytes = dtype_row_nbytes(a.kv_dtype, a.Dh)
    fill_row(m, rows, types.float32(MINUS_INF))
    fill_row(l, rows, types.float32(0.0))
    fill_row(o, rows * a.Dh, types.float32(0.0))
    first = start
    while first < stop:
        n = min(SCORE_BLOCK - first % SCORE_BLOCK, stop - first)
        position = first
        while position < first + n:
            count = min(a.P - position % a.P, first + n - position)
            k = kv_row(a, sequence, position, 0, head)
            call_address(
                matmul,
                (k, row_nbytes, count, q, 4 * a.Dh, rows, a.Dh, scores + 4 * (position - first), 4 * SCORE_BLOCK),
            )
            position += count
        if a.alibi_max_bias > 0:
            _add_alibi(scores, rows, heads, head * heads, a.QD // a.Dh, a.alibi_max_bias, first, p0)
        _softmax_rows(scores, rows, heads, first, n, p0, a.window, m, l, o, a.Dh)
        _weigh_values(team, a, sequence, head, scores, tokens, heads, first, n, p0, o)
        first += n


@njit
def merge(m, l, o, new_m, new_l, new_o, Dh):
    """Fold one row's partial result (new_m, new_l, new_o) into its running one (m, l, o)."""
    old, new = f32_at(m), f32_at(new_m)
    if new == types.float32(MINUS_INF):
        return
    top = max(old, new)
    keep, add = exp(old - top), exp(new - top)
    put_f32(m, top)
    put_f32(l, f32_at(l) * keep + f32_at(new_l) * add)
    k = 0
    while k + LANES <= Dh:
        store_f32(o + 4 * k, fma(load_f32(o + 4 * k), splat(keep), load_f32(new_o + 4 * k) * splat(add)))
        k += LANES
    while k < Dh:
        put_f32(o + 4 * k, lane0(fma(splat(f32_at(o + 4 * k)), splat(keep), splat(f32_at(new_o + 4 * k) * add))))
        k += 1


@njit
def write_row(o, l, Dh, out):
    """out = o / l."""
    total = f32_at(l)
    for k in range(Dh):
        put_f32(out + 4 * k, f32_at(o + 4 * k) / total)
