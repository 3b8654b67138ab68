"""JSON and YAML files as mappings, however broken or hostile they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import BadInput

# A Trainer's log of a long run is tens of megabytes of JSON; nobody writes YAML or a card by the megabyte,
# and the YAML parser is slow enough for that to matter.
_MOST_BYTES_OF_JSON = 2**28
_MOST_BYTES_OF_TEXT = 2**22


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file; raises `BadInput` if it cannot be read or has more than `most` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror or error})", where=path, remedy="check the path") from error
    if len(content) > most:
        raise BadInput(
            f"has more than {most} bytes, too many for a training recipe",
            where=path,
            remedy="pass another file",
        )
    return content


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; bytes that are none are replaced."""
    return read_bytes(path, _MOST_BYTES_OF_TEXT).decode("utf-8", errors="replace")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `BadInput` if there is none."""
    content = read_bytes(path, _MOST_BYTES_OF_JSON)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput("is not valid JSON", where=path, remedy="correct it or pass another file") from error
    return _mapping(value, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; raises `BadInput` if there is none."""
    text = read_text(path)
    try:
        try:
            # JSON first: YAML 1.1 refuses its tabs, and takes its 1e-4 for text.
            value = json.loads(text)
        except ValueError:
            value = yaml.safe_load(text)
    # Beside YAMLError the parser lets the errors of the values' own types through: dates, unhashable keys.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as e:
        raise BadInput("is neither YAML nor JSON", where=path, remedy="correct it or pass another file") from e
    return _mapping(value, path)


def product(*factors: object) -> int | None:
    """The product of whole numbers; None if a factor is not one, and so unknown."""
    numbers = [factor for factor in factors if isinstance(factor, int) and not isinstance(factor, bool)]
    return math.prod(numbers) if len(numbers) == len(factors) else None


def _mapping(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadInput("is not a mapping from names to values", where=path, remedy="pass another file")
    return value
