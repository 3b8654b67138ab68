"""Writes the interactive explorer, for the presets or for a real recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from compressor.api.keywords import ExploreKeywords
from compressor.api.option import verb
from compressor.api.options import ExploreOptions
from compressor.errors import BadInput

if TYPE_CHECKING:
    from compressor.model import InspectedLayer
    from compressor.progress import Progress
    from compressor.recipe import TrainingRecipe
    from compressor.report.explorer import ExploredLayers, WrittenSpectrum
    from compressor.results import Inspection


@verb(ExploreOptions)
def explore(
    output: str | Path | None = None, options: ExploreOptions | None = None, **given: Unpack[ExploreKeywords]
) -> Path:
    """Write the interactive explorer as one offline HTML file, and return its path.

    `recipe` is what the page opens on: a `TrainingRecipe`, a file that holds one, or a model, which is measured first
    and whose layers are then listed with their windows. Without it the page opens on a preset.

    Args:
        output: The page to write, explorer.html by default.
        options: The options as an object; keywords take precedence.

    Returns:
        The path of the page.

    Raises:
        BadInput: a path that is not named .html or cannot be written, or a recipe or model that cannot be used.

    Example:
        >>> compressor.explore("explorer.html", recipe="model/")
    """
    asked = ExploreOptions.of(options, {**given, "output": output})
    recipe, overwrite = asked.recipe, asked.overwrite
    from compressor.io import check_output, staged_file
    from compressor.report.explorer import explorer_page

    path = asked.output
    # A slip such as -o MODEL --overwrite must not cost anybody a model.
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInput("the explorer is an HTML file", where=path, remedy="give it a name that ends in .html")
    sources = [Path(recipe)] if isinstance(recipe, str | Path) else []
    check_output(path, sources=sources, form="file", overwrite=overwrite)
    known, layers = (None, ()) if recipe is None else _explored(recipe, asked.progress)
    page = explorer_page(known, layers)
    with staged_file(path, overwrite=overwrite) as staged:
        staged.write_bytes(page.encode())
    return path


def _explored(
    recipe: TrainingRecipe | str | Path, progress: Progress | None
) -> tuple[TrainingRecipe, tuple[ExploredLayers, ...]]:
    from compressor.io import local_model
    from compressor.measure import memory_window
    from compressor.recipe import TrainingRecipe, read_recipe
    from compressor.report.explorer import ExploredLayers

    if isinstance(recipe, str):
        recipe = local_model(recipe)
    if not isinstance(recipe, TrainingRecipe) and _is_model(Path(recipe)):
        from compressor.api.inspect import inspect

        inspection = inspect(recipe, progress=progress)
        return inspection.recipe, _alike(inspection)
    known = recipe if isinstance(recipe, TrainingRecipe) else read_recipe(recipe)
    window = memory_window(known, shape=(1, 1), uses=known.sequence_length)
    if window.rank_bound is not None:
        # Nobody can say of a recipe alone whether the bound is vacuous: that is all that hangs on the shape.
        window = replace(window, vacuous=None, reason="")
    return known, (ExploredLayers((), None, known.sequence_length, window, None),)


def _is_model(path: Path) -> bool:
    """Whether a path is that of weights, and not of a file that tells how some were trained."""
    from compressor.io.checkpoint import WEIGHT_SUFFIXES

    if path.name == "training_args.bin":
        return False
    return path.is_dir() or path.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))


def _alike(inspection: Inspection) -> tuple[ExploredLayers, ...]:
    """The eligible layers, those together that the explorer cannot tell apart, most parameters first."""
    from compressor.report.explorer import ExploredLayers

    groups: dict[object, list[int]] = {}
    for index, each in enumerate(inspection.layers):
        if each.window is not None:
            groups.setdefault((each.layer.shape, each.uses, each.window), []).append(index)
    explored = []
    for indices in groups.values():
        members = [inspection.layers[index] for index in indices]
        ranks = [member.ranks.entropy for member in members if member.ranks is not None]
        first = members[0]
        assert first.window is not None
        explored.append(
            ExploredLayers(
                names=tuple(member.layer.name for member in members),
                shape=first.layer.shape,
                uses=first.uses,
                window=first.window,
                entropy_ranks=(min(ranks), max(ranks)) if ranks else None,
                written=next(filter(None, (_written(member, inspection) for member in members)), None),
            )
        )
    if not explored:
        raise BadInput(
            "no layer of this model is a matrix that can be explored",
            where=inspection.source,
            remedy="see why with 'compress inspect MODEL'",
        )
    return tuple(sorted(explored, key=lambda each: -_parameters(each)))


def _written(inspected: InspectedLayer, inspection: Inspection) -> WrittenSpectrum | None:
    """The spectra of a layer and of what training wrote, where its initial weights were found."""
    import numpy as np

    from compressor.report.explorer import WrittenSpectrum

    values, written, found = inspected.singular_values, inspected.written_values, inspection.initial
    if inspected.start is None or values is None or written is None or found is None:
        return None
    return WrittenSpectrum(
        inspected.layer.name, found.source, inspected.start.share, np.asarray(values), np.asarray(written)
    )


def _parameters(layers: ExploredLayers) -> int:
    d_out, d_in = layers.shape or (0, 0)
    return len(layers.names) * d_out * d_in
