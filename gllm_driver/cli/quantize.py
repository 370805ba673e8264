"""`gllm quantize`: a model in fewer bits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from .console import Console
from .options import TextType
from .outcome import EXIT_CODES, guarded

POSITIVE = click.IntRange(min=1)


@click.command(epilog=EXIT_CODES, short_help="Write a model in fewer bits.")
@click.argument("source", metavar="IN", type=TextType())
@click.argument("out", metavar="OUT", type=TextType())
@click.option(
    "--type",
    "type_name",
    required=True,
    type=TextType(),
    metavar="T",
    help="Of the matrices. q8_0, q4_0, q4_k and ggml's others, f16, bf16, f32: OUT.gguf. int8, int4, int2, int1, or "
    "one in full as int4_64z: a directory.",
)
@click.option("--block", type=click.Choice(["32", "64", "128"]), help="Elements of a block of int8, int4, int2, int1.")
@click.option(
    "--method",
    type=click.Choice(["rtn", "search", "hqq", "gptq"]),
    help="What chooses scales and quants: rounding to nearest, least squares, half-quadratic, or the inputs of a text. "
    "Without it: search, with --calib gptq where the type allows it.",
)
@click.option("--calib", type=TextType(), metavar="FILE", help="A text like those the model will read.")
@click.option(
    "--calib-tokens", type=POSITIVE, metavar="N", default=65536, show_default=True, help="Tokens of it at most."
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN=T",
    help="Another type for the matrices whose names match (* and ? stand for anything). Repeatable; the first counts.",
)
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--threads", type=POSITIVE, metavar="N", help="Without it, all this process may use.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="Nothing on standard error but errors.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the log.")
@guarded
def quantize(
    *,
    source: str,
    out: str,
    type_name: str,
    block: str | None,
    method: str | None,
    calib: str | None,
    calib_tokens: int,
    keep: tuple[str, ...],
    force: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write the model IN (HF directory, .gguf file or hub id) as OUT, its matrices in another type.

    At two bits and less, embeddings, output, v and down keep four bits unless --keep says otherwise. The table shows
    bits per weight and the relative error of every kind of matrix.
    """
    console: Console = click.get_current_context().obj
    console.configure(quiet=quiet, debug=debug)
    # Tensors and windows are shared out among threads of ours; those of BLAS would get in their way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from ..convert.plan import parse_keep
    from ..convert.run import Options, quantize

    options = Options(
        type_name=type_name.lower(),
        block=int(block) if block else None,
        method=method,
        calib=Path(calib) if calib else None,
        calib_tokens=calib_tokens,
        keep=[parse_keep(each) for each in keep],
        force=force,
        threads=threads,
    )
    report = quantize(source, Path(out), options, console.progress)
    with console.printing() as output:
        output.write(json.dumps(report.as_object(), ensure_ascii=False) if as_json else "\n".join(report.lines()))
        output.end_line()
