"""What the pipeline returns: frozen, and as JSON by `to_dict`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from compressor.adapters import AdapterInspection
from compressor.archiving import ArchivedCheckpoint
from compressor.choices import AdapterDialect, ExportTarget, FormRequest, Head, MergeMode
from compressor.diagnosis.findings import Finding
from compressor.diagnosis.series import RankSeries
from compressor.diagnosis.types import DiagnosedLayer, Predictions
from compressor.display import Displayed, DisplayedLayers
from compressor.errors import QualityGateNotMet
from compressor.evaluation import (
    BetterUniform,
    Evaluation,
    LatencyChange,
    Losses,
    SizeChange,
    TimedWorkload,
    UniformQuantization,
    Verdict,
    better_uniform,
    latency_changes,
)
from compressor.fine_tuning.correspondence import Correspondence
from compressor.fine_tuning.difference import BaseShare
from compressor.formatting import format_size
from compressor.initial import InitialFound
from compressor.io import NotCopied
from compressor.io.steps import Unit
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


@dataclass(frozen=True, repr=False)
class Inspection(DisplayedLayers):
    """The measurements of every matrix of a model, as `inspect` returns them.

    Attributes:
        source: The model.
        recipe: How it was trained, as far as that is known.
        layers: The matrices, eligible or with the reason why they are skipped.
        parameters: The numbers in all tensors.
        weight_bytes: The size of the weight files.
        advice: What the measurements suggest, or None.
        left_out: What the files hold beside the weights, such as an optimizer's state; not counted in `weight_bytes`.
        weights_at: The keys under which a torch file keeps the weights; empty if they are all of it.
        initial: The initial weights that were looked for, and what layers still have of them; None where none were.
        adapter: How much rank an adapter uses; None of a model. The rows of `to_frame` are then its modules.

    Example:
        >>> inspection = compressor.inspect("model.safetensors")
        >>> print(inspection)  # the tables of `compress inspect`
        >>> inspection.to_frame()["ranks.energy"]
    """

    source: str
    recipe: TrainingRecipe
    layers: tuple[InspectedLayer, ...]
    parameters: int
    weight_bytes: int
    advice: str | None
    left_out: tuple[LeftOut, ...] = ()
    weights_at: str = ""
    initial: InitialFound | None = None
    adapter: AdapterInspection | None = None

    @property
    def eligible(self) -> int:
        return sum(inspected.layer.stored_parameters for inspected in self.layers if inspected.layer.eligible)

    def __repr__(self) -> str:
        if self.adapter is not None:
            return f"<Inspection of {self.source}: an adapter of {len(self.adapter.modules):,} modules>"
        eligible = sum(inspected.layer.eligible for inspected in self.layers)
        return (
            f"<Inspection of {self.source}: {self.parameters:,} parameters, {format_size(self.weight_bytes)},"
            f" {eligible} of {len(self.layers)} layers eligible>"
        )

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
            **({} if self.initial is None else {"initial": self.initial.to_dict()}),
            **({} if self.adapter is None else {"dialect": self.adapter.dialect}),
            "layers": [layer.to_dict() for layer in (self.layers if self.adapter is None else self.adapter.modules)],
        }


@dataclass(frozen=True)
class Amount:
    """Bytes that are needed of something, and that there are.

    Attributes:
        needed: What is needed at most.
        available: What there is; None where that is not known.
        place: Where: a folder, or a device.
    """

    needed: int
    available: int | None
    place: str


@dataclass(frozen=True)
class Needs:
    """What a compression is expected to take, as it says before it begins.

    Attributes:
        memory: The largest size of the process; on an accelerator, of its tensors there.
        temporary: Disk for temporary files.
        output: Disk for the weight files; at most this, where the request does not say their size.
        seconds: How long it is expected to take; None where nothing was timed.
        most_seconds: The same with all steps that may be left out.
    """

    memory: Amount
    temporary: Amount
    output: Amount
    seconds: float | None = None
    most_seconds: float | None = None


@dataclass(frozen=True)
class FineTune:
    """How a fine-tune was stored as its difference from a base model.

    Attributes:
        base: The base model.
        base_bytes: The size of its weight files.
        written_as: `LoRA adapter`, `factor pairs`, or `quantized layers` where some of them are.
        unchanged: The number of tensors that are equal to the base's.
        in_full: The tensors that are stored in full.
        max_lora_rank: The `--max-lora-rank` that vLLM needs to load the adapter; None for pairs.
        vllm_obstacles: Why vLLM would refuse the adapter all the same; empty for pairs.
        verified_with: The version of PEFT that loaded the adapter and reproduced every change before it was written;
            None if PEFT is not installed or nothing was written.
        rounding_share: The share of the difference, in the Frobenius norm over the matrices that became pairs, that is
            rounding of the fine-tune to the dtype that it is stored in; no rank is spent on it.
        shares: How much of the base is left in each matrix that became a pair, by the layer's name: as the recipe
            predicts, as fitted, and as used.
        rounding_shares: The same share of the difference of each matrix that changed and can have a pair, by the
            layer's name.
        only_rounding: Those of these layers whose difference is all rounding, as far as can be told.
        vocabulary: How many tokens the base has and the fine-tune; None where these are as many.
        llama_cpp_obstacles: Why llama.cpp would not convert the adapter; empty for pairs.
        correspondence: How its names are found in the base, and what is in one of the two alone; None where both have
            the same names.
    """

    base: str
    base_bytes: int
    written_as: Literal["LoRA adapter", "factor pairs", "quantized layers"]
    unchanged: int
    in_full: tuple[str, ...]
    max_lora_rank: int | None
    vllm_obstacles: tuple[str, ...]
    verified_with: str | None
    rounding_share: float
    shares: Mapping[str, BaseShare]
    rounding_shares: Mapping[str, float] = field(default_factory=dict)
    only_rounding: tuple[str, ...] = ()
    vocabulary: BeforeAfter | None = None
    llama_cpp_obstacles: tuple[str, ...] = ()
    correspondence: Correspondence | None = None


@dataclass(frozen=True)
class AdapterChange:
    """What became of an adapter that was resized.

    Attributes:
        dialect: Whose names its tensors have.
        modules: How many modules it changes.
        resized: How many of these have a smaller rank now.
        error: The relative error of all updates together, in the Frobenius norm; None before they are computed.
    """

    dialect: AdapterDialect
    modules: int
    resized: int
    error: float | None


@dataclass(frozen=True, repr=False)
class Compression(DisplayedLayers):
    """A compressed model, as `compress` returns it: the plan, the sizes, the quality, and what the work took.

    Attributes:
        source: The model that was compressed.
        output: The file or folder that was written; None for a module or a dry run.
        recipe: How the model was trained, as far as that is known.
        plan: The rank and form of each eligible layer; with a base, of its difference from the base.
        parameters: The numbers in all tensors, before and after.
        bytes: The size of the weight files, before and after. With a base, what is stored beside the base is `after`.
        evaluation: Quality and cost on `data`, beside the dense model; None without `data`.
        latency: The model timed beside the dense one in every workload; empty where speed was not asked for.
        uniform: What int8 and int4 of the same model, all layers alike, take and lose; empty with a base.
        timed_on: The device that it was timed on; None where speed was not asked for, or of another device.
        needs: What it was expected to take before it began; None for the difference of a fine-tune.
        seconds: How long it took.
        peak_memory_bytes: The most memory that the process used.
        skipped: The matrices that are not eligible, each with the reason.
        spectra: The singular values behind the plan, by layer, in descending order.
        has_attention: Whether the model has attention layers.
        warnings: Sentences that must not be overlooked.
        inspected: Further measurements of the eligible layers.
        measured: The measurements that the plan was made from.
        form: The form that was asked for.
        bits: The widths below 16 that layers could take, the most first; empty where all kept 16.
        command: The command line that asks for the same, with paths by their last part; empty for a module.
        pushed: The address of the commit on the Hugging Face hub, or None.
        model: The compressed module, if a module was compressed.
        fine_tune: How a fine-tune was written; None without a base.
        not_copied: Files of the model folder that were not copied, each with the reason.
        left_out: What the source's files hold beside the weights; not counted in `bytes`.
        weights_at: The keys under which a torch file keeps the weights; empty if they are all of it.
        adapter: What became of an adapter; None for a model. The layers of the plan are then its modules, and sizes
            those of their factors.

    Example:
        >>> small = compressor.compress("model/", output="small/", keep=0.6, data="test.jsonl")
        >>> small.bytes.after / small.bytes.before, small.evaluation.drop
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
    latency: tuple[TimedWorkload, ...] = ()
    timed_on: str | None = None
    needs: Needs | None = field(default=None, compare=False)
    uniform: tuple[UniformQuantization, ...] = ()
    bits: tuple[int, ...] = ()
    adapter: AdapterChange | None = None

    def __repr__(self) -> str:
        score = "" if self.evaluation is None else f", {self.evaluation.score}"
        place = self.output or ("nowhere" if self.model is None else "memory")
        return (
            f"<Compression of {self.source} to {place}: {self.plan.rewritten_words},"
            f" {format_size(self.bytes.before)} to {format_size(self.bytes.after)}{score}>"
        )

    @property
    def initial(self) -> InitialFound | None:
        """The initial weights that were looked for, and what layers still have of them; None where none were."""
        return self.plan.initial

    @property
    def latency_changes(self) -> tuple[LatencyChange, ...]:
        """Times as ratios to the dense model's: measured, or predicted of the layers for a device not at hand."""
        if self.latency:
            return tuple(LatencyChange(each.workload, each.ratio) for each in self.latency)
        if (device := self.plan.device) is not None:
            return tuple(LatencyChange(*each, predicted_on=device) for each in self.plan.predicted_latency.items())
        return () if self.evaluation is None else latency_changes(self.evaluation.latency)

    @property
    def verdict(self) -> Verdict:
        """What became of the model, as `str` says it in a line: smaller, faster, as good?"""
        return Verdict(
            SizeChange(self.bytes.before, self.bytes.after),
            self.latency_changes,
            None if self.evaluation is None else self.evaluation.quality,
            beside_base=self.fine_tune is not None,
        )

    @property
    def losses(self) -> Losses:
        """What it loses, by each measure that there is."""
        evaluation, calibration = self.evaluation, self.plan.calibration
        change = dense = None
        if evaluation is not None and evaluation.compressed_loss is not None:
            dense = evaluation.baseline_loss
            change = None if dense is None else evaluation.compressed_loss - dense
        squares = [layer.error**2 for layer in self.plan.layers]
        return Losses(
            on_data=change,
            data="" if evaluation is None else evaluation.data,
            on_holdout=None if calibration is None else calibration.holdout_loss,
            unit="" if calibration is None else calibration.unit,
            error=None if calibration is not None else math.sqrt(sum(squares) / max(1, len(squares))),
            dense_loss=dense,
        )

    @property
    def better_uniform(self) -> BetterUniform | None:
        """A uniform quantization of the same model that is smaller and loses no more."""
        return better_uniform(self.uniform, self.losses, size=self.bytes.after)

    @cached_property
    def curve(self) -> SizeCurve | None:
        """What other sizes would lose, by the measurements behind the plan; None for a fine-tune's difference."""
        if not self.measured:
            return None
        calibration = self.plan.calibration
        if calibration is None:
            return size_curve(self.measured, self.form)
        exponent = 1.0 if calibration.exponent is None else calibration.exponent
        return size_curve(self.measured, self.form, exponent=exponent, unit=calibration.unit)

    def _beside(self) -> dict[str, Any]:
        """What uniform quantizations lose, where they were measured, and whether one is better."""
        if not self.uniform:
            return {}
        better = self.better_uniform
        return {
            "uniform": [each.to_dict() for each in self.uniform],
            "better_uniform": None if better is None else better.to_dict(),
        }

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
            "verdict": str(self.verdict),
            "changes": self.verdict.to_dict(),
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
            **({"bits": list(self.bits)} if self.bits else {}),
            "advice": self.plan.advice,
            "warnings": list(self.warnings),
            **({} if self.initial is None else {"initial": self.initial.to_dict()}),
            "calibration": None if self.plan.calibration is None else asdict(self.plan.calibration),
            "search": None if self.plan.search is None else self.plan.search.to_dict(),
            "curve": None if self.curve is None else self.curve.to_dict(),
            **self._beside(),
            "error_name": self.plan.error_name,
            "layers": [layer.to_dict() for layer in self.plan.layers],
            "skipped": [
                {"name": layer.name, "shape": list(layer.tensor_shape), "kind": layer.kind, "reason": layer.skip}
                for layer in self.skipped
            ],
            "fine_tune": None if self.fine_tune is None else asdict(self.fine_tune),
            **({} if self.adapter is None else {"adapter": asdict(self.adapter)}),
            "not_copied": [each._asdict() for each in self.not_copied],
            "evaluation": self.evaluation.to_dict() if self.evaluation else None,
            **({"timed_on": self.timed_on} if self.latency else {}),
            **({"latency": [each.to_dict() for each in self.latency]} if self.latency else {}),
            "recipe": self.recipe.to_dict(),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "needs": None if self.needs is None else asdict(self.needs),
        }


