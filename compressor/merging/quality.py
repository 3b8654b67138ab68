"""What a merge does to the task of each network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.arguments import Percent
from compressor.data import EvaluationData, Sample, open_data
from compressor.errors import BadInput
from compressor.evaluation import measure_quality, quality_drop
from compressor.merging.combination import Combination
from compressor.merging.overlap import output_change
from compressor.merging.parts import Part
from compressor.model import on_device
from compressor.progress import Progress


@dataclass(frozen=True)
class TaskQuality:
    """One task before and after the merge.

    Attributes:
        model: The network that was trained for the task.
        data: The data that the task was measured on.
        metric: `accuracy` (a fraction) or `perplexity`.
        alone: The metric of the task's own network.
        merged: The metric of the merged network.
        drop: Accuracy lost, as a fraction, or the increase in perplexity.
        loss_alone: The loss of the task's own network, in nats per prediction.
        loss_merged: The loss of the merged network, in nats per prediction.
        count: The number of predictions.
        output_change: `||f_merged - f|| / ||f||` of the logits.
    """

    model: str
    data: str
    metric: str
    alone: float
    merged: float
    drop: float
    loss_alone: float | None
    loss_merged: float | None
    count: int
    output_change: float


class _Outputs(nn.Module):
    """Some of a network's outputs, those from `start` up to `stop`."""

    def __init__(self, network: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.network, self.start, self.stop = network, start, stop

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.network(x)
        return outputs[:, self.start : self.stop]


def open_task(part: Part, data: Any, limit: int | None) -> EvaluationData:
    """The data of a network's task, prepared for it; at most `limit` examples."""
    part.model.require_runnable()
    return open_data(data, part.model.preprocessing, Sample(limit=limit))


def task_qualities(
    combination: Combination,
    merged: nn.Module,
    tasks: Sequence[EvaluationData],
    *,
    device: torch.device,
    progress: Progress | None,
) -> tuple[TaskQuality, ...]:
    """What the merge did to the task of each network."""
    qualities = []
    for index, (part, data) in enumerate(zip(combination.networks, tasks, strict=True)):
        own = merged if combination.head == "shared" else _outputs_of(merged, combination, index)
        with on_device(device, merged, part.model.module):
            qualities.append(_quality(part, own, data, device=device))
        if progress:
            progress("evaluate", index + 1, len(tasks))
    return tuple(qualities)


def _outputs_of(merged: nn.Module, combination: Combination, index: int) -> nn.Module:
    """The merged network as a task sees it whose outputs are separate from the others'."""
    assert combination.chain is not None
    name = f"{combination.chain.head}.weight".removeprefix(".")
    sizes = [part.infos[name].shape[0] for part in combination.networks]
    return _Outputs(merged, sum(sizes[:index]), sum(sizes[: index + 1]))


def _quality(part: Part, merged: nn.Module, data: EvaluationData, *, device: torch.device) -> TaskQuality:
    alone = part.model.module
    before, after = (measure_quality(network, data, device=device) for network in (alone, merged))
    return TaskQuality(
        model=part.name,
        data=data.name,
        metric=after.metric,
        alone=before.value,
        merged=after.value,
        drop=quality_drop(before, after),
        loss_alone=before.loss,
        loss_merged=after.loss,
        count=after.count,
        output_change=output_change(alone, merged, data, device=device),
    )


def lost_too_much(tasks: Sequence[TaskQuality], max_drop: float | None) -> str | None:
    """Which task loses most, in words, if it loses more than is allowed."""
    if max_drop is None:
        return None
    of_another = next((task for task in tasks if task.metric != "accuracy"), None)
    if isinstance(max_drop, Percent) and of_another is not None:
        what = (
            f"`max_drop` {100 * max_drop:g}% is of accuracy, and {of_another.data} is measured in {of_another.metric}"
        )
        raise BadInput(what, option="max_drop", remedy="give it in that unit, such as 0.5")
    worst = max(tasks, key=lambda task: task.drop)
    if worst.drop <= max_drop:
        return None
    return (
        f"{worst.data}: {worst.metric} {worst.merged:.4g} after merging and {worst.alone:.4g} alone, a drop of "
        f"{worst.drop:.4g} where at most {max_drop:g} was allowed; nothing was written"
    )
