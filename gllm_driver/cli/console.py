"""What a user sees: text on standard output; messages, warnings and progress bars on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from .outcome import OutputError

# stage: (label, unit, seconds before the bar appears)
_STAGES = {
    "download": ("downloading", "B", 0.0),
    "load": ("loading weights", "B", 0.3),
    "read": ("reading", "window", 0.3),
    "quantize": ("quantizing", "weight", 0.3),
    "compile": ("compiling kernels, once for this machine", "kernel", 0.0),
}


class Console:
    """Messages of one command. `quiet` silences all but errors; bars and notes need a terminal as well."""

    def __init__(self) -> None:
        self.debug = False
        self.quiet = False
        self._bar: Any = None
        self._stage: tuple[str, int] | None = None
        self._stage_start = 0.0
        self._printing = False

    @property
    def interactive(self) -> bool:
        """Whether someone watches standard error."""
        return not self.quiet and _is_terminal(sys.stderr)

    def configure(self, *, quiet: bool, debug: bool) -> None:
        """Take the command's flags and send the log of the packages through this console."""
        self.quiet, self.debug = quiet, debug
        log = logging.getLogger("gllm_driver")
        log.handlers[:] = [_LogHandler(self)]
        log.setLevel(logging.DEBUG if debug else logging.WARNING)
        if debug:
            import faulthandler

            faulthandler.enable()
        if not self.interactive:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def note(self, text: str) -> None:
        """Something nice to know, for a terminal only."""
        if self.interactive:
            self.write(one_line(text) + "\n")

    def warn(self, text: str) -> None:
        """Something the user should know, wherever standard error goes."""
        if not self.quiet:
            self.write(one_line(text) + "\n")

    def error(self, text: str) -> None:
        """Why the command failed."""
        self.write(f"error: {one_line(text)}\n")

    def write(self, text: str) -> None:
        """To standard error, past a progress bar that is in the way."""
        self._end_bar()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or absent: nobody listens
            sys.stderr.write(text)
            sys.stderr.flush()

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show how far a stage is, and `detail` behind it; `done == total` ends it. Short stages show nothing."""
        if self._printing or not self.interactive:
            return
        now = time.monotonic()
        if self._stage != (stage, total):
            self._end_bar()
            self._stage, self._stage_start = (stage, total), now
        if done >= total:
            self._end_bar()
            return
        label, unit, patience_s = _STAGES.get(stage, (stage, "it", 0.0))
        if self._bar is None and now - self._stage_start >= patience_s:
            from tqdm import tqdm

            scale = unit == "B"
            self._bar = tqdm(
                total=total, desc=label, unit=unit, unit_scale=scale, unit_divisor=1024, leave=False, file=sys.stderr
            )
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(max(0, done - self._bar.n))

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._stage = None

    @contextlib.contextmanager
    def printing(self) -> Iterator[Output]:
        """Standard output, while text goes to it: no bar is drawn after its first piece."""
        output = Output(self)
        try:
            yield output
        finally:
            self._end_bar()

    def _starts_printing(self) -> None:
        self._end_bar()
        self._printing = True


class Output:
    """Writes to standard output at once. Raises BrokenPipeError when the reader has gone, OutputError otherwise."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def write(self, text: str) -> None:
        if not text:
            return
        if not self._last:
            self._console._starts_printing()
        self._last = text[-1]  # before writing: an interrupt may come as soon as the text is out
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error

    def end_line(self) -> None:
        """Leave the cursor at the start of a line."""
        if self._last not in ("", "\n"):
            self.write("\n")


class _LogHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(f"{record.levelname.lower()}: {record.getMessage()}")


def one_line(text: str) -> str:
    """`text` without line breaks, and without characters that could steer a terminal: names come from files."""
    flat = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in flat)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()
