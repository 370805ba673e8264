"""How a command ends: signals, exit codes, and the one line that every error becomes."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec

import click

from ..errors import GllmError

if TYPE_CHECKING:
    from .console import Console

P = ParamSpec("P")

EXIT_ERROR = 2  # click's code for usage errors, kept for every mistake in what was given
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_PIPE = 128 + signal.SIGPIPE  # as a process that SIGPIPE ended
EXIT_INTERRUPTED = 128 + signal.SIGINT

EXIT_CODES = f"""\b
Exit codes:
    0  done
  {EXIT_ERROR:>3}  wrong usage, model, prompt or device; too little memory
  {EXIT_BUG:>3}  a bug in gllm-driver
  {EXIT_INTERRUPTED:>3}  interrupted by Ctrl-C; what was generated has been printed
  {EXIT_PIPE:>3}  the reader of the output has gone (as with `| head`)
  {128 + signal.SIGTERM:>3}  ended by SIGTERM; what was generated has been printed
"""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class OutputError(GllmError):
    """Standard output cannot be written."""


def catch_signals() -> None:
    """Turn SIGINT and SIGTERM into `Interrupted`, once: a second one ends the process as the system does."""

    def handle(signum: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup and background jobs of scripts stay as they are
            signal.signal(signum, handle)


def interrupted_code(error: KeyboardInterrupt) -> int:
    """128 + the signal's number, as shells report it."""
    return 128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Ends a command with the exit code of whatever it raises, before click sees it.

    click would turn an interrupt into its own Abort and a closed pipe into exit code 1.
    """

    @functools.wraps(command)
    def guard(*args: P.args, **kwargs: P.kwargs) -> None:
        context = click.get_current_context()
        try:
            command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BaseException as error:
            context.exit(report(error, context.obj))

    return guard


def report(error: BaseException, console: Console) -> int:
    """Say in one line what went wrong and return the exit code; with --debug the traceback comes first."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_ERROR
    if isinstance(error, BrokenPipeError):
        discard_output()
        return EXIT_PIPE
    if isinstance(error, OutputError):
        discard_output()
    if console.debug and not isinstance(error, click.ClickException):
        console.write("".join(traceback.format_exception(error)))
    if isinstance(error, KeyboardInterrupt):
        console.warn("interrupted")
        return interrupted_code(error)
    message, code = _explain(error)
    console.error(message)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, click.UsageError):
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return f"{error.format_message()}{where}", EXIT_ERROR
    if isinstance(error, click.ClickException):
        return error.format_message(), EXIT_ERROR
    if isinstance(error, GllmError):
        return str(error), EXIT_ERROR
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        detail = f" ({error})" if str(error) else ""
        return f"out of memory{detail}: give a smaller --context, or a smaller or quantized model", EXIT_ERROR
    name = type(error).__name__
    detail = f"{name}: {error}" if str(error) else name
    return f"{detail} (a bug in gllm-driver; run again with --debug and report what it shows)", EXIT_BUG


def discard_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush cannot fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream without a file, as under a test runner, has no last flush to fear
        pass
    finally:
        os.close(null)
