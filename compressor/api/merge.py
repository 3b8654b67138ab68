"""Merging networks of one architecture: their weights added, or the networks put side by side in one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from compressor.api.keywords import MergeKeywords
from compressor.api.option import verb
from compressor.api.options import MergeOptions
from compressor.api.write import written
from compressor.choices import Head, MergeMode
from compressor.data import EvaluationData, Sample, open_data
from compressor.errors import BadInput
from compressor.evaluation import measure_quality, quality_drop
from compressor.io import Naming, checked_target, form_of
from compressor.measure.rounding import rounding
from compressor.merging import InputOverlap, LayerOverlap
from compressor.merging.artifact import merged_artifact
from compressor.merging.chain import Chain, chain_of_shapes, traced_chain
from compressor.merging.combination import Combination, layer_of
from compressor.merging.guarantee import interference_warning, sum_warnings
from compressor.merging.overlap import (
    data_overlap,
    layer_overlap,
    measured_interference,
    output_change,
    row_space_overlap,
)
from compressor.merging.parts import (
    Part,
    normalization,
    open_part,
    require_equal,
    require_same_architecture,
)
from compressor.model import Factory, build_model, open_runnable, resolve_device
from compressor.network import layer_name
from compressor.progress import Progress
from compressor.results import MergeRefused, Merging, TaskQuality
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(MergeOptions)
def merge(models: Sequence[str | Path], options: MergeOptions | None = None, **given: Unpack[MergeKeywords]) -> Merging:
    """Merge two or more trained networks of one architecture into one that does what each of them does.

    `sum` adds the weights, for networks trained with weight decay on nearly orthogonal inputs; with a `base` it adds
    what each was fine-tuned by, `base + sum of (W_i - base)` (task arithmetic, Ilharco et al., arXiv 2212.04089).
    `concat` puts feed-forward networks side by side: first layers stacked, middle layers as blocks of a diagonal; a
    `shared` head adds their outputs, a `separate` one concatenates them. Factor pairs stay pairs. With `data` of each
    network, overlap is measured on it, and each task's metric before and after. Files give a safetensors file and
    folders a folder.

    Args:
        models: Two or more weight files, or model folders.
        options: The options as an object; keywords go before them.

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
    mode, head, base, factory, progress = asked.mode, asked.head, asked.base, asked.factory, asked.progress
    torch_device = resolve_device(asked.device)
    parts = tuple(open_part(model, factory) for model in models)
    start = None if base is None else open_part(base, factory)
    combination = _combination(parts, start, mode, head, factory)
    others = [part.checkpoint for part in (*parts[1:], *(() if start is None else (start,)))]
    named = Naming(form_of(parts[0].checkpoint), "-merged")
    target = checked_target(parts[0].checkpoint, asked.output, named, overwrite=asked.overwrite, others=others)
    tasks = _task_data(parts, asked.data, asked.data_samples)

    networks = [part.model.module for part in parts] if tasks else []
    foundation = start.model.module if tasks and start is not None else None
    overlaps, cosine = _layer_overlaps(parts, start, networks, foundation, tasks, torch_device, progress)
    inputs = data_overlap(tasks, networks) if tasks else None
    inputs = inputs or _first_layer_overlap(parts, start, combination.chain)
    warnings = _warnings(combination, mode, start, overlaps, cosine, factory)

    artifact = merged_artifact(combination, asked.max_shard_size, base=start, progress=progress)
    qualities: list[TaskQuality] = []

    def result(output: Path | None) -> Merging:
        return Merging(
            models=tuple(str(model) for model in models),
            base=None if base is None else str(base),
            output=None if output is None else str(output),
            mode=mode,
            head=head,
            inputs=inputs,
            layers=overlaps,
            warnings=tuple(warnings),
            tasks=tuple(qualities),
            parts_parameters=sum(info.elements for part in parts for info in part.checkpoint.tensors.values()),
            parameters=artifact.elements,
            parts_bytes=sum(part.checkpoint.weight_bytes for part in parts),
            bytes=artifact.bytes,
            seconds=time.monotonic() - started,
            not_copied=() if output is None else artifact.not_copied,
        )

    with written(artifact, target) as made:
        assert made.model is not None
        merged = open_runnable(made.model, factory).module if tasks else None
        for index, task in enumerate(tasks):
            assert merged is not None
            own = merged if head == "shared" else _outputs_of(merged, combination, index)
            qualities.append(_quality(parts[index], networks[index], own, task, torch_device))
            if progress:
                progress("evaluate", index + 1, len(tasks))
        if (lost := _lost_too_much(qualities, asked.max_drop)) is not None:
            raise MergeRefused(lost, result(None))
    return result(target.path)


