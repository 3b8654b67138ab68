"""Fills in the tables of the pages: each is what a function of a benchmark makes of a file of its results.

Run as `python -m docs.tables` from the root of the repository after a benchmark. A table stands between
`<!-- table: SCRIPT.FUNCTION of RESULT.json -->` and `<!-- end -->`: a function in `benchmarks/SCRIPT.py`, which takes
the document in `benchmarks/results/RESULT.json` and returns Markdown.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"<!-- table: (\w+)\.(\w+) of ([\w.-]+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return TABLE.sub(_table, text)


def _table(found: re.Match[str]) -> str:
    script, function, result = found.groups()
    benchmarks = ROOT / "benchmarks"
    if str(benchmarks) not in sys.path:
        sys.path.append(str(benchmarks))  # the scripts import each other as they do when they are run
    document = json.loads((benchmarks / "results" / result).read_text(encoding="utf-8"))
    made = getattr(importlib.import_module(script), function)(document)
    return f"<!-- table: {script}.{function} of {result} -->\n\n{made}\n\n<!-- end -->"


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
