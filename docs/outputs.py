"""Records what commands on the pages print, for the blocks of text below them.

Run as `python -m docs.outputs [NAME ...]` from the root of the repository; `python -m docs.tables` then puts it into
the pages. A block below `<!-- output: NAME -->` is the output of the last command above it, at 80 columns, in a folder
that has nothing but a copy of `model_cards/`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from docs.tables import OUTPUTS, PAGES, ROOT

_COMMAND = re.compile(r"```sh\n((?:(?!```).)*?)```(?:(?!```).)*?<!-- output: ([\w-]+) -->", re.DOTALL)


def commands() -> dict[str, str]:
    """The commands whose outputs are on pages, by name."""
    found = [match for page in PAGES for match in _COMMAND.findall(page.read_text(encoding="utf-8"))]
    return {name: re.sub(r"\\\n\s*", "", text).strip() for text, name in found}


def output_of(command: str) -> list[str]:
    """The lines that a command prints."""
    program, *words = shlex.split(command)
    executable = Path(sys.executable).with_name(program)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "model_cards", Path(folder) / "model_cards")
        environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        run = [str(executable), *words]
        done = subprocess.run(run, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [line.rstrip() for line in done.stdout.strip("\n").splitlines()]


def main() -> None:
    known = commands()
    recorded = json.loads(OUTPUTS.read_text(encoding="utf-8"))["outputs"] if OUTPUTS.exists() else {}
    kept = {name: each for name, each in recorded.items() if name in known}
    for name in sys.argv[1:] or known:
        kept[name] = {"command": known[name], "lines": output_of(known[name])}
    document = {"outputs": dict(sorted(kept.items()))}
    OUTPUTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
