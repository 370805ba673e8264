"""The command group `gllm`, and the way from an argument list to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from .. import __version__
from .compare import compare
from .console import Console
from .generate import generate
from .info import info
from .kv import kv
from .outcome import EXIT_CODES, catch_signals, report
from .perplexity import perplexity
from .quantize import quantize


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="gllm", message="%(prog)s %(version)s")
@click.pass_context
def gllm(context: click.Context) -> None:
    """Run large language models from Hugging Face directories and GGUF files."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


gllm.add_command(generate)
gllm.add_command(info)
gllm.add_command(perplexity)
gllm.add_command(compare)
gllm.add_command(quantize)
gllm.add_command(kv)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code. Errors become one line on standard error."""
    console = Console()
    try:
        # Commands end in click's Exit, whose code comes back from `main`; what click itself finds wrong is raised.
        return gllm.main(list(args), prog_name="gllm", standalone_mode=False, obj=console) or 0
    except BaseException as error:
        return report(error, console)


def main() -> None:
    """Entry point of the console script."""
    catch_signals()
    sys.exit(run(sys.argv[1:]))
