"""The caller's own metric, and the batches that it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

MetricFunction = Callable[[nn.Module, Iterable[Any]], float]


@dataclass(frozen=True)
class CustomMetric:
    """A function of a model and batches that returns a number, and whether a higher one is better."""

    function: MetricFunction
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """The function's own name, or that of its class."""
        function: Any = self.function
        while isinstance(function, partial):
            function = function.func
        name = str(getattr(function, "__name__", type(function).__name__))
        return name if name.isidentifier() else "metric"