def _require_several(models: Sequence[str | Path], asked: MergeOptions) -> None:
    if isinstance(models, str | Path) or len(models) < 2:
        raise BadInput("one network is nothing to merge", option="models", remedy="give two or more")
    if asked.data and len(asked.data) != len(models):
        what = f"{len(models)} networks and data of {len(asked.data)} tasks"
        raise BadInput(what, option="data", remedy="give `data` once for each network, in order")


def _combination(
    parts: tuple[Part, ...], start: Part | None, mode: MergeMode, head: Head, factory: Factory | None
) -> Combination:
    """How the parts are put together, once they are known to fit."""
    everything = parts if start is None else (*parts, start)
    if mode == "concat" and parts[0].checkpoint.folder is not None:
        raise BadInput(
            "concat is for feed-forward networks in weight files, and this is a model folder",
            where=parts[0].name,
            remedy="merge fine-tunes of one model with `mode='sum'` `base=ORIGINAL`",
        )
    require_same_architecture(everything, same_shapes=mode == "sum")
    if mode == "sum":
        if start is None and (name := normalization(parts[0])) is not None:
            raise BadInput(
                f"{name} is of a normalization layer, which is no sum",
                where=parts[0].name,
                remedy="merge fine-tunes with `base=ORIGINAL`, or feed-forward networks with `mode='concat'`",
            )
        factors = (1.0,) * len(parts) if start is None else (*(1.0,) * len(parts), 1.0 - len(parts))
        combination = Combination(everything, factors)
    else:
        chain = _chain(parts, factory)
        combination = Combination(parts, (1.0,) * len(parts), chain, head)
        _require_sides(parts, chain, head)
    for name in parts[0].infos:
        if combination.is_kept(name):
            require_equal(parts, name)
    return combination


def _chain(parts: Sequence[Part], factory: Factory | None) -> Chain:
    if factory is None:
        chains = [
            chain_of_shapes({name: info.shape for name, info in part.infos.items()}, part.checkpoint.source)
            for part in parts
        ]
        if any(chain.layers != chains[0].layers for chain in chains):
            raise BadInput("the layers of the networks come in different orders", remedy="pass `factory`")
        return chains[0]
    chain = traced_chain(build_model(factory))
    known = {*chain.layers, *chain.batch_norms}
    if strange := [name for name in parts[0].infos if layer_of(name) not in known]:
        raise BadInput(
            f"the networks cannot be concatenated: {strange[0]} is in no layer that runs",
            where=parts[0].name,
            remedy="pass `factory` with the function that builds them",
        )
    return chain


def _require_sides(parts: Sequence[Part], chain: Chain, head: Head) -> None:
    """What the networks share must be equally large in all of them: their inputs, and the outputs of a shared head."""
    sides = [(f"{layer}.weight", 1, "inputs") for layer in chain.first]
    if head == "shared":
        sides.append((f"{chain.head}.weight", 0, "outputs"))
    for tensor, side, what in sides:
        name = tensor.removeprefix(".")
        sizes = [part.infos[name].shape[side] for part in parts]
        if len(set(sizes)) > 1:
            remedy = (
                "give each its own outputs with `head='separate'`" if side == 0 else "merge networks of the same inputs"
            )
            raise BadInput(f"{name} has {' and '.join(map(str, sizes))} {what}", remedy=remedy)


def _task_data(parts: Sequence[Part], data: Sequence[Any], limit: int | None) -> list[EvaluationData]:
    """Each network's data, prepared for it."""
    opened = []
    for part, spec in zip(parts, data, strict=False):
        part.model.require_runnable()
        opened.append(open_data(spec, part.model.preprocessing, Sample(limit=limit)))
    return opened


def _layer_overlaps(
    parts: Sequence[Part],
    start: Part | None,
    networks: Sequence[nn.Module],
    foundation: nn.Module | None,
    tasks: Sequence[EvaluationData],
    device: torch.device,
    progress: Progress | None,
) -> tuple[tuple[LayerOverlap, ...], float]:
    """The overlap of every layer whose inputs are equally many in all networks; the largest cosine of their weights."""
    measured = measured_interference(networks, tasks, device, foundation) if tasks else {}
    known_in = parts if start is None else [*parts, start]
    names = [name for name in parts[0].matrices if _same_inputs(known_in, name)]
    overlaps = []
    products = dict.fromkeys(combinations(range(len(parts)), 2), 0.0)
    squares = [0.0] * len(parts)
    for done, name in enumerate(names, start=1):
        matrices = _matrices(parts, start, name, device)
        edges = None if start is None else _rounding_edges(parts, matrices, name)
        interference = measured.get(parts[0].matrices[name].module)
        overlaps.append(layer_overlap(layer_name(name), matrices, interference, edges))
        if len({matrix.shape for matrix in matrices}) == 1:
            for first, second in products:
                products[first, second] += float((matrices[first] * matrices[second]).sum())
            squares = [total + float(m.square().sum()) for total, m in zip(squares, matrices, strict=True)]
        if progress:
            progress("measure", done, len(names))
    norms = {pair: (squares[pair[0]] * squares[pair[1]]) ** 0.5 for pair in products}
    cosine = max(product / norms[pair] if norms[pair] > 0 else 0.0 for pair, product in products.items())
    return tuple(overlaps), cosine


