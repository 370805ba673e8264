"""`gllm kv distill`: what making KV smaller costs on a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..config import DISTILL_METHODS, DISTILL_RATIOS, DistillConfig
from .console import Console
from .options import DeviceType, TextType, read_text
from .outcome import EXIT_CODES, guarded
from .perplexity import about_model, as_json_text, as_pair, shown

POSITIVE = click.IntRange(min=1)


@click.command(epilog=EXIT_CODES, short_help="Measure what distilling KV costs on a text.")
@click.argument("file", type=TextType(), metavar="FILE")
@click.option(
    "--model", type=TextType(), metavar="M", help="HF directory, .gguf file or hub id; default: the demo model."
)
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="Where to run.")
@click.option("--threads", type=POSITIVE, metavar="N", help="CPU threads; without it, all this process may use.")
@click.option("--ratio", type=click.Choice([str(r) for r in DISTILL_RATIOS]), default="2", show_default=True)
@click.option("--method", type=click.Choice(DISTILL_METHODS), default="tokens", show_default=True)
@click.option(
    "--sinks", type=click.IntRange(0), default=DistillConfig.sinks, show_default=True, help="First tokens kept."
)
@click.option(
    "--window", type=click.IntRange(0), default=DistillConfig.window, show_default=True, help="Last tokens kept."
)
@click.option("--context", type=POSITIVE, default=768, show_default=True, help="Tokens whose KV is distilled.")
@click.option(
    "--continuation", type=POSITIVE, default=64, show_default=True, help="Tokens behind them that are scored."
)
@click.option("--windows", type=POSITIVE, metavar="N", help="Only the first N windows of the text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
@click.option("--quiet", is_flag=True, help="Nothing on standard error but errors.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the log.")
@guarded
def distill(
    *,
    file: str,
    model: str | None,
    ratio: str,
    method: str,
    sinks: int,
    window: int,
    context: int,
    continuation: int,
    windows: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **placing: Any,
) -> None:
    """Print what distilling KV costs on the text in FILE (- for standard input): perplexity and bytes.

    Beside it: the perplexity when the same bytes hold the newest tokens exactly, and when only the tokens that are
    never merged are kept.
    """
    console: Console = click.get_current_context().find_root().obj
    console.configure(quiet=quiet, debug=debug)
    text = read_text(file)
    config = DistillConfig(int(ratio), method, sinks, window)

    import gllm_driver as gllm

    with gllm.load(
        model, context_length=context + continuation, prefix_reuse=False, progress=console.progress, **placing
    ) as llm:
        found = llm.distillation_cost(
            text,
            config,
            context=context,
            continuation=continuation,
            max_windows=windows,
            progress=lambda done, total: console.progress("read", done, total),
        )
        about = about_model(llm)
    facts = {"model": about, "ratio": config.ratio, "method": method, "sinks": sinks, "window": window}
    pairs = {name: as_pair(getattr(found, name)) for name in ("exact", "distilled", "shorter", "ends", "ratio")}
    counts = {k: v for k, v in asdict(found).items() if k not in pairs}
    lines = [
        f"exact KV        perplexity {shown(found.exact)}  {found.nbytes_before:,} bytes",
        f"distilled       perplexity {shown(found.distilled)}  {found.nbytes_after:,} bytes",
        f"  of the exact  {100 * (found.ratio.value - 1):+.2f} ± {100 * found.ratio.error:.2f} %"
        f"              {100 * (found.nbytes_after / found.nbytes_before - 1):+.1f} %",
        f"newest tokens   perplexity {shown(found.shorter)}  as many bytes as distilled",
        f"ends alone      perplexity {shown(found.ends)}  {sinks} first and {window} last tokens",
        f"{found.tokens:,} tokens scored behind {found.windows:,} contexts of {found.context:,}",
    ]
    with console.printing() as output:
        output.write(as_json_text({**facts, "perplexity": pairs, **counts}) if as_json else "\n".join(lines))
        output.end_line()
