"""A plan that a user gave, perhaps edited: read from its JSON, and its ranks applied to the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.documents import read_json
from compressor.errors import BadInput
from compressor.forms import (
    DENSE,
    FORMS,
    factorized_shape,
    from_initial,
    pair_forms,
    pair_name,
    quantization_of,
    quantized_name,
    stored_parameters,
)
from compressor.planning.budget import Budget
from compressor.planning.measured import MeasuredLayer, exceeds_stored
from compressor.planning.plan import PLAN_SCHEMA_VERSION, LayerPlan, Plan, dense_plan
from compressor.quantize import Quantization


def read_plan(path: Path) -> Plan:
    """A plan from its JSON, as `Plan.to_dict` wrote it, perhaps edited; BadInput says which entry is wrong."""
    remedy = "write a new one with 'compress plan MODEL -o PLAN.json' and edit its ranks"
    document = read_json(path, remedy=remedy)
    if not isinstance(document.get("layers"), list):
        raise BadInput("not a plan: it has no list of layers", where=path, remedy=remedy)
    if not document["layers"]:
        raise BadInput("it names no layer", where=path, remedy=remedy)
    if document.get("schema_version") != PLAN_SCHEMA_VERSION:
        raise BadInput(
            f"its schema version is {document.get('schema_version')!r}, not {PLAN_SCHEMA_VERSION}",
            where=path,
            remedy=remedy,
        )
    layers = tuple(_read_layer(entry, path, remedy) for entry in document["layers"])
    digest = document.get("digest")
    return Plan(
        source=str(document.get("source", path)),
        digest=digest if isinstance(digest, str) else None,
        budget=Budget("plan"),
        layers=layers,
        calibrated=document.get("calibration") is not None,
    )


def given_plan(given: Plan | str | Path) -> tuple[Plan, str]:
    """A plan that was given as an object or by its path, and its name in errors."""
    return (given, "the plan") if isinstance(given, Plan) else (read_plan(Path(given)), str(given))


def _read_layer(entry: Any, path: Path, remedy: str) -> LayerPlan:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise BadInput("a layer of the plan has no name", where=path, remedy=remedy)
    name, stated = entry["name"], entry.get("form", DENSE)
    quantization = _read_quantization(entry, path)
    form = quantized_name(str(stated), quantization)
    if "rank" not in entry:
        raise BadInput(f"{name} has no rank", where=path, remedy="give one, or null for dense")
    rank, share = entry["rank"], entry.get("share")
    least = FORMS[form].least_rank if form in FORMS else 1
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < least):
        raise BadInput(
            f"rank {rank!r} of {name} is not a {'' if least == 0 else 'positive '}whole number",
            where=path,
            remedy="give one, or null for dense",
        )
    if form not in (known := (DENSE, *FORMS)) and form not in FORMS:
        raise BadInput(f"form {stated!r} of {name} does not exist", where=path, remedy=f"one of {', '.join(known)}")
    if share is not None and (type(share) not in (int, float) or not math.isfinite(share)):
        raise BadInput(f"share {share!r} of {name} is not a number", where=path, remedy="give one, or leave it out")
    if quantization is not None and rank is None:
        what = f"{quantization.bits} bits and rank null of {name} contradict each other"
        raise BadInput(what, where=path, remedy="set the rank to 0 for the quantized matrix, or leave out the bits")
    if rank is not None and form == DENSE:
        *others, last = FORMS
        remedy = f"set the rank to null for dense, or the form to {', '.join(others)} or {last}"
        raise BadInput(f"rank {rank} and form 'dense' of {name} contradict each other", where=path, remedy=remedy)
    return LayerPlan(
        name=name,
        shape=_read_shape(entry.get("shape")),
        kind=str(entry.get("kind", "")),
        rank=rank,
        form=DENSE if rank is None else form,
        parameters=0,
        error=math.nan,
        reason=str(entry.get("reason", "")),
        share=None if share is None else float(share),
    )


def _read_quantization(entry: Mapping[str, Any], path: Path) -> Quantization | None:
    """How the numbers of a layer are quantized; None where the entry states no bits, or 16 of them."""
    bits = entry.get("bits")
    if bits is None or bits == 16:
        return None
    try:
        return Quantization.from_dict(entry)
    except ValueError as error:
        remedy = "give 2 to 8 bits, a group size that divides the inputs or null, and zero points true or false"
        raise BadInput(f"{entry['name']}: {error}", where=path, remedy=remedy) from None


def _read_shape(shape: object) -> tuple[int, int]:
    """The shape that a plan states; `(0, 0)` if it states none."""
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(side, int) for side in shape):
        return (shape[0], shape[1])
    return (0, 0)


def apply_edits(plan: Plan, measured: Sequence[MeasuredLayer], where: str) -> tuple[LayerPlan, ...]:
    """The plan's ranks and forms checked against the checkpoint, with sizes and errors computed anew.

    Eligible layers that the plan does not name stay dense. BadInput for a layer that does not exist or is not
    eligible, a rank outside the layer's, or a form that the kind of layer does not have.
    """
    known = {m.layer.name: m for m in measured}
    edited = {layer.name: layer for layer in plan.layers}
    remedy = "correct it, or write a new plan with 'compress plan MODEL'"
    for name, edit in edited.items():
        if name not in known:
            raise BadInput(
                f"the plan names {name}, which is not an eligible layer of this model",
                where=where,
                remedy="add `embeddings`" if edit.kind == "embedding" else remedy,
            )
    if len(edited) < len(plan.layers):
        raise BadInput("the plan names a layer twice", where=where, remedy=remedy)
    return tuple(
        _apply_edit(edited[m.layer.name], m, where=where, remedy=remedy)
        if m.layer.name in edited
        else dense_plan(m.layer, "not in the plan")
        for m in measured
    )


def _apply_edit(edit: LayerPlan, m: MeasuredLayer, *, where: str, remedy: str) -> LayerPlan:
    layer = m.layer
    if edit.shape not in ((0, 0), layer.shape):
        raise BadInput(
            f"the plan's {layer.name} is {edit.shape[0]} x {edit.shape[1]}, "
            f"the model's {layer.shape[0]} x {layer.shape[1]}",
            where=where,
            remedy=remedy,
        )
    if edit.rank is None:
        return dense_plan(layer, "asked for by the plan")
    form, initial = edit.form, from_initial(edit.form)
    if initial and m.start is None:
        raise BadInput(
            f"form {form!r} does not exist for {layer.name}, whose initial weights are not known",
            where=where,
            remedy="name them with `initial`; a layer that does not correlate with them has no such form",
        )
    possible = [each.name for each in pair_forms(layer, initial=m.start is not None)]
    quantization = quantization_of(form)
    if form not in possible and (quantization is None or not FORMS[form].takes(layer)):
        sides = " x ".join(map(str, layer.tensor_shape))
        remedy = f"give it the form {' or '.join(possible)}, or null for a rank to keep it dense"
        if quantization is not None:
            remedy = "give it another form, other bits, or null for the group size"
        stated = f"form {pair_name(form)!r}{'' if quantization is None else f' in {quantization.name} bits'}"
        raise BadInput(
            f"{stated} does not exist for {layer.name}, a {layer.kind} layer of {sides}", where=where, remedy=remedy
        )
    shape = factorized_shape(layer, form)
    if edit.rank > min(shape):
        raise BadInput(
            f"rank {edit.rank} of {layer.name} does not exist: its matrix is {shape[0]} x {shape[1]}",
            where=where,
            remedy=f"give a rank up to {min(shape)}, or null for dense",
        )
    if layer.stored is not None and exceeds_stored(layer, form, edit.rank):
        raise BadInput(
            f"rank {edit.rank} of {layer.name} is above the {layer.stored.rank} that it is stored at",
            where=where,
            remedy=f"give a rank up to {layer.stored.rank}, or null to leave it as it is",
        )
    if layer.stored is not None and (form, edit.rank) == (layer.stored.form, layer.stored.rank):
        return dense_plan(layer, "asked for by the plan")
    parameters = stored_parameters(layer, form, edit.rank)
    unreached = f"; {m.stays_dense}, so its error is the Frobenius one" if m.stays_dense is not None else ""
    larger = ", though a pair of this rank is larger than the layer" if parameters > layer.stored_parameters else ""
    return replace(
        edit,
        shape=layer.shape,
        kind=layer.kind,
        reason=f"asked for by the plan{larger}{unreached}",
        parameters=parameters,
        error=float(m.errors(form)[edit.rank]),
        latency=None,
        before=None if layer.stored is None else layer.stored.numbers,
        encoding=layer.encoding,
        share=(m.start.share if edit.share is None else edit.share) if initial and m.start is not None else None,
    )
