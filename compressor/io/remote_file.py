"""A file of the Hugging Face hub that is read by ranges, and not fetched."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from compressor.errors import BadInput, first_line

_MOST_FAILURES = 3
# Seconds after the first failure; further ones take multiples of it.
_PAUSE = 0.5
# Answers that stay the same when asked again: no access, or no such file.
_FINAL = (401, 403, 404)
# Numbers that are longer are no places in a file, and int() refuses thousands of digits.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.IGNORECASE | re.ASCII)
_AGAIN = "try again, or fetch the model first with 'hf download'"
_ACCESS = "check its name, and for a private or gated model log in with 'hf auth login'"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model of the hub: `where` names it in messages, and `size` is in bytes."""

    url: str
    size: int
    where: str

    def __str__(self) -> str:
        return self.where

    @property
    def name(self) -> str:
        """Its name in the repository."""
        return self.where.rpartition("/")[2]

    def read_at(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes, writable) from `offset`; a connection that breaks is taken up where it was.

        Raises:
            BadInput: the hub does not answer, does not give parts of files, or gives other bytes than asked for.
        """
        filled = failures = 0
        while filled < len(buffer):
            before = filled
            try:
                for chunk in self._range(offset + filled, offset + len(buffer)):
                    if len(chunk) > len(buffer) - filled:
                        raise self._refused("sends more than was asked for")
                    buffer[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
                reason = "ends too early"
            except BadInput:
                raise
            # The library under huggingface_hub, and so the class of a connection's failure, differs with its version.
            except Exception as error:
                reason = f"cannot be read ({first_line(error)})"
            failures = failures + 1 if filled == before else 0
            if failures == _MOST_FAILURES:
                raise self._refused(reason)
            time.sleep(_PAUSE * failures)

    def _range(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from one position to another, in pieces as they come."""
        # They are public, but its stub does not say so.
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self.url, headers=headers) as response:
            if response.is_error:
                response.read()
            try:
                hf_raise_for_status(response)
            except Exception as error:
                if response.status_code not in _FINAL:
                    raise
                raise self._refused(f"cannot be read ({first_line(error)})", remedy=_ACCESS) from error
            # A whole file in answer to a range may be larger than memory.
            if response.status_code != 206:
                raise self._refused("is not given in parts")
            if not self._is_from(response.headers.get("Content-Range", ""), begin, end):
                raise self._refused("is given in other parts than asked for")
            yield from response.iter_bytes()

    def _is_from(self, content_range: str, begin: int, end: int) -> bool:
        """Whether the header of an answer (RFC 9110, section 14.4) says that it begins where it should, in this file.

        An answer may end early; what is left is asked for again.
        """
        said = _CONTENT_RANGE.fullmatch(content_range.strip())
        if said is None:
            return False
        first, last, whole = said.groups()
        return int(first) == begin <= int(last) < end and whole in ("*", str(self.size))

    def _refused(self, what: str, *, remedy: str = _AGAIN) -> BadInput:
        return BadInput(what, where=self.where, remedy=remedy)
