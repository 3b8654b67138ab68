"""Walks the stages for a file, a folder or a module; the only place that knows them all."""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from compressor.calibration import Calibration, calibrate, held_back_divergence
from compressor.checkpoint import (
    Checkpoint,
    Layer,
    Skeleton,
    TensorInfo,
    check_output,
    find_layers,
    hidden_sibling,
    module_skeleton,
    open_checkpoint,
    output_folder,
    parse_size,
    refuse_fp8,
    require_finite,
    skeleton_mismatch,
    transformers_skeleton,
    write_json,
    write_state_dict_file,
)
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import (
    Cost,
    Evaluation,
    EvaluationData,
    build_model,
    compare,
    load_model,
    load_preprocessing,
    open_data,
    require_architecture,
    resolve_device,
)
from compressor.factorize import TiedMetric, tied_singular_values, weighted_singular_values
from compressor.measure import (
    effective_ranks,
    initial_standard_deviation,
    memory_window,
    singular_values,
    surviving_initialisation,
    uses_per_example,
)
from compressor.planning import (
    Budget,
    CalibrationResult,
    FormRequest,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    choose_ranks,
    default_budget,
    predicted_loss,
    read_plan,
    requested_budget,
    window_rule_advice,
)
from compressor.recipe import TrainingRecipe, find_recipe, merge, read_recipe
from compressor.results import BeforeAfter, Compression, InspectedLayer, Inspection, Restoration
from compressor.rewrite import (
    METADATA_KEY,
    PLAN_FILE,
    Rewriting,
    as_matrix,
    dense_infos,
    dense_tensors,
    describe_folder,
    file_metadata,
    file_record,
    rewritten_infos,
    rewritten_module,
    rewritten_tensors,
    stored_pairs,
    weight_file_bytes,
    write_weights,
)

# The exponents of the allocation, of which the one with the least loss on held-back data is kept.
ALLOCATION_POWERS = (1.0, 0.5, 0.0)

CostOrNone = TypeVar("CostOrNone", Cost, Cost | None)

logger = logging.getLogger(__name__)

Model = str | Path | nn.Module
Factory = str | Callable[[], nn.Module]
Split = Literal["train", "validation", "test"]

# Called with the name of the stage, how many layers of it are done, and how many there are.
Progress = Callable[[str, int, int], None]


