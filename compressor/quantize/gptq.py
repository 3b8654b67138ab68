"""Integers and scales in the metric of the loss: each error is carried to the weights that are not rounded yet.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023) minimizes `tr(D S_x D^T)` of the error D one column after another: what a column's rounding
costs is compensated by the later ones, which is Babai's nearest plane in the lattice that `S_x` spans (Chen et al.,
"The geometry of LLM quantization", 2025). The loss is `tr(S_g D S_x D^T)`, so the outputs compensate for each other
too (Tseng, Sun and De Sa, "Model-preserving adaptive rounding", 2025).

With `S_x = M diag(.) M^T` and `S_g = N diag(.) N^T`, M and N unit upper triangular, the loss is the weighted sum of the
squares of `N^T D M`. Its entry at row i and column j depends on the errors at rows up to i and columns up to j. So each
is made as small as its own integer makes it, all those of one antidiagonal at once.

When all are rounded, each column is rounded once more to what is best beside the others, in the same way: its `D S_x`
over the diagonal of `S_x` is how far it is from that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.factorize import Metric, weighed
from compressor.measure.scale import power_of_two
from compressor.quantize.damping import damped, descending, diagonal_of, upper_factor
from compressor.quantize.feedback import Feedback, Levels, rounded_in_turn
from compressor.quantize.nearest import quantize_to_nearest, searched_scales, stored_scales
from compressor.quantize.quantization import Quantization, QuantizedMatrix
from compressor.quantize.settings import DEFAULTS, QuantizationSettings
from compressor.torch_state import in_float64


def gptq(
    matrix: Tensor,
    quantization: Quantization,
    metric: Metric,
    *,
    scale_dtype: torch.dtype,
    settings: QuantizationSettings = DEFAULTS,
) -> QuantizedMatrix:
    """Quantize a `d_out x d_in` matrix so that its error costs little in the metric of the loss.

    Rows and columns go in the order of their moments, the largest first, and groups are of neighbors as always. After
    the first pass the scales are fitted to the integers and the integers chosen anew, for a few rounds. It is never
    worse in the metric than rounding to nearest with the moment's diagonal as importance.

    Args:
        matrix: The matrix, in any floating-point dtype.
        quantization: Its group size divides `d_in`.
        metric: Where the inputs' moment is a diagonal, nothing is better than rounding to nearest.
        scale_dtype: The dtype of the scales, of 16 bits. They are rounded to it before integers are chosen.
        settings: Damping of the moments, and how much work is put into it.
    """
    importance = diagonal_of(metric.inputs)
    rounded = quantize_to_nearest(
        matrix, quantization, scale_dtype=scale_dtype, importance=importance, settings=settings
    )
    if metric.inputs.dim() == 1:
        return rounded
    found = _Search.of(matrix, quantization, metric, scale_dtype=scale_dtype, settings=settings).best()
    return found if _is_better(metric, matrix, found, than=rounded) else rounded


def _is_better(metric: Metric, matrix: Tensor, found: QuantizedMatrix, *, than: QuantizedMatrix) -> bool:
    """Whether the error of one costs no more; in float32 where they differ by more than it can be wrong."""
    narrow = Metric(metric.inputs.to(torch.float32), metric.gradients.to(torch.float32))
    wide = in_float64(matrix) / power_of_two(matrix)
    errors = [wide - each.product() / power_of_two(matrix) for each in (found, than)]
    first, second = (narrow.squared_size(error.to(torch.float32)) for error in errors)
    if math.isfinite(first + second) and first < 0.99 * second:
        return True
    return metric.squared_size(errors[0]) <= metric.squared_size(errors[1])


@dataclass(frozen=True)
class _Choice:
    """Scales, `d_out x groups` in 16 bits, and integers less the zero points, `d_out x d_in` in float32."""

    scales: Tensor
    integers: Tensor


@dataclass(frozen=True)
class _State(_Choice):
    """The same with its error D, `D S_x`, and loss."""

    error: Tensor
    weighted: Tensor
    loss: float


@dataclass(frozen=True)
class _Search:
    """A matrix divided by a power of two, and its damped metric.

    `feedback` (`d_in x d_in`) and `coupling` (`d_out x d_out`) are -M and N above their diagonals, in the order of
    `columns` and `rows`; where the gradients' moment is a diagonal the rows do not depend on each other, and `coupling`
    is None.
    """

    values: Tensor
    unit: float
    inputs: Tensor
    gradients: Tensor
    rows: Tensor
    columns: Tensor
    feedback: Tensor
    coupling: Tensor | None
    quantization: Quantization
    zero_points: Tensor
    start: Tensor
    settings: QuantizationSettings

    @classmethod
    def of(
        cls,
        matrix: Tensor,
        quantization: Quantization,
        metric: Metric,
        *,
        scale_dtype: torch.dtype,
        settings: QuantizationSettings,
    ) -> _Search:
        unit = power_of_two(matrix)
        inputs = damped(metric.inputs, settings.damping)
        gradients = damped(metric.gradients, settings.gradient_damping)
        rows, columns = descending(gradients), descending(inputs)
        coupling = _above_diagonal(gradients[rows][:, rows]) if gradients.dim() == 2 else None
        scales = searched_scales(matrix, quantization, scale_dtype, settings=settings)
        middle = torch.full_like(scales.scales, 2 ** (quantization.bits - 1), dtype=torch.float32)
        return cls(
            values=(in_float64(matrix) / unit).to(torch.float32),
            unit=unit,
            inputs=inputs.to(torch.float32),
            gradients=gradients.to(torch.float32),
            rows=rows,
            columns=columns,
            feedback=-_above_diagonal(inputs[columns][:, columns]),
            coupling=coupling,
            quantization=quantization,
            zero_points=middle if scales.zero_points is None else scales.zero_points.to(torch.float32),
            start=scales.scales,
            settings=settings,
        )

    def best(self) -> QuantizedMatrix:
        """The first pass, and rounds while they gain enough."""
        state = self._weighted(self._chosen(self.start, self.values, before=self.values, feedback=self.feedback))
        best, again = state, self._feedback_again()
        for _ in range(self.settings.rounds):
            fitted = self._weighted(_Choice(self._fitted(state), state.integers))
            before = fitted.error + self.values
            targets = before - fitted.weighted / self.inputs.diagonal()
            state = self._weighted(self._chosen(fitted.scales, targets, before=before, feedback=again))
            least = best.loss
            best = min((best, fitted, state), key=lambda each: each.loss)
            if best.loss > (1 - self.settings.gain) * least:
                break
        integers = (best.integers + self._of_columns(self.zero_points)).to(torch.uint8)
        zero_points = self.zero_points.to(torch.uint8) if self.quantization.zero_points else None
        return QuantizedMatrix(self.quantization, integers, best.scales, zero_points)

    def _feedback_again(self) -> Tensor:
        """What a change at one column makes of the targets of the later ones when all others are rounded already."""
        ordered = self.inputs[self.columns][:, self.columns]
        return (ordered / -ordered.diagonal()).triu_(1)

    def _of_columns(self, groups: Tensor) -> Tensor:
        """What is stated for groups, for each column."""
        return groups.repeat_interleave(self.values.shape[1] // groups.shape[1], 1)

    def _narrow(self, scales: Tensor) -> Tensor:
        """Stored scales in the unit of the values."""
        return (scales.to(torch.float64) / self.unit).to(torch.float32)

    def _weighted(self, choice: _Choice) -> _State:
        """A choice and what it costs."""
        error = choice.integers * self._of_columns(self._narrow(choice.scales)) - self.values
        weighted = error @ self.inputs
        loss = float((weighed(weighted, self.gradients) * error).sum(dtype=torch.float64))
        return _State(choice.scales, choice.integers, error, weighted, loss)

    def _fitted(self, state: _State) -> Tensor:
        """Scales that cost less with the integers, by conjugate gradients from their own."""
        shape = (*state.scales.shape, self.values.shape[1] // state.scales.shape[1])

        def by_group(matrix: Tensor) -> Tensor:
            return (matrix * state.integers).reshape(shape).sum(2)

        # The diagonal of the equations, as if the inputs of a group were not correlated.
        own = (state.integers.square() * self.inputs.diagonal()).reshape(shape).sum(2)
        own *= diagonal_of(self.gradients).unsqueeze(1)
        own = torch.where(own > 0, own, 1.0)
        scales = self._narrow(state.scales)
        residual = -by_group(weighed(state.weighted, self.gradients))
        step = residual / own
        direction, size = step, float((residual * step).sum())
        for _ in range(self.settings.scale_steps):
            moved = direction.repeat_interleave(shape[2], 1) * state.integers
            image = by_group(weighed(moved @ self.inputs, self.gradients))
            curvature = float((direction * image).sum())
            if not (size > 0 and curvature > 0):
                break
            scales = scales + size / curvature * direction
            residual = residual - size / curvature * image
            step = residual / own
            before, size = size, float((residual * step).sum())
            direction = step + size / before * direction
        return stored_scales(scales.to(torch.float64) * self.unit, state.scales.dtype)

    def _chosen(self, scales: Tensor, targets: Tensor, *, before: Tensor, feedback: Tensor) -> _Choice:
        """The integers at these scales, with feedback of the changes from what was `before`."""
        rows, columns = self.rows, self.columns
        last = 2**self.quantization.bits - 1
        zero_points = self._of_columns(self.zero_points)[rows][:, columns]
        levels = Levels(self._of_columns(self._narrow(scales))[rows][:, columns], -zero_points, last - zero_points)
        found = rounded_in_turn(
            targets[rows][:, columns],
            levels,
            Feedback(feedback, self.coupling),
            before=before[rows][:, columns],
            block=self.settings.block,
        )
        return _Choice(scales, found[rows.argsort()][:, columns.argsort()])


def _above_diagonal(moment: Tensor) -> Tensor:
    """M of `M diag(.) M^T`, upper triangular with ones on its diagonal, without the ones."""
    factor = upper_factor(moment)
    return (factor / factor.diagonal()).triu_(1).to(torch.float32)
