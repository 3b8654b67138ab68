"""For mkdocs: what lies outside of docs/ and belongs to the site. Other files of the repository are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# A page that lies at the root of the repository, where contributors look for it.
CONTRIBUTING = "CONTRIBUTING.md"
# A link or picture that leaves docs/: what is shown, and the path from the root of the repository.
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+([\w./-]+)(#[\w-]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """The pictures of the benchmarks and the page for contributors are files of the site."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.svg")):
        place = f"pictures/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    files.append(File.generated(config, CONTRIBUTING, abs_src_path=str(ROOT / CONTRIBUTING)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Pictures are those of the site, and links to other files are their paths."""
    above = "../" * page.file.src_uri.count("/")
    if page.file.src_uri == CONTRIBUTING:
        return markdown.replace("](docs/", "](")

    def inside(found: re.Match[str]) -> str:
        picture, shown, path, anchor = found.groups()
        if path == CONTRIBUTING:
            return f"[{shown}]({above}{path}{anchor or ''})"
        if (ROOT / "docs" / path).is_file():
            return found[0]
        if picture:
            return f"![{shown}]({above}pictures/{Path(path).name})"
        return shown if shown == path else f"{shown} (`{path}`)"

    return _OUTSIDE.sub(inside, markdown)
