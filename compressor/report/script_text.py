"""What a page's script reads, as text inside the page."""

from __future__ import annotations

import json
from typing import Any


def script_text(content: dict[str, Any]) -> str:
    """JSON that cannot end its script element, whatever names a checkpoint contains."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
