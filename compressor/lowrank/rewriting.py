"""Carry out a plan: the tensors, metadata, and module of the compressed model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.encodings import encoded_in
from compressor.engine import Run
from compressor.factorize import Decomposition, decompose, product_bytes, working_bytes
from compressor.forms import FORMS, InitialLayer, from_initial
from compressor.initial import InitialWeights
from compressor.io import Checkpoint, Provenance, Stack, StoredTensor, TensorInfo, require_finite, require_in_range
from compressor.lowrank.batched_experts import batch_experts
from compressor.lowrank.batched_tensors import batched_infos, batched_stems, batched_tensors, batches_to_write
from compressor.lowrank.decompositions import KeptDecompositions
from compressor.lowrank.effective_weights import let_script
from compressor.lowrank.factored_parameter import fill_factors, put_factors, to_be_factored
from compressor.lowrank.initial_layer import formed_weight, initial_record, start_matrix
from compressor.lowrank.modules import (
    carry_over,
    carry_state_hooks,
    is_of_transformers,
    low_rank_layer,
    put_beside,
    put_layer,
    tie_head,
)
from compressor.lowrank.product_tensor import ProductTensor, product_in, squeezed
from compressor.lowrank.sources import source_left
from compressor.lowrank.spec import LayerSpec, LowRankSpec
from compressor.lowrank.stacked import stacks_of
from compressor.lowrank.stored_pairs import join
from compressor.lowrank.tensor_format import Factors, as_matrix, factorize, pair_infos, written
from compressor.measure import Precision
from compressor.network import Layer, fuse_experts, is_weight
from compressor.planning import LayerPlan, Plan
from compressor.recipe import TrainingRecipe
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class Rewriting:
    """A checkpoint, the recipe it was trained by, and what becomes of its layers."""

    checkpoint: Checkpoint
    recipe: TrainingRecipe
    layers: tuple[Layer, ...]
    plan: Plan
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """What stands for layers that are factorized already, by name."""
    statistics: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)
    """Tensors of batch normalizations that changed, by name: what they are called in the model, and their values."""
    provenance: Provenance | None = None
    """What was asked for, which the model will say."""
    decompositions: KeptDecompositions | None = None
    """Those of the layers' matrices, where they are known."""
    initial: InitialWeights | None = None
    """The initial weights of the model, where the plan has layers in forms of what training wrote."""

    @property
    def factorized(self) -> tuple[tuple[Layer, LayerPlan], ...]:
        """The layers that do not stay dense, in the order of the plan."""
        layers = {layer.name: layer for layer in self.layers}
        return tuple((layers[each.name], each) for each in self.plan.layers if each.rank is not None)

    @property
    def kept(self) -> dict[str, ProductTensor]:
        """The layers that are low-rank already and stay as they are, by name."""
        rewritten = {layer.name for layer, _ in self.factorized}
        found = {layer.name: product_in(self.checkpoint, layer.tensor) for layer in self.layers}
        return {name: pair for name, pair in found.items() if pair is not None and name not in rewritten}

    @property
    def spec(self) -> LowRankSpec:
        """The low-rank layers by their names in the checkpoint."""
        kept = self.kept
        specs = {layer.name: layer_spec(layer, plan) for layer, plan in self.factorized}
        specs |= {name: pair.spec for name, pair in kept.items()}
        layers = {layer.name: specs[layer.name] for layer in self.layers if layer.name in specs} if kept else specs
        written = {layer.name: layer for layer, plan in self.factorized if from_initial(plan.form)}
        source = source_left(self.checkpoint, self.passed_through)
        # Those of a model that is compressed already are in it.
        stacks = self.checkpoint.stacks if self._taken_apart else stacks_of(self.checkpoint)
        batched = batched_stems(self.checkpoint.stacks, layers) if self._taken_apart else ()
        return LowRankSpec(layers, initial_record(written, self.initial), source=source, stacks=stacks, batched=batched)

    @property
    def batches(self) -> list[Stack]:
        """The tensors that are stored for those of experts which run in batched products."""
        if not self.checkpoint.stacks:
            return []
        spec = self.spec
        return batches_to_write(self.checkpoint.stacks, spec.layers, spec.batched)

    @property
    def _taken_apart(self) -> bool:
        """Whether the layers are stored by themselves that the files of the original hold in one tensor.

        All of them are where one is factorized: a model has all of its experts apart, or none.
        """
        layers = {each.name: each for each in self.layers}
        moved = {layers[each.name].tensor for each in self.plan.layers if each.rank is not None}
        return not moved.isdisjoint(self.checkpoint.held_by)

    @property
    def spec_of_modules(self) -> LowRankSpec:
        """The low-rank layers by their names in the model, and the linear layers that stay dense."""
        rewritten = {layer.name: layer.module for layer in self.layers if layer.name in self.spec.layers}
        left = [layer for layer in self.layers if layer.name not in rewritten]
        dense = [layer.module for layer in left if layer.kind == "linear"] + [each.head for each in left if each.head]
        return replace(self.spec.renamed(rewritten.__getitem__), dense=tuple(dense))

    @property
    def passed_through(self) -> list[str]:
        """The tensors that are copied as they are.

        A further name of one that moves is among them: what was tied becomes two tensors of the same values. Not so the
        name of a tied head's weight, which moves with its embedding, and those that a module has in its other places.
        """
        moved = {name for layer, _ in self.factorized for name in (layer.tensor, layer.bias)}
        of_kept = {join(name, "bias") for name, pair in self.kept.items() if pair.pair.has_bias}
        untied = moved - {layer.tensor for layer, _ in self.factorized if layer.head is not None}
        untied -= {name for layer, _ in self.factorized if layer.places for name in (layer.tensor, layer.bias)}
        left = [name for name in self.checkpoint.tensors if name not in moved and name not in of_kept]
        if not self._taken_apart:
            left = self._together(left)
        return left + [
            alias for alias, name in self.checkpoint.aliases.items() if name in untied and alias not in moved
        ]

    def _together(self, names: list[str]) -> list[str]:
        """Some tensors with those that hold several in the places of the first of these."""
        return list(dict.fromkeys(self.checkpoint.held_by.get(name, name) for name in names))

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor of the original checkpoint by any of its names."""
        if (whole := self.checkpoint.wholes.get(name)) is not None:
            return whole
        return replace(self.checkpoint.tensors[self.checkpoint.aliases.get(name, name)], name=name)


def layer_spec(layer: Layer, plan: LayerPlan, share: float | None = None) -> LayerSpec:
    """The specification of a layer that a plan makes low-rank."""
    assert plan.rank is not None
    return LayerSpec(plan.form, plan.rank, layer.kind, plan.share if share is None else share)


def rewritten_infos(rewriting: Rewriting) -> list[TensorInfo]:
    """Name, shape and dtype of every tensor of the compressed checkpoint, before any of them is computed."""
    infos = [info for name in rewriting.passed_through for info in _passed_infos(rewriting, name)]
    for layer, plan in rewriting.factorized:
        bias = None if layer.bias is None else rewriting.info(layer.bias)
        infos += pair_infos(layer, plan, rewriting.info(layer.tensor).dtype, bias=bias)
    return batched_infos(infos, rewriting.batches)


def _passed_infos(rewriting: Rewriting, name: str) -> list[TensorInfo]:
    """A tensor that is copied as it is, or those that are stored for it."""
    pair, encoded = (find(rewriting.checkpoint, name) for find in (product_in, encoded_in))
    if encoded is not None:
        return encoded.infos
    return [rewriting.info(name)] if pair is None else pair.infos


def rewritten_numbers(rewriting: Rewriting) -> int:
    """How many numbers the compressed checkpoint has, a quantized one counted as one."""
    numbers = sum(info.elements for info in rewritten_infos(rewriting))
    for name in rewriting.passed_through:
        if encoded_in(rewriting.checkpoint, name) is not None:
            parts = sum(info.elements for info in _passed_infos(rewriting, name))
            numbers += rewriting.info(name).elements - parts
    for layer, plan in rewriting.factorized:
        if plan.quantization is not None and plan.rank is not None:
            stored = pair_infos(layer, plan, rewriting.info(layer.tensor).dtype, bias=None)
            numbers += FORMS[plan.form].numbers(layer, plan.rank) - sum(info.elements for info in stored)
    return numbers


def rewritten_tensors(
    rewriting: Rewriting, run: Run, done: Callable[[str, float], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the compressed checkpoint, read and computed a layer a job.

    `done` is told the name of each factorized layer and the relative error of what is stored for it.
    """
    return batched_tensors(_tensors(rewriting, run, done), rewriting.batches, rewritten_infos(rewriting))


