"""The plan of a model: form and rank of every eligible layer, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from compressor.display import DisplayedLayers
from compressor.formatting import format_percent
from compressor.forms import DENSE, pair_name, quantization_of
from compressor.initial import InitialFound
from compressor.io import portable_name
from compressor.network import Layer
from compressor.planning.budget import Budget
from compressor.planning.drop_search import DropSearch
from compressor.planning.latency import WorkloadLatency
from compressor.quantize import Quantization

PLAN_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """The rank, form and size of one eligible layer, and why.

    Attributes:
        name: The layer's name in the checkpoint.
        shape: `(d_out, d_in)` of its matrix.
        kind: What the layer is, as `Layer.kind` says.
        rank: The rank of its pair; None if it stays as it is. Of a matrix that is only quantized it is 0, or that of
            the low-rank correction.
        form: The form in which it is stored: that of a pair, such as `plain`, or `dense`, where its numbers are
            quantized with how they are, as in `plain@4g128`.
        parameters: The numbers that it stores, quantized ones counted as numbers of 16 bits of the same bytes.
        error: The relative error of its matrix: in the Frobenius norm, or with calibration in the metric of the loss
            (`Plan.error_name` says which). Of the stored factors once they exist, of the best pair of the rank before.
        reason: Why this rank, in words.
        latency: Seconds of the layer in each workload, dense and as it was chosen; None where speed was not asked for.
        share: The share of its initial weights that a layer in a form of what training wrote still has; None in others.
        before: The numbers that it stores in a model where it is not dense: a pair already, or quantized by others, in
            numbers of the same bytes; else None.
        encoding: How others quantized it, in words; None where they did not.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    rank: int | None
    form: str
    parameters: int
    error: float
    reason: str
    latency: tuple[WorkloadLatency, ...] | None = None
    share: float | None = None
    before: int | None = None
    encoding: str | None = None

    @property
    def parameters_before(self) -> int:
        """The numbers that it stores before: those of its matrix, or of the pair that it is already."""
        return self.shape[0] * self.shape[1] if self.before is None else self.before

    @property
    def quantization(self) -> Quantization | None:
        """How its numbers are quantized; None where they are not."""
        return quantization_of(self.form)

    @property
    def bits(self) -> int:
        """The bits of each of its numbers; 16 where they are not quantized, whatever its dtype is."""
        return 16 if self.quantization is None else self.quantization.bits

    @property
    def truncated_to(self) -> int | None:
        """The rank of its pair; None where it is dense, quantized or not."""
        dense = pair_name(self.form) in (DENSE, f"initial+{DENSE}")
        return None if dense else self.rank

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self) | {"shape": list(self.shape), "form": pair_name(self.form)}
        quantized = {} if self.quantization is None else self.quantization.to_dict()
        document = {name: own.pop(name) for name in ("name", "shape", "kind", "rank", "form")} | quantized | own
        latency, share, before, encoding = (document.pop(name) for name in ("latency", "share", "before", "encoding"))
        document |= {} if latency is None else {"latency": list(latency)}
        document |= {} if share is None else {"share": share}
        document |= {} if before is None else {"before": before}
        return document if encoding is None else document | {"encoding": encoding}


# What a calibrated loss is in: of models that predict classes or tokens, and of all others.
LossUnit = Literal["nats per prediction", "half the squared change of the outputs"]


@dataclass(frozen=True)
class CalibrationResult:
    """How a calibrated plan was chosen, and what it is expected to cost.

    `predicted_loss` is the increase of loss per prediction to second order, and `holdout_loss` the increase measured
    on the holdout examples, against the dense model's own predictions; both in `unit`. Where they differ much the
    second-order estimate no longer holds. `exponent` is the exponent of the allocation that did best there, so that the
    holdout loss is a little optimistic; None where the ranks were given. `capped` tells whether the window rule's
    caps on the ranks lost less there, before compensation, than the allocation without them, and `refined` whether the
    factors are those fitted to the dense blocks, because they lose less there. `unused` says what part of the data
    given was not used, empty if all was, and `made` what the examples are where the model made them itself.
    """

    examples: int
    holdout: int
    exponent: float | None
    predicted_loss: float
    holdout_loss: float
    capped: bool = False
    refined: bool = False
    unit: LossUnit = "nats per prediction"
    unused: str = ""
    made: str = ""


