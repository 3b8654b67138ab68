"""What the same model loses with all its layers quantized alike, which is what a line of other tools gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.evaluation.verdict import finite_or_words
from compressor.formatting import format_size

QuantizationMethod = Literal["round to nearest", "GPTQ"]


@dataclass(frozen=True)
class UniformQuantization:
    """The model with every eligible layer in so many bits, and no pairs.

    Attributes:
        bits: Bits of an integer.
        method: Whether each weight is rounded by itself, or errors are carried over to others in the metric of the
            calibration.
        parameters: What the eligible layers take, in numbers of 16 bits.
        bytes: The size of the weight files.
        error: Without calibration, the root mean square of the layers' relative errors in the Frobenius norm.
        holdout_loss: With calibration, what it loses on the holdout, in the unit of the calibration.
        loss: Its loss on `data`, in nats per prediction; None where it was not measured.
        value: Its metric on `data`, such as the accuracy; None where it was not measured.
    """

    bits: int
    method: QuantizationMethod
    parameters: int
    bytes: int
    error: float | None = None
    holdout_loss: float | None = None
    loss: float | None = None
    value: float | None = None

    @property
    def name(self) -> str:
        """Such as `int4`."""
        return f"int{self.bits}"

    def to_dict(self) -> dict[str, Any]:
        numbers = {key: finite_or_words(value) for key, value in asdict(self).items() if isinstance(value, float)}
        return {**asdict(self), **numbers}


@dataclass(frozen=True)
class Loss:
    """What a model loses, and on what that was measured."""

    value: float
    unit: str
    on: str


@dataclass(frozen=True)
class Losses:
    """What a compressed model loses by each measure there is; None where it was not measured.

    Args:
        on_data: The increase of its loss on `data`, in nats per prediction.
        data: The name of the data.
        on_holdout: What it loses on the holdout, in the `unit` of the calibration.
        error: The root mean square of its layers' relative errors in the Frobenius norm.
        dense_loss: The loss of the dense model on the data.
    """

    on_data: float | None
    data: str
    on_holdout: float | None
    unit: str
    error: float | None
    dense_loss: float | None

    def by_measure(self, uniform: UniformQuantization) -> Iterator[tuple[Loss | None, Loss]]:
        """This model's loss and that of a uniform quantization by each measure that the latter has, the best first."""
        yield from ((own, other) for own, other in self._measures(uniform) if other is not None)

    def beside(self, uniform: UniformQuantization) -> tuple[Loss, Loss] | None:
        """Both losses by the best measure of this model; None where the uniform quantization was not measured so."""
        own, other = next((each for each in self._measures(uniform) if each[0] is not None), (None, None))
        return None if own is None or other is None else (own, other)

    def _measures(self, uniform: UniformQuantization) -> Iterator[tuple[Loss | None, Loss | None]]:
        """By each measure, the best first."""
        on_data = None if uniform.loss is None or self.dense_loss is None else uniform.loss - self.dense_loss
        for own, other, unit, on in (
            (self.on_data, on_data, "nats per prediction", self.data),
            (self.on_holdout, uniform.holdout_loss, self.unit, "the holdout"),
            (self.error, uniform.error, "relative error", ""),
        ):
            yield None if own is None else Loss(own, unit, on), None if other is None else Loss(other, unit, on)


@dataclass(frozen=True)
class BetterUniform:
    """A uniform quantization that is smaller than a compressed model and loses no more, with both losses."""

    uniform: UniformQuantization
    loss: Loss
    of_model: Loss

    def __str__(self) -> str:
        """In one sentence."""
        each, loss = self.uniform, self.loss
        where = f" on {loss.on}" if loss.on else ""
        return (
            f"{each.name} of all its layers ({each.method}) is smaller, {format_size(each.bytes)}, and loses no more:"
            f" {loss.value:.3g}{where} beside {self.of_model.value:.3g} {loss.unit}"
        )

    def to_dict(self) -> dict[str, Any]:
        losses = {name: finite_or_words(each.value) for name, each in (("loss", self.loss), ("of", self.of_model))}
        return {
            "bits": self.uniform.bits,
            "method": self.uniform.method,
            "bytes": self.uniform.bytes,
            "loss": losses["loss"],
            "loss_of_this": losses["of"],
            "unit": self.loss.unit,
            "on": self.loss.on,
            "words": str(self),
        }


def better_uniform(uniform: Iterable[UniformQuantization], losses: Losses, *, size: int) -> BetterUniform | None:
    """The smallest uniform quantization that is smaller than a model of `size` bytes and loses no more; else None.

    Where there are data they decide: on the holdout, by which the model was chosen, it looks better than it is.
    """
    found = []
    for each in uniform:
        compared = losses.beside(each) if each.bytes < size else None
        if compared is not None and compared[1].value <= compared[0].value:
            found.append(BetterUniform(each, loss=compared[1], of_model=compared[0]))
    return min(found, key=lambda one: (one.uniform.bytes, one.loss.value), default=None)
