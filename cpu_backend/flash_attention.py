"""flash_attention: a tile of query tokens of one KV head group is the unit of work; one thread does all its spans."""

from __future__ import annotations

from numba import types

from .attention import MINUS_INF, attend_span, fill_row, load_queries, merge, write_row
from .simd import i32_at, i64_at
from .sync import take
from .workspace import QUERY_ROWS, SCORE_BLOCK, SPAN


def kernel(a, team, thread):
    heads = a.QD // (a.HK * a.Dh)
    tile = max(1, QUERY_ROWS // heads)
    rows = tile * heads
    q = team.private + thread * team.private_nbytes
    o = q + 4 * rows * a.Dh
    span_o = o + 4 * rows * a.Dh
    scores = span_o + 4 * rows * a.Dh
    m = scores + 4 * rows * SCORE_BLOCK
    l, span_m, span_l = m + 4 * rows, m + 8 * rows, m + 12 * rows
    item = take(team, 1)
    sequence = 0
    before = 0  # items of earlier sequences
    while sequence < a.S:
        begin, end = i32_at(a.offsets + 4 * sequence), i32_at(a.offsets + 4 * sequence + 4)
        items = (end - begin + tile - 1) // tile * a.HK
        if item >= before + items:
            before += items
            sequence += 1
            continue
        # the last tiles see the longest context: start with them, so that threads finish together
        index = items - 1 - (item - before)
        head, first = index % a.HK, begin + index // a.HK * tile
        tokens = min(tile, end - first)
        p0 = i64_at(a.positions + 8 * first)
        load_queries(a.q + 4 * (first * a.QD + head * heads * a.Dh), 4 * a.QD, tokens, heads, a.Dh, a.scale, q)
        fill_row(m, rows, types.float32(MINUS_INF))
        fill_row(l, rows, types.float32(0.0))
        fill_row(o, rows * a.Dh, types.float32(0.0))
        start = 0
        if a.window > 0:
            start = max(0, p0 - a.window + 1) // SPAN * SPAN
        while start < p0 + tokens:
            stop = min(start + SPAN, p0 + tokens)
            attend_span(team, a, sequence, head, q, tokens, heads, p0, start, stop, span_m, span_l, span_o, scores)
            for r in range(tokens * heads):
                row = 4 * r * a.Dh
                merge(m + 4 * r, l + 4 * r, o + row, span_m + 4 * r, span_l + 4 * r, span_o + row, a.Dh)
            start += SPAN
        for r in range(tokens * heads):
            out = a.out + 4 * ((first + r // heads) * a.QD + (head * heads + r % heads) * a.Dh)
            write_row(o + 4 * r * a.Dh, l + 4 * r, a.Dh, out)
        item = take(team, 1)