@dataclass(frozen=True, repr=False)
class Plan(DisplayedLayers):
    """The rank and form of every eligible layer of one model: editable as JSON, and applied with `compress(plan=...)`.

    Attributes:
        source: The model.
        digest: The SHA-256 of the checkpoint that was measured; None for a module in memory.
        budget: What was asked for.
        layers: The eligible layers.
        advice: What the measurements suggest, or None.
        calibration: How calibration data chose the ranks, and the loss that is expected; None without.
        calibrated: Whether a plan that was read from a file had been made with calibration data.
        search: How `max_drop` found the size; None for another budget.
        device: The device that it is to be fast on; None where speed was not asked for.
        initial: The initial weights that were looked for, and the layers that have some of them; None where none were.
        schema_version: The version of the JSON document.

    Example:
        >>> plan = compressor.plan("model.safetensors", keep=0.5)
        >>> {layer.name: layer.rank for layer in plan.layers}
        >>> small = compressor.compress("model.safetensors", output="small.safetensors", plan=plan)
    """

    source: str
    digest: str | None
    budget: Budget
    layers: tuple[LayerPlan, ...]
    advice: str | None = None
    calibration: CalibrationResult | None = None
    calibrated: bool = False
    search: DropSearch | None = None
    device: str | None = None
    initial: InitialFound | None = None
    schema_version: int = PLAN_SCHEMA_VERSION

    def __repr__(self) -> str:
        return (
            f"<Plan for {self.source} ({self.budget}): {self.rewritten_words},"
            f" {format_percent(self.eligible_after, self.eligible_before)} of the eligible parameters kept>"
        )

    @property
    def factorized(self) -> int:
        """How many layers become factor pairs."""
        return sum(layer.truncated_to is not None for layer in self.layers)

    @property
    def squeezed(self) -> int:
        """How many layers are pairs already in the model that was compressed."""
        return sum(layer.before is not None and layer.encoding is None for layer in self.layers)

    @property
    def rewritten(self) -> int:
        """How many layers do not stay as they are."""
        return sum(layer.rank is not None for layer in self.layers)

    @property
    def quantized(self) -> int:
        """How many layers have quantized numbers, in pairs or not."""
        return sum(layer.quantization is not None for layer in self.layers)

    @property
    def rewritten_words(self) -> str:
        """How many layers become factor pairs, and how many are quantized, where any are."""
        factorized = f"{self.factorized} of {len(self.layers)} eligible layers factorized"
        return f"{factorized}, {self.quantized} quantized" if self.quantized else factorized

    @property
    def eligible_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def eligible_after(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def error_name(self) -> Literal["relative loss error", "relative Frobenius error"]:
        """What the error of a layer measures."""
        return "relative Frobenius error" if self.calibration is None else "relative loss error"

    @property
    def predicted_latency(self) -> dict[str, float]:
        """Predicted time of all eligible layers together in each workload, as a ratio to the dense ones."""
        known = [layer.latency for layer in self.layers if layer.latency is not None]
        sums = (
            (each[0].workload, sum(of.predicted.chosen for of in each), sum(of.predicted.dense for of in each))
            for each in zip(*known, strict=True)
        )
        return {workload: chosen / dense for workload, chosen, dense in sums if dense > 0}

    def with_errors(self, errors: Mapping[str, float]) -> Plan:
        """The same plan with the errors of what is stored, where they are known."""
        return replace(self, layers=tuple(replace(p, error=errors.get(p.name, p.error)) for p in self.layers))

    def portable(self) -> Plan:
        """The same plan for a file that goes to others, without an absolute path of this machine."""
        search = None if self.search is None else replace(self.search, data=portable_name(self.search.data))
        return replace(self, source=portable_name(self.source), search=search)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "source": self.source,
            "digest": self.digest,
            "budget": self.budget.to_dict(),
            "eligible": {"before": self.eligible_before, "after": self.eligible_after},
            "advice": self.advice,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "search": None if self.search is None else self.search.to_dict(),
            "error_name": self.error_name,
            **({} if self.device is None else {"device": self.device}),
            **({} if self.initial is None else {"initial": self.initial.to_dict()}),
            "layers": [layer.to_dict() for layer in self.layers],
        }


def dense_plan(layer: Layer, reason: str) -> LayerPlan:
    """The plan of a layer that stays as it is."""
    return LayerPlan(
        *(layer.name, layer.shape, layer.kind, None, DENSE, layer.stored_parameters, 0.0, reason),
        before=None if layer.stored is None else layer.stored.numbers,
        encoding=layer.encoding,
    )
