"""Parts of model cards: pieces of Markdown, and names made safe for them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressor.formatting import one_line

TAG = "compressor"
TAGS = ("low-rank", "compressed", TAG)

LOADING = "## How to load it"


def repository_name(name: str) -> str:
    """A name reduced to the characters that the hub allows in names."""
    return re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^\w./-]", "-", name, flags=re.ASCII)).strip("-.")[:96] or "model"


def python_block(*lines: str) -> str:
    """Lines of Python as a block of Markdown."""
    return "\n".join(("```python", *lines, "```"))


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code(name: str) -> str:
    """A name of foreign origin as inline code, which it cannot break out of."""
    return f"`{one_line(name).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def plain_text(text: str) -> str:
    """A text of foreign origin without a meaning in HTML or Markdown."""
    escaped = html.escape(one_line(text), quote=False)
    return re.sub(r"([\\`|\[\]])", r"\\\1", escaped)


def architecture_of(config: Mapping[str, Any] | None) -> str:
    """The transformers class that loads the weights beside a `config.json`."""
    import transformers

    named = (config or {}).get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return architecture if architecture.isidentifier() and hasattr(transformers, architecture) else "AutoModel"
