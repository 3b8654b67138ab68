"""Fills in what the pages take from the results of benchmarks: tables, single figures, and outputs of commands.

Run as `python -m docs.tables` from the root of the repository after a benchmark.

- A table stands between `<!-- table: SCRIPT.FUNCTION of RESULT.json -->` and `<!-- end -->`: a function in
  `benchmarks/SCRIPT.py`, which takes the document in `benchmarks/results/RESULT.json` and returns Markdown.
- A figure stands between `<!-- value: PATH as FORMAT of RESULT.json -->` and `<!-- end -->`, in a sentence. The path
  leads into the document (`sharded.runs.0.seconds`); the format is one of Python's, such as `.1f` or `.0%`, or MB or GB
  of a number of bytes.
- An output is the block of text below `<!-- output: NAME -->`, as `docs/outputs.py` recorded it.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"<!-- table: (\w+)\.(\w+) of ([\w.-]+\.json) -->\n.*?<!-- end -->", re.DOTALL)
VALUE = re.compile(r"<!-- value: ([\w.-]+) as ([\w.%]+) of ([\w.-]+\.json) -->.*?<!-- end -->")
OUTPUT = re.compile(r"<!-- output: ([\w-]+) -->\n\n```text\n.*?\n```\n", re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"
OUTPUTS = RESULTS / "outputs.json"
BYTES = {"MB": 1e6, "GB": 1e9}


def filled(text: str) -> str:
    """A page with its tables, figures, and outputs as the results have them."""
    return OUTPUT.sub(_output, VALUE.sub(_value, TABLE.sub(_table, text)))


def _value(found: re.Match[str]) -> str:
    path, written, result = found.groups()
    value: Any = json.loads((RESULTS / result).read_text(encoding="utf-8"))
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    shown = f"{value / BYTES[written]:.3g} {written}" if written in BYTES else format(value, written)
    return f"<!-- value: {path} as {written} of {result} -->{shown.replace('%', ' %')}<!-- end -->"


def _output(found: re.Match[str]) -> str:
    name = found[1]
    recorded = json.loads(OUTPUTS.read_text(encoding="utf-8"))["outputs"][name]
    return f"<!-- output: {name} -->\n\n```text\n" + "\n".join(recorded["lines"]) + "\n```\n"


def _table(found: re.Match[str]) -> str:
    script, function, result = found.groups()
    benchmarks = ROOT / "benchmarks"
    if str(benchmarks) not in sys.path:
        sys.path.append(str(benchmarks))  # the scripts import each other as they do when they are run
    document = json.loads((RESULTS / result).read_text(encoding="utf-8"))
    made = getattr(importlib.import_module(script), function)(document)
    return f"<!-- table: {script}.{function} of {result} -->\n\n{made}\n\n<!-- end -->"


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
