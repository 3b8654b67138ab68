"""Where training started: the initial weights, drawn again from their seed or read, and what is left of them."""

from __future__ import annotations

from compressor.initial.weights import InitialWeights, Start

__all__ = ["InitialWeights", "Start"]
