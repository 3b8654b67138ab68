"""What differs between runs in what is written of a model: the times that were measured."""

from __future__ import annotations

import re

# ", 0.63x latency at batch 1, 1.20x at 32" in a verdict.
VERDICT = re.compile(
    r", \d[\d.]*x (?:to \d[\d.]*x )?latency(?: (?:at [^,*]+|\([^)]*\)), \d[\d.]*x (?:at [^,*]+|\([^)]*\)))?"
)
# What a card says to be worse, and the cells of its rows.
WORSE = re.compile(r" Worse than the dense model: ([^.]+)\.")
ROW = re.compile(r"^(\| latency, [^|]+\|).*", re.MULTILINE)


def without_times(text: str) -> str:
    """A verdict or a card without the times, and without how they compare with those of the dense model."""
    return ROW.sub(r"\1", WORSE.sub(_without_latency, VERDICT.sub("", text)))


def _without_latency(said: re.Match[str]) -> str:
    worse = [each for each in said[1].split(", ") if each != "latency"]
    return f" Worse than the dense model: {', '.join(worse)}." if worse else ""
