"""What a model costs and how well it predicts, beside its baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, Unpack

from compressor.api.initial import require_use
from compressor.api.keywords import EvaluateKeywords
from compressor.api.option import verb
from compressor.api.options import EvaluateOptions
from compressor.api.requests import reported_data, timing_settings
from compressor.api.stored_base import with_base
from compressor.data import EvaluationData
from compressor.engine import Run
from compressor.evaluation import Cost, Evaluation, TimingSettings, compare
from compressor.model import Model, ModelLike, open_runnable, resolve_device
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(EvaluateOptions)
def evaluate(model: ModelLike, options: EvaluateOptions | None = None, **given: Unpack[EvaluateKeywords]) -> Evaluation:
    """Measure quality, size, arithmetic, memory and speed of a model on `data`, beside those of its `baseline`.

    `data` takes paths and objects, as `compress` does. Of a stored difference and its `base` the fine-tune is measured
    that they make.

    Args:
        model: A weight file, a model folder, `org/name` of the Hugging Face hub, or a `torch.nn.Module`.
        options: The options as an object; keywords take precedence.

    Returns:
        What was measured; of the model alone without a baseline.

    Raises:
        BadInput: a model or data that cannot be used.

    Example:
        >>> compressor.evaluate("small/", baseline="model/", data="test.jsonl").drop
    """
    asked = EvaluateOptions.of(options, given)
    device = resolve_device(asked.device)
    opened = with_base(open_runnable(model, asked.factory, initial=asked.initial), asked.base, asked.factory, runs=True)
    baseline = asked.baseline
    reference = None if baseline is None else open_runnable(baseline, asked.factory, initial=asked.initial)
    for each in (opened, reference):
        if each is not None:
            each.require_runnable()
    require_use(asked, opened, reference)
    examples = reported_data(asked, opened, asked.split)
    run = Run(device, progress=asked.progress)
    return evaluate_models(reference, opened, examples, run=run, timing=timing_settings(asked))


def evaluate_models(
    baseline: Model | None,
    model: Model,
    data: EvaluationData,
    *,
    run: Run,
    timing: TimingSettings,
) -> Evaluation:
    """Compare two opened models; the cost of weight files has their size."""
    reference = None if baseline is None else baseline.module
    evaluation = compare(reference, model.module, data, device=run.device, timing=timing, progress=run.progress)
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
