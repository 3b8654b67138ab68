"""Round to nearest, with scales and zero points that are searched for the least squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.quantize.quantization import Quantization, QuantizedMatrix
from compressor.quantize.settings import DEFAULTS, QuantizationSettings

# So many weights at once stay in the cache of a core.
_AT_ONCE = 1 << 18
# Of so many weights some scales are tried at once: an operation on fewer takes no less time.
_TRIED_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Scales:
    """Scales in 16 bits and zero points of a matrix, `d_out x groups`; without zero points these are None."""

    scales: Tensor
    zero_points: Tensor | None


def quantize_to_nearest(
    matrix: Tensor,
    quantization: Quantization,
    *,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
    settings: QuantizationSettings = DEFAULTS,
) -> QuantizedMatrix:
    """Quantize a `d_out x d_in` matrix to nearest, with searched scales.

    Each group's scale, of either sign, and zero point are those of some candidates whose integers have the least
    squared error, with the scale then fitted to the integers. It is no worse than with the scale that spans the group.

    Args:
        matrix: The matrix, in any floating-point dtype.
        quantization: Its group size divides `d_in`.
        scale_dtype: The dtype of the scales, of 16 bits. They are rounded to it before integers are chosen.
        importance: The weight of an input's squared error (`d_in`), the diagonal of the inputs' second moment.
        settings: How many candidates are tried.
    """
    found = searched_scales(matrix, quantization, scale_dtype, importance=importance, settings=settings)
    return QuantizedMatrix(quantization, nearest(matrix, quantization, found), found.scales, found.zero_points)


def nearest(matrix: Tensor, quantization: Quantization, found: Scales) -> Tensor:
    """The integers nearest to a matrix, in uint8, at scales that are given."""
    rows = max(1, _AT_ONCE // matrix.shape[1])
    integers = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    for start in range(0, len(matrix), rows):
        part = slice(start, start + rows)
        grouped = (
            matrix[part].to(torch.float64).reshape(-1, found.scales.shape[1], matrix.shape[1] // found.scales.shape[1])
        )
        middle = 2.0 ** (quantization.bits - 1)
        zero = middle if found.zero_points is None else found.zero_points[part].to(torch.float64).unsqueeze(2)
        grouped = grouped / found.scales[part].to(torch.float64).unsqueeze(2)
        integers[part] = grouped.round_().add_(zero).clamp_(0, 2**quantization.bits - 1).flatten(1).to(torch.uint8)
    return integers


def searched_scales(
    matrix: Tensor,
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    settings: QuantizationSettings = DEFAULTS,
) -> Scales:
    """The scales and zero points of `quantize_to_nearest`."""
    d_out, d_in = matrix.shape
    groups = quantization.groups(d_in)
    weights = torch.ones(d_in, dtype=torch.float32, device=matrix.device)
    if importance is not None and float(importance.max()) > 0:
        weights = (importance / importance.mean() + settings.damping).to(torch.float32)
    weights = weights.reshape(groups, -1)
    scales = torch.empty(d_out, groups, dtype=dtype, device=matrix.device)
    zero_points = torch.empty(d_out, groups, dtype=torch.uint8, device=matrix.device)
    rows = max(1, _AT_ONCE // d_in)
    for start in range(0, d_out, rows):
        part = slice(start, start + rows)
        grouped = matrix[part].to(torch.float64).reshape(-1, groups, d_in // groups)
        scales[part], zero_points[part] = _search(grouped, weights, quantization, dtype=dtype, settings=settings)
    return Scales(scales, zero_points if quantization.zero_points else None)


def _search(
    grouped: Tensor,
    weights: Tensor,
    quantization: Quantization,
    *,
    dtype: torch.dtype,
    settings: QuantizationSettings,
) -> tuple[Tensor, Tensor]:
    """The best scales, in 16 bits, and zero points of `rows x groups x inputs`; weights are `groups x inputs`.

    All are positive here. What is symmetric is also tried with one level more on the other side, for which the sign
    of the scale is turned around at the end.
    """
    largest = grouped.abs().amax(2, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    values = (grouped / largest).to(torch.float32)
    high = values.amax(2, keepdim=True).clamp_min(0)
    low = values.amin(2, keepdim=True).clamp_max(0)
    last = 2**quantization.bits - 1
    middle = torch.full_like(high, 2 ** (quantization.bits - 1))
    if quantization.zero_points:
        spanning = (-low / (high - low).clamp_min(torch.finfo(torch.float32).tiny) * last).round()
        tried = [spanning, (spanning - 1).clamp_min(0), (spanning + 1).clamp_max(last)]
    else:
        tried = [middle, middle - 1]
    best, zero = torch.zeros_like(high), middle
    error = torch.full_like(high, torch.inf)
    for zeros in tried:
        problem = _Groups(values, weights, -zeros, last - zeros)
        span = torch.maximum(_quotient(high, last - zeros), _quotient(-low, zeros))
        found = problem.searched(span, least=0.1 + 0.1 * quantization.bits, settings=settings)
        for scales in (span, found):
            stored = stored_scales(scales * largest, dtype)
            exact = (stored.to(torch.float64) / largest).to(torch.float32)
            lost = problem.lost(exact)
            better = lost < error
            error = torch.where(better, lost, error)
            best, zero = torch.where(better, stored.to(torch.float64), best), torch.where(better, zeros, zero)
    if not quantization.zero_points:
        best = torch.where(zero < middle, -best, best)
    return best.squeeze(2).to(dtype), zero.squeeze(2).to(torch.uint8)


@dataclass(frozen=True)
class _Groups:
    """Groups of weights and the range of their integers without the zero points."""

    values: Tensor
    weights: Tensor
    lowest: Tensor
    highest: Tensor

    def integers(self, scales: Tensor) -> Tensor:
        return (self.values / scales).round_().clamp_(self.lowest, self.highest)

    def lost(self, scales: Tensor) -> Tensor:
        """The weighted squared error of each group."""
        return ((self.integers(scales) * scales - self.values).square_() * self.weights).sum(-1, keepdim=True)

    def fitted(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The best scales for the integers at given ones, and the weighted square that they capture."""
        integers = self.integers(scales)
        weighted = integers * self.weights
        square = (weighted * integers).sum(-1, keepdim=True)
        product = weighted.mul_(self.values).sum(-1, keepdim=True)
        fitted = torch.where(square > 0, product / square, scales)
        return torch.where(fitted > 0, fitted, scales), torch.where(square > 0, product.square() / square, 0.0)

    def searched(self, span: Tensor, *, least: float, settings: QuantizationSettings) -> Tensor:
        """The best scales that were found, from the one that spans the group down to a share of it."""
        best, captured = self.fitted(span)
        steps = torch.arange(1, 1 + int((1 - least) / settings.scale_step), dtype=torch.float64, device=span.device)
        shares = (1 - steps * settings.scale_step).to(span.dtype).view(-1, 1, 1, 1)
        together = max(1, _TRIED_AT_ONCE // max(1, self.values.numel()))
        for some in torch.split(shares, together) if len(shares) else ():
            for scales, square in zip(*self.fitted(some * span), strict=True):
                better = square > captured
                best, captured = torch.where(better, scales, best), torch.where(better, square, captured)
        for _ in range(settings.scale_rounds):
            best, _ = self.fitted(best)
        return best


def _quotient(size: Tensor, levels: Tensor) -> Tensor:
    """The scale at which a size takes all levels; a small one where there are none or it is zero."""
    return torch.where(levels > 0, size / levels.clamp_min(1), 0.0).clamp_min(1e-6)


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of either sign in 16 bits, none of them zero or infinite."""
    info = torch.finfo(dtype)
    return scales.abs().clamp(info.smallest_normal * info.eps, info.max).copysign(scales).to(dtype)