def _tensors(rewriting: Rewriting, run: Run, done: Callable[[str, float], None]) -> Iterator[tuple[str, Tensor]]:
    """The same, of which each expert has its own."""
    read = rewriting.checkpoint.read
    for name in rewriting.passed_through:
        if name in rewriting.statistics:
            yield name, require_in_range(name, rewriting.statistics[name][1])
            continue
        if (pair := product_in(rewriting.checkpoint, name)) is not None:
            yield from ((each, part.read()) for each, part in pair.parts.items())
            continue
        if (encoded := encoded_in(rewriting.checkpoint, name)) is not None:
            yield from ((part.name, part.stored.read()) for part in encoded.stored)
            continue
        tensor = read(name)
        if is_weight(name) or name.endswith("bias"):
            require_finite(name, tensor, rewriting.checkpoint.source)
        yield name, tensor
    for layer, _, factors in rewritten_factors(rewriting, run):
        yield from factors.tensors.items()
        done(layer.name, factors.error)


def rewritten_factors(rewriting: Rewriting, run: Run) -> Iterator[tuple[Layer, LayerPlan, Factors]]:
    """What stands for each layer that does not stay dense, in the order of the plan."""
    checkpoint, journal = rewriting.checkpoint, run.journal
    done = {layer.name for layer, plan in rewriting.factorized if journal.holds(_unit(layer, plan))}
    jobs = (
        _Factorization(
            layer=layer,
            plan=plan,
            weight=checkpoint.stored(layer.tensor),
            bias=None if layer.bias is None else checkpoint.stored(layer.bias),
            source=checkpoint.source,
            device=run.job_device,
            decomposition=None if rewriting.decompositions is None else rewriting.decompositions.get(layer.name),
            precision=None if rewriting.decompositions is None else rewriting.decompositions.precision,
            start=start_matrix(layer, plan.share, rewriting.initial),
        )
        for layer, plan in rewriting.factorized
        if layer.name not in rewriting.factors and layer.name not in done
    )
    computed = run.engine.map(_factorized, jobs)
    for layer, plan in rewriting.factorized:
        if layer.name in rewriting.factors:
            factors = rewriting.factors[layer.name]
        elif layer.name in done:
            factors = _recorded(journal.read(_unit(layer, plan)))
        else:
            factors = next(computed)
            if journal.kept:
                error = torch.tensor(factors.error, dtype=torch.float64)
                journal.write(_unit(layer, plan), {_ERROR: error, **factors.tensors})
        for name, tensor in factors.tensors.items():
            require_in_range(name, tensor)
        yield layer, plan, factors


