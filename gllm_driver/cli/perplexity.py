"""`gllm perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .console import Console
from .options import DeviceType, TextType, read_text
from .outcome import EXIT_CODES, guarded

if TYPE_CHECKING:
    from ..evaluation import PerplexityResult
    from ..llm import LLM
    from ..quant.perplexity import Estimate

log = logging.getLogger("gllm_driver.cli")

POSITIVE = click.IntRange(min=1)

_OPTIONS = (
    click.option("--device", type=DeviceType(), default="auto", show_default=True, help="Where to run."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "f32", "f16", "bf16"]),
        default="auto",
        show_default=True,
        help="Type of float weights and of the KV cache; auto: as stored.",
    ),
    click.option("--threads", type=POSITIVE, metavar="N", help="CPU threads; without it, all this process may use."),
    click.option(
        "--context",
        type=POSITIVE,
        metavar="N",
        default=512,
        show_default=True,
        help="Tokens of a window; the second half of each is scored.",
    ),
    click.option(
        "--stride",
        type=POSITIVE,
        metavar="N",
        help="Windows of N/2 more tokens, one every N, the last N of each scored.",
    ),
    click.option("--windows", type=POSITIVE, metavar="N", help="Only the first N windows of the text."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else."),
    click.option("--quiet", is_flag=True, help="Nothing on standard error but errors."),
    click.option("--debug", is_flag=True, help="Show tracebacks and the log."),
)


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that have models read a text."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(epilog=EXIT_CODES, short_help="Measure how well a model predicts a text.")
@click.argument("file", type=TextType(), metavar="FILE")
@click.option(
    "--model", type=TextType(), metavar="M", help="HF directory, .gguf file or hub id; without it, the demo model."
)
@reading_options
@guarded
def perplexity(
    *,
    file: str,
    model: str | None,
    context: int,
    stride: int | None,
    windows: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **placing: Any,
) -> None:
    """Print the perplexity of a model on the text in FILE (- for standard input), and its standard error.

    The text is cut into windows of --context tokens, each read from an empty context, and the second half of each is
    scored: the figure that llama.cpp's llama-perplexity gives for the same model, text and context.
    """
    console: Console = click.get_current_context().obj
    console.configure(quiet=quiet, debug=debug)
    text = read_text(file)

    from .. import evaluation

    with open_model(model, context, stride, console, **placing) as llm:
        log.debug("reading the text")
        result = evaluation.perplexity(
            llm, text, context=context, stride=stride, max_windows=windows, progress=reading_progress(console)
        )
        facts = {"model": about_model(llm), **as_object(result)}
    with console.printing() as output:
        output.write(as_json_text(facts) if as_json else "\n".join(_lines(result)))
        output.end_line()


def open_model(model: str | None, context: int, stride: int | None, console: Console, **placing: Any) -> LLM:
    """Load a model with room for windows of the text."""
    import gllm_driver as gllm

    length = context + (stride or 0) // 2
    return gllm.load(model, context_length=length, prefix_reuse=False, progress=console.progress, **placing)


def reading_progress(console: Console) -> Callable[[int, int, float], None]:
    """A bar with the perplexity so far."""
    return lambda done, total, so_far: console.progress("read", done, total, f"perplexity {so_far:.4f}")


def about_model(llm: LLM) -> dict[str, Any]:
    """Which model it was, and how it was computed."""
    return {
        "path": str(llm.path),
        "family": llm.arch.family,
        "device": llm.device,
        "types": {"weights": dict(llm.weight_types), "kv": llm.kv_dtype},
        "load_s": llm.load_s,
    }


def as_object(result: PerplexityResult) -> dict[str, Any]:
    """The result's part of the object that --json prints (docs/cli.md has its schema)."""
    return {
        "perplexity": as_pair(result.perplexity),
        "nll": as_pair(result.nll),
        **asdict(result.reading),
    }


def as_pair(estimate: Estimate) -> dict[str, float | None]:
    """JSON has no infinity and no not-a-number: null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()}


def as_json_text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=False, allow_nan=False)


def _lines(result: PerplexityResult) -> list[str]:
    reading = result.reading
    return [
        f"perplexity {shown(result.perplexity)}",
        f"{reading.tokens:,} tokens scored in {reading.windows:,} windows of {reading.length:,}, "
        f"of {reading.text_tokens:,} in the text, in {reading.seconds:.1f} s",
    ]


def shown(estimate: Estimate, digits: int = 4) -> str:
    """`12.3456 ± 0.0789`."""
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"
