"""A common factor to divide numbers by before they are squared, so that the squares stay in float64's range."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compressor.torch_state import in_float64


def power_of_two(values: Tensor | npt.NDArray[np.float64]) -> float:
    """The largest power of two that does not exceed the largest absolute value; 1 if all are zero.

    Dividing by it is exact, so results do not depend on the scale of their input in any digit.
    """
    sizes = values.abs() if isinstance(values, Tensor) else np.abs(values)
    largest = float(sizes.max()) if math.prod(values.shape) else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0


def power_of_two_on_device(values: Tensor) -> Tensor:
    """The same as a float64 number on the device of the values, so that nothing waits for it."""
    largest = in_float64(torch.stack(torch.aminmax(values)).abs().max() if values.numel() else values.new_zeros(()))
    mantissa, _ = torch.frexp(largest)
    # The quotient is a power of two, and so has no rounding.
    return torch.where((largest > 0) & torch.isfinite(largest), largest / (2 * mantissa), 1.0)