# The error of factors, among their tensors in a journal: no tensor of a model has such a name.
_ERROR = "/error"


def _unit(layer: Layer, plan: LayerPlan) -> str:
    """What the factors of a layer that are found without data are called in a journal."""
    share = "" if plan.share is None else f"-{plan.share}"
    return f"factors/{plan.form}-{plan.rank}{share}/{layer.name}"


def _recorded(tensors: dict[str, Tensor]) -> Factors:
    error = float(tensors.pop(_ERROR))
    return Factors({name: each.clone() for name, each in tensors.items()}, error)


@dataclass(frozen=True)
class _Factorization:
    """A layer that is to be factorized without data on a device."""

    layer: Layer
    plan: LayerPlan
    weight: StoredTensor
    bias: StoredTensor | None
    source: Path | None
    device: torch.device
    decomposition: Decomposition | None = None
    precision: Precision | None = None
    start: Tensor | None = None

    @property
    def nbytes(self) -> int:
        if isinstance(self.weight, ProductTensor) and self.plan.quantization is None:
            return product_bytes(self.layer.shape, self.weight.pair.rank)
        return working_bytes(self.layer.shape)


def _factorized(asked: _Factorization) -> Factors:
    layer = asked.layer
    bias = None if asked.bias is None else asked.bias.read()
    if layer.bias is not None and bias is not None:
        require_finite(layer.bias, bias, asked.source)
    if isinstance(asked.weight, ProductTensor) and asked.plan.quantization is None:
        return squeezed(layer, asked.plan, asked.weight, bias=bias, device=asked.device)
    weight = asked.weight.read().to(asked.device)
    start = None if asked.start is None else asked.start.to(asked.device)
    found = asked.decomposition if start is None else None
    if found is not None:
        found = replace(found, basis=found.basis.to(asked.device))
    elif (
        asked.precision is not None
        and layer.groups == 1
        and min(layer.shape) >= asked.precision.side
        and asked.plan.rank
    ):
        # There was no room for what was found when it was measured, and the same is found again.
        matrix = as_matrix(layer, weight)
        if start is not None:
            matrix = written(in_float64(matrix), start).to(torch.float32)
        found = decompose(matrix, None, asked.precision)
    return factorize(layer, asked.plan, weight, bias=bias, decomposition=found, start=start)


