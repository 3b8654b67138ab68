"""What makes the fine-tune out of its base: pairs or integers for matrices, and everything else that changed in full.

Written as one safetensors file of pairs, `X.down.weight` and `X.up.weight` for what was added to `share * X.weight` of
the base, or what quantized forms have in their place, and changed tensors under their own names; or put into a copy of
the base module, whose layers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.fine_tuning.difference import BaseShare, Difference
from compressor.forms import FORMS
from compressor.io import Artifact, Checkpoint, Provenance, TensorInfo, require_in_range
from compressor.lowrank import (
    DenseWeights,
    Factors,
    LowRankSpec,
    StoredErrors,
    approximate,
    as_matrix,
    carry_over,
    join,
    layer_spec,
    low_rank_layer,
    put_layer,
    remove_call_hooks,
    stored_error,
    stored_tensors,
)
from compressor.lowrank.tensor_format import pair_infos, stored_matrix
from compressor.model import load_state
from compressor.network import Layer
from compressor.planning import LayerPlan, Plan
from compressor.recipe import TrainingRecipe
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class Adaptation:
    """A difference, the plan for its matrices, the recipe of the fine-tuning, and the sha256 of the base."""

    difference: Difference
    layers: tuple[Layer, ...]
    plan: Plan
    recipe: TrainingRecipe
    base_digest: str | None
    stored: Checkpoint | None = None
    """The file of pairs that this was read from, where the pairs are there already."""
    provenance: Provenance | None = None
    """What was asked for, which the output will say."""
    found: Mapping[str, Factors] = field(default_factory=dict)
    """What stands for the differences of layers, by name, where it was found with the plan."""

    @property
    def paired(self) -> tuple[tuple[Layer, LayerPlan], ...]:
        """The layers whose difference becomes a pair, in the order of the plan; a pair of rank 0 is none."""
        layers = {layer.name: layer for layer in self.layers}
        return tuple((layers[each.name], each) for each in self.plan.layers if each.rank or each.quantization)

    @property
    def shares(self) -> dict[str, BaseShare]:
        """How much of the base is left in each layer whose difference becomes a pair, by the layer's name."""
        known = self.difference.shares
        return {layer.name: known[layer.tensor] for layer, _ in self.paired if layer.tensor in known}

    @property
    def numbers(self) -> int:
        """How many numbers stand for the difference, a quantized one counted as one."""
        tuned = self.difference.tuned.tensors
        of_pairs = (FORMS[plan.form].numbers(layer, plan.rank or 0) for layer, plan in self.paired)
        return sum(tuned[name].elements for name in self.in_full) + sum(of_pairs)

    def stored_dtype(self, layer: Layer, plan: LayerPlan) -> torch.dtype:
        """The dtype of what is stored for a layer: that of its weight, and bfloat16 of the scales of integers.

        Float16, which a layer's own scales would have, is too coarse for those of small differences. What was found
        with the plan has scales already, by which it was measured.
        """
        narrow = plan.quantization is not None and layer.name not in self.found
        return torch.bfloat16 if narrow else self.difference.tuned.tensors[layer.tensor].dtype

    @property
    def in_full(self) -> tuple[str, ...]:
        """The changed tensors that no pair stands for."""
        of_pairs = {layer.tensor for layer, _ in self.paired}
        tuned = self.difference.tuned
        return tuple(name for name in tuned.tensors if name in self.difference.changed and name not in of_pairs)

    def factors(self, layer: Layer, plan: LayerPlan, device: torch.device) -> Factors:
        """What stands for a layer's difference, computed in float64 and rounded as it is stored, or as stored."""
        if layer.name in self.found:
            return self.found[layer.name]
        if self.stored is not None:
            roles = (join(layer.name, f"{factor}.weight") for factor in ("down", "up"))
            return Factors({name: self.stored.read(name) for name in roles}, math.nan)
        matrix = as_matrix(layer, self.difference.checkpoint.read(layer.tensor)).to(device)
        dense = DenseWeights(matrix, bias=None, dtype=self.stored_dtype(layer, plan))
        tensors = stored_tensors(layer, plan, approximate(layer, plan, matrix), dense=dense, metric=None)
        for name, tensor in tensors.items():
            require_in_range(name, tensor)
        return Factors(tensors, stored_error(layer, plan, tensors, matrix=matrix, metric=None))


def pair_file_infos(adaptation: Adaptation) -> list[TensorInfo]:
    """Name, shape and dtype of every tensor of the file of pairs."""
    tuned = adaptation.difference.tuned.tensors
    infos = [tuned[name] for name in adaptation.in_full]
    for layer, plan in adaptation.paired:
        infos += pair_infos(layer, plan, adaptation.stored_dtype(layer, plan), bias=None)
    return infos


