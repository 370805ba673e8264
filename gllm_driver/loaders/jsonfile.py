"""JSON from strangers: an object, or one error that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError

MAX_JSON_NBYTES = 64 << 20  # config.json takes kilobytes; the index of the largest models a few megabytes


def parse_object(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `text`. Duplicate keys are refused: readers differ in which of the two they keep."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ModelFormatError(f"{what} has the key {key!r} twice", path=path)
                seen.add(key)
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ModelFormatError(f"{what} is nested too deeply", path=path) from None
    except ValueError as error:
        raise ModelFormatError(f"{what} is not valid JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{what} must be a JSON object, got {type(value).__name__}", path=path)
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object a file holds; ModelFormatError when it cannot be read, is absurdly large or is no object."""
    try:
        if not path.is_file():
            raise ModelFormatError("is a directory, expected a file" if path.is_dir() else "no such file", path=path)
        with open(path, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > MAX_JSON_NBYTES:
                raise ModelFormatError(f"has {nbytes} bytes, more than any such file needs", path=path)
            text = file.read(nbytes)
    except PermissionError:
        raise ModelFormatError("no permission to read the file", path=path) from None
    except OSError as error:
        raise ModelFormatError(f"cannot be read: {error}", path=path) from error
    return parse_object(text, path, path.name)