def rewritten_module(
    rewriting: Rewriting, module: nn.Module, run: Run, *, done: Callable[[str, float], None]
) -> nn.Module:
    """A copy of `module` with low-rank layers; the weights that are factorized are never copied.

    A transformers model is told of them, so that it can be saved.

    `done` is told what `rewritten_tensors` tells it.
    """
    dense = {layer.name: module.get_submodule(layer.module) for layer, _ in rewriting.factorized}
    left_out = {id(getattr(dense[layer.name], layer.parameter)): None for layer, _ in rewriting.factorized}
    compressed = copy.deepcopy(module, left_out)
    for layer, plan, factors in rewritten_factors(rewriting, run):
        if (start := start_matrix(layer, plan.share, rewriting.initial)) is not None:
            like = getattr(dense[layer.name], layer.parameter)
            weight = formed_weight(layer, plan, factors.tensors, start=start, dtype=like.dtype)
            owner = compressed.get_submodule(layer.module)
            _put_parameter(owner, layer.parameter, weight, like=like)
            if layer.bias is not None:
                _put_parameter(owner, "bias", factors.tensors[join(layer.name, "bias")], like=dense[layer.name].bias)
            if layer.head is not None:
                compressed.get_submodule(layer.head).weight = owner.weight
        elif layer.kind == "parameter":
            like = getattr(dense[layer.name], layer.parameter)
            _put_filled_factors(compressed.get_submodule(layer.module), layer, plan, like=like, tensors=factors.tensors)
        else:
            copied = compressed.get_submodule(layer.module)
            low_rank = filled_layer(layer, plan, dense[layer.name], tensors=factors.tensors, copied=copied)
            carry_state_hooks(copied, low_rank)
            for place in (layer.module, *layer.places):
                compressed = put_layer(compressed, place, low_rank)
            if layer.places and layer.kind == "embedding" and is_of_transformers(compressed):
                put_beside(compressed, layer.module, list(layer.places))
        if layer.head is not None and start is None:
            tie_head(compressed, layer.head, layer.module)
        done(layer.name, factors.error)
    own = dict(compressed.named_buffers())
    with torch.no_grad():
        for in_model, tensor in rewriting.statistics.values():
            own[in_model].copy_(require_in_range(in_model, tensor))
    compressed = fuse_experts(compressed)
    batch_experts(compressed, rewriting.spec_of_modules.batched)
    let_script(compressed)
    modeling = sys.modules.get("transformers.modeling_utils")
    pairs = rewriting.spec_of_modules.without_initial()
    if pairs.layers and modeling is not None and isinstance(compressed, modeling.PreTrainedModel):
        from compressor.lowrank.quantizer import tell_transformers

        tell_transformers(compressed, pairs)
    return compressed


