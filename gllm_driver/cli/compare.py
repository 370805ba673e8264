"""`gllm compare`: what changes when one model takes another's place."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .console import Console
from .options import TextType, read_text
from .outcome import EXIT_CODES, guarded
from .perplexity import about_model, as_json_text, as_pair, open_model, reading_options, reading_progress, shown

if TYPE_CHECKING:
    from ..evaluation import ComparisonResult
    from ..quant.perplexity import Estimate


@click.command(epilog=EXIT_CODES, short_help="Compare two models' predictions of a text.")
@click.argument("a", type=TextType(), metavar="A")
@click.argument("b", type=TextType(), metavar="B")
@click.argument("file", type=TextType(), metavar="FILE")
@reading_options
@guarded
def compare(
    *,
    a: str,
    b: str,
    file: str,
    context: int,
    stride: int | None,
    windows: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **placing: Any,
) -> None:
    """Compare model B (a quantized one, say) with model A (the original) on the text in FILE (- for standard input).

    Prints the perplexity of both, the divergence of B's predictions from A's (Kullback-Leibler, in nats, over the same
    tokens), and how often both hold the same token for the most likely. Both models are in memory at the same time.
    """
    console: Console = click.get_current_context().obj
    console.configure(quiet=quiet, debug=debug)
    text = read_text(file)

    from .. import evaluation

    with (
        open_model(a, context, stride, console, **placing) as of_a,
        open_model(b, context, stride, console, **placing) as of_b,
    ):
        result = evaluation.compare(
            of_a, of_b, text, context=context, stride=stride, max_windows=windows, progress=reading_progress(console)
        )
        facts = {"a": about_model(of_a), "b": about_model(of_b), **as_object(result)}
    with console.printing() as output:
        output.write(as_json_text(facts) if as_json else "\n".join(_lines(result)))
        output.end_line()


def as_object(result: ComparisonResult) -> dict[str, Any]:
    """The result's part of the object that --json prints (docs/cli.md has its schema)."""
    return {
        "perplexity_a": as_pair(result.perplexity_a),
        "perplexity_b": as_pair(result.perplexity_b),
        "ratio": as_pair(result.ratio),
        "kl": {**as_pair(result.kl), "percentiles": result.kl_percentiles},
        "same_top": as_pair(result.same_top),
        **asdict(result.reading),
    }


def _lines(result: ComparisonResult) -> list[str]:
    reading = result.reading
    ranks = {
        ("median" if name == "50" else name if name == "max" else f"{name} %"): value
        for name, value in result.kl_percentiles.items()
    }
    return [
        f"perplexity of A    {shown(result.perplexity_a)}",
        f"perplexity of B    {shown(result.perplexity_b)}",
        f"B / A              {shown(result.ratio, 5)}",
        f"KL divergence      {shown(result.kl, 6)} nats",
        *(f"  {name:<17}{value:.6f}" for name, value in ranks.items()),
        f"same top token     {_percent(result.same_top)}",
        f"{reading.tokens:,} tokens scored in {reading.windows:,} windows of {reading.length:,}, "
        f"of {reading.text_tokens:,} in the text, in {reading.seconds:.1f} s",
    ]


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.3f} ± {100 * share.error:.3f} %"