@dataclass(frozen=True, repr=False)
class Restoration(Displayed):
    """A dense checkpoint restored from a compressed one, as `restore` returns it.

    Attributes:
        source: The compressed checkpoint.
        output: The dense file or folder.
        layers: The layers whose factors were multiplied.
        bytes: The size of the weight files, before and after.
        seconds: How long it took.
        not_copied: Files of the model folder that were not copied, each with the reason.
        checkpoint: Which checkpoint of an archive it is; None of a compressed model.
    """

    source: str
    output: str
    layers: tuple[str, ...]
    bytes: BeforeAfter
    seconds: float
    not_copied: tuple[NotCopied, ...] = ()
    checkpoint: str | None = None

    def __repr__(self) -> str:
        what = f"{len(self.layers)} layers made dense" if self.checkpoint is None else self.checkpoint
        return (
            f"<Restoration of {self.source} to {self.output}: {what},"
            f" {format_size(self.bytes.before)} to {format_size(self.bytes.after)}>"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "output": self.output,
            "layers": list(self.layers),
            "bytes": asdict(self.bytes),
            "not_copied": [each._asdict() for each in self.not_copied],
            "seconds": self.seconds,
            "checkpoint": self.checkpoint,
        }


@dataclass(frozen=True, repr=False)
class Archiving(Displayed):
    """The checkpoints of a training run in an archive, as `archive` returns it.

    Attributes:
        output: The archive.
        tolerance: The largest relative error of a tensor that was asked for.
        unit: What the numbers of the checkpoints count: optimizer steps or epochs.
        recipe: How the run was trained, as far as that is known.
        initial: Where the initial weights come from; None where they are not known.
        checkpoints: What each checkpoint takes, and how it is stored.
        bytes: The size of the weight files, and of the archive with all that it holds.
        left_out: What the files of the checkpoints hold beside the weights, which is not stored.
        seconds: How long it took.

    Example:
        >>> archived = compressor.archive(["run/step-100.pt", "run/step-200.pt"], output="run-archive")
        >>> archived.bytes.after / archived.bytes.before
    """

    output: str
    tolerance: float
    unit: Unit
    recipe: TrainingRecipe
    initial: str | None
    checkpoints: tuple[ArchivedCheckpoint, ...]
    bytes: BeforeAfter
    left_out: tuple[LeftOut, ...]
    seconds: float

    def __repr__(self) -> str:
        return (
            f"<Archiving of {len(self.checkpoints)} checkpoints to {self.output}:"
            f" {format_size(self.bytes.before)} to {format_size(self.bytes.after)}>"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "output": self.output,
            "tolerance": self.tolerance,
            "unit": self.unit,
            "recipe": self.recipe.to_dict(),
            "initial": self.initial,
            "checkpoints": [each.to_dict() for each in self.checkpoints],
            "bytes": asdict(self.bytes),
            "left_out": [asdict(each) for each in self.left_out],
            "seconds": self.seconds,
        }


