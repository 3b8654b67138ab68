"""Untrusted documents: read within limits on bytes, values, and depth, or refused in one line."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import BadInput
from compressor.system_errors import explained

# A Trainer's log of a long run is tens of megabytes of JSON, all of it ASCII. Other text takes up to four bytes a
# character in memory.
_MOST_BYTES_OF_JSON = 2**26
_MOST_BYTES_OF_OTHER_JSON = 2**23
_MOST_BYTES_OF_TEXT = 2**22
_MOST_BYTES_OF_YAML = 2**20
# An empty list in a list takes 64 bytes, an object of one name 240: what a small file can ask for stays below 200 MB.
_MOST_VALUES_OF_JSON = 1_250_000
_MOST_VALUES_OF_YAML = 100_000
_MOST_LEVELS = 100
# Python reads a number of base 60 (1:30:00), which YAML 1.1 has, in quadratic time; and of whole numbers with more
# digits than these as the names of a mapping, thousands can share one hash.
_MOST_DIGITS, _EVERYDAY_DIGITS = 1000, 15
_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fxA-FX_:]*")

# The parser in C is ten times as fast as the one in Python, and its events are safe at any depth.
_SafeLoader: type[yaml.SafeLoader] | type[yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_CORRECT = "correct it or pass another file"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the ways in which the file system refuses `path` into `BadInput`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            what = f"is a symbolic link to {path.readlink()}, which does not exist"
            raise BadInput(what, where=path, remedy="download or restore the file it stands for") from None
        raise BadInput("no such file or folder", where=path, remedy="check the path") from None
    except PermissionError:
        raise BadInput("may not be read", where=path, remedy="ask for read permission or copy it") from None
    except OSError as error:
        bad = explained(error, doing="cannot be read", folder=path.parent, elsewhere="copy it to another", where=path)
        what = f"cannot be read ({error.strerror or error})"
        raise bad or BadInput(what, where=path, remedy="check the path and the disk") from error


def read_regular_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; waits for nobody, and never reads more.

    Raises:
        BadInput: the file is missing, unreadable, too large, or a pipe, a device or a folder.
    """
    with reading(path):
        # Without O_NONBLOCK opening a named pipe would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput("is not a regular file", where=path, remedy="pass the path of a file")
            content = file.read(most + 1) if status.st_size <= most else b""
    if max(len(content), status.st_size) > most:
        raise BadInput(f"has more than {most:,} bytes, too many to read", where=path, remedy="pass another file")
    return content


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; invalid bytes are replaced."""
    return read_regular_file(path, _MOST_BYTES_OF_TEXT).decode("utf-8", errors="replace")


def read_json(path: Path, *, remedy: str = _CORRECT) -> dict[str, Any]:
    """The object in a JSON file; raises `BadInput` if there is none."""
    return mapping(parse_json(read_regular_file(path, _MOST_BYTES_OF_JSON), where=path, remedy=remedy), path, remedy)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; raises `BadInput` if there is none."""
    return mapping(parse_yaml(read_text(path), where=path), path, _CORRECT)


def parse_json(content: bytes | str, *, where: str | Path, remedy: str = _CORRECT) -> Any:
    """The value of a JSON document.

    Raises:
        BadInput: it is no JSON, or larger or deeper than what is read from others.
    """
    try:
        return bounded_json(content)
    except (ValueError, RecursionError) as error:
        # Python's own words on a number of thousands of digits are advice to programmers.
        why = "a number of too many digits" if "int_max_str_digits" in str(error) else str(error)[:200]
        raise BadInput(f"is not valid JSON ({why})", where=where, remedy=remedy) from None


def parse_yaml(text: str, *, where: str | Path) -> Any:
    """The value of a YAML (or JSON) document.

    Raises:
        BadInput: it is neither, or larger or deeper than what is read from others, aliases and merge keys written out.
    """
    try:
        try:
            # JSON first: YAML 1.1 refuses its tabs, and takes its 1e-4 for text.
            return bounded_json(text)
        except ValueError:
            _require_small_yaml(text)
            return yaml.load(text, Loader=_SafeLoader)
    # Beside YAMLError the parser lets the errors of the values' own types through: dates, unhashable keys.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as e:
        why = f" ({e})" if isinstance(e, _TooLargeError) else ""
        raise BadInput(f"is neither YAML nor JSON that can be read{why}", where=where, remedy=_CORRECT) from None


def mapping(value: object, where: str | Path, remedy: str) -> dict[str, Any]:
    """A document that has to be a mapping from names to values; raises `BadInput` if it is not one."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        what = f"holds a {type(value).__name__} where a mapping from names to values is expected"
        raise BadInput(what, where=where, remedy=remedy)
    return value


class _TooLargeError(ValueError):
    """A document is larger or deeper than what is read from others."""


def bounded_json(
    content: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> Any:
    """`json.loads` of a document that is not larger or deeper than what is read from others.

    Raises:
        ValueError: it is no JSON, or larger or deeper. The JSON reader itself may raise `RecursionError`.
    """
    most = _MOST_BYTES_OF_JSON if content.isascii() else _MOST_BYTES_OF_OTHER_JSON
    if len(content) > most:
        raise _TooLargeError(f"more than {most:,} bytes")
    # Each value but the first follows one of these, so that their number bounds the memory before it is asked for.
    text = content if isinstance(content, bytes) else content.encode("utf-8", errors="replace")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES_OF_JSON:
        raise _TooLargeError(f"more than {_MOST_VALUES_OF_JSON:,} values")
    document = json.loads(content, object_pairs_hook=object_pairs_hook)
    level = [document] if isinstance(document, dict | list) else []
    levels = 0
    while level:
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        levels += 1
        if levels > _MOST_LEVELS:
            raise _TooLargeError(f"more than {_MOST_LEVELS} levels")
    return document


def _require_small_yaml(text: str) -> None:
    """Refuse a YAML document by its events alone: an alias counts as what it stands for, as does a merge key's."""
    if len(text) > _MOST_BYTES_OF_YAML:
        raise _TooLargeError(f"more than {_MOST_BYTES_OF_YAML:,} characters")
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    values = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.ScalarEvent):
            size = _size_of_scalar(event.value)
            values += size
            if event.anchor is not None:
                sizes[event.anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _TooLargeError("an alias of what it is in, or of nothing")
            values += sizes[event.anchor]
        if values > _MOST_VALUES_OF_YAML:
            raise _TooLargeError(f"more than {_MOST_VALUES_OF_YAML:,} values")
        if len(open_nodes) > _MOST_LEVELS:
            raise _TooLargeError(f"more than {_MOST_LEVELS} levels")


def _size_of_scalar(text: str) -> int:
    """How many values a scalar counts as; a number that would take too long to parse is refused."""
    if len(text) <= _EVERYDAY_DIGITS or not _NUMBER.fullmatch(text):
        return 1
    if len(text) > _MOST_DIGITS:
        raise _TooLargeError(f"a number of more than {_MOST_DIGITS:,} digits")
    return 10


def text_mapping(value: object) -> dict[str, str]:
    """A mapping of names read from a file, {} if it is none."""
    entries = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in entries if isinstance(key, str) and isinstance(text, str)}
