"""What a model costs and how well it predicts, beside its baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import torch
from torch import nn

from compressor.arguments import as_count_if_given, one_of
from compressor.data import EvaluationData
from compressor.data.builtin_data import Split
from compressor.evaluation import Cost, Evaluation, compare
from compressor.io import local_model, open_checkpoint
from compressor.model import Factory, ModelLike, build_model, load_model, resolve_device
from compressor.model.opened import open_data_for
from compressor.progress import Progress
from compressor.torch_state import neutral_torch_state, uncompiled


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
    model = uncompiled(local_model(model))
    baseline = None if baseline is None else uncompiled(local_model(baseline))
    module = model if isinstance(model, nn.Module) else None
    if factory is not None and Path(data).suffix in (".npz", ".safetensors"):  # whose arrays may go by its names
        module = build_model(factory)
    evaluated = open_data_for(data, open_checkpoint(model), split, data_samples, module=module)
    return evaluate_models(baseline, model, evaluated, factory, torch_device, progress)


def evaluate_models(
    baseline: ModelLike | None,
    model: ModelLike,
    data: EvaluationData,
    factory: Factory | None,
    device: torch.device,
    progress: Progress | None,
) -> Evaluation:
    reference = None if baseline is None else load_model(baseline, factory)
    evaluation = compare(reference, load_model(model, factory), data, device=device, progress=progress)
    return replace(
        evaluation,
        baseline_cost=_on_disk(evaluation.baseline_cost, baseline),
        compressed_cost=_on_disk(evaluation.compressed_cost, model),
    )


def _on_disk(cost: CostOrNone, model: ModelLike | None) -> CostOrNone:
    """The cost with the size of the weight files, where the model came from files."""
    if cost is None or model is None or isinstance(model, nn.Module):
        return cost
    return replace(cost, bytes=open_checkpoint(model).weight_bytes)


CostOrNone = TypeVar("CostOrNone", Cost, Cost | None)
