"""paged_attention: a span of one sequence's context for one KV head is the unit of work; results merge in order."""

from __future__ import annotations

from numba import njit, types

from .attention import MINUS_INF, attend_span, fill_row, load_queries, merge, write_row
from .simd import i64_at
from .sync import barrier, take
from .workspace import SCORE_BLOCK, SPAN


@njit
def span_range(a, sequence):
    """(first span a sequence's query sees, number of spans)."""
    position = i64_at(a.positions + 8 * sequence)
    first = 0
    if a.window > 0:
        first = max(0, position - a.window + 1) // SPAN
    return first, position // SPAN - first + 1


def kernel(a, team, thread):
    heads = a.QD // (a.HK * a.Dh)
    max_spans = a.MP * a.P // SPAN + 1
    record = 4 * heads * (a.Dh + 2)  # partial result of a span: m [heads], l [heads], o [heads, Dh]
    q = team.private + thread * team.private_nbytes
    o = q + 4 * heads * a.Dh
    scores = o + 4 * heads * a.Dh
    m = scores + 4 * heads * SCORE_BLOCK
    l = m + 4 * heads

    item = take(team, 1)
    sequence = 0
    before = 0
    while sequence < a.S:
        first_span, spans = span_range(a, sequence)
        if item >= before + spans * a.HK:
            before += spans * a.HK
            sequence += 1
            continue
        head, span = (item - before) % a.HK, (item - before) // a.HK
        position = i64_at(a.positions + 8 * sequence)
        load_queries(a.q + 4 * (sequence * a.QD + head * heads * a.Dh), 4 * a.QD, 1, heads, a.Dh, a.scale, q)
        start = (first_span + span) * SPAN
        stop = min(start + SPAN, position + 1)
        part = team.shared + ((sequence * a.HK + head) * max_spans + span) * record
        attend_span(
            team,
            a,
            sequence,
            head,
            q,
            1,
            heads,
            position,
            start,
            stop,
            part,
            part + 4 * heads,
            part + 8 * heads,
            scores,
        )
        item = take(team, 1)
    barrier(team)

    item = take(team, 1)
    while item < a.S * a.HK:
        sequence, head = item // a.HK, item % a.HK
        _, spans = span_range(a, sequence)
        fill_row(m, heads, types.float32(MINUS_INF))
        fill_row(l, heads, types.float32(0.0))
        fill_row(o, heads * a.Dh, types.float32(0.0))
        for span in range(spans):
            part = team.shared + ((sequence * a.HK + head) * max_spans + span) * record
            for h in range(heads):
                partial = part + 8 * heads + 4 * h * a.Dh
                merge(m + 4 * h, l + 4 * h, o + 4 * h * a.Dh, part + 4 * h, part + 4 * (heads + h), partial, a.Dh)
        for h in range(heads):
            out = a.out + 4 * (sequence * a.QD + (head * heads + h) * a.Dh)
            write_row(o + 4 * h * a.Dh, l + 4 * h, a.Dh, out)
        item = take(team, 1)
