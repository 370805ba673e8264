"""The command `gllm`. Its modules import click and the standard library alone until there is something to run."""

from __future__ import annotations

from .app import main, run

__all__ = ["main", "run"]
