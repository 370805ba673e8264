"""`gllm kv`: what lies in KV stores on disk and in Redis, and keeping them in order."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from .console import Console
from .kv_distill import distill
from .outcome import EXIT_CODES, guarded

if TYPE_CHECKING:
    from ..kv.store import KvStore
    from ..kv.store.base import StoredEntry

EXIT_DAMAGED = 1
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_KV_EXIT_CODES = EXIT_CODES.replace(
    "    0  done\n", f"    0  done\n  {EXIT_DAMAGED:>3}  verify: damaged entries are left\n"
)


class AgeType(click.ParamType):
    """30s, 90m, 12h, 7d or 2w, in seconds."""

    name = "7d"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhdw])", value, re.ASCII)
        if match is None:
            self.fail(f"an age is a number and one of s, m, h, d, w, as in 12h or 7d; got {value!r}.", param, ctx)
        return float(int(match[1]) * _SECONDS[match[2]])


class ModelType(click.ParamType):
    """The beginning of a model's digest, as `gllm kv ls` shows it."""

    name = "digest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        if not re.fullmatch(r"([0-9a-f]{2}){4,32}", value, re.ASCII):
            self.fail(
                f"a model is named by 8 to 64 hexadecimal digits (gllm kv ls shows them), got {value!r}.", param, ctx
            )
        return bytes.fromhex(value)


@click.group(short_help="Look after stored KV.")
def kv() -> None:
    """Look after KV that --kv-store keeps on disk or in Redis.

    SPEC is what --kv-store takes: disk:/path, redis://host:6379/0, or both with a comma between them.
    """


def _command(name: str, help_text: str) -> Callable[[Callable[..., None]], click.Command]:
    def decorate(function: Callable[..., None]) -> click.Command:
        for option in (
            click.option("--debug", is_flag=True, help="Show tracebacks and the log."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else."),
            click.argument("spec"),
        ):
            function = option(function)
        return kv.command(name, help=help_text, epilog=_KV_EXIT_CODES)(function)

    return decorate


@_command("ls", "List entries: model, type of the KV, tokens, where in the prompt they stand, bytes, age.")
@guarded
def ls(*, spec: str, as_json: bool, debug: bool) -> None:
    with _opened(spec, debug) as (store, console):
        entries = sorted(store.entries(), key=lambda e: (e.model, e.root, e.position, e.name))
        now = time.time()
        if as_json:
            _print(console, json.dumps({"entries": [_as_object(e) for e in entries]}))
            return
        rows = [("model", "kv", "tokens", "from", "bytes", "age")]
        rows += [
            (
                e.model.hex()[:16],
                e.dtype if e.codec == "none" else f"{e.dtype}, {e.codec}",
                f"{e.num_tokens:,}",
                f"{e.position:,}",
                f"{e.stored_nbytes:,}",
                _age(now - e.created),
            )
            for e in entries
        ]
        _print(console, "\n".join(_columns(rows)))


@_command("stats", "Sum up entries and bytes by model.")
@guarded
def stats(*, spec: str, as_json: bool, debug: bool) -> None:
    with _opened(spec, debug) as (store, console):
        by_model: dict[str, list[StoredEntry]] = defaultdict(list)
        for entry in store.entries():
            by_model[entry.model.hex()].append(entry)
        found = [
            {
                "model": model,
                "entries": len(entries),
                "tokens": sum(e.num_tokens for e in entries),
                "stored_bytes": sum(e.stored_nbytes for e in entries),
                "kv_bytes": sum(e.payload_nbytes for e in entries),
            }
            for model, entries in sorted(by_model.items())
        ]
        if as_json:
            _print(console, json.dumps({"models": found}))
            return
        rows = [("model", "entries", "tokens", "bytes", "bytes of KV")]
        rows += [
            (m["model"][:16], *(f"{m[key]:,}" for key in ("entries", "tokens", "stored_bytes", "kv_bytes")))  # type: ignore[index]
            for m in found
        ]
        _print(console, "\n".join(_columns(rows)))


@_command("purge", "Remove entries: all of them, or those of a model or an age.")
@click.option("--model", type=ModelType(), help="Only entries of this model; the beginning of its digest.")
@click.option("--older-than", type=AgeType(), help="Only entries older than this: 12h, 7d …")
@guarded
def purge(*, spec: str, model: bytes | None, older_than: float | None, as_json: bool, debug: bool) -> None:
    with _opened(spec, debug) as (store, console):
        removed = store.purge(model=model, older_than_s=older_than)
        _print(console, json.dumps({"removed": removed}) if as_json else f"{removed:,} entries removed")


@_command("verify", "Check the checksum of every entry.")
@click.option("--repair", is_flag=True, help="Remove damaged entries.")
@guarded
def verify(*, spec: str, repair: bool, as_json: bool, debug: bool) -> None:
    with _opened(spec, debug) as (store, console):
        report = store.verify(repair=repair)
        left = len(report.bad) - report.num_removed
        if as_json:
            bad = [{"entry": name, "reason": reason, "detail": detail} for name, reason, detail in report.bad]
            _print(console, json.dumps({"checked": report.num_checked, "removed": report.num_removed, "bad": bad}))
        else:
            lines = [f"{name}: {detail}" for name, _, detail in report.bad]
            lines.append(
                f"{report.num_checked:,} entries checked, {len(report.bad):,} bad, {report.num_removed:,} removed"
            )
            _print(console, "\n".join(lines))
    if left:
        click.get_current_context().exit(EXIT_DAMAGED)


kv.add_command(distill)


@contextmanager
def _opened(spec: str, debug: bool) -> Iterator[tuple[KvStore, Console]]:
    """The store, which must be there and answer. Raises RequestError."""
    console: Console = click.get_current_context().find_root().obj
    console.configure(quiet=False, debug=debug)
    from ..kv.store import open_store
    from ..kv.store.spec import parse_spec

    for tier in parse_spec(spec):
        if tier.kind == "memory":
            raise RequestError("KV in memory ends with the process that keeps it: name a disk or Redis store")
        if tier.kind == "disk" and not Path(tier.where).expanduser().is_dir():
            raise RequestError(f"KV store: {tier.where} is no directory")
    store = open_store(spec)
    try:
        yield store, console
        faults = {reason: n for each in (store.stats().tiers or (store.stats(),)) for reason, n in each.faults.items()}
    finally:
        store.close()
    if unreachable := sorted(set(faults) & {"timeout", "unreachable", "auth", "reply", "down"}):
        raise RequestError(
            f"KV store: the server cannot be used ({', '.join(unreachable)}); the warning above says why"
        )


def _print(console: Console, text: str) -> None:
    with console.printing() as output:
        output.write(text)
        output.end_line()


def _as_object(entry: StoredEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "model": entry.model.hex(),
        "root": entry.root.hex(),
        "dtype": entry.dtype,
        "codec": entry.codec,
        "tokens": entry.num_tokens,
        "position": entry.position,
        "kv_bytes": entry.payload_nbytes,
        "stored_bytes": entry.stored_nbytes,
        "created": entry.created,
    }


def _age(seconds: float) -> str:
    unit, size = next(((u, s) for u, s in reversed(_SECONDS.items()) if seconds >= 2 * s), ("s", 1))
    return f"{max(seconds, 0) / size:.0f}{unit}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
