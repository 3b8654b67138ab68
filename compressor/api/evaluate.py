"""What a model costs and how well it predicts, beside its baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import torch

from compressor.arguments import as_count_if_given, one_of
from compressor.data import EvaluationData, open_data_for
from compressor.data.builtin_data import Split
from compressor.evaluation import Cost, Evaluation, compare
from compressor.model import Factory, Model, ModelLike, open_runnable, resolve_device
from compressor.progress import Progress
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
def evaluate(
    model: ModelLike,
    *,
    data: str | Path,
    data_samples: int | None = None,
    baseline: ModelLike | None = None,
    factory: Factory | None = None,
    split: Split = "test",
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Quality, size, arithmetic, memory and speed of a model on `data`, beside those of its `baseline`.

    At most `data_samples` examples are used, evenly spaced; all by default. Without a baseline the model is measured
    alone. `factory` builds the architecture of weights that are not a transformers model's. Raises `BadInput` for a
    model or data that cannot be used.
    """
    one_of(split, "split", get_args(Split))
    data_samples = as_count_if_given(data_samples, "data_samples", least=1)
    torch_device = resolve_device(device)
    opened = open_runnable(model, factory)
    reference = None if baseline is None else open_runnable(baseline, factory)
    examples = open_data_for(data, opened.preprocessing, split=split, limit=data_samples)
    return evaluate_models(reference, opened, examples, torch_device, progress)


def evaluate_models(
    baseline: Model | None,
    model: Model,
    data: EvaluationData,
    device: torch.device,
    progress: Progress | None,
) -> Evaluation:
    """Compare two opened models; the cost of weight files has their size."""
    reference = None if baseline is None else baseline.module
    evaluation = compare(reference, model.module, data, device=device, progress=progress)
    return replace(
        evaluation,
        baseline_cost=_on_disk(evaluation.baseline_cost, baseline),
        compressed_cost=_on_disk(evaluation.compressed_cost, model),
    )


def _on_disk(cost: CostOrNone, model: Model | None) -> CostOrNone:
    """The cost with the size of the weight files, where the model came from files."""
    if cost is None or model is None or model.in_memory:
        return cost
    return replace(cost, bytes=model.checkpoint.weight_bytes)


CostOrNone = TypeVar("CostOrNone", Cost, Cost | None)
