"""Values out of a model's own description (config.json, GGUF keys), checked where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 16384
MAX_NUMBER = 1e12  # nothing a model is described with comes near; products of such numbers stay finite


@dataclass(frozen=True)
class Fields:
    """Typed reads of `values`; an absent or null value takes `default`, and is an error where there is none.

    Every error is a ModelFormatError that names the file, the key, the value and what was expected.
    """

    values: Mapping[str, Any]
    path: Path
    prefix: str = ""  # how the keys are written in errors

    def error(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(f"{self.prefix}{key} {problem}", path=self.path)

    def wrong(self, key: str, expected: str) -> ModelFormatError:
        return self.error(key, f"must be {expected}, got {str(self.values.get(key))[:80]!r}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number in {low} … {high}")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A number > `above`, and no larger than MAX_NUMBER."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not above < value <= MAX_NUMBER:
            raise self.wrong(key, f"a number > {above:g} and at most {MAX_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if type(value) is not str:
            raise self.wrong(key, "a string")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value

    def refuse(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise for the first key whose value is none of its neutral ones: it would change what the model computes."""
        for key, allowed in neutral.items():
            value = self.values.get(key)
            if value is not None and not any(type(value) is type(n) and value == n for n in allowed):
                raise self.error(key, f"is {str(value)[:80]}: that changes the computation and is not supported yet")
