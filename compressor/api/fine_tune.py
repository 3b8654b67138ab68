"""A fine-tune compressed as what it adds to its base: compare, measure, plan, and write an adapter or pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from compressor.documents import read_text
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import Evaluation
from compressor.fine_tuning.adaptation import (
    Adaptation,
    adaptation_metadata,
    adapted_module,
    pair_file_infos,
    pair_file_tensors,
)
from compressor.fine_tuning.adapter import (
    ADAPTER_WEIGHTS,
    UNCHANGED,
    Adapter,
    adaptable_layers,
    adapter_of,
    adapter_tensors,
    require_pairs,
    vllm_obstacles,
    vllm_rank,
)
from compressor.fine_tuning.difference import Difference, compare_checkpoints, share_left
from compressor.fine_tuning.mixture import expert_blocks, with_common_ranks
from compressor.fine_tuning.verification import verify_with_peft
from compressor.io import (
    ADAPTER_CONFIG,
    PLAN_FILE,
    Checkpoint,
    TensorInfo,
    check_output,
    hub_model,
    open_checkpoint,
    portable_name,
    safetensors_size,
    staged_file,
    staged_folder,
    write_json,
)
from compressor.io.destination import target_of
from compressor.lowrank import write_weights
from compressor.measure import EPSILON
from compressor.model import (
    Factory,
    InspectedLayer,
    Model,
    ModelLike,
    inspect_layers,
    load_model,
    measured_layers,
    open_model,
)
from compressor.network import Layer, module_architecture, with_ties
from compressor.planning import (
    Budget,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    choose_ranks,
    default_budget,
    is_worthwhile,
    read_plan,
)
from compressor.progress import Progress
from compressor.recipe import TrainingRecipe
from compressor.report.fine_tune_card import adapter_card
from compressor.report.model_card import CARD_FILE
from compressor.results import BeforeAfter, Compression, FineTune

Kind = Literal["adapter", "pairs", "module"]


def compress_fine_tune(
    model: ModelLike,
    base: ModelLike,
    *,
    output: str | Path | None,
    budget: Budget | None,
    plan: Plan | str | Path | None,
    recipe: TrainingRecipe | str | Path | None,
    recipe_file: str | Path | None,
    factory: Factory | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: torch.device,
    dry_run: bool,
    overwrite: bool,
    progress: Progress | None,
    evaluated: Callable[[nn.Module], Evaluation] | None,
) -> Compression:
    """Compress the difference of a fine-tune to its base; the parameters are those of `compress`.

    A folder gives a LoRA adapter folder, or a file of pairs where the output is named .safetensors; a file gives a file
    of pairs; a module gives a copy of the base with pairs beside its layers. `evaluated` measures such a module.
    """
    started = time.monotonic()
    if isinstance(model, nn.Module) != isinstance(base, nn.Module):
        raise BadInput("a module and files cannot be compared", remedy="give both as modules, or both as files")
    subject = open_model(model, recipe, recipe_file, factory, include, exclude)
    subject = replace(subject, checkpoint=with_ties(subject.checkpoint, subject.architecture))
    start = with_ties(open_checkpoint(base), subject.architecture)
    kind = _kind(subject, output)
    target = None if dry_run else _checked_target(subject, start.source, output, kind, overwrite=overwrite)
    # PEFT adds to all of the base.
    difference = compare_checkpoints(subject.checkpoint, start, None if kind == "adapter" else subject.recipe, progress)
    layers = tuple(_layer(layer, difference) for layer in subject.layers)
    if kind == "adapter":
        layers = adaptable_layers(difference, subject.architecture, layers)
    changes = replace(subject, checkpoint=difference.checkpoint, layers=layers)
    inspected = inspect_layers(changes, EPSILON, device, progress)
    measured = measured_differences(changes, inspected, difference)
    if not measured:
        raise BadInput(
            "no layer that changed is eligible",
            where=subject.name,
            remedy="see why with 'compress inspect MODEL', and widen `include` or narrow `exclude`",
        )
    digests = [each.digest() if each.source is not None else None for each in (subject.checkpoint, start)]
    form = _Form(kind, subject, portable_name(_called(base, start)), difference, layers, _advice(inspected), *digests)

    blocks = (
        expert_blocks(subject.architecture.module) if kind == "adapter" and subject.architecture is not None else ()
    )

    def with_budget(planned: tuple[LayerPlan, ...], of: Budget) -> tuple[LayerPlan, ...]:
        return with_common_ranks(planned, measured, layers, blocks, of) if plan is None else planned

    def file_bytes(planned: tuple[LayerPlan, ...]) -> int:
        asked = budget or Budget("plan")
        return form.stored(form.adaptation(with_budget(planned, asked), asked)).bytes

    chosen, planned = _planned(measured, budget, plan, subject, file_bytes)
    planned = with_budget(planned, chosen)
    if budget is None and plan is None and all(layer.rank is None for layer in planned):
        raise QualityGateNotMet(
            f"{subject.name}: no layer's difference can be made smaller safely ({chosen}); ask for a size with"
            " `keep=0.2`, or for a larger `tolerance`"
        )
    adaptation = form.adaptation(planned, chosen)
    stored = form.stored(adaptation)
    if budget is None and plan is None and not is_worthwhile(stored.bytes, subject.checkpoint.weight_bytes):
        raise QualityGateNotMet(
            f"{subject.name}: what was added to the base would take nearly as much as the fine-tune itself ({chosen});"
            " ask for a size with `keep=0.2`, or for a larger `tolerance`"
        )
    if stored.adapter is not None:
        require_pairs(stored.adapter)
    errors: dict[str, float] = {}

    def done(name: str, error: float) -> None:
        errors[name] = error
        if progress:
            progress("factorize", len(errors), len(adaptation.paired))

    module, evaluation = None, None
    if not dry_run and (kind == "module" or evaluated is not None):
        dense = load_model(base, factory)
        names = subject.architecture or module_architecture(dense)
        module = adapted_module(adaptation, dense, device, done, names.module_name)
        evaluation = None if evaluated is None else evaluated(module)
    verified = None
    if target is not None:
        verified = _write(target, adaptation, stored, device, done, overwrite=overwrite)
    tuned = subject.checkpoint
    by = adaptation.plan
    return Compression(
        source=subject.name,
        output=None if target is None else str(target),
        recipe=subject.recipe,
        plan=replace(by, layers=tuple(replace(p, error=errors.get(p.name, p.error)) for p in by.layers)),
        parameters=BeforeAfter(
            sum(info.elements for info in tuned.tensors.values()), sum(info.elements for info in stored.infos)
        ),
        bytes=BeforeAfter(tuned.weight_bytes, stored.bytes),
        evaluation=evaluation,
        seconds=time.monotonic() - started,
        peak_memory_bytes=0,
        skipped=tuple(layer for layer in layers if not layer.eligible),
        spectra={m.layer.name: m.singular_values for m in measured},
        model=module if kind == "module" else None,
        fine_tune=_fine_tune(adaptation, stored, _called(base, start), verified),
    )


@dataclass(frozen=True)
class _Stored:
    """What is stored for an adaptation; an adapter where it is one."""

    adapter: Adapter | None
    infos: Sequence[TensorInfo]
    bytes: int


@dataclass(frozen=True)
class _Form:
    """All that is known before the ranks: what they become is the same for every plan that is tried."""

    kind: Kind
    subject: Model
    base_name: str
    difference: Difference
    layers: tuple[Layer, ...]
    advice: str | None
    digest: str | None
    base_digest: str | None

    def adaptation(self, planned: tuple[LayerPlan, ...], budget: Budget) -> Adaptation:
        by = Plan(self.subject.name, self.digest, budget, planned, self.advice)
        return Adaptation(self.difference, self.layers, by, self.subject.recipe, self.base_digest)

    def stored(self, adaptation: Adaptation) -> _Stored:
        if self.kind == "adapter":
            adapter = adapter_of(adaptation, self.subject.architecture, self.base_name)
            infos = adapter.infos
            return _Stored(adapter, infos, safetensors_size(infos, adaptation_metadata(adaptation)))
        infos = pair_file_infos(adaptation)
        if self.kind == "module":
            return _Stored(None, infos, sum(info.nbytes for info in infos))
        return _Stored(None, infos, safetensors_size(infos, adaptation_metadata(adaptation)))


def _write(
    target: Path,
    adaptation: Adaptation,
    stored: _Stored,
    device: torch.device,
    done: Callable[[str, float], None],
    *,
    overwrite: bool,
) -> str | None:
    """Write what is stored; the version of PEFT that an adapter was tried with."""
    if stored.adapter is not None:
        return write_adapter(target, stored.adapter, device, done, overwrite=overwrite)
    with staged_file(target, overwrite=overwrite) as staged:
        tensors = pair_file_tensors(adaptation, device, done)
        write_weights(staged, stored.infos, tensors, adaptation_metadata(adaptation), None)
    return None


def write_adapter(
    target: Path, adapter: Adapter, device: torch.device, done: Callable[[str, float], None], *, overwrite: bool
) -> str | None:
    """Write the folder of an adapter with its card, complete or not at all; the version of PEFT that it was tried with.

    None where PEFT is not installed. Raises `BadInput` where PEFT does not make of the folder what it stands for.
    """
    adaptation = adapter.adaptation
    errors: dict[str, float] = {}

    def noted(name: str, error: float) -> None:
        errors[name] = error
        done(name, error)

    with staged_folder(target, overwrite=overwrite) as folder:
        tensors = adapter_tensors(adapter, device, noted)
        write_weights(folder / ADAPTER_WEIGHTS, adapter.infos, tensors, adaptation_metadata(adaptation), None)
        write_json(folder / ADAPTER_CONFIG, adapter.config)
        write_json(folder / PLAN_FILE, adaptation.plan.portable().to_dict() | {"recipe": adaptation.recipe.to_dict()})
        verified = verify_with_peft(folder, adapter)
        card = _adapter_card(target.name, adapter, (folder / ADAPTER_WEIGHTS).stat().st_size, errors, verified)
        (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
    return verified


def _adapter_card(
    name: str, adapter: Adapter, after_bytes: int, errors: Mapping[str, float], verified: str | None
) -> str:
    adaptation, obstacles = adapter.adaptation, vllm_obstacles(adapter)
    tuned, base = adaptation.difference.tuned, adaptation.difference.base
    # Put together from pairs the fine-tune has no card, and its other files are the base's.
    own = None if tuned.folder is None or tuned.folder == base.folder else tuned.folder / CARD_FILE
    return adapter_card(
        name=name,
        base=base.name,
        revision=adapter.config["revision"],
        tuned=(adaptation.stored or tuned).name,
        config=base.config,
        original=read_text(own) if own is not None and own.is_file() else "",
        sizes=BeforeAfter(tuned.weight_bytes, after_bytes),
        rounding_share=adaptation.difference.rounding_share(layer.tensor for layer, _ in adaptation.paired),
        base_bytes=base.weight_bytes,
        layers=[replace(plan, error=errors.get(layer.name, plan.error)) for layer, plan in adaptation.paired],
        saved=adapter.saved.modules,
        peft=_peft_words(adapter, verified),
        vllm=f"vLLM refuses {' and '.join(obstacles)}."
        if obstacles
        else f"vLLM takes it with `--enable-lora --max-lora-rank {vllm_rank(adapter)}`.",
    )


def _peft_words(adapter: Adapter, verified: str | None) -> str:
    """Whether PEFT was tried with the adapter, and what of its warnings is to be known."""
    if verified is None:
        words = "It was written without being loaded by PEFT, which was not installed."
    else:
        words = f"PEFT {verified} loaded it before it was written, and made each of these changes of the base."
    if adapter.config["target_parameters"] and adapter.config["rank_pattern"]:
        words += " PEFT may warn that rank patterns match no module: they match parameters, and it follows them."
    return words


def _called(base: ModelLike, start: Checkpoint) -> str:
    """What a base is called: as it was given, or by its name on the hub."""
    if isinstance(base, nn.Module):
        return type(base).__name__
    return start.name if start.folder is not None and hub_model(start.folder) is not None else str(base)


def _fine_tune(adaptation: Adaptation, stored: _Stored, base: str, verified: str | None) -> FineTune:
    difference, adapter = adaptation.difference, stored.adapter
    return FineTune(
        base=base,
        base_bytes=difference.base.weight_bytes,
        written_as="LoRA adapter" if adapter is not None else "factor pairs",
        unchanged=len(difference.tuned.tensors) - len(difference.changed),
        in_full=adaptation.in_full if adapter is None else tuple(adapter.saved.tensors.values()),
        max_lora_rank=None if adapter is None else vllm_rank(adapter),
        vllm_obstacles=() if adapter is None else vllm_obstacles(adapter),
        verified_with=verified,
        rounding_share=difference.rounding_share(layer.tensor for layer, _ in adaptation.paired),
    )


def _kind(subject: Model, output: str | Path | None) -> Kind:
    if subject.checkpoint.source is None:
        return "module"
    as_file = output is not None and Path(output).suffix == ".safetensors"
    return "pairs" if as_file or subject.checkpoint.folder is None else "adapter"


def _checked_target(
    subject: Model, base: Path | None, output: str | Path | None, kind: Kind, *, overwrite: bool
) -> Path | None:
    if kind == "module":
        if output is not None:
            raise BadInput(
                "a module is compressed in memory", remedy="leave out the output, and save Compression.model"
            )
        return None
    suffix = "-adapter" if kind == "adapter" else "-difference"
    as_folder = kind == "adapter" or output is not None
    target = Path(output) if output is not None and as_folder else target_of(subject.checkpoint, output, suffix=suffix)
    if kind == "pairs" and target.suffix != ".safetensors":
        raise BadInput("a file is written as safetensors", where=target, remedy="name it with .safetensors")
    for source in (subject.checkpoint, base):
        form: Literal["file", "folder"] = "folder" if kind == "adapter" else "file"
        check_output(target, source=source, form=form, overwrite=overwrite)
    return target


def _layer(layer: Layer, difference: Difference) -> Layer:
    return layer if layer.tensor in difference.changed else replace(layer, skip=layer.skip or UNCHANGED)


def measured_differences(
    subject: Model, inspected: tuple[InspectedLayer, ...], difference: Difference
) -> list[MeasuredLayer]:
    """What the planning needs to know of differences: the window rule's bound is that of all steps of the fine-tuning.

    Training started from the base, so `W_T - p_T W_0` is of rank `B * R * T` at most
    (`MemoryWindow.learned_rank_bound`), and no other difference is: the rule applies where the share of the base that
    was taken away is `p_T`, and the bound is below the full rank. Pairs are plain, and none fits what rounding added.
    """
    windows = {each.layer.name: each.window for each in inspected}
    measured = []
    for m in measured_layers(subject, inspected):
        window = windows[m.layer.name]
        bound = None if window is None else window.learned_rank_bound
        unknown = "the rank bound of the fine-tuning is unknown or vacuous"
        binds = bound is not None and bound < min(m.layer.shape)
        if binds and share_left(subject.recipe.of_parameter(m.layer.tensor)) != difference.shares.get(
            m.layer.tensor, 1.0
        ):
            binds, unknown = False, "weight decay has changed the rest of the base, which no rank bound is for"
        rounded = difference.rounding.get(m.layer.tensor)
        learned = None if rounded is None else int((m.singular_values > rounded.edge).sum())
        measured.append(
            replace(
                m,
                rounding_share=0.0 if rounded is None else rounded.share,
                above_rounding=learned,
                rank_cap=None if learned is None else max(1, learned),
                above_edge=min(m.layer.shape) if binds else None,
                surviving_share=0.0 if binds else None,
                rank_bound=bound if binds else None,
                unknown_start=unknown,
                spatial_values=None,
            )
        )
    return measured


def _planned(
    measured: list[MeasuredLayer],
    budget: Budget | None,
    given: Plan | str | Path | None,
    subject: Model,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
) -> tuple[Budget, tuple[LayerPlan, ...]]:
    if given is not None:
        edited = given if isinstance(given, Plan) else read_plan(Path(given))
        where = "the plan" if isinstance(given, Plan) else str(given)
        layers = apply_edits(edited, measured, where)
        if strange := [layer.name for layer in layers if layer.form not in ("dense", "plain", "channel")]:
            raise BadInput(
                f"{strange[0]} is to be {next(each.form for each in layers if each.name == strange[0])}",
                where=where,
                remedy="a difference is stored in plain and channel pairs",
            )
        return Budget("plan"), layers
    chosen = budget or default_budget(measured, subject.recipe.family)
    return chosen, choose_ranks(measured, chosen, "plain", file_bytes)


def _advice(inspected: tuple[InspectedLayer, ...]) -> str | None:
    """What the memory window says of a fine-tuning whose bound does not decide."""
    bounds = [each.window.learned_rank_bound for each in inspected if each.window is not None]
    known = [bound for bound in bounds if bound is not None]
    sides = [min(each.layer.shape) for each in inspected if each.window is not None]
    if not known:
        return None
    if all(bound >= side for bound, side in zip(bounds, sides, strict=True) if bound is not None):
        return f"the fine-tuning can have written rank {min(known):,} and more: its memory window bounds nothing here"
    return None
