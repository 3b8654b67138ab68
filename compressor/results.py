"""What the pipeline returns: frozen, and as JSON by `to_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from compressor.choices import ExportTarget, FormRequest, Head, MergeMode
from compressor.diagnosis.findings import Finding
from compressor.diagnosis.series import RankSeries
from compressor.diagnosis.types import DiagnosedLayer, Predictions
from compressor.errors import QualityGateNotMet
from compressor.evaluation import Evaluation
from compressor.io import NotCopied
from compressor.io.training_state import LeftOut
from compressor.measure import NormBalance, Spectrum
from compressor.merging import InputOverlap, LayerOverlap, TaskQuality
from compressor.model import InspectedLayer
from compressor.network import Layer
from compressor.planning import MeasuredLayer, Plan, SizeCurve, size_curve
from compressor.recipe import TrainingRecipe

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BeforeAfter:
    """One quantity of the model before and after."""

    before: int
    after: int


@dataclass(frozen=True)
class Inspection:
    """Effective ranks and memory windows, layer by layer."""

    source: str
    recipe: TrainingRecipe
    layers: tuple[InspectedLayer, ...]
    parameters: int
    weight_bytes: int
    advice: str | None
    left_out: tuple[LeftOut, ...] = ()
    weights_at: str = ""

    @property
    def eligible(self) -> int:
        return sum(inspected.layer.parameters for inspected in self.layers if inspected.layer.eligible)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "parameters": self.parameters,
            "eligible": self.eligible,
            "bytes": self.weight_bytes,
            "left_out": [asdict(each) for each in self.left_out],
            "weights_at": self.weights_at,
            "advice": self.advice,
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class FineTune:
    """How a fine-tune was written as what it adds to its base.

    `unchanged` counts the tensors that are the base's, `in_full` names those that are stored as they are. For an
    adapter `max_lora_rank` is what vLLM is to be started with (--max-lora-rank), and `vllm_obstacles` say why it would
    refuse the adapter all the same; None and empty for pairs. `verified_with` is the version of PEFT that loaded the
    adapter and made every change of it before it was written, None where PEFT is not installed or nothing was written.
    `rounding_share` is how much of the difference of the matrices that became pairs is rounding of the fine-tune to the
    dtype that it is stored in, in the Frobenius norm; no rank is spent on it.
    """

    base: str
    base_bytes: int
    written_as: Literal["LoRA adapter", "factor pairs"]
    unchanged: int
    in_full: tuple[str, ...]
    max_lora_rank: int | None
    vllm_obstacles: tuple[str, ...]
    verified_with: str | None
    rounding_share: float


@dataclass(frozen=True)
class Compression:
    """What became of a model: the plan, the sizes, what it cost in quality, and what the work took.

    `parameters` and `bytes` are of all weights, `plan.eligible_before` and `after` of the eligible matrices,
    `skipped` are the others. `spectra` holds the singular values behind the plan, `inspected` what else was measured
    of the eligible layers, and `measured` what the plan was made from. `has_attention` tells whether the model has
    attention layers, and `warnings` are sentences on what must not be overlooked. `command` is the one that does the
    same, with paths by their last part (empty for a module), and `pushed` the address of the commit on the hub.
    `model` is the compressed module when a module was compressed. `left_out` is what the source's files hold beside
    the weights (they are not counted in `bytes`), and `weights_at` the keys under which the weights were found. With
    a base the matrices are differences to it, `after` is what is stored beside it, and `fine_tune` says how.
    `not_copied` is what of a model folder did not go along, and why.
    """

    source: str
    output: str | None
    recipe: TrainingRecipe
    plan: Plan
    parameters: BeforeAfter
    bytes: BeforeAfter
    evaluation: Evaluation | None
    seconds: float
    peak_memory_bytes: int
    skipped: tuple[Layer, ...]
    spectra: Mapping[str, Spectrum] = field(repr=False, compare=False)
    has_attention: bool = False
    warnings: tuple[str, ...] = ()
    inspected: tuple[InspectedLayer, ...] = field(default=(), repr=False, compare=False)
    measured: tuple[MeasuredLayer, ...] = field(default=(), repr=False, compare=False)
    form: FormRequest = field(default="auto", repr=False, compare=False)
    command: str = ""
    pushed: str | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    fine_tune: FineTune | None = None
    not_copied: tuple[NotCopied, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    weights_at: str = ""

    @cached_property
    def curve(self) -> SizeCurve | None:
        """What other sizes would lose, by the measurements behind the plan; None for a fine-tune's difference."""
        if not self.measured:
            return None
        calibration = self.plan.calibration
        if calibration is None:
            return size_curve(self.measured, self.form)
        power = 1.0 if calibration.power is None else calibration.power
        return size_curve(self.measured, self.form, power, calibration.unit)

    def metrics(self) -> dict[str, float]:
        """The numbers by flat names, for a tracker of experiments; what was not measured has none.

        `parameters`, `eligible_parameters` and `bytes` with `_before` and `_after`; `kept`, the share of the eligible
        parameters; of a calibration `predicted_loss` and `holdout_loss`, in nats per prediction, or for a model
        without logits `predicted_output_change` and `holdout_output_change`, half the squared change of the outputs;
        `seconds` of the work; and those of `Evaluation.metrics`.
        """
        before, after = self.plan.eligible_before, self.plan.eligible_after
        found = {
            "parameters_before": self.parameters.before,
            "parameters_after": self.parameters.after,
            "eligible_parameters_before": before,
            "eligible_parameters_after": after,
            "kept": after / before,
            "bytes_before": self.bytes.before,
            "bytes_after": self.bytes.after,
            "seconds": self.seconds,
        }
        if (calibration := self.plan.calibration) is not None:
            what = "loss" if calibration.unit == "nats per prediction" else "output_change"
            found[f"predicted_{what}"] = calibration.predicted_loss
            found[f"holdout_{what}"] = calibration.holdout_loss
        measured = {} if self.evaluation is None else self.evaluation.metrics()
        return {name: float(value) for name, value in found.items()} | measured

    def to_dict(self) -> dict[str, Any]:
        before, after = self.plan.eligible_before, self.plan.eligible_after
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "output": self.output,
            "command": self.command,
            "pushed": self.pushed,
            "parameters": asdict(self.parameters),
            "bytes": asdict(self.bytes),
            "left_out": [asdict(each) for each in self.left_out],
            "weights_at": self.weights_at,
            "eligible": {"before": before, "after": after, "kept": after / before},
            "budget": self.plan.budget.to_dict(),
            "advice": self.plan.advice,
            "warnings": list(self.warnings),
            "calibration": None if self.plan.calibration is None else asdict(self.plan.calibration),
            "search": None if self.plan.search is None else self.plan.search.to_dict(),
            "curve": None if self.curve is None else self.curve.to_dict(),
            "error_name": self.plan.error_name,
            "layers": [layer.to_dict() for layer in self.plan.layers],
            "skipped": [
                {"name": layer.name, "shape": list(layer.tensor_shape), "kind": layer.kind, "reason": layer.skip}
                for layer in self.skipped
            ],
            "fine_tune": None if self.fine_tune is None else asdict(self.fine_tune),
            "not_copied": [each._asdict() for each in self.not_copied],
            "evaluation": self.evaluation.to_dict() if self.evaluation else None,
            "recipe": self.recipe.to_dict(),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Restoration:
    """A dense checkpoint multiplied back from a compressed one; `not_copied` is what did not go along, and why."""

    source: str
    output: str
    layers: tuple[str, ...]
    bytes: BeforeAfter
    seconds: float
    not_copied: tuple[NotCopied, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "output": self.output,
            "layers": list(self.layers),
            "bytes": asdict(self.bytes),
            "not_copied": [each._asdict() for each in self.not_copied],
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What was found, with the numbers behind it."""

    source: str
    recipe: TrainingRecipe
    layers: tuple[DiagnosedLayer, ...]
    predictions: Predictions | None
    balance: NormBalance | None
    series: RankSeries | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as one JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "predictions": self.predictions.to_dict() if self.predictions else None,
            "balance": self.balance.to_dict() if self.balance else None,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [layer.to_dict() for layer in self.layers],
            "series": self.series.to_dict() if self.series else None,
        }


@dataclass(frozen=True)
class Merging:
    """What was merged, how much the networks overlap, and what merging did to each task.

    `inputs` and `layers` were measured before merging; `tasks` after it, and empty without data. `parts_parameters` and
    `parts_bytes` are the stored numbers and the weight files of all parts together. `output` is None where the merge
    was refused. `not_copied` is what of the first folder did not go along, and why.
    """

    models: tuple[str, ...]
    base: str | None
    output: str | None
    mode: MergeMode
    head: Head
    inputs: InputOverlap | None
    layers: tuple[LayerOverlap, ...]
    warnings: tuple[str, ...]
    tasks: tuple[TaskQuality, ...]
    parts_parameters: int
    parameters: int
    parts_bytes: int
    bytes: int
    seconds: float
    not_copied: tuple[NotCopied, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "models": list(self.models),
            "layers": [layer.to_dict() for layer in self.layers],
            "warnings": list(self.warnings),
            "tasks": [asdict(task) for task in self.tasks],
            "not_copied": [each._asdict() for each in self.not_copied],
        }


class MergeRefused(QualityGateNotMet):
    """A task would lose more than was allowed: nothing was written, and `merging` says what was measured."""

    def __init__(self, what: str, merging: Merging) -> None:
        super().__init__(what)
        self.merging = merging


@dataclass(frozen=True)
class Export:
    """What was exported: to where, how large it is, and how to load it.

    `layers` counts the low-rank layers of the model that was given. `difference` is the largest one between the outputs
    of torch and of what was written, where it was run (onnx); None elsewhere. `not_copied` is what of a folder did not
    go along, and why.
    """

    source: str
    output: str
    to: ExportTarget
    layers: int
    bytes: BeforeAfter
    difference: float | None
    load: str
    seconds: float
    not_copied: tuple[NotCopied, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        not_copied = [each._asdict() for each in self.not_copied]
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "not_copied": not_copied}