def pair_file_tensors(
    adaptation: Adaptation, device: torch.device, done: Callable[[str, float], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file of pairs, one layer at a time; `done` is told each pair's relative error."""
    for name in adaptation.in_full:
        yield name, adaptation.difference.tuned.read(name)
    for layer, plan in adaptation.paired:
        factors = adaptation.factors(layer, plan, device)
        yield from factors.tensors.items()
        done(layer.name, factors.error)


def pair_file_artifact(adaptation: Adaptation, device: torch.device, errors: StoredErrors) -> Artifact:
    """The file of pairs, computed on `device`; the errors of the pairs are noted meanwhile."""
    return Artifact(
        form="file",
        infos=pair_file_infos(adaptation),
        tensors=partial(pair_file_tensors, adaptation, device, errors),
        metadata=adaptation_metadata(adaptation, in_file=True),
    )


def adaptation_metadata(adaptation: Adaptation, *, in_file: bool) -> dict[str, str]:
    """What a file of a difference says of itself: how it was made, and of which base."""
    difference, plan = adaptation.difference, adaptation.plan
    base = difference.base
    spec = LowRankSpec(
        {layer.name: layer_spec(layer, each, difference.share(layer.tensor)) for layer, each in adaptation.paired}
    )
    record: dict[str, Any] = {
        "source": plan.source if difference.tuned.source is None else difference.tuned.source.name,
        "digest": plan.digest,
        "base": {
            "source": None if base.source is None else base.source.name,
            "digest": adaptation.base_digest,
        },
        "budget": plan.budget.to_dict(),
        "recipe": adaptation.recipe.known(),
    }
    tuned = difference.tuned.tensors
    quantized = [layer for layer, each in adaptation.paired if each.quantization is not None]
    if quantized:  # whose tensors do not tell it
        record["dtypes"] = {layer.name: str(tuned[layer.tensor].dtype).removeprefix("torch.") for layer in quantized}
    if adaptation.provenance is not None and in_file:  # a folder has a file of them
        record["options"] = dict(adaptation.provenance.options)
    return {"format": "pt"} | spec.to_metadata(record)


class AdaptedLayer(nn.Module):
    """A layer of the base with a low-rank pair beside it: `y = base(x) + pair(x)`."""

    __jit_unused_properties__: ClassVar = ["weight"]

    def __init__(self, base: nn.Module, pair: nn.Module) -> None:
        super().__init__()
        self.base, self.pair = base, pair

    @property
    def weight(self) -> Tensor:
        """The base layer's, for code that asks for its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.base(input) + self.pair(input)
        return result


def adapted_module(
    adaptation: Adaptation,
    base: nn.Module,
    *,
    device: torch.device,
    done: Callable[[str, float], None],
    module_name: Callable[[str], str | None],
) -> nn.Module:
    """The base module, changed in place, that computes what base and adaptation do together.

    `module_name` maps names of the checkpoint to names of the module's state. The layers of the base keep their
    weights, multiplied by the share of them that is left.
    """
    module, difference = base, adaptation.difference
    if difference.vocabulary is not None:
        _extend_vocabulary(module, difference.vocabulary.after, where=difference.tuned.source)
    replaced = {}
    for name in adaptation.in_full:
        in_module = module_name(name)
        if in_module is None:
            raise BadInput(
                f"{name} is no tensor of the model by itself, so nothing can be added to it",
                where=difference.tuned.source,
                remedy="compress the fine-tune itself, without `base`",
            )
        replaced[in_module] = difference.tuned.read(name)
    state = dict(module.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, value in replaced.items():
            state[name].copy_(value)
    for layer, plan in adaptation.paired:
        dense = module.get_submodule(layer.module)
        factors = adaptation.factors(layer, plan, device)
        done(layer.name, factors.error)
        if layer.kind == "parameter":  # the module's own code multiplies with it
            weight = getattr(dense, layer.parameter)
            start = in_float64(weight.detach())
            change = stored_matrix(layer, plan, factors.tensors).to(start).reshape(start.shape)
            with torch.no_grad():
                weight.copy_(change.add_(start, alpha=difference.share(layer.tensor)))
            continue
        assert plan.rank is not None
        assert isinstance(dense.weight, Tensor)
        pair = low_rank_layer(dense, plan.form, plan.rank)
        prefix, bias = f"{layer.name}." if layer.name else "", FORMS[plan.form].bias
        own = {name.removeprefix(prefix): tensor for name, tensor in factors.tensors.items()}
        own |= {name: torch.zeros_like(each) for name, each in pair.named_parameters() if name == bias}
        if plan.quantization is None:
            load_state(pair, {name: tuple(tensor.shape) for name, tensor in own.items()}, own.__getitem__)
        else:  # whose scales are not to be rounded
            own = {name: tensor.to(dense.weight.device) for name, tensor in own.items() if tensor.numel()}
            pair.load_state_dict(own, strict=False, assign=True)
        with torch.no_grad():
            dense.weight.mul_(difference.share(layer.tensor))
        adapted = AdaptedLayer(dense, pair).train(dense.training)
        carry_over(dense, adapted)
        remove_call_hooks(dense)
        module = put_layer(module, layer.module, adapted)
    return module


def _extend_vocabulary(module: nn.Module, tokens: int, *, where: Path | None) -> None:
    """Give a transformers model rows for tokens that were added, whose values are filled in later."""
    resize = getattr(module, "resize_token_embeddings", None)
    if resize is None:
        raise BadInput(
            "tokens were added to it, and its base cannot be given rows for them",
            where=where,
            remedy="give a base with as many tokens as the fine-tune",
        )
    resize(tokens, mean_resizing=False)