def _same_inputs(parts: Sequence[Part], name: str) -> bool:
    return len({part.matrices[name].shape[1] if name in part.matrices else None for part in parts}) == 1


def _matrices(parts: Sequence[Part], start: Part | None, name: str, device: torch.device) -> list[Tensor]:
    """Each network's `d_out x d_in` matrix, or what was trained on top of the base, in float64."""
    matrices = [part.matrix(name).to(device) for part in parts]
    if start is None:
        return matrices
    before = start.matrix(name).to(device)
    return [matrix - before for matrix in matrices]


def _rounding_edges(parts: Sequence[Part], differences: Sequence[Tensor], name: str) -> list[float]:
    """The largest singular value that rounding has in each network's difference to the base; 0 for low-rank layers."""
    return [
        0.0
        if part.pair(name) is not None
        else rounding(part.matrix(name).to(part.infos[name].dtype), difference.cpu()).edge
        for part, difference in zip(parts, differences, strict=True)
    ]


def _first_layer_overlap(parts: Sequence[Part], start: Part | None, chain: Chain | None) -> InputOverlap | None:
    """What the first layers' row spaces let expect of the inputs, where it is known which layers are the first."""
    if chain is None:
        try:
            shapes = {name: info.shape for name, info in parts[0].infos.items()}
            chain = chain_of_shapes(shapes, parts[0].checkpoint.source)
        except BadInput:
            return None
    name = f"{chain.layers[0]}.weight".removeprefix(".")
    return row_space_overlap(_matrices(parts, start, name, torch.device("cpu")))


def _warnings(
    combination: Combination,
    mode: MergeMode,
    start: Part | None,
    overlaps: Sequence[LayerOverlap],
    cosine: float,
    factory: Factory | None,
) -> list[str]:
    parts = combination.parts
    if mode == "concat":
        assert combination.chain is not None
        warnings = [] if factory is not None else ["taken for a plain chain: " + " -> ".join(combination.chain.layers)]
        first = [layer for layer in overlaps if layer.name in combination.chain.first]
        return warnings + (interference_warning(first) if combination.head == "shared" else [])
    if start is not None:
        said = ["theory says nothing about the sum of fine-tunes: it is known to work often, from experiments"]
        return said + interference_warning(overlaps)
    recipes = [(part.name, part.model.recipe) for part in parts]
    return sum_warnings(len(parts[0].matrices), _is_linear(factory), recipes, cosine) + interference_warning(overlaps)


def _is_linear(factory: Factory | None) -> bool | None:
    if factory is None:
        return None
    try:
        return traced_chain(build_model(factory)).linear
    except BadInput:
        return None


class _Outputs(nn.Module):
    """Some of a network's outputs, those from `start` up to `stop`."""

    def __init__(self, network: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.network, self.start, self.stop = network, start, stop

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.network(x)
        return outputs[:, self.start : self.stop]


def _outputs_of(merged: nn.Module, combination: Combination, index: int) -> nn.Module:
    """The merged network as a task sees it whose outputs are separate from the others'."""
    assert combination.chain is not None
    name = f"{combination.chain.head}.weight".removeprefix(".")
    sizes = [part.infos[name].shape[0] for part in combination.parts]
    return _Outputs(merged, sum(sizes[:index]), sum(sizes[: index + 1]))


def _quality(
    part: Part, alone: nn.Module, merged: nn.Module, data: EvaluationData, device: torch.device
) -> TaskQuality:
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
        output_change=output_change(alone, merged, data, device),
    )


def _lost_too_much(tasks: Sequence[TaskQuality], max_drop: float | None) -> str | None:
    """Which task loses most, in words, if it loses more than is allowed."""
    if max_drop is None:
        return None
    worst = max(tasks, key=lambda task: task.drop)
    if worst.drop <= max_drop:
        return None
    return (
        f"{worst.data}: {worst.metric} {worst.merged:.4g} after merging and {worst.alone:.4g} alone, a drop of "
        f"{worst.drop:.4g} where at most {max_drop:g} was allowed; nothing was written"
    )