def inspect(
    model: Model,
    *,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    epsilon: float = 0.1,
    device: str = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """Measure every matrix of a model: effective ranks, memory window, surviving initialisation.

    `model` is a weight file, a model folder or a module. `recipe` says how it was trained where the files beside it do
    not, as a `TrainingRecipe` or the path of a file. `factory` builds the model's architecture, for weights that are
    not a transformers model's. `embeddings` has these measured too. `epsilon` is the share of a matrix that the memory
    window may leave out.

    Raises `BadInput` for a model, recipe or pattern that cannot be used.
    """
    if not 0 < epsilon < 1:
        raise BadInput(f"epsilon {epsilon:g} is out of range", remedy="give a number between 0 and 1")
    subject = _open(model, recipe, recipe_file, factory, include, exclude, embeddings)
    inspected = _inspect(subject, epsilon, resolve_device(device), progress)
    return Inspection(
        source=subject.name,
        recipe=subject.recipe,
        layers=inspected,
        parameters=_elements(subject.checkpoint.tensors.values()),
        weight_bytes=subject.checkpoint.weight_bytes,
        advice=window_rule_advice(_measured(subject, inspected), subject.recipe.family, "auto"),
    )


def plan(
    model: Model,
    *,
    keep: float | None = None,
    max_size: int | str | None = None,
    tolerance: float | None = None,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    calibration_samples: int = 128,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    form: FormRequest = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Plan:
    """The ranks that `compress` would choose, and why, without the work; raises what `compress` raises."""
    return compress(
        model,
        keep=keep,
        max_size=max_size,
        tolerance=tolerance,
        recipe=recipe,
        recipe_file=recipe_file,
        factory=factory,
        calibration=calibration,
        calibration_samples=calibration_samples,
        seed=seed,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        form=form,
        device=device,
        dry_run=True,
        progress=progress,
    ).plan


def compress(
    model: Model,
    *,
    output: str | Path | None = None,
    keep: float | None = None,
    max_size: int | str | None = None,
    tolerance: float | None = None,
    plan: Plan | str | Path | None = None,
    recipe: TrainingRecipe | str | Path | None = None,
    recipe_file: str | Path | None = None,
    factory: Factory | None = None,
    data: str | Path | None = None,
    data_samples: int | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    calibration_samples: int = 128,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    form: FormRequest = "auto",
    max_shard_size: int | str = "5GB",
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compression:
    """Make a trained model smaller: measure, plan, factorize, rewrite, and evaluate on `data` where it is given.

    Of the data at most `data_samples` examples are used, evenly spaced; all by default. With `embeddings` these are
    among the eligible layers, each together with an output head that is tied to it.

    At most one of `keep` (fraction of the eligible parameters), `max_size` (bytes of the weight files), `tolerance`
    (relative error per layer) and `plan`; with none of them the window rule where the recipe is of the SGD family,
    else a tolerance that is safe without data. `calibration` is data, or an iterable of batches, by which ranks and
    factors are chosen so that the loss notices least: at most `calibration_samples` of its examples, a quarter of them
    held back to choose between allocations; `seed` draws the targets. A file gives a safetensors file and a folder a
    folder, at `output` or as `NAME-compressed` beside the input; a module gives `Compression.model` and is itself left
    as it is. Nothing is written in a `dry_run`. The same input gives the same bytes.

    Raises `BadInput` for a request or input that is bad and `QualityGateNotMet` when nothing was asked and nothing can
    be removed safely; no output is left behind.
    """
    started = time.monotonic()
    budget = _requested(keep, max_size, tolerance, plan, form)
    subject = _open(model, recipe, recipe_file, factory, include, exclude, embeddings)
    checkpoint = subject.checkpoint
    target = _checked_target(checkpoint, output, dry_run=dry_run, overwrite=overwrite)
    if (data is not None or calibration is not None) and not isinstance(model, nn.Module):
        require_architecture(checkpoint, factory)
    if calibration is not None and plan is None and (budget is None or budget.kind == "tolerance"):
        raise BadInput(
            "calibration shares a size among the layers, and none was asked for",
            remedy="ask for one with --keep or --max-size, or give a --plan",
        )
    where = resolve_device(device)
    evaluated = None if data is None else _evaluation_data(data, checkpoint, "test", data_samples)
    samples = _calibration_data(calibration, subject, calibration_samples)
    shard_size = _in_bytes(max_shard_size)

    inspected = _inspect(subject, 0.1, where, progress)
    measured = _measured(subject, inspected)
    if not measured:
        raise BadInput(
            "no layer of this model is eligible",
            where=subject.name,
            remedy="see why with 'compress inspect MODEL', and widen --include or narrow --exclude",
        )
    calibrated = None
    if samples is not None:
        layers = [m.layer for m in measured]
        calibrated = calibrate(load_model(model, factory), layers, samples, device=where, seed=seed)
        measured = _weighted(measured, calibrated, subject, where)
    chosen = _plan(subject, measured, budget, plan, form, shard_size, calibrated, where)
    if budget is None and all(layer.rank is None for layer in chosen.layers):
        raise QualityGateNotMet(
            f"{subject.name}: nothing can be removed safely ({chosen.budget}); ask for a size with --keep 0.8, or for a"
            " larger --tolerance"
        )

    metrics = {} if calibrated is None else calibrated.metrics
    rewriting = Rewriting(checkpoint, subject.recipe, subject.layers, chosen, metrics)
    infos = rewritten_infos(rewriting)
    after_bytes = weight_file_bytes(rewriting, shard_size)
    errors: dict[str, float] = {}

    def done(name: str, error: float) -> None:
        errors[name] = error
        if progress:
            progress("factorize", len(errors), len(rewriting.factorized))

    compressed, evaluation = None, None
    if isinstance(model, nn.Module) and not dry_run:
        compressed = rewritten_module(rewriting, model, where, done)
        if evaluated is not None:
            evaluation = _evaluate(model, compressed, evaluated, factory, where, progress)
    if target is not None:
        check_output(target, source=checkpoint, form=_form(checkpoint), overwrite=overwrite, needed_bytes=after_bytes)
        tensors = rewritten_tensors(rewriting, where, done)
        with _staged(target, checkpoint, overwrite) as staged:
            write_weights(staged, infos, tensors, file_metadata(rewriting), _shards(checkpoint, shard_size))
            if checkpoint.folder is not None:
                describe_folder(staged, rewriting)
            if evaluated is not None:
                evaluation = _evaluate(model, staged, evaluated, factory, where, progress)
    return Compression(
        source=subject.name,
        output=None if target is None else str(target),
        recipe=subject.recipe,
        plan=replace(chosen, layers=tuple(replace(p, error=errors.get(p.name, p.error)) for p in chosen.layers)),
        parameters=BeforeAfter(_elements(checkpoint.tensors.values()), _elements(infos)),
        bytes=BeforeAfter(checkpoint.weight_bytes, after_bytes),
        evaluation=evaluation,
        seconds=time.monotonic() - started,
        peak_memory_bytes=_peak_memory_bytes(),
        skipped=tuple(layer for layer in subject.layers if not layer.eligible),
        spectra={m.layer.name: m.singular_values for m in measured},
        model=compressed,
    )


def evaluate(
    model: Model,
    *,
    data: str | Path,
    data_samples: int | None = None,
    baseline: Model | None = None,
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
    where = resolve_device(device)
    evaluated = _evaluation_data(data, open_checkpoint(model), split, data_samples)
    return _evaluate(baseline, model, evaluated, factory, where, progress)


def restore(
    model: str | Path,
    *,
    output: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Restoration:
    """Multiply the factors of a compressed checkpoint back to dense weights that its original code loads.

    A folder gives a folder; a file gives safetensors, or a torch state dict where `output` is named like one (.pt,
    .pth, .bin, .th, .ckpt). Raises `BadInput` when the model is not a compressed one, or the output cannot be written.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(model)
    skeleton = _skeleton(checkpoint, None)
    pairs = stored_pairs(checkpoint, skeleton)
    if not pairs:
        raise BadInput(
            "holds no low-rank layer", where=checkpoint.source, remedy="give a checkpoint that 'compress MODEL' wrote"
        )
    target = _target(checkpoint, output, suffix="-restored", torch_files=True)
    planned = {name: info for name, (info, _) in dense_infos(checkpoint, pairs).items()}
    aliases = {
        alias: name
        for alias, name in _mapping(file_record(checkpoint).get("aliases")).items()
        if name in planned and alias not in planned
    }
    infos = [*planned.values(), *(replace(planned[name], name=alias) for alias, name in aliases.items())]
    check_output(
        target,
        source=checkpoint,
        form=_form(checkpoint),
        overwrite=overwrite,
        needed_bytes=sum(info.nbytes for info in infos),
    )
    shard_size = _in_bytes(max_shard_size)
    copies: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        copies.setdefault(name, []).append(alias)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(dense_tensors(checkpoint, pairs), start=1):
            yield name, tensor
            for alias in copies.get(name, ()):
                yield alias, tensor
            if progress:
                progress("restore", done, len(planned))

    metadata = {key: text for key, text in checkpoint.metadata.items() if key != METADATA_KEY}
    with _staged(target, checkpoint, overwrite) as staged:
        if checkpoint.folder is not None or target.suffix == ".safetensors":
            shards = _shards(checkpoint, shard_size)
            write_weights(staged, infos, tensors(), {"format": "pt"} | metadata, shards)
        else:
            write_state_dict_file(staged, dict(tensors()))
        if checkpoint.folder is not None:
            config = {key: value for key, value in (checkpoint.config or {}).items() if key != "quantization_config"}
            write_json(staged / "config.json", config)
            (staged / PLAN_FILE).unlink(missing_ok=True)
        after_bytes = open_checkpoint(staged).weight_bytes
    return Restoration(
        source=str(checkpoint.source),
        output=str(target),
        layers=tuple(pairs),
        bytes=BeforeAfter(checkpoint.weight_bytes, after_bytes),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Subject:
    """An opened model with what is known about it."""

    name: str
    checkpoint: Checkpoint
    skeleton: Skeleton | None
    layers: tuple[Layer, ...]
    recipe: TrainingRecipe


def _open(
    model: Model,
    recipe: TrainingRecipe | str | Path | None,
    recipe_file: str | Path | None,
    factory: Factory | None,
    include: Sequence[str],
    exclude: Sequence[str],
    embeddings: bool,
) -> _Subject:
    checkpoint = open_checkpoint(model)
    refuse_fp8(checkpoint)
    if isinstance(recipe, str | Path):
        recipe, recipe_file = None, recipe
    if checkpoint.source is not None:
        known = find_recipe(checkpoint.source, flags=recipe, recipe_file=recipe_file)
    else:
        known = merge(*filter(None, (recipe, read_recipe(recipe_file) if recipe_file is not None else None)))
    skeleton = module_skeleton(model) if isinstance(model, nn.Module) else _skeleton(checkpoint, factory)
    quantized = (checkpoint.config or {}).get("quantization_config")
    if quantized is not None and _mapping(quantized).get("quant_method") != METADATA_KEY:
        raise BadInput(
            f"is quantized already ({_mapping(quantized).get('quant_method', 'by an unknown method')})",
            where=checkpoint.source,
            remedy="compress the original, and quantize the result",
        )
    if stored_pairs(checkpoint, skeleton):
        raise BadInput(
            "is compressed already",
            where=checkpoint.source,
            remedy="give the original, or bring it back with 'compress restore MODEL'",
        )
    skeleton = _fitting(checkpoint, skeleton, factory)
    layers = find_layers(checkpoint, skeleton, include=include, exclude=exclude, embeddings=embeddings)
    if known.optimizer is not None and known.family is None:
        logger.warning("nothing is known about what the optimizer %r forgets", known.optimizer)
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    return _Subject(name, checkpoint, skeleton, layers, known)


def _skeleton(checkpoint: Checkpoint, factory: Factory | None) -> Skeleton | None:
    """The module tree behind a checkpoint, from the user's own code or from transformers, if there is one."""
    if factory is not None:
        return module_skeleton(build_model(factory), untrained=True)
    if checkpoint.config is None or checkpoint.source is None:
        return None
    return transformers_skeleton(_folder_of(checkpoint))


def _fitting(checkpoint: Checkpoint, skeleton: Skeleton | None, factory: Factory | None) -> Skeleton | None:
    """The skeleton, if it is that of the checkpoint; BadInput where it ought to be."""
    if skeleton is None or (mismatch := skeleton_mismatch(checkpoint, skeleton)) is None:
        return skeleton
    if factory is not None:
        raise BadInput(
            f"the model that --model builds does not fit: {mismatch}",
            where=checkpoint.source,
            remedy="use the function that builds the model that was trained",
        )
    if checkpoint.folder is not None:
        raise BadInput(
            f"config.json does not belong to these weights: {mismatch}",
            where=checkpoint.source,
            remedy="put the model's own config.json there",
        )
    logger.warning("the config.json beside %s belongs to another model and is not used", checkpoint.source)
    return None


def _folder_of(checkpoint: Checkpoint) -> Path:
    assert checkpoint.source is not None
    return checkpoint.folder or checkpoint.source.parent


def _form(checkpoint: Checkpoint) -> Literal["file", "folder"]:
    return "folder" if checkpoint.folder is not None else "file"


def _checked_target(
    checkpoint: Checkpoint, output: str | Path | None, *, dry_run: bool, overwrite: bool
) -> Path | None:
    """Where the result goes, known to be writable before any work is done; None where nothing is written."""
    if checkpoint.source is None and output is not None:
        raise BadInput("a module is compressed in memory", remedy="leave out the output, and save Compression.model")
    if dry_run or checkpoint.source is None:
        return None
    target = _target(checkpoint, output)
    check_output(target, source=checkpoint, form=_form(checkpoint), overwrite=overwrite)
    return target


def _shards(checkpoint: Checkpoint, shard_size: int) -> int | None:
    return shard_size if checkpoint.folder is not None else None


def _target(
    checkpoint: Checkpoint, output: str | Path | None, *, suffix: str = "-compressed", torch_files: bool = False
) -> Path:
    """Where the result goes: as asked, or beside the input under its name and the suffix."""
    source = checkpoint.source
    assert source is not None
    if checkpoint.folder is not None:
        place = Path(os.path.abspath(source))  # noqa: PTH100 - a link is not followed, so the output is beside it
        return Path(output) if output is not None else place.with_name(place.name + suffix)
    if output is None:
        stem = source.name.removesuffix(".index.json")
        return source.with_name(Path(stem).stem + suffix + ".safetensors")
    allowed = (".safetensors", ".pt", ".pth", ".bin", ".th", ".ckpt") if torch_files else (".safetensors",)
    if Path(output).suffix not in allowed:
        raise BadInput("a file is written as safetensors", where=output, remedy=f"name it with {' or '.join(allowed)}")
    return Path(output)


def _requested(
    keep: float | None,
    max_size: int | str | None,
    tolerance: float | None,
    plan: Plan | str | Path | None,
    form: FormRequest,
) -> Budget | None:
    size = None if max_size is None else _in_bytes(max_size)
    budget = requested_budget(keep=keep, max_size=size, tolerance=tolerance)
    if plan is None:
        return budget
    if form != "auto":
        raise BadInput(f"--plan and --form {form} contradict each other", remedy="state the forms in the plan")
    if budget is not None:
        raise BadInput(f"--plan and --{budget.kind} are two budgets", remedy="ask for one of them")
    return Budget("plan")


def _inspect(
    subject: _Subject, epsilon: float, device: torch.device, progress: Progress | None
) -> tuple[InspectedLayer, ...]:
    """Read every eligible layer once, and measure it."""
    recipe, skeleton = subject.recipe, subject.skeleton
    folder = None if subject.checkpoint.source is None else _folder_of(subject.checkpoint)
    uses = uses_per_example(subject.layers, skeleton, folder, recipe.sequence_length)
    eligible = [layer for layer in subject.layers if layer.eligible]
    inspected: dict[str, InspectedLayer] = {}
    for done, layer in enumerate(eligible, start=1):
        weight = subject.checkpoint.read(layer.tensor)
        require_finite(layer.tensor, weight, subject.checkpoint.source)
        values = singular_values(as_matrix(layer, weight.to(device)))
        del weight
        decayed = recipe.decays(layer.tensor) is not False
        inspected[layer.name] = InspectedLayer(
            layer=layer,
            uses=uses[layer.name],
            ranks=effective_ranks(values),
            window=memory_window(recipe, shape=layer.shape, uses=uses[layer.name], decayed=decayed, epsilon=epsilon),
            initialisation=surviving_initialisation(
                recipe, layer.shape, values, init_std=initial_standard_deviation(layer, skeleton), decayed=decayed
            ),
            singular_values=tuple(values.tolist()),
        )
        if progress:
            progress("measure", done, len(eligible))
    return tuple(inspected.get(layer.name, InspectedLayer(layer)) for layer in subject.layers)


def _measured(subject: _Subject, inspected: Sequence[InspectedLayer]) -> list[MeasuredLayer]:
    measured = []
    for each in inspected:
        if each.singular_values is None or each.window is None or each.initialisation is None:
            continue
        window = each.window
        measured.append(
            MeasuredLayer(
                layer=each.layer,
                singular_values=np.array(each.singular_values),
                itemsize=subject.checkpoint.tensors[each.layer.tensor].dtype.itemsize,
                precision=torch.finfo(subject.checkpoint.tensors[each.layer.tensor].dtype).eps,
                above_edge=each.initialisation.above_edge,
                surviving_share=each.initialisation.share,
                unknown_start=each.initialisation.reason,
                rank_bound=window.rank_bound if window.vacuous is False else None,
            )
        )
    return measured


def _plan(
    subject: _Subject,
    measured: Sequence[MeasuredLayer],
    budget: Budget | None,
    given: Plan | str | Path | None,
    form: FormRequest,
    shard_size: int,
    calibrated: Calibration | None,
    device: torch.device,
) -> Plan:
    checkpoint = subject.checkpoint
    digest = checkpoint.digest() if checkpoint.source is not None else None
    if given is not None:
        edited = given if isinstance(given, Plan) else read_plan(Path(given))
        where = "the plan" if isinstance(given, Plan) else str(given)
        layers = apply_edits(edited, measured, where)
        if edited.digest is not None and digest is not None and edited.digest != digest:
            logger.warning("the plan was made for other weights than those of %s", subject.name)
        if (edited.calibrated or edited.calibration is not None) and calibrated is None:
            logger.warning("the plan was made with calibration data: pass them too, for factors as good as its ranks")
        applied = Plan(subject.name, digest, Budget("plan"), layers)
        return applied if calibrated is None else _measured_plan(subject, measured, applied, calibrated, device)
    chosen = budget or default_budget(measured, subject.recipe.family)

    def file_bytes(layers: tuple[LayerPlan, ...]) -> int:
        plan = Plan(subject.name, digest, chosen, layers)
        return weight_file_bytes(Rewriting(checkpoint, subject.recipe, subject.layers, plan), shard_size)

    advice = None if budget else window_rule_advice(measured, subject.recipe.family, form)
    if calibrated is None:
        layers = choose_ranks(measured, chosen, form, file_bytes)
        return Plan(subject.name, digest, chosen, layers, advice)
    candidates = []
    for power in ALLOCATION_POWERS:
        layers = choose_ranks(measured, chosen, form, file_bytes, power)
        candidate = Plan(subject.name, digest, chosen, layers, advice)
        candidates.append(_measured_plan(subject, measured, candidate, calibrated, device, power))
    return min(candidates, key=_held_back_loss)


def _held_back_loss(plan: Plan) -> float:
    assert plan.calibration is not None
    return plan.calibration.held_back_loss


def _measured_plan(
    subject: _Subject,
    measured: Sequence[MeasuredLayer],
    plan: Plan,
    calibrated: Calibration,
    device: torch.device,
    power: float | None = None,
) -> Plan:
    """The plan with what it is predicted to cost, and what it costs on the calibration data held back."""
    rewriting = Rewriting(subject.checkpoint, subject.recipe, subject.layers, plan, calibrated.metrics)
    compressed = rewritten_module(rewriting, calibrated.model, device, lambda _name, _error: None)
    loss = held_back_divergence(calibrated, compressed, device)
    if not math.isfinite(loss):
        raise BadInput(
            "the compressed model's predictions on the calibration data are not finite",
            where=subject.name,
            remedy="keep more, or use the model in a wider dtype",
        )
    logger.info("allocation power %s: %.5f nats per prediction on the data held back", power, loss)
    result = CalibrationResult(
        examples=calibrated.examples,
        held_back=calibrated.held_back_examples,
        power=power,
        predicted_loss=predicted_loss(measured, plan.layers),
        held_back_loss=loss,
    )
    return replace(plan, calibration=result)


def _calibration_data(
    calibration: str | Path | Iterable[Any] | None, subject: _Subject, samples: int
) -> EvaluationData | Iterable[Any] | None:
    if not isinstance(calibration, str | Path):
        return calibration
    return _evaluation_data(calibration, subject.checkpoint, "train", samples)


def _weighted(
    measured: Sequence[MeasuredLayer], calibrated: Calibration, subject: _Subject, device: torch.device
) -> list[MeasuredLayer]:
    """The layers with their singular values in the metric of the loss; what calibration did not reach stays dense."""
    weighted = []
    for m in measured:
        if m.layer.name not in calibrated.metrics:
            weighted.append(replace(m, stays_dense="no calibration example reached it"))
            continue
        matrix = as_matrix(m.layer, subject.checkpoint.read(m.layer.tensor).to(device))
        metric = calibrated.metrics[m.layer.name]
        if isinstance(metric, TiedMetric):
            values = tied_singular_values(matrix, metric)
        else:
            values = weighted_singular_values(matrix, metric)
        weighted.append(replace(m, weighted_values=values, uses=calibrated.uses[m.layer.name]))
    return weighted


@contextmanager
def _staged(target: Path, checkpoint: Checkpoint, overwrite: bool) -> Iterator[Path]:
    """A place to write to that becomes `target` when the block ends well, and leaves no trace when it does not."""
    if checkpoint.folder is not None:
        with output_folder(target, copy_from=checkpoint.folder, overwrite=overwrite) as folder:
            yield folder
        return
    staged = hidden_sibling(target).with_suffix(target.suffix)
    try:
        yield staged
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def _evaluation_data(
    data: str | Path,
    checkpoint: Checkpoint,
    split: Split,
    limit: int | None = None,
) -> EvaluationData:
    """The data prepared as the model's folder says, or as it is where the folder says nothing."""
    if checkpoint.source is None or checkpoint.config is None:
        return open_data(data, split=split, limit=limit)
    prepared = load_preprocessing(_folder_of(checkpoint))
    return open_data(
        data,
        split=split,
        tokenizer=prepared.tokenizer,
        image_processor=prepared.image_processor,
        classes=prepared.classes,
        sequence_length=prepared.sequence_length,
        limit=limit,
    )


def _evaluate(
    baseline: Model | None,
    model: Model,
    data: EvaluationData,
    factory: Factory | None,
    device: torch.device,
    progress: Progress | None,
) -> Evaluation:
    if progress:
        progress("evaluate", 0, 1)
    reference = None if baseline is None else load_model(baseline, factory)
    evaluation = compare(reference, load_model(model, factory), data, device=device)
    evaluation = replace(
        evaluation,
        baseline_cost=_on_disk(evaluation.baseline_cost, baseline),
        compressed_cost=_on_disk(evaluation.compressed_cost, model),
    )
    if progress:
        progress("evaluate", 1, 1)
    return evaluation


def _on_disk(cost: CostOrNone, model: Model | None) -> CostOrNone:
    """The cost with the size of the weight files, where the model came from files."""
    if cost is None or model is None or isinstance(model, nn.Module):
        return cost
    return replace(cost, bytes=open_checkpoint(model).weight_bytes)


def _in_bytes(size: int | str) -> int:
    return parse_size(size) if isinstance(size, str) else size


def _mapping(value: object) -> dict[str, str]:
    """A mapping of names read from a file, {} if it is none."""
    entries = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in entries if isinstance(key, str) and isinstance(text, str)}


def _elements(infos: Iterable[TensorInfo]) -> int:
    return sum(info.elements for info in infos)


def _peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
