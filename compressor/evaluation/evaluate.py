"""A model beside its baseline, on the same data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from compressor.data import Batch, EvaluationData, Task
from compressor.display import Displayed
from compressor.errors import BadInput
from compressor.evaluation.cost import (
    TIMING,
    Cost,
    Latency,
    TimingSettings,
    measure_cost,
    measure_latency,
    stored_cost,
)
from compressor.evaluation.metrics import Quality, accepts, drop_error, measure_quality, quality_drop
from compressor.evaluation.verdict import LatencyChange, QualityChange, SizeChange, Verdict, finite_or_words
from compressor.latency.measure import device_name
from compressor.model import on_device, resolve_device
from compressor.progress import Progress


@dataclass(frozen=True, repr=False)
class Evaluation(Displayed):
    """The quality and cost of a model on one set of data, beside its baseline, as `evaluate` returns them.

    Attributes:
        metric: `accuracy` (a fraction), `perplexity`, or the name of the caller's own metric.
        baseline: The metric of the baseline; None without one, as all that compares.
        compressed: The metric of the model.
        drop: How much worse the model is: accuracy lost, as a fraction, the increase in perplexity, or the change for
            the worse in the unit of the caller's own metric.
        drop_error: The standard error of the drop, over the examples; None with a metric of the caller's own, and where
            there is one example.
        baseline_loss: The loss of the baseline, in nats per prediction; None with a metric of the caller's own.
        compressed_loss: The loss of the model, in nats per prediction; None with a metric of the caller's own.
        count: The number of predictions; with a metric of the caller's own, of examples.
        data: The data that was measured on.
        task: What the data is.
        device: The device that the models ran on.
        baseline_cost: Parameters, bytes, multiply-accumulates and memory of the baseline.
        compressed_cost: The same of the model.
        latency: The times at each batch size; empty if they were not measured.
        higher_is_better: Which way a metric of the caller's own is better; None with accuracy and perplexity.

    Example:
        >>> evaluation = compressor.evaluate("small/", baseline="model/", data="test.jsonl")
        >>> evaluation.drop, evaluation.latency[0].ratio
    """

    metric: str
    baseline: float | None
    compressed: float
    drop: float | None
    baseline_loss: float | None
    compressed_loss: float | None
    count: int
    data: str
    task: Task
    device: str
    baseline_cost: Cost | None
    compressed_cost: Cost
    latency: tuple[Latency, ...]
    higher_is_better: bool | None = None
    drop_error: float | None = None

    def __repr__(self) -> str:
        return f"<Evaluation on {self.data}: {self.score}, {self.count:,} predictions, {self.device}>"

    @property
    def score(self) -> str:
        """The metric before and after, in a few words."""
        before = "" if self.baseline is None else f"{self.baseline:.4g} to "
        return f"{self.metric} {before}{self.compressed:.4g}"

    @property
    def quality(self) -> QualityChange:
        """The metric before and after."""
        return QualityChange(
            self.metric,
            before=self.baseline,
            after=self.compressed,
            drop=self.drop,
            drop_error=self.drop_error,
            higher_is_better=self.higher_is_better,
        )

    @property
    def verdict(self) -> Verdict:
        """What the model is beside its baseline, as `str` says it in a line; without one, only its quality."""
        before, after = self.baseline_cost, self.compressed_cost
        size = None if before is None else SizeChange(before.bytes, after.bytes)
        return Verdict(size, latency_changes(self.latency), self.quality)

    def to_dict(self) -> dict[str, Any]:
        """The evaluation for JSON, with an infinite number as the string "infinity" or "-infinity"."""
        before = asdict(self.baseline_cost) if self.baseline_cost else {}
        after = asdict(self.compressed_cost)
        return {
            "verdict": str(self.verdict),
            "changes": self.verdict.to_dict(),
            "metric": self.metric,
            **({} if self.higher_is_better is None else {"higher_is_better": self.higher_is_better}),
            "baseline": finite_or_words(self.baseline),
            "compressed": finite_or_words(self.compressed),
            "drop": finite_or_words(self.drop),
            "drop_error": self.drop_error,
            "loss": {
                "baseline": finite_or_words(self.baseline_loss),
                "compressed": finite_or_words(self.compressed_loss),
            },
            "count": self.count,
            "data": self.data,
            "task": self.task,
            "device": self.device,
            **{name: {"before": before.get(name), "after": after[name]} for name in after},
            "latency": {f"batch_{timing.batch_size}": asdict(timing) for timing in self.latency} or None,
        }

    def metrics(self) -> dict[str, float]:
        """The numbers by flat names, for an experiment tracker; unknown numbers are left out.

        `accuracy`, `perplexity` or the metric's name, `loss` (nats per prediction), `macs`, `peak_memory_bytes` and
        `latency_batch_N` (seconds), each with `_before` and `_after`; `drop`, as in the field; `latency_batch_N_ratio`,
        the median of paired runs.
        """
        sides = {
            "before": (self.baseline, self.baseline_loss, self.baseline_cost),
            "after": (self.compressed, self.compressed_loss, self.compressed_cost),
        }
        found: dict[str, float | None] = {}
        for side, (value, loss, cost) in sides.items():
            found |= {f"{self.metric}_{side}": value, f"loss_{side}": loss}
            if cost is not None:
                found |= {f"macs_{side}": cost.macs, f"peak_memory_bytes_{side}": cost.peak_memory_bytes}
        found["drop"] = self.drop
        for timing in self.latency:
            name = f"latency_batch_{timing.batch_size}"
            found |= {f"{name}_before": timing.baseline_seconds, f"{name}_after": timing.compressed_seconds}
            found[f"{name}_ratio"] = timing.ratio
        return {name: float(value) for name, value in found.items() if value is not None}


def latency_changes(latency: Sequence[Latency]) -> tuple[LatencyChange, ...]:
    """What was measured as ratios to the baseline, where there is one."""
    return tuple(LatencyChange(f"batch {each.batch_size}", each.ratio) for each in latency if each.ratio is not None)


def compare(
    baseline: nn.Module | None,
    compressed: nn.Module,
    data: EvaluationData,
    *,
    device: str | torch.device = "auto",
    timing: TimingSettings | None = TIMING,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the quality of both models on all of `data`, and the cost of each.

    Quality, multiply-accumulates (one example) and peak memory (one batch) are measured on one model after
    the other; only the timing, at the batch sizes of `timing` as far as there are examples, needs both on the device.
    Both models are left as they were; nothing is timed if `timing` is None. Raises `BadInput` when a
    model and the data do not fit, or for a device that is not there.
    """
    device = resolve_device(device)
    example, batch = data.read(range(1)), data.read(range(min(data.batch_size, data.count)))
    models = (compressed,) if baseline is None else (baseline, compressed)
    runs = data.metric is None or (batch.inputs != {} and accepts(compressed, batch, device=device))
    example = example[:1] if runs and example.aligned else example  # of data that came in batches
    timed = [] if timing is None or not runs else [(each, timing) for each in _batches_of(data, timing.batch)]
    parts = len(models) + len(timed)
    qualities, costs, latencies = [], [], []
    if progress:
        progress("evaluate", 0, parts)
    for model in models:
        with on_device(device, model):
            qualities.append(measure_quality(model, data, device=device))
            cost = measure_cost(model, example.inputs, batch.inputs, device=device) if runs else stored_cost(model)
            costs.append(cost)
        if progress:
            progress("evaluate", len(costs), parts)
    with on_device(device, *(models if timed else ())):
        for each, settings in timed:
            latency = measure_latency(compressed, each.inputs, baseline=baseline, device=device, timing=settings)
            latencies.append(latency)
            if progress:
                progress("evaluate", len(costs) + len(latencies), parts)
    before, after = (None if baseline is None else qualities[0]), qualities[-1]
    for quality in qualities:
        if math.isnan(quality.value):
            what = f"the metric {quality.metric} returned NaN"
            raise BadInput(what, where=data.name, option="metric", remedy="return a number for every model")
    return Evaluation(
        metric=after.metric,
        baseline=before.value if before else None,
        compressed=after.value,
        drop=quality_drop(before, after) if before else None,
        drop_error=_drop_error(before, after) if before else None,
        baseline_loss=before.loss if before else None,
        compressed_loss=after.loss,
        count=after.count,
        data=data.name,
        task=data.task,
        device=device_words(device),
        baseline_cost=None if baseline is None else costs[0],
        compressed_cost=costs[-1],
        latency=tuple(latencies),
        higher_is_better=after.higher_is_better,
    )


def _drop_error(before: Quality, after: Quality) -> float | None:
    """The standard error of the drop, where the examples tell it."""
    error = math.inf if after.examples is None else drop_error(before, after)
    return error if math.isfinite(error) else None


def _batches_of(data: EvaluationData, sizes: Sequence[int]) -> list[Batch]:
    """A batch of each size, or of all examples where there are fewer; one that cannot be cut stays whole."""
    found: dict[int, Batch] = {}
    for size in sizes:
        batch = data.read(range(min(size, data.count)))
        batch = batch[:size] if batch.aligned else batch  # of data that came in batches
        found.setdefault(batch.examples, batch)
    return list(found.values())


def device_words(device: torch.device) -> str:
    """The device in words, with the number of threads that a CPU computes with."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} {'thread' if threads == 1 else 'threads'})"
    return f"{device} ({device_name(device)})"
