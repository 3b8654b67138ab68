"""Pages opened in a real browser, and what is asked of their colors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it with 'make chromium'")


def in_browser(test: Any) -> Any:
    """Mark a test that runs in a browser: slow, and skipped where there is none."""
    return pytest.mark.slow(_needs_chromium(test))


class OpenedPage:
    """A page in a browser without a network, with all it asked for and all that went wrong."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, *, address: str = "", **options: Any) -> None:
        viewport = {"width": width, "height": 900}
        self.context = browser.new_context(offline=True, **{"viewport": viewport, **options})
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(path.as_uri() + address)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.1 of two colors written #rrggbb."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
