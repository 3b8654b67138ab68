"""How much the networks of a merge are in each other's way, and what to fear of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from compressor.data import EvaluationData
from compressor.errors import BadInput
from compressor.measure.rounding import rounding
from compressor.merging.chain import chain_of_shapes, traced_chain
from compressor.merging.combination import Combination
from compressor.merging.guarantee import interference_warning, sum_warnings
from compressor.merging.overlap import (
    InputOverlap,
    LayerOverlap,
    data_overlap,
    layer_overlap,
    measured_interference,
    row_space_overlap,
)
from compressor.merging.parts import Part
from compressor.model import Factory, build_model, on_device
from compressor.network import layer_name
from compressor.progress import Progress
from compressor.torch_state import float64_device


def layer_overlaps(
    combination: Combination, tasks: Sequence[EvaluationData], *, device: torch.device, progress: Progress | None
) -> tuple[tuple[LayerOverlap, ...], float]:
    """The overlap of every layer whose inputs are equally many in all networks; the largest cosine of their weights.

    `tasks` are data of each network, on which their interference is measured, or none.
    """
    parts, base = combination.networks, combination.base
    measured = {}
    if tasks:
        modules = [part.model.module for part in parts]
        start = None if base is None else base.model.module
        with on_device(device, *modules, *(() if start is None else (start,))):
            measured = measured_interference(modules, tasks, device=device, base=start, progress=progress)
    names = compared_layers(combination)
    overlaps = []
    products = dict.fromkeys(combinations(range(len(parts)), 2), 0.0)
    squares = [0.0] * len(parts)
    for done, name in enumerate(names, start=1):
        matrices = _matrices(combination, name, device)
        interference = measured.get(parts[0].matrices[name].module)
        overlaps.append(_overlap(combination, name, matrices, interference=interference))
        if len({matrix.shape for matrix in matrices}) == 1:
            for first, second in products:
                products[first, second] += float((matrices[first] * matrices[second]).sum())
            squares = [total + float(m.square().sum()) for total, m in zip(squares, matrices, strict=True)]
        if progress:
            progress("measure", done, len(names))
    norms = {pair: (squares[pair[0]] * squares[pair[1]]) ** 0.5 for pair in products}
    cosine = max(product / norms[pair] if norms[pair] > 0 else 0.0 for pair, product in products.items())
    return tuple(overlaps), cosine


def overlap_of(combination: Combination, name: str, device: torch.device) -> LayerOverlap:
    """The overlap of one layer, as its matrices alone tell it."""
    return _overlap(combination, name, _matrices(combination, name, device), interference=None)


def _overlap(
    combination: Combination, name: str, matrices: Sequence[Tensor], *, interference: Sequence[float] | None
) -> LayerOverlap:
    parts, base = combination.networks, combination.base
    edges = None if base is None else _rounding_edges(parts, matrices, name)
    return layer_overlap(layer_name(name), matrices, interference, edges=edges)


def compared_layers(combination: Combination) -> list[str]:
    """The weights of the layers whose inputs are equally many in all networks."""
    return [name for name in combination.networks[0].matrices if _same_inputs(combination.parts, name)]


def _same_inputs(parts: Sequence[Part], name: str) -> bool:
    return len({part.matrices[name].shape[1] if name in part.matrices else None for part in parts}) == 1


def _matrices(combination: Combination, name: str, device: torch.device) -> list[Tensor]:
    """Each network's `d_out x d_in` matrix, or what was trained on top of the base, in float64."""
    matrices = [part.matrix(name).to(float64_device(device)) for part in combination.networks]
    if combination.base is None:
        return matrices
    before = combination.base.matrix(name).to(float64_device(device))
    return [matrix - before for matrix in matrices]


def _rounding_edges(parts: Sequence[Part], differences: Sequence[Tensor], name: str) -> list[float]:
    """The largest singular value that rounding has in each network's difference to the base; 0 for low-rank layers."""
    return [
        0.0
        if part.pair(name) is not None
        else rounding(part.matrix(name).to(part.infos[name].dtype), difference.cpu()).edge
        for part, difference in zip(parts, differences, strict=True)
    ]


def input_overlap(combination: Combination, tasks: Sequence[EvaluationData]) -> InputOverlap | None:
    """How much the inputs of the networks overlap: measured on their data, or told by their first layers.

    None where neither is possible, because it is not known which layers are the first.
    """
    measured = data_overlap(tasks, [part.model.module for part in combination.networks]) if tasks else None
    if measured is not None:
        return measured
    chain, first = combination.chain, combination.networks[0]
    if chain is None:
        try:
            shapes = {name: info.shape for name, info in first.infos.items()}
            chain = chain_of_shapes(shapes, first.checkpoint.source)
        except BadInput:
            return None
    name = f"{chain.layers[0]}.weight".removeprefix(".")
    return row_space_overlap(_matrices(combination, name, torch.device("cpu")))


def merge_warnings(
    combination: Combination, overlaps: Sequence[LayerOverlap], *, cosine: float, factory: Factory | None
) -> list[str]:
    """What theory, recipes and the measured overlaps let fear of a merge."""
    chain, networks = combination.chain, combination.networks
    if chain is not None:
        warnings = [] if factory is not None else ["taken for a plain chain: " + " -> ".join(chain.layers)]
        first = [layer for layer in overlaps if layer.name in chain.first]
        return warnings + (interference_warning(first) if combination.head == "shared" else [])
    if combination.base is not None:
        said = ["theory says nothing about the sum of fine-tunes: it is known to work often, from experiments"]
        return said + interference_warning(overlaps)
    recipes = [(part.name, part.model.recipe) for part in networks]
    theory = sum_warnings(depth=len(networks[0].matrices), linear=_is_linear(factory), recipes=recipes, cosine=cosine)
    return theory + interference_warning(overlaps)


def _is_linear(factory: Factory | None) -> bool | None:
    if factory is None:
        return None
    try:
        return traced_chain(build_model(factory)).linear
    except BadInput:
        return None