def filled_layer(
    layer: Layer,
    plan: LayerPlan,
    dense: nn.Module,
    *,
    tensors: Mapping[str, Tensor],
    copied: nn.Module | None = None,
    start: Tensor | None = None,
) -> nn.Module:
    """The low-rank layer that takes the place of a dense one, with the numbers that stand for it, and its hooks.

    Where it is a parameter of a module that is factorized, a copy of this module that shares all else with it. Hooks
    may be bound to other modules of a model; where the model is a copy, they are those of the layer as it was `copied`.
    In a form of what training wrote it is an `InitialLayer` with its `start`, a `d_out x d_in` matrix.
    """
    assert plan.rank is not None
    if layer.kind == "parameter" and start is not None:
        copied, like = to_be_factored(dense), getattr(dense, layer.parameter)
        _put_parameter(
            copied, layer.parameter, formed_weight(layer, plan, tensors, start=start, dtype=like.dtype), like=like
        )
        return copied
    if layer.kind == "parameter":
        copied = to_be_factored(dense)
        _put_filled_factors(copied, layer, plan, like=getattr(dense, layer.parameter), tensors=tensors)
        return copied
    low_rank = low_rank_layer(dense, plan.form, plan.rank)
    prefix = f"{layer.name}." if layer.name else ""
    # Assigned, not copied: the factors are the layer's own numbers from here on.
    assert isinstance(low_rank.weight, Tensor)
    place = low_rank.weight.device
    if low_rank.weight.is_meta:  # the dense weight is not in memory: the layer goes where its factors are
        place = next(iter(tensors.values())).device
        # Not `to_empty`, which would empty what the layer shares with the dense one: its bias is in memory.
        low_rank._apply(lambda own: torch.empty_like(own, device=place) if own.is_meta else own)  # type: ignore[no-untyped-call]
    own = {name.removeprefix(prefix): tensor.to(place) for name, tensor in tensors.items()}
    low_rank.load_state_dict(own, assign=True)
    if isinstance(low_rank, InitialLayer):
        assert start is not None
        low_rank.fill_start(start)
    weight = dense.weight
    assert isinstance(weight, Tensor)
    for dimensions, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == dimensions and not weight.is_contiguous() and weight.is_contiguous(memory_format=order):
            low_rank.to(memory_format=order)  # type: ignore[call-overload]
    carry_over(dense if copied is None else copied, low_rank)
    return low_rank


def _put_parameter(owner: nn.Module, name: str, values: Tensor, *, like: Tensor | nn.Module) -> None:
    """Give a module a parameter with the values, placed in memory and as trainable as another."""
    assert isinstance(like, Tensor)
    values = values if like.is_meta else torch.empty_like(like).copy_(values)
    setattr(owner, name, nn.Parameter(values, like.requires_grad))
    if isinstance(owner, nn.RNNBase):
        with torch.no_grad():
            owner._init_flat_weights()  # it keeps a list of its weights


def _put_filled_factors(
    owner: nn.Module, layer: Layer, plan: LayerPlan, *, like: Tensor, tensors: Mapping[str, Tensor]
) -> None:
    assert plan.rank is not None
    put_factors(owner, layer.parameter, plan.form, rank=plan.rank, like=like, weight=layer)
    fill_factors(
        owner, layer.parameter, {name: tensors[join(layer.name, name)] for name in FORMS[plan.form].names_at(plan.rank)}
    )
