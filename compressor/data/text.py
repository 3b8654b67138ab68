"""Texts as rows of tokens; of a large text only the part that is used is read and tokenized.

A causal language model gets windows of the documents joined together; an encoder gets one document in each row, with
the special tokens of its tokenizer.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import BadInput

Tokenizer = Callable[..., Any]
Document = Path | str  # the text of a file, or a text

# Texts of at most this many bytes are tokenized whole, even if only some of the windows are used.
WHOLE_BYTES = 2**21

# Characters tokenized at a time: a tokenizer needs about 200 bytes for each.
PIECE = 2**18

# Bytes read for each token of a window; twice as many if they turn out to be too few.
BYTES_PER_TOKEN = 8

SIGNATURE = b"\xef\xbb\xbf"  # that some editors put first, which is no text


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids; `unused` says which part of the text was left out, empty for none."""

    rows: Sequence[Tensor]
    unused: str = ""


@dataclass(frozen=True)
class Corpus:
    """Documents joined by a `separator`."""

    documents: tuple[Document, ...]
    separator: str = ""

    @cached_property
    def _parts(self) -> list[Path | bytes]:
        parts: list[Path | bytes] = []
        for document in self.documents:
            if parts and self.separator:
                parts.append(self.separator.encode())
            parts.append(document if isinstance(document, Path) else document.encode("utf-8", "replace"))
        return parts

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(each.stat().st_size if isinstance(each, Path) else len(each) for each in self._parts))

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._ends[-1]

    @property
    def blank(self) -> bool:
        """Whether it is all white space."""
        return not any(text.strip() for document in self.documents for text in _texts(document))

    def pieces(self) -> Iterator[str]:
        """The whole text in pieces, cut where tokens hardly ever span the cut."""
        held = ""
        for part in self._parts:
            for text in _texts(part if isinstance(part, Path) else part.decode()):
                held += text
                while len(held) > PIECE:
                    cut = _cut(held[:PIECE])
                    yield held[:cut]
                    held = held[cut:]
        if held:
            yield held

    def read(self, start: int, count: int) -> str:
        """The whole characters in so many bytes from a place on, from the first white space on unless at the start."""
        raw = b"".join(self._read(start, count))
        begins = start == 0
        first = next((i for i, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), 0)
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(raw if begins else raw[first:])
        except UnicodeDecodeError:
            raise self._not_utf8(start, start + count) from None
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        word = 0 if begins else next((i for i, character in enumerate(text[: count // 2]) if character.isspace()), 0)
        return text[word:]

    def _read(self, start: int, count: int) -> Iterator[bytes]:
        for index in range(bisect_right(self._ends, start), len(self._parts)):
            part, begin = self._parts[index], self._ends[index - 1] if index else 0
            if begin >= start + count:
                break
            inside = max(0, start - begin)
            length = start + count - begin - inside
            if isinstance(part, Path):
                with part.open("rb") as file:
                    file.seek(inside)
                    read = file.read(length)
                yield read.removeprefix(SIGNATURE) if inside == 0 else read
            else:
                yield part[inside : inside + length]

    def _not_utf8(self, start: int, end: int) -> BadInput:
        """The error that names the file, among those between two positions, with a byte that is not UTF-8."""
        for part, begin, last in zip(self._parts, [0, *self._ends], self._ends, strict=False):
            if isinstance(part, Path) and begin < end and start < last:
                for _ in _texts(part):
                    pass
        raise AssertionError("every file is UTF-8")


def _texts(path: Document) -> Iterator[str]:
    """A text in parts; a file is read a part at a time."""
    if isinstance(path, str):
        yield path
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            while text := file.read(PIECE):
                yield text
    except UnicodeDecodeError:
        raise BadInput(
            f"not UTF-8 text, at byte {_first_bad_byte(path)}", where=path, remedy="convert the file to UTF-8"
        ) from None


def _first_bad_byte(path: Path) -> int:
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while raw := file.read(PIECE):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(raw)
            except UnicodeDecodeError as error:
                return place - waiting + error.start
            place += len(raw)
    return place - len(decoder.getstate()[0])


def _cut(text: str) -> int:
    """Where to cut a text: after the white space that ends its last whole line, or else its last whole word."""
    for mark in ("\n", " "):
        place = len(text) - 1
        while (place := text.rfind(mark, 1, place)) > 0:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                return place + 1
    return len(text)


def windows(
    corpus: Corpus, tokenizer: Tokenizer, length: int, *, limit: int | None, name: str, least: int = 0
) -> TokenRows:
    """Windows of `length` tokens that do not overlap, of a large text no more than `limit`, from evenly spaced places.

    A short text is one shorter window. Raises `BadInput` for a text of less than two tokens or `least` whole windows.
    """
    if limit is not None and corpus.size > max(WHOLE_BYTES, 2 * limit * BYTES_PER_TOKEN * length):
        found = [_window(corpus, tokenizer, length, place=corpus.size * i // limit, name=name) for i in range(limit)]
        share = sum(used for _, used in found) / corpus.size
        return TokenRows([row for row, _ in found], f"about {100 * (1 - share):.3g} % of the text")
    tokens = _all_tokens(corpus, tokenizer)
    if len(tokens) < 2:
        raise BadInput(
            f"the text is {len(tokens)} token long, too short to predict one from another",
            where=name,
            remedy="pass more text",
        )
    if len(tokens) < least * length:
        raise BadInput(
            f"the text is {len(tokens):,} tokens long, less than {least} windows of {length:,}",
            where=name,
            remedy="give more text, or ask for shorter windows with `calibration_length`",
        )
    size = min(length, len(tokens))
    return TokenRows(tokens[: len(tokens) // size * size].reshape(-1, size).unbind())


def _window(corpus: Corpus, tokenizer: Tokenizer, length: int, *, place: int, name: str) -> tuple[Tensor, int]:
    """The first tokens from a position on, and about how many bytes they cover."""
    count = BYTES_PER_TOKEN * length
    while True:
        text = corpus.read(place, count)
        found = _ids(tokenizer, text, special=False)
        if len(found) >= length or place + count >= corpus.size:
            break
        count *= 2
    if len(found) < length:
        raise BadInput(
            f"there is no window of {length:,} tokens from byte {place:,} on",
            where=name,
            remedy="ask for fewer or shorter windows",
        )
    return found[:length], round(len(text.encode()) * length / len(found))


def _all_tokens(corpus: Corpus, tokenizer: Tokenizer) -> Tensor:
    """The tokens of all of a text, with the special tokens that the tokenizer adds to one."""
    texts = corpus.pieces()
    first, second = next(texts, ""), next(texts, None)
    if second is None:
        return _ids(tokenizer, first, special=True)
    before, after = special_tokens(tokenizer)
    pieces = (_ids(tokenizer, text, special=False) for text in chain((first, second), texts))
    return torch.cat([before, *pieces, after])


def special_tokens(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain, whole = _ids(tokenizer, "a", special=False).tolist(), _ids(tokenizer, "a", special=True).tolist()
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return _tokens(whole[:start]), _tokens(whole[start + len(plain) :])
    return _tokens([]), _tokens([])


def separator(tokenizer: Tokenizer | None) -> str:
    """The end-of-text token of a tokenizer, or an empty line if it has none."""
    end = getattr(tokenizer, "eos_token", None)
    if tokenizer is None or not isinstance(end, str):
        return "\n\n"
    marked = _ids(tokenizer, end, special=False).tolist()
    return end if marked == [getattr(tokenizer, "eos_token_id", None)] else "\n\n"


def _ids(tokenizer: Tokenizer, text: str, *, special: bool) -> Tensor:
    # not verbose: that a text is longer than the model's window is as it should be
    encoded = tokenizer(text, return_attention_mask=False, verbose=False, add_special_tokens=special)
    return _tokens(encoded["input_ids"])


def _tokens(ids: Sequence[int]) -> Tensor:
    """Token ids as int32, in half the memory."""
    return torch.from_numpy(np.asarray(ids, dtype=np.int32))


def documents(corpus: Corpus, tokenizer: Tokenizer, length: int, *, limit: int | None, name: str) -> TokenRows:
    """A document in a row with its special tokens; longer ones in several rows of `length` tokens.

    A line of a .txt file is a document. With a `limit` no more are tokenized, evenly spaced, of each its first row; of
    a large corpus of fewer documents windows from evenly spaced places.
    """
    before, after = special_tokens(tokenizer)
    inside = max(1, length - len(before) - len(after))
    lines = [_Lines.of(each) if _is_lined(each) else None for each in corpus.documents]
    counts = [1 if each is None else len(each) for each in lines]
    number = sum(counts)
    if limit is not None and number < limit and corpus.size > WHOLE_BYTES:
        found = windows(corpus, tokenizer, inside, limit=limit, name=name)
        return TokenRows([torch.cat([before, row, after]) for row in found.rows], found.unused)
    few = limit is not None and number >= limit
    chosen = [i * number // limit for i in range(limit)] if limit is not None and few else range(number)
    ends = list(accumulate(counts))
    rows: list[Tensor] = []
    for index in chosen:
        place = bisect_right(ends, index)
        document, own = corpus.documents[place], lines[place]
        text = "".join(_texts(document)) if own is None else own.read(index - (ends[place - 1] if place else 0))
        ids = _ids(tokenizer, text, special=False)
        starts = range(0, min(len(ids), inside) if few else len(ids), inside)
        rows += [torch.cat([before, ids[start : start + inside], after]) for start in starts]
    if not any(len(row) >= 2 for row in rows):
        raise BadInput("no document is two tokens long", where=name, remedy="pass more text")
    unused = f"{number - len(chosen):,} of {number:,} documents" if len(chosen) < number else ""
    return TokenRows([row for row in rows if len(row) >= 2], unused)


def _is_lined(document: Document) -> bool:
    return isinstance(document, Path) and document.suffix.lower() == ".txt"


# Whether each byte is white space.
_BLANK = np.isin(np.arange(256), list(b" \t\r\n\v\f"))


@dataclass(frozen=True)
class _Lines:
    """The lines of a file that are not blank, by where they begin and end."""

    path: Path
    starts: np.ndarray[Any, np.dtype[np.int64]]
    ends: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, document: Document) -> _Lines:
        assert isinstance(document, Path)
        places, filled = [np.zeros(1, dtype=np.int64)], list[np.ndarray[Any, np.dtype[np.int64]]]()
        place, line = 0, 0
        with document.open("rb") as file:
            while raw := file.read(PIECE):
                read = np.frombuffer(raw, dtype=np.uint8)
                ends = read == ord("\n")
                lines = line + np.cumsum(ends)
                filled.append(np.unique(lines[~_BLANK[read]]))
                places.append(place + 1 + np.flatnonzero(ends))
                place, line = place + len(raw), int(lines[-1])
        edges = np.concatenate([*places, np.array([place])])
        chosen = np.unique(np.concatenate([*filled, np.zeros(0, dtype=np.int64)]))
        return cls(document, edges[:-1][chosen], edges[1:][chosen])

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> str:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            raw = file.read(int(self.ends[index] - self.starts[index]))
        try:
            return raw.decode("utf-8-sig").strip("\r\n")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"not UTF-8 text, at byte {int(self.starts[index]) + error.start}",
                where=self.path,
                remedy="convert the file to UTF-8",
            ) from None
