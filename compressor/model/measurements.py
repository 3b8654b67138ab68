"""Every eligible layer read once and measured: what is reported of it, and what its rank is chosen by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.engine import Run
from compressor.errors import BadInput
from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    decompose,
    decompose_grouped,
    grouped_values,
    product_bytes,
    product_svd,
    working_bytes,
)
from compressor.forms import (
    FORMS,
    Approximations,
    InitialForm,
    from_initial,
    has_own_errors,
    pair_forms,
    pair_of,
    quantization_of,
)
from compressor.initial import InitialWeights, Start, initial_name, starts_of
from compressor.io import StoredTensor, require_finite
from compressor.lowrank import KeptDecompositions, ProductTensor, as_matrix, initial_weight
from compressor.measure import (
    EffectiveRanks,
    MemoryWindow,
    Precision,
    SurvivingInitialization,
    effective_ranks,
    initial_standard_deviation,
    memory_window,
    singular_values,
    surviving_initialization,
    uses_per_example,
)
from compressor.model.opened import Model
from compressor.network import Layer
from compressor.planning import PLANNING, MeasuredLayer, PlanningSettings
from compressor.recipe import TrainingRecipe
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class Decomposing:
    """That large layers are decomposed when they are measured: how precisely, and where that is kept, if it is."""

    precision: Precision
    kept: KeptDecompositions | None = None


def inspect_layers(
    subject: Model,
    epsilon: float,
    run: Run,
    *,
    decomposing: Decomposing | None = None,
    quantized: Mapping[str, Sequence[str]] | None = None,
) -> tuple[InspectedLayer, ...]:
    """Read every eligible layer once, and measure it, and what quantizing costs it in the forms that are named."""
    kept = None if decomposing is None else decomposing.kept
    recipe, architecture = subject.recipe, subject.architecture
    uses = uses_per_example(
        subject.layers, architecture, subject.checkpoint.directory, sequence_length=recipe.sequence_length
    )
    eligible = [layer for layer in subject.layers if layer.eligible]
    starts = _starts(subject, eligible, uses)
    asked = [
        _Measurement(
            layer=layer,
            weight=subject.checkpoint.stored(layer.tensor),
            source=subject.checkpoint.source,
            device=run.job_device,
            uses=uses[layer.name],
            recipe=recipe.of_parameter(layer.tensor),
            epsilon=epsilon,
            init_std=initial_standard_deviation(layer, architecture),
            precision=None if layer.is_pair else _precision(layer, decomposing),
            kept=kept is not None,
            start=starts.get(layer.name),
            quantized=tuple((quantized or {}).get(layer.name, ())),
        )
        for layer in eligible
    ]
    inspected: dict[str, InspectedLayer] = {}
    done = {
        each.layer.name
        for each in asked
        if run.journal.holds(each.unit) and (kept is None or each.precision is None or each.layer.name in kept)
    }
    missing = (each.with_initial(subject.initial) for each in asked if each.layer.name not in done)
    computed = run.engine.map(_spectra, missing)
    for each in asked:
        name, unit = each.layer.name, each.unit
        if name in done:
            spectra = _in_order_of_computation(each, run.journal.read(unit))
        else:
            spectra, found = next(computed)
            if kept is not None and found is not None:
                kept.put(name, found)
            if run.journal.kept:
                run.journal.write(unit, {key: torch.from_numpy(values.copy()) for key, values in spectra.items()})
        inspected[name] = _inspected(each, spectra)
        run.report("measure", len(inspected), len(eligible))
    return tuple(inspected.get(layer.name, InspectedLayer(layer)) for layer in subject.layers)


def _in_order_of_computation(asked: _Measurement, read: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """Spectra that a file gives by their names: of forms of one size the first is chosen."""
    quantized = sorted(asked.quantized, key=from_initial)
    order = {name: place for place, name in enumerate(("", *FORMS, *quantized))}
    return {name: read[name].numpy() for name in sorted(read, key=order.__getitem__)}


def _starts(subject: Model, layers: Sequence[Layer], uses: Mapping[str, int | None]) -> Mapping[str, Start]:
    """What layers still have of their initial weights, where these are known and a compressed model can name them."""
    initial = subject.initial
    if initial is None:
        return {}
    layers = [layer for layer in layers if layer.groups == 1]
    if initial.draws is not None:
        layers = [layer for layer in layers if initial_name(layer) in initial.draws.names]
    return starts_of(layers, subject.checkpoint, initial, recipe=subject.recipe, uses=uses)


@dataclass(frozen=True)
class _Measurement:
    """What is known of a layer whose weight is to be measured on a device."""

    layer: Layer
    weight: StoredTensor
    source: Path | None
    device: torch.device
    uses: int | None
    recipe: TrainingRecipe
    epsilon: float
    init_std: float | None
    precision: Precision | None
    kept: bool
    start: Start | None
    quantized: tuple[str, ...] = ()
    initial: Tensor | None = None

    def with_initial(self, initial: InitialWeights | None) -> _Measurement:
        """The same with the initial weights of the layer, where it correlates with them."""
        return self if self.start is None else replace(self, initial=initial_weight(self.layer, initial))

    @property
    def unit(self) -> str:
        """What the spectra are called in a journal."""
        share = "" if self.start is None else f"-{self.start.share}"
        forms = "".join(f"-{form}" for form in self.quantized)
        bits = f"-{hashlib.sha256(forms.encode()).hexdigest()[:8]}" if forms else ""
        return f"spectrum{share}{bits}/{self.layer.name}"

    @property
    def nbytes(self) -> int:
        if isinstance(self.weight, ProductTensor) and not self.quantized:
            return product_bytes(self.layer.shape, self.weight.pair.rank)
        return working_bytes(self.layer.shape)


def _precision(layer: Layer, decomposing: Decomposing | None) -> Precision | None:
    """How precisely a layer is decomposed; None where only its singular values are computed."""
    if decomposing is None or layer.groups > 1 or min(layer.shape) < decomposing.precision.side:
        return None
    return decomposing.precision


def _spectra(asked: _Measurement) -> tuple[dict[str, NDArray[np.float64]], Decomposition | None]:
    """The singular values of a layer, under no name, and those of forms that have their own, by the form's.

    Of quantized forms they are relative errors. And its decomposition, if there is one to be kept.
    """
    layer, found = asked.layer, None
    if isinstance(asked.weight, ProductTensor) and not asked.quantized:
        return {"": product_svd(asked.weight.factors()).spectrum}, None
    weight = asked.weight.read()
    require_finite(layer.tensor, weight, asked.source)
    weight = weight.to(asked.device)
    matrix = as_matrix(layer, weight)
    if asked.precision is None:
        values = grouped_values(matrix, layer.groups)
    else:
        found = decompose(matrix, None, asked.precision)
        values = found.values
    if not np.isfinite(values).all():
        raise BadInput(
            "its singular values exceed the range of float64",
            where=layer.tensor,
            remedy="use a checkpoint from before the training diverged",
        )
    if isinstance(asked.weight, ProductTensor):
        values = product_svd(asked.weight.factors()).spectrum
    apart = [form for form in pair_forms(layer) if form.has_own_errors and not layer.is_pair]
    own = {form.name: form.own_values(weight) for form in apart}
    written = None
    if asked.start is not None and asked.initial is not None:
        training = in_float64(weight) - asked.start.share * in_float64(asked.initial.to(weight.device))
        written = as_matrix(layer, training)
        of_training = singular_values(written)
        for form in pair_forms(layer, initial=True):
            if isinstance(form, InitialForm):
                own[form.name] = form.own_values(training) if form.pair.has_own_errors else of_training
    own |= _quantized_errors(layer, matrix, [name for name in asked.quantized if not from_initial(name)], found=found)
    if written is not None:
        share = _norm(written) / (_norm(matrix) or 1.0)
        errors = _quantized_errors(layer, written, [name for name in asked.quantized if from_initial(name)])
        own |= {name: share * each for name, each in errors.items()}
    return {"": values} | own, found if asked.kept else None


def _quantized_errors(
    layer: Layer, matrix: Tensor, forms: Sequence[str], *, found: Decomposition | None = None
) -> dict[str, NDArray[np.float64]]:
    """Relative Frobenius errors of a matrix in quantized forms, at rank 0, 1, .."""
    if not forms:
        return {}
    if layer.groups > 1:
        found = decompose_grouped(matrix, layer.groups)
    found = found or decompose(matrix, None, Precision())
    approximations = Approximations(
        weight=layer, matrix=matrix, metric=None, settings=FactorizationSettings(), known=found
    )
    return {name: approximations.errors(FORMS[name]) for name in forms}


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(in_float64(matrix)))


def _inspected(asked: _Measurement, spectra: Mapping[str, NDArray[np.float64]]) -> InspectedLayer:
    layer, values = asked.layer, spectra[""]
    return InspectedLayer(
        layer=layer,
        uses=asked.uses,
        ranks=effective_ranks(values),
        window=memory_window(asked.recipe, layer.block_shape, asked.uses, epsilon=asked.epsilon),
        initialization=_surviving(asked, values),
        singular_values=tuple(values.tolist()),
        own_values={
            form: tuple(each.tolist()) for form, each in spectra.items() if form and form not in asked.quantized
        },
        quantized_errors={form: tuple(spectra[form].tolist()) for form in asked.quantized if form in spectra},
        start=asked.start,
    )


def _surviving(asked: _Measurement, values: NDArray[np.float64]) -> SurvivingInitialization:
    """How much of its initialization a layer keeps, and what stands above it.

    Of a convolution with groups the second is not known: its values are of all groups together, and one group may have
    learned what does not show in these.
    """
    layer = asked.layer
    if layer.groups == 1:
        return surviving_initialization(asked.recipe, layer.shape, values, init_std=asked.init_std)
    found = surviving_initialization(asked.recipe, layer.block_shape, (), init_std=None)
    return replace(found, reason="the rule is not for groups of channels") if found.share is not None else found


def measured_layers(
    subject: Model, inspected: Sequence[InspectedLayer], settings: PlanningSettings = PLANNING
) -> list[MeasuredLayer]:
    """What the planning needs to know of the eligible layers."""
    measured = []
    for each in inspected:
        if each.singular_values is None or each.window is None or each.initialization is None:
            continue
        window = each.window
        measured.append(
            MeasuredLayer(
                layer=each.layer,
                singular_values=np.array(each.singular_values),
                itemsize=subject.checkpoint.tensors[each.layer.tensor].dtype.itemsize,
                precision=torch.finfo(subject.checkpoint.tensors[each.layer.tensor].dtype).eps,
                above_edge=each.initialization.above_edge,
                surviving_share=each.initialization.share,
                unknown_start=each.initialization.reason,
                rank_bound=window.rank_bound if window.vacuous is False else None,
                own_values={form: np.array(values) for form, values in each.own_values.items()},
                own_errors={form: np.array(errors) for form, errors in each.quantized_errors.items()},
                quantized=tuple(each.quantized_errors),
                settings=settings,
                start=each.start,
            )
        )
    return measured


def _stored(layer: Layer) -> dict[str, Any]:
    """How a layer is stored that is not dense, as an inspection says it."""
    if layer.stored is None:
        return {}
    if layer.encoding is not None:
        return {"stored": {"encoding": layer.encoding, "bytes": layer.stored.nbytes}}
    return {"stored": {"form": layer.stored.form, "rank": layer.stored.rank}}


@dataclass(frozen=True)
class InspectedLayer:
    """What was measured of one layer; a skipped layer has nothing but its `layer.skip`."""

    layer: Layer
    uses: int | None = None
    ranks: EffectiveRanks | None = None
    window: MemoryWindow | None = None
    initialization: SurvivingInitialization | None = None
    singular_values: tuple[float, ...] | None = None
    own_values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Singular values of the matrix that is factorized, by the form's name, for forms that factorize another one."""
    quantized_errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Relative Frobenius errors at rank 0, 1, .. of the quantized forms that were asked for, by their names."""
    start: Start | None = None
    """What is left of its initial weights, where it correlates with them."""

    @property
    def written_values(self) -> tuple[float, ...] | None:
        """Singular values of what training wrote, as a matrix of the layer's own sides; None without a start."""
        for form, values in self.own_values.items():
            pair = pair_of(form)
            if pair is not None and not has_own_errors(pair):
                return values
        return None

    def to_dict(self) -> dict[str, Any]:
        layer = self.layer
        apart = [form.name for form in FORMS.values() if form.has_own_errors and not form.from_initial]
        own = {form: self.own_values.get(form) for form in apart}
        quantized = [
            {**of.to_dict(), "error": errors[0]}
            for form, errors in self.quantized_errors.items()
            if (of := quantization_of(form)) is not None
        ]
        return {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "parameters": layer.parameters,
            "skip": layer.skip,
            "uses": self.uses,
            "ranks": self.ranks.to_dict() if self.ranks else None,
            "window": self.window.to_dict() if self.window else None,
            "initialization": self.initialization.to_dict() if self.initialization else None,
            "singular_values": list(self.singular_values) if self.singular_values is not None else None,
            **({"quantized": quantized} if quantized else {}),
            **_stored(layer),
        } | {f"{form}_values": None if values is None else list(values) for form, values in own.items()}
