"""What quantizing a matrix, or the factors of a pair, would cost in the metric, at any width.

All that does not depend on the width is computed once: how much an error in each of the numbers costs. See
`quantize/simulated.py`.

The factors of a pair are quantized one after the other, and the second is refitted to the first as it was rounded. To
first order this takes what of the first factor's error lies in the space of its rows: the projection P on it, which is
orthogonal in the moment of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.factorize import FactorPair, Metric, pivoted_pair, weighed
from compressor.forms.pair_form import PairForm
from compressor.forms.pivoted import PIVOTED
from compressor.forms.quantized_parts import turned_metric, with_even_columns
from compressor.forms.weights import TURNED
from compressor.measure.scale import power_of_two
from compressor.network import Kind
from compressor.quantize import Quantization, Simulation
from compressor.quantize.simulated import Carrying, left_by_rounding
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class _Term:
    """What squares of what rounding left cost: the products of a weight of their row and one of their column."""

    rows: Tensor
    columns: Tensor

    def turned(self) -> _Term:
        return _Term(self.columns, self.rows)


@dataclass(frozen=True)
class _Part:
    """A matrix that is rounded as it is stored, in its metric, and what that costs."""

    matrix: Tensor
    metric: Metric
    terms: Sequence[_Term]

    def cost(self, quantization: Quantization) -> float:
        scale = power_of_two(self.matrix)
        left = left_by_rounding(self.matrix, quantization.fitted(self.matrix.shape[1]), self.metric)
        squares = (left / scale).square_()
        return scale**2 * sum(float(term.rows @ squares @ term.columns) for term in self.terms)


@dataclass(frozen=True)
class Rounded:
    """What is quantized of a layer."""

    parts: Sequence[_Part]

    def cost(self, quantization: Quantization) -> float:
        """`tr(S_g D S_x D^T)` of the error D, on average over what may be left by rounding."""
        return sum(part.cost(quantization) for part in self.parts)


def rounded_matrix(kind: Kind, matrix: Tensor, *, simulation: Simulation) -> Rounded:
    """A layer's own matrix, in the metric that the simulation shares."""
    return Rounded([_whole(in_float64(matrix), simulation.shared, simulation=simulation, turned=kind in TURNED)])


def rounded_pair(form: PairForm, kind: Kind, pair: FactorPair, *, simulation: Simulation) -> Rounded:
    """The factors of a plain, channel, or pivoted pair, which is the truncated SVD in that metric."""
    if form is PIVOTED:
        return _pivoted(pair, simulation=simulation)
    metric, even = simulation.shared, with_even_columns(pair)
    of_down = Metric(metric.inputs, even.up.T @ weighed(even.up, metric.gradients))
    turned = kind in TURNED
    rows, inputs = _carrying(of_down, simulation=simulation, turned=turned)
    space = _Space.of(even.down, metric.inputs)
    outside = _Term(rows.weights, space.outside(inputs))
    down = _Part(*_as_stored(even.down, of_down, turned=turned), [outside.turned() if turned else outside])
    of_up = Metric(space.moment, metric.gradients)
    up = _whole(even.up, of_up, simulation=simulation, turned=kind == "transposed convolution")
    return Rounded([down, up])


def _pivoted(pair: FactorPair, *, simulation: Simulation) -> Rounded:
    """Rows of the matrix, to which nothing is fitted in their own places, and the others' coefficients."""
    metric, found = simulation.shared, pivoted_pair(pair)
    places = torch.argsort(found.order.long())
    chosen, others = places[: found.rank], places[found.rank :]
    outputs = torch.cat([torch.eye(found.rank).to(found.up), found.up])[found.order.long()]
    of_down = Metric(metric.inputs, outputs.T @ weighed(outputs, metric.gradients))
    rows, inputs = _carrying(of_down, simulation=simulation, turned=False)
    space = _Space.of(found.down, metric.inputs)
    outside = _Term(rows.weights, space.outside(inputs))
    of_chosen = _part_of(metric.gradients, chosen)
    root = torch.diag(of_chosen.sqrt()) if of_chosen.dim() == 1 else _root(_ridged(of_chosen))
    inside = _Term(rows.weights_of(root), space.inside(inputs))
    down = _Part(found.down, of_down, [outside, inside])
    # As if the chosen rows came last: what is carried to them is left out alone.
    of_up = Metric(space.moment, metric.gradients)
    rows, columns = simulation.carrying(of_up)
    return Rounded([down, _Part(found.up, of_up, [_Term(rows.weights[others], columns.weights)])])


def _part_of(moment: Tensor, places: Tensor) -> Tensor:
    """The moment of some places alone."""
    return moment[places] if moment.dim() == 1 else moment[places][:, places]


@dataclass(frozen=True)
class _Space:
    """The rows of a factor in the moment S of the inputs: their moment, and `root` of `S d^T (d S d^T)^-1 d S`."""

    moment: Tensor
    root: Tensor

    @classmethod
    def of(cls, down: Tensor, inputs: Tensor) -> _Space:
        weighted = weighed(down.T, inputs)
        moment = down @ weighted
        ridged = _ridged((moment + moment.T) / 2)
        return cls(ridged, torch.linalg.solve_triangular(_root(ridged), weighted.T, upper=False).T)

    def inside(self, inputs: Carrying) -> Tensor:
        """What errors in each input cost in the space of the rows."""
        return inputs.weights_of(self.root)

    def outside(self, inputs: Carrying) -> Tensor:
        """What they cost outside of it."""
        return (inputs.weights - self.inside(inputs)).clamp_min_(0)


def _whole(matrix: Tensor, metric: Metric, *, simulation: Simulation, turned: bool) -> _Part:
    """A matrix whose error costs what it costs in a metric."""
    rows, columns = _carrying(metric, simulation=simulation, turned=turned)
    term = _Term(rows.weights, columns.weights)
    return _Part(*_as_stored(matrix, metric, turned=turned), [term.turned() if turned else term])


def _carrying(metric: Metric, *, simulation: Simulation, turned: bool) -> tuple[Carrying, Carrying]:
    """How errors are carried between the rows and between the columns of what is stored in a metric, or its transpose.

    The rows and columns are those of the matrix itself.
    """
    rows, columns = simulation.carrying(turned_metric(metric) if turned else metric)
    return (columns, rows) if turned else (rows, columns)


def _as_stored(matrix: Tensor, metric: Metric, *, turned: bool) -> tuple[Tensor, Metric]:
    return (matrix.T, turned_metric(metric)) if turned else (matrix, metric)


def _ridged(moment: Tensor) -> Tensor:
    return moment + (1e-10 * float(moment.diagonal().mean()) or 1.0) * torch.eye(len(moment)).to(moment)


def _root(moment: Tensor) -> Tensor:
    """The Cholesky factor of a moment, with a ridge that grows where rounding made it indefinite."""
    size, ridge = float(moment.diagonal().mean()), 0.0
    while True:
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(moment + ridge * size * torch.eye(len(moment)).to(moment))
        if not failed or ridge > 1:
            return root
        ridge = max(1e-10, 10 * ridge)
