"""Merging networks of one architecture: their weights added, or the networks put side by side in one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from compressor.api.adapters import merge_adapters, opened_adapter
from compressor.api.announced import merge_steps
from compressor.api.keywords import MergeKeywords
from compressor.api.option import verb
from compressor.api.options import MergeOptions
from compressor.api.stored_base import with_base
from compressor.api.write import written
from compressor.choices import MergeMode
from compressor.errors import BadInput
from compressor.fine_tuning import is_difference
from compressor.io import Naming, Target, checked_target, form_of
from compressor.merging.artifact import merged_artifact
from compressor.merging.combination import Combination, combined
from compressor.merging.comparison import input_overlap, layer_overlaps, merge_warnings
from compressor.merging.parts import Part, open_part, part_of
from compressor.merging.quality import lost_too_much, open_task, task_qualities
from compressor.model import open_runnable, resolve_device
from compressor.progress import expect, takes_steps
from compressor.results import MergeRefused, Merging
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(MergeOptions)
def merge(models: Sequence[str | Path], options: MergeOptions | None = None, **given: Unpack[MergeKeywords]) -> Merging:
    """Merge two or more trained networks of one architecture into one that does what each of them does.

    `sum` adds the weights, for networks trained with weight decay on nearly orthogonal inputs; with a `base` it adds
    what each was fine-tuned by, `base + sum of (W_i - base)` (task arithmetic, Ilharco et al., arXiv 2212.04089).
    `concat` puts feed-forward networks side by side: first layers stacked, middle layers as blocks of a diagonal; a
    `shared` head adds their outputs, a `separate` one concatenates them. Factor pairs stay pairs; one of the networks
    may be what a fine-tune adds to the `base`, as `compress` with a base writes it. With `data` of each
    network, overlap is measured on it, and each task's metric before and after. Files give a safetensors file and
    folders a folder.

    LoRA adapters of one base are added, each times its weight, in the names of the first: their factors are put side by
    side, and truncated where a `rank`, `energy`, `keep`, or `max_size` is asked for.

    Args:
        models: Two or more weight files, model folders, or adapters.
        options: The options as an object; keywords take precedence.

    Returns:
        How much the networks overlap, and what merging did to each task.

    Raises:
        BadInput: the request or an input is bad.
        MergeRefused: `max_drop` is not held; nothing is written.

    Example:
        >>> compressor.merge(["a.safetensors", "b.safetensors"], output="ab.safetensors", mode="concat")
    """
    started = time.monotonic()
    asked = MergeOptions.of(options, given)
    _require_several(models, asked)
    adapters = [opened_adapter(model) for model in models]
    if any(adapter is not None for adapter in adapters):
        return merge_adapters(models, adapters, asked)
    mode = _mode_of_networks(asked)
    device = resolve_device(asked.device)
    networks = tuple(_opened_part(model, asked) for model in models)
    base = None if asked.base is None else open_part(asked.base, asked.factory)
    combination = combined(networks, base, mode, head=asked.head, factory=asked.factory)
    target = _target(combination, asked)
    tasks = [open_task(part, data, asked.data_samples) for part, data in zip(networks, asked.data, strict=False)]
    if takes_steps(asked.progress):
        expect(asked.progress, merge_steps(combination, tasks, device))
    overlaps, cosine = layer_overlaps(combination, tasks, device=device, progress=asked.progress)
    artifact = merged_artifact(combination, asked.max_shard_size, asked.progress)
    merging = Merging(
        models=tuple(str(model) for model in models),
        base=None if asked.base is None else str(asked.base),
        output=None,
        mode=mode,
        head=asked.head,
        inputs=input_overlap(combination, tasks),
        layers=overlaps,
        warnings=tuple(merge_warnings(combination, overlaps, cosine=cosine, factory=asked.factory)),
        tasks=(),
        parts_parameters=sum(part.checkpoint.elements for part in networks),
        parameters=artifact.elements,
        parts_bytes=sum(part.checkpoint.weight_bytes for part in networks),
        bytes=artifact.bytes,
        seconds=0.0,
    )
    with written(artifact, target) as made:
        if tasks and made.model is not None:
            merged = open_runnable(made.model, asked.factory).module
            qualities = task_qualities(combination, merged, tasks, device=device, progress=asked.progress)
            merging = replace(merging, tasks=qualities, seconds=time.monotonic() - started)
        if (lost := lost_too_much(merging.tasks, asked.max_drop)) is not None:
            raise MergeRefused(lost, merging)
    seconds = time.monotonic() - started
    return replace(merging, output=str(target.path), seconds=seconds, not_copied=made.not_copied)


def _mode_of_networks(asked: MergeOptions) -> MergeMode:
    """How networks are merged; `BadInput` where it is not said, or what is asked makes sense of adapters alone."""
    for name in ("weights", *asked.adapter_budget):
        if name in asked.given:
            what = f"`{name}` is about adapters, and these are networks"
            raise BadInput(what, option=name, remedy=f"leave out `{name}`")
    if asked.mode is None:
        remedy = "give `mode='sum'` or `mode='concat'`"
        raise BadInput("how networks are merged is not said", option="mode", remedy=remedy)
    return asked.mode


def _opened_part(model: str | Path, asked: MergeOptions) -> Part:
    """One of the networks; of a stored difference the fine-tune that it and the base make."""
    opened = open_runnable(model)
    if is_difference(opened.checkpoint):
        return part_of(with_base(opened, asked.base, asked.factory))
    return open_part(model, asked.factory)


def _require_several(models: Sequence[str | Path], asked: MergeOptions) -> None:
    if isinstance(models, str | Path) or len(models) < 2:
        raise BadInput("one network is nothing to merge", option="models", remedy="give two or more")
    for model in models:
        if not isinstance(model, str | Path):
            what, remedy = f"one of `models` is of type {type(model).__name__}", "give weight files or model folders"
            raise BadInput(what, option="models", remedy=remedy)
    if asked.data and len(asked.data) != len(models):
        what = f"{len(models)} networks and data of {len(asked.data)} tasks"
        raise BadInput(what, option="data", remedy="give `data` once for each network, in order")


def _target(combination: Combination, asked: MergeOptions) -> Target:
    """Where the result goes: none of the inputs, base and all."""
    first, *others = (part.checkpoint for part in combination.parts)
    named = Naming(form_of(first), "-merged")
    return checked_target(first, asked.output, named, overwrite=asked.overwrite, others=others)