@dataclass(frozen=True, repr=False)
class Diagnosis(DisplayedLayers):
    """The effects of training on each matrix, and the findings that follow, as `diagnose` returns them.

    Attributes:
        source: The model.
        recipe: How it was trained, as far as that is known.
        layers: The eligible matrices.
        predictions: The model's score on the data; None without data.
        balance: How the norms of the matrices compare; None if fewer than two can be compared.
        series: The ranks over the checkpoints of the training; None without `series`.
        findings: The findings, each with its advice.
        initial: The initial weights that were looked for, and what layers still have of them; None where none were.

    Example:
        >>> [finding.message for finding in compressor.diagnose("model/").findings if finding.warning]
    """

    source: str
    recipe: TrainingRecipe
    layers: tuple[DiagnosedLayer, ...]
    predictions: Predictions | None
    balance: NormBalance | None
    series: RankSeries | None
    findings: tuple[Finding, ...]
    initial: InitialFound | None = None

    def __repr__(self) -> str:
        warnings = sum(finding.warning for finding in self.findings)
        return (
            f"<Diagnosis of {self.source}: {len(self.layers)} layers, {len(self.findings)} findings,"
            f" {warnings} of them warnings>"
        )

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as one JSON document."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "predictions": self.predictions.to_dict() if self.predictions else None,
            "balance": self.balance.to_dict() if self.balance else None,
            **({} if self.initial is None else {"initial": self.initial.to_dict()}),
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [layer.to_dict() for layer in self.layers],
            "series": self.series.to_dict() if self.series else None,
        }


