"""The verbs of adapters, which `compress`, `inspect`, `export`, and `merge` call for what is one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.adapters import (
    DIALECTS,
    Adapter,
    ModuleChange,
    ModuleSpectrum,
    adapter_plan,
    adapter_ranks,
    adapter_spectra,
    inspected_adapter,
    is_adapter,
    merged_adapter,
    module_change,
    needs_spectra,
    planned_ranks,
    read_adapter,
    relative_error,
    resized_artifact,
    written_as,
)
from compressor.api.announced import adapter_steps
from compressor.api.option import Options
from compressor.api.options import CompressOptions, ExportOptions, InspectOptions, MergeOptions
from compressor.api.requests import memory_of_jobs, requested_budget
from compressor.api.write import written
from compressor.choices import AdapterDialect
from compressor.encodings import is_gguf
from compressor.engine import Engine, opened_engine
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import process_memory
from compressor.formatting import format_size
from compressor.io import (
    ADAPTER_CONFIG,
    OPTIONS_FILE,
    PLAN_FILE,
    Artifact,
    Document,
    Naming,
    Provenance,
    RemoteModel,
    Target,
    checked_target,
    local_model,
    open_checkpoint,
)
from compressor.model import ModelLike
from compressor.planning import PLANNING, Budget, Plan, checked_budget, given_plan
from compressor.planning.budget import BudgetKind
from compressor.progress import Progress, expect
from compressor.recipe import TrainingRecipe
from compressor.results import AdapterChange, BeforeAfter, Compression, Export, Inspection, Merging
from compressor.torch_state import CPU

_RESIZED_BY = frozenset({"rank", "keep", "energy", "max_size", "tolerance", "plan"})
_ALLOWED = _RESIZED_BY | {"output", "overwrite", "progress", "revision", "push_to", "dry_run"}


def opened_adapter(model: ModelLike | RemoteModel, revision: str | None = None) -> Adapter | None:
    """The adapter at a path; None for a model. Of what stays on the hub the names of its files have to tell it.

    Raises:
        BadInput: nothing that can be opened, or an adapter that cannot be read.
    """
    if isinstance(model, RemoteModel):
        # The headers of a model would be fetched twice otherwise.
        if not (model.folder / ADAPTER_CONFIG).is_file() and not any("lora" in name.lower() for name in model.files):
            return None
        checkpoint = open_checkpoint(model)
    elif isinstance(model, str | Path) and not is_gguf(model):
        checkpoint = open_checkpoint(local_model(model, revision))
    else:
        return None
    return read_adapter(checkpoint) if is_adapter(checkpoint) else None


def require_no_adapter_options(asked: CompressOptions) -> None:
    """Raise `BadInput` for what is asked of a model and makes sense of an adapter alone."""
    for name in ("rank", "energy"):
        if name in asked.given:
            what = f"`{name}` is about adapters, and this is a model"
            raise BadInput(what, option=name, remedy="ask for a size with `keep` or `max_size`, or for a `tolerance`")


def require_adapter_options(asked: Options, allowed: frozenset[str]) -> None:
    """Raise `BadInput` for an option that makes no sense of an adapter."""
    for name in sorted(asked.given - allowed):
        if name == "device" and getattr(asked, name) in ("auto", "cpu"):
            continue
        raise BadInput(f"`{name}` is not for adapters", option=name, remedy=f"leave out `{name}`")


@dataclass
class _Changes:
    """What became of each module, noted as they are written."""

    modules: int
    progress: Progress | None
    found: list[ModuleChange] = field(default_factory=list)

    def __call__(self, change: ModuleChange) -> None:
        self.found.append(change)
        if self.progress is not None:
            self.progress("factorize", len(self.found), self.modules)


def compress_adapter(adapter: Adapter, asked: CompressOptions) -> Compression:
    """Resize an adapter."""
    started = time.monotonic()
    require_adapter_options(asked, _ALLOWED)
    # Without a budget what is lost is as of a model that nothing is known of.
    budget = requested_budget(asked) or Budget("tolerance", PLANNING.safe_tolerance)
    given = None if asked.plan is None else planned_ranks(adapter, *given_plan(asked.plan))
    target = None if asked.dry_run else _target(adapter, asked)
    with opened_engine(None, CPU, memory=memory_of_jobs(CPU)) as engine:
        measures = asked.dry_run or (given is None and needs_spectra(budget))
        steps = adapter_steps(adapter, measures=measures)
        expect(asked.progress, steps[:1] if asked.dry_run else steps)
        ranks, planned = _ranks(adapter, budget, asked.progress, engine=engine, given=given, predicts=asked.dry_run)
        if requested_budget(asked) is None and all(
            module.kept_as_it_is(rank) for module, rank in zip(adapter.modules, ranks, strict=True)
        ):
            raise QualityGateNotMet(
                f"{adapter.checkpoint.name}: with {budget} every module keeps its rank; ask for less, such as `rank=8`"
            )
        changes = _Changes(len(adapter.modules), asked.progress)
        plan = adapter_plan(adapter, budget, ranks)
        artifact = resized_artifact(adapter, ranks, engine=engine, done=changes)
        made_by = Provenance(asked.command(adapter.checkpoint.name), asked.portable())
        with written(_documented(artifact, plan, changes, made_by=made_by), target) as made:
            size = made.bytes
        found = changes.found or planned
    return Compression(
        source=adapter.checkpoint.name,
        output=None if target is None else str(target.path),
        recipe=TrainingRecipe(),
        plan=_with_errors(plan, found),
        parameters=BeforeAfter(adapter.checkpoint.elements, artifact.elements),
        bytes=BeforeAfter(adapter.checkpoint.weight_bytes, size),
        evaluation=None,
        seconds=time.monotonic() - started,
        peak_memory_bytes=process_memory(),
        skipped=(),
        spectra={},
        warnings=_warnings(adapter),
        command=made_by.command,
        pushed=None if target is None else target.push(),
        not_copied=made.not_copied,
        adapter=AdapterChange(
            adapter.dialect,
            len(adapter.modules),
            sum(not m.kept_as_it_is(rank) for m, rank in zip(adapter.modules, ranks, strict=True)),
            relative_error(found) if found else None,
        ),
    )


def inspect_adapter(adapter: Adapter, asked: InspectOptions) -> Inspection:
    """Measure how much rank an adapter uses."""
    require_adapter_options(asked, frozenset({"progress", "revision"}))
    with opened_engine(None, CPU, memory=memory_of_jobs(CPU)) as engine:
        spectra = _spectra(adapter, asked.progress, engine=engine)
    return Inspection(
        source=adapter.checkpoint.name,
        recipe=TrainingRecipe(),
        layers=(),
        parameters=adapter.checkpoint.elements,
        weight_bytes=adapter.checkpoint.weight_bytes,
        advice=None,
        adapter=inspected_adapter(adapter, spectra),
    )


def _spectra(adapter: Adapter, progress: Progress | None, *, engine: Engine) -> tuple[ModuleSpectrum, ...]:
    def done(count: int) -> None:
        if progress is not None:
            progress("measure", count, len(adapter.modules))

    return adapter_spectra(adapter, engine, done)


def export_adapter(adapter: Adapter, asked: ExportOptions) -> Export:
    """Write an adapter in the names of another dialect."""
    started = time.monotonic()
    require_adapter_options(asked, frozenset({"to", "output", "overwrite", "progress"}))
    checkpoint, to = adapter.checkpoint, next((name for name in DIALECTS if name == asked.to), None)
    if to is None:
        dense = "make a dense model with PEFT or diffusers: merge_and_unload(), or fuse_lora()"
        remedy = dense if asked.to == "dense" else "export it with `to='peft'`, `to='kohya'`, or `to='diffusers'`"
        raise BadInput("is a LoRA adapter", where=checkpoint.source, option="to", remedy=remedy)
    naming = Naming(written_as(adapter, to), f"-{to}")
    target = checked_target(checkpoint, asked.output, naming, overwrite=asked.overwrite)
    with opened_engine(None, CPU, memory=memory_of_jobs(CPU)) as engine:
        ranks = [module.rank for module in adapter.modules]
        changes = _Changes(len(ranks), asked.progress)
        artifact = resized_artifact(adapter, ranks, dialect=to, engine=engine, done=changes)
        with written(artifact, target) as made:
            size = made.bytes
    return Export(
        source=checkpoint.name,
        output=str(target.path),
        to=to,
        layers=len(adapter.modules),
        bytes=BeforeAfter(checkpoint.weight_bytes, size),
        difference=None,
        load=_load_words(to, str(target.path)),
        seconds=time.monotonic() - started,
        not_copied=made.not_copied,
    )


def merge_adapters(models: Sequence[str | Path], opened: Sequence[Adapter | None], asked: MergeOptions) -> Merging:
    """Add adapters of one base, each times its weight."""
    started = time.monotonic()
    allowed = {"output", "overwrite", "progress", "mode", "weights", *asked.adapter_budget}
    require_adapter_options(asked, frozenset(allowed))
    adapters = [adapter for adapter in opened if adapter is not None]
    if len(adapters) < len(opened):
        model = next(model for model, adapter in zip(models, opened, strict=True) if adapter is None)
        raise BadInput("is no adapter, and others are", where=model, option="models", remedy="give adapters alone")
    if asked.mode == "concat":
        raise BadInput("adapters are added", option="mode", remedy="leave out `mode`")
    weights = asked.weights or (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        what = f"{len(weights)} weights of {len(adapters)} adapters"
        raise BadInput(what, option="weights", remedy="give one for each, in their order")
    if not any(weights):
        raise BadInput("the sum of nothing is no adapter", option="weights", remedy="give one that is not zero")
    merged = merged_adapter(adapters, weights)
    budget = next((checked_budget(_budget(*each)) for each in asked.adapter_budget.items()), None)
    first, *others = (adapter.checkpoint for adapter in adapters)
    naming = Naming(written_as(merged, merged.dialect), "-merged")
    target = checked_target(first, asked.output, naming, overwrite=asked.overwrite, others=others)
    with opened_engine(None, CPU, memory=memory_of_jobs(CPU)) as engine:
        ranks = tuple(module.rank for module in merged.modules)
        expect(asked.progress, adapter_steps(merged, measures=budget is not None and needs_spectra(budget)))
        if budget is not None:
            ranks, _ = _ranks(merged, budget, asked.progress, engine=engine)
        changes = _Changes(len(ranks), asked.progress)
        artifact = resized_artifact(merged, ranks, engine=engine, done=changes)
        with written(artifact, target) as made:
            size = made.bytes
    return Merging(
        models=tuple(str(model) for model in models),
        base=None,
        output=str(target.path),
        mode="sum",
        head=asked.head,
        inputs=None,
        layers=(),
        warnings=(),
        tasks=(),
        parts_parameters=sum(adapter.checkpoint.elements for adapter in adapters),
        parameters=artifact.elements,
        parts_bytes=sum(adapter.checkpoint.weight_bytes for adapter in adapters),
        bytes=size,
        seconds=time.monotonic() - started,
        not_copied=made.not_copied,
        adapter=AdapterChange(
            merged.dialect,
            len(ranks),
            sum(rank < module.rank for module, rank in zip(merged.modules, ranks, strict=True)),
            relative_error(changes.found),
        ),
        weights=weights,
    )


def _budget(name: str, value: float) -> Budget:
    kinds: dict[str, BudgetKind] = {"rank": "rank", "energy": "energy", "keep": "keep", "max_size": "max-size"}
    return Budget(kinds[name], value)


def _load_words(dialect: AdapterDialect, path: str) -> str:
    if dialect == "peft":
        return f"peft.PeftModel.from_pretrained(base, {path!r})"
    if dialect == "diffusers":
        return f"pipeline.load_lora_weights({path!r})"
    return "as a LoRA file in ComfyUI, or by the scripts of kohya"


def _ranks(
    adapter: Adapter,
    budget: Budget,
    progress: Progress | None,
    *,
    engine: Engine,
    given: tuple[int, ...] | None = None,
    predicts: bool = False,
) -> tuple[tuple[int, ...], list[ModuleChange]]:
    """The ranks, of a budget or those `given`, and where singular values were computed what they make of each module.

    Where nothing is written that would tell what becomes of the modules, it `predicts` that for any ranks.
    """
    if given is None and not needs_spectra(budget):
        given = adapter_ranks(adapter, budget)
    if given is not None and not predicts:
        return given, []

    spectra = _spectra(adapter, progress, engine=engine)

    def size_at(ranks: Sequence[int]) -> int:
        return resized_artifact(adapter, ranks).bytes

    ranks = adapter_ranks(adapter, budget, spectra=spectra, size_at=size_at) if given is None else given
    changes = [
        module_change(each, rank if not each.module.kept_as_it_is(rank) else None)
        for each, rank in zip(spectra, ranks, strict=True)
    ]
    return ranks, changes


def _target(adapter: Adapter, asked: CompressOptions) -> Target:
    checkpoint = adapter.checkpoint
    naming = Naming(written_as(adapter, adapter.dialect), "-compressed")
    target = checked_target(checkpoint, asked.output, naming, overwrite=asked.overwrite)
    return target.pushed_to(asked.push_to)


def _documented(artifact: Artifact, plan: Plan, changes: _Changes, *, made_by: Provenance) -> Artifact:
    """The artifact with the plan and the options beside it, where it is a folder."""
    own = artifact.documents

    def documents() -> dict[str, Document]:
        described: dict[str, Any] = _with_errors(plan, changes.found).portable().to_dict()
        return {**own(), PLAN_FILE: described, OPTIONS_FILE: made_by.document()}

    return replace(artifact, documents=documents)


def _with_errors(plan: Plan, changes: Sequence[ModuleChange]) -> Plan:
    return plan.with_errors({each.name: each.error for each in changes})


def _warnings(adapter: Adapter) -> tuple[str, ...]:
    warnings = []
    if adapter.has_magnitudes:
        warnings.append(
            "it is of DoRA: magnitudes are kept as they are, and ranks are chosen by the updates before normalization"
        )
    if adapter.others:
        names = [each.name for each in adapter.others]
        size = format_size(sum(each.info.nbytes for each in adapter.others))
        warnings.append(f"{len(names)} tensors beside the factors are kept as they are: {names[0]}, ... ({size})")
    return tuple(warnings)
