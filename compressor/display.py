"""Results as text, HTML and data frames: `print(result)` shows the table that its command prints.

The room `report` draws the tables. It knows the types of all results and lies below them, so it cannot be imported
here; the package names it in `registration.register`, and it is loaded when the first result is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from compressor.errors import CompressorError

if TYPE_CHECKING:
    import pandas


class Page(Protocol):
    """A result, drawn."""

    def text(self) -> str: ...

    def html(self) -> str: ...


_draw: Callable[[object], Page]


def draw_with(draw: Callable[[object], Page]) -> None:
    """Set the function that draws results."""
    global _draw  # noqa: PLW0603 - set once, when the package is imported
    _draw = draw


class Displayed:
    """A result that shows itself as the table that its command prints."""

    def __str__(self) -> str:
        return _draw(self).text()

    def _repr_html_(self) -> str:
        return _draw(self).html()


class DisplayedLayers(Displayed):
    """A result with layers."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_frame(self) -> pandas.DataFrame:
        """Return the layers as a data frame, a row each, with the layer's name as index.

        The columns are the entries of `to_dict()["layers"]`; nested ones are joined by a dot, as in `ranks.energy`.

        Raises:
            CompressorError: pandas is not installed.

        Example:
            >>> compressor.plan("model.safetensors", keep=0.5).to_frame()[["rank", "error"]]
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise CompressorError("pandas is not installed; pip install pandas, or use to_dict()") from error
        return pandas.json_normalize(self.to_dict()["layers"]).set_index("name")
