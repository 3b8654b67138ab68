"""Numbers, sizes and names as people read them: the same in messages, tables, cards and reports."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text on one line, with characters that could move a terminal's cursor escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def format_size(size: float) -> str:
    """A size in bytes, in the decimal units of `max_size="40MB"`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def format_count(number: int) -> str:
    """An exact count."""
    return f"{number:,}"


def format_short(number: int) -> str:
    """A count in at most five characters, exact below a thousand."""
    size = float(number)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(size) < 999.5:
            return f"{number:d}" if unit == "" else f"{size:.3g}{unit}"
        size /= 1000
    return f"{number:.0e}"


def format_percent(part: float, whole: float = 1) -> str:
    """A share in percent, with one decimal; a dash if the whole is zero."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def format_seconds(seconds: float) -> str:
    """A duration, in the unit that keeps it readable."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_estimate(seconds: float) -> str:
    """A duration that is only expected, to about one digit: no estimate is worth more."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 115 * size:
            return _coarse(seconds / size, unit)
    return _coarse(seconds / 3600, "h")


def _coarse(value: float, unit: str) -> str:
    step = 1 if value < 9.5 else 5 if value < 57.5 else 10
    return f"{max(step, step * round(value / step))} {unit}"


def format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)
