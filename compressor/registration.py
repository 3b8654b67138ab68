"""What `import compressor` sets up, without importing torch, transformers or rich.

Transformers learns to load compressed folders as soon as it is imported, and results learn how they are drawn.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compressor.display import draw_with

if TYPE_CHECKING:
    from compressor.report.blocks import Page

_REGISTRY = "transformers.quantizers.auto"
_QUANTIZER = "compressor.lowrank.quantizer"


class _RegisterOnImport(MetaPathFinder):
    """Waits for transformers' registry of quantizers to be imported, and adds ours to it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader)
        return spec


class _LoadThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_QUANTIZER)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _draw(result: object) -> Page:
    from compressor.report.draw import draw

    return draw(result)


def register() -> None:
    """Register the low-rank quantizer with transformers, now or when it is imported, and what draws results."""
    draw_with(_draw)
    if _REGISTRY in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())