@dataclass(frozen=True, repr=False)
class Merging(DisplayedLayers):
    """A merged network, how much the networks overlap, and the change of each task, as `merge` returns it.

    Attributes:
        models: The networks that were merged.
        base: The model that they were fine-tuned from, or None.
        output: The file or folder that was written; None if the merge was refused.
        mode: `sum` or `concat`.
        head: `shared` or `separate`, of `concat`.
        inputs: How nearly orthogonal the inputs of two tasks are; None if unknown.
        layers: The overlap of the networks in each layer, measured before merging.
        warnings: Sentences that must not be overlooked.
        tasks: The quality of each task before and after; empty without data.
        parts_parameters: The stored numbers of all networks together.
        parameters: The stored numbers of the merged network.
        parts_bytes: The size of the weight files of all networks together.
        bytes: The size of the merged weight files.
        seconds: How long it took.
        not_copied: Files of the first folder that were not copied, each with the reason.
        adapter: What became of adapters; None for networks. Its `error` is that of the truncation.
        weights: What each adapter counts; empty for networks.
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
    adapter: AdapterChange | None = None
    weights: tuple[float, ...] = ()

    def __repr__(self) -> str:
        drops = "".join(
            f", {task.data}: {task.metric} {task.alone:.4g} to {task.merged:.4g}" for task in self.tasks[:3]
        )
        what = "models" if self.adapter is None else "adapters"
        return (
            f"<Merging of {len(self.models)} {what} by {self.mode} to {self.output or 'nothing'}:"
            f" {format_size(self.parts_bytes)} to {format_size(self.bytes)}{drops}>"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: value for name, value in asdict(self).items() if name not in ("adapter", "weights")},
            **({} if self.adapter is None else {"adapter": asdict(self.adapter), "weights": list(self.weights)}),
            "models": list(self.models),
            "layers": [layer.to_dict() for layer in self.layers],
            "warnings": list(self.warnings),
            "tasks": [asdict(task) for task in self.tasks],
            "not_copied": [each._asdict() for each in self.not_copied],
        }


class MergeRefused(QualityGateNotMet):
    """A task would lose more than `max_drop` allows: nothing was written.

    Attributes:
        merging: What was measured.
    """

    def __init__(self, what: str, merging: Merging) -> None:
        super().__init__(what)
        self.merging = merging

    def __reduce__(self) -> tuple[object, ...]:
        # As of `BadInput`: an error is pickled with the arguments of its base class alone.
        return MergeRefused, (str(self), self.merging)


@dataclass(frozen=True, repr=False)
class Export(Displayed):
    """An exported model, as `export` returns it.

    Attributes:
        source: The compressed model.
        output: The file or folder that was written.
        to: What it was exported to.
        layers: The number of low-rank layers of the compressed model, or of modules of an adapter.
        bytes: The size of the weight files, before and after.
        difference: The largest difference between its outputs and those of torch; None if it was not run.
        load: How to load it.
        seconds: How long it took.
        not_copied: Files of the model folder that were not copied, each with the reason.
        tensor_types: The number of tensors of each type in a GGUF file; None of anything else.
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
    tensor_types: Mapping[str, int] | None = None

    def __repr__(self) -> str:
        return (
            f"<Export of {self.source} to {self.output} as {self.to}: {self.layers} low-rank layers,"
            f" {format_size(self.bytes.before)} to {format_size(self.bytes.after)}>"
        )

    def to_dict(self) -> dict[str, Any]:
        not_copied = [each._asdict() for each in self.not_copied]
        found = {"schema_version": SCHEMA_VERSION, **asdict(self), "not_copied": not_copied}
        if self.tensor_types is None:
            del found["tensor_types"]
        return found
