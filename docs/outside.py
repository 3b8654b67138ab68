"""For mkdocs: pictures of the benchmarks are copied beside the pages, and other files of the repository are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# A link or picture that leaves docs/: what is shown, and the path from the root of the repository.
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+([\w./-]+)(#[\w-]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """The pictures are files of the site."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.svg")):
        place = f"pictures/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Pictures are those of the site, and links to other files are their paths."""
    above = "../" * page.file.src_uri.count("/")

    def inside(found: re.Match[str]) -> str:
        picture, shown, path, _ = found.groups()
        if (ROOT / "docs" / path).is_file():
            return found[0]
        if picture:
            return f"![{shown}]({above}pictures/{Path(path).name})"
        return shown if shown == path else f"{shown} (`{path}`)"

    return _OUTSIDE.sub(inside, markdown)
