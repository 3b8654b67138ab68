"""Layers in forms of what training wrote: their initial weights, checked, and the dense weights formed from them.

A file has the factors, a share for each layer, and a record of the draws of the initialization, or the name of a
checkpoint. Whoever opens it sees dense tensors: they are formed when they are read. Only transformers fills modules by
itself, which are `InitialLayer`s until their weights are formed.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.forms import FORMS, InitialForm, InitialLayer, StoredWeight, formed_in
from compressor.initial import InitialWeights, initial_name, initial_tensor
from compressor.io import Checkpoint, StoredTensor, TensorInfo, require_in_range
from compressor.lowrank.modules import carry_hooks, carry_over, carry_state_hooks, low_rank_layer, put_layer, tied_head
from compressor.lowrank.spec import METADATA_KEY, InitialRecord, InitialTensor, LayerSpec, LowRankSpec
from compressor.lowrank.stored_pairs import file_record, join, spec_of, stored_pairs
from compressor.lowrank.tensor_format import as_matrix, dense_infos
from compressor.network import Layer, layer_name
from compressor.planning import LayerPlan
from compressor.torch_state import CPU, brought_to, in_float64


def start_matrix(
    layer: Layer, share: float | None, initial: InitialWeights | None, *, device: torch.device = CPU
) -> Tensor | None:
    """The share of its initial matrix that a layer still has, `d_out x d_in` in float64; None without a share."""
    if share is None:
        return None
    return share * in_float64(as_matrix(layer, brought_to(device, initial_weight(layer, initial))))


def initial_weight(layer: Layer, initial: InitialWeights | None) -> Tensor:
    """The initial weights of a layer that has some, as they are stored."""
    found = None if initial is None else initial_tensor(layer, initial)
    if found is None:
        raise _no_initial(layer)
    return found


def _no_initial(layer: Layer) -> BadInput:
    return BadInput(
        f"{layer.name} has no initial weights of its shape",
        option="initial",
        remedy="name those that the plan was made with, or give the layer another form",
    )


def formed_weight(
    layer: Layer, plan: LayerPlan, tensors: Mapping[str, Tensor], *, start: Tensor, dtype: torch.dtype
) -> Tensor:
    """The dense weight that a layer's factors and its start, `d_out x d_in`, are formed to."""
    form = FORMS[plan.form]
    assert isinstance(form, InitialForm)
    assert plan.rank is not None
    own = {name: tensors[join(layer.name, name)] for name in form.names_at(plan.rank)}
    return form.formed(layer, own, start.to(formed_in(dtype))).to(dtype)


def initial_record(layers: Mapping[str, Layer], initial: InitialWeights | None) -> InitialRecord | None:
    """What a compressed model says of the initial weights of some of its layers; None where it needs none."""
    tensors = {}
    for name, layer in layers.items():
        for own in (initial_name(layer), layer.tensor):
            if name not in tensors and initial is not None and (found := initial.fingerprint(own)) is not None:
                tensors[name] = InitialTensor(own, found)
        if name not in tensors:
            raise _no_initial(layer)
    if initial is None or not tensors:
        return None
    if initial.draws is not None:
        return InitialRecord(tensors, initial.draws.only({each.name for each in tensors.values()}))
    return InitialRecord(tensors, None, initial.checkpoint_name or initial.source, initial.digest)


@dataclass(frozen=True, eq=False)
class RecordedStarts:
    """The initial weights that a compressed model names: drawn again, or read from those that are given."""

    record: InitialRecord
    given: InitialWeights | None
    source: Path | str | None

    def __post_init__(self) -> None:
        if self.record.draws is None and self.given is None:
            name = self.record.checkpoint or "its initial weights"
            first = next(iter(self.record.tensors.values())).name
            known = f" (SHA-256 {self.record.digest})" if self.record.digest else ""
            # Where no source is known transformers itself loads a folder.
            load = "" if self.source else f", with `compressor.load_model(FOLDER, initial={name!r})`"
            layers = f"{first}{_and_more(len(self.record.tensors))}"
            raise BadInput(
                f"needs {name}, to which what training wrote is added, for {layers}",
                where=self.source,
                option="initial",
                remedy=f"give it as `initial`{load}: {name}{known}",
            )

    def start(self, layer: str, share: float, *, weight: StoredWeight, dtype: torch.dtype) -> Tensor:
        """The share of a layer's initial matrix, `d_out x d_in`, for a dense weight of this dtype.

        Raises `BadInput` where the initial weights are not those that the model was compressed with.
        """
        found = self.tensor(layer, weight.tensor_shape)
        return (share * in_float64(as_matrix(weight, found))).to(formed_in(dtype))

    def tensor(self, layer: str, shape: tuple[int, ...]) -> Tensor:
        """The initial weights of a layer, of this shape; `BadInput` where they are others than those recorded."""
        expected = self.record.tensors[layer]
        found = self._read(expected.name)
        if found is None or tuple(found.shape) != shape:
            raise self._other(expected.name, "there is none of its shape")
        if (defect := expected.fingerprint.defect(found)) is not None:
            raise self._other(expected.name, defect)
        return found

    def _read(self, name: str) -> Tensor | None:
        draws = self.record.draws
        if draws is None:
            assert self.given is not None
            return self.given.read(name)
        try:
            return draws.tensor(name)
        except KeyError:
            return None

    def _other(self, name: str, defect: str) -> BadInput:
        draws = self.record.draws
        if draws is None:
            assert self.given is not None
            return BadInput(
                f"{name} of {self.given.source} is not what this model was compressed with: {defect}",
                where=self.source,
                option="initial",
                remedy=f"give {self.record.checkpoint}",
            )
        if draws.torch_version == torch.__version__:
            what = f"{name} is not drawn as it was when this model was compressed: {defect}"
            remedy = "get it again if it was changed; else restore it with 'compress restore' where it was made"
            return BadInput(what, where=self.source, remedy=remedy)
        return BadInput(
            f"PyTorch {torch.__version__} does not draw {name} as PyTorch {draws.torch_version} did: {defect}",
            where=self.source,
            remedy=f"restore it with 'compress restore' under PyTorch {draws.torch_version}",
        )


@dataclass(frozen=True, eq=False)
class FormedTensor:
    """The dense weight of a layer, formed whenever it is read."""

    layer: str
    spec: LayerSpec
    stands_for: StoredWeight
    factors: Mapping[str, StoredTensor]
    starts: RecordedStarts
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stands_for.tensor_shape

    @property
    def region(self) -> Hashable:
        return id(self)

    def read(self) -> Tensor:
        """The weight, in memory of its own."""
        form = _form(self.spec)
        assert self.spec.share is not None
        start = self.starts.start(self.layer, self.spec.share, weight=self.stands_for, dtype=self.dtype)
        own = {name: tensor.read() for name, tensor in self.factors.items()}
        if own and (defect := form.defect(self.spec.rank, own.__getitem__)) is not None:
            raise _damaged(join(self.layer, defect), self.starts.source)
        formed = form.formed(self.stands_for, own, start).to(self.dtype)
        return require_in_range(join(self.layer, "weight"), formed).contiguous()


def _form(spec: LayerSpec) -> InitialForm:
    form = FORMS[spec.form]
    assert isinstance(form, InitialForm)
    return form


def _require_modest(record: InitialRecord, numbers: int, source: Path | str | None) -> None:
    """Refuse draws that no initialization of a model of so many numbers makes, before any of them is made."""
    if record.draws is not None and not record.draws.is_within(numbers):
        raise _damaged("the record of its initialization draws more numbers than the model has", source)


def _and_more(count: int) -> str:
    return "" if count == 1 else f" and {count - 1} more"


def _damaged(what: str, source: Path | str | None) -> BadInput:
    return BadInput(what, where=source, remedy="compress the original checkpoint again")


def formed_checkpoint(checkpoint: Checkpoint, given: InitialWeights | None = None) -> Checkpoint:
    """The checkpoint with a dense tensor for every layer in a form of what training wrote; nothing is read yet.

    `given` are the initial weights, where the file names a checkpoint instead of having a record of the draws. Raises
    `BadInput` where they are missing, or the factors do not fit together.
    """
    spec = spec_of(checkpoint)
    if not spec.from_initial:
        return checkpoint
    assert spec.initial is not None, "a specification with such layers has a record"
    starts = RecordedStarts(spec.initial, given, checkpoint.source)
    markers = {layer_name(name): info for name, info in checkpoint.tensors.items()}
    changed: dict[str, StoredTensor | None] = {}
    for name, layer in spec.from_initial.items():
        marker = markers.get(name)
        dense = None if marker is None else _formed_tensor(name, layer, marker, checkpoint=checkpoint, starts=starts)
        if marker is None or dense is None:
            raise _damaged(f"the factors of {name} do not fit together", checkpoint.source)
        changed |= {join(name, factor): None for factor in dense.factors} | {marker.name: dense}
    record = file_record(checkpoint) | spec.without_initial().to_dict()
    record.pop("initial", None)
    formed = replace(
        checkpoint.changed(changed),
        metadata={**checkpoint.metadata, METADATA_KEY: json.dumps(record, sort_keys=True)},
        config=None if checkpoint.config is None else formed_config(checkpoint.config),
    )
    # Other layers may be pairs or integers, which are fewer numbers than were drawn for them.
    restored = dense_infos(formed, stored_pairs(formed))
    _require_modest(spec.initial, sum(info.elements for info, _ in restored.values()), checkpoint.source)
    return formed


def formed_layers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The layers whose dense weights are computed from initial ones when they are read."""
    stored = (checkpoint.stored(name) for name in checkpoint.tensors)
    return tuple(each.layer for each in stored if isinstance(each, FormedTensor))


def needs_initial(checkpoint: Checkpoint) -> bool:
    """Whether dense weights that `formed_checkpoint` forms need initial ones which a file names and does not draw."""
    stored = (checkpoint.stored(name) for name in checkpoint.tensors)
    return any(isinstance(each, FormedTensor) and each.starts.record.draws is None for each in stored)


def _formed_tensor(
    name: str, spec: LayerSpec, marker: TensorInfo, *, checkpoint: Checkpoint, starts: RecordedStarts
) -> FormedTensor | None:
    """The dense weight that takes the place of a marker; None where the factors are not those of its form."""
    form, stands_for = _form(spec), StoredWeight(spec.kind, marker.shape[1:])
    if len(marker.shape) < 3 or marker.shape[0] != 0 or not form.takes(stands_for):
        return None
    if spec.rank > min(form.sides(stands_for)):
        return None
    factors: dict[str, StoredTensor] = {}
    for info in form.infos(stands_for, spec.rank, marker.dtype):
        found = checkpoint.tensors.get(join(name, info.name))
        if found is None or found.shape != info.shape:
            return None
        factors[info.name] = checkpoint.stored(found.name)
    return FormedTensor(name, spec, stands_for, factors, starts, marker.dtype)


def formed_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The configuration of a model whose layers in forms of what training wrote are dense."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        return config
    try:
        return LowRankSpec.from_dict(said).without_initial().described(config)
    except ValueError:
        return config


# The initial weights of the model that is being loaded, where it names a checkpoint.
_given: ContextVar[InitialWeights | None] = ContextVar("given", default=None)


@contextmanager
def initial_given(initial: InitialWeights | None) -> Iterator[None]:
    """Have transformers form layers from these initial weights in the block, where a folder names a checkpoint."""
    token = _given.set(initial)
    try:
        yield
    finally:
        _given.reset(token)


class _WaitingHead(nn.Module):
    """An output head until the weight of the embedding that it is tied to is formed: with its bias alone."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        weight, bias = dense.weight, dense.bias
        assert isinstance(weight, Tensor)
        self.dense = (dense,)  # in a tuple, so that it is no part of this module
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        self.register_buffer("weight", weight.new_empty(0), persistent=False)


@dataclass(frozen=True, eq=False)
class PutLayer:
    """An `InitialLayer` in a model that is about to be filled, and the output head that is tied to it."""

    layer: InitialLayer
    head: str | None
    declared: tuple[tuple[nn.Module, str, dict[str, str]], ...] = ()
    """What transformers' modules said of the tie: the module, the attribute, and its value."""


def put_initial(root: nn.Module, name: str, form: str, *, rank: int) -> PutLayer:
    """Put an unfilled `InitialLayer` in all the places of a dense layer below the root.

    A head that is tied to it waits for its weight, and transformers does not try to tie it. ValueError for a layer that
    cannot be factorized.
    """
    head, dense = tied_head(root, name), root.get_submodule(name)
    layer = low_rank_layer(dense, form, rank)
    assert isinstance(layer, InitialLayer)
    carry_over(dense, layer)
    carry_state_hooks(dense, layer)
    for place in [place for place, module in root.named_modules(remove_duplicate=False) if module is dense]:
        put_layer(root, place, layer)
    if head is None:
        return PutLayer(layer, None)
    put_layer(root, head, _WaitingHead(root.get_submodule(head)))
    declared = []
    for place, module in root.named_modules():
        prefix = f"{place}." if place else ""
        tied = f"{head.removeprefix(prefix)}.weight"
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            said = getattr(module, attribute, None)
            if isinstance(said, dict) and said.get(tied) == f"{name.removeprefix(prefix)}.weight":
                declared.append((module, attribute, said))
                setattr(module, attribute, {target: of for target, of in said.items() if target != tied})
    return PutLayer(layer, head, tuple(declared))


def form_layers(root: nn.Module, put: Mapping[str, PutLayer], spec: LowRankSpec, *, numbers: int) -> None:
    """Put the ordinary dense layers in the places of filled `InitialLayer`s, by their names in a specification.

    The dense model has so many `numbers`. Raises `BadInput` where initial weights are not those that the model was
    compressed with.
    """
    if not put:
        return
    assert spec.initial is not None
    _require_modest(spec.initial, numbers, None)
    starts = RecordedStarts(spec.initial, _given.get(), None)
    for name, each in put.items():
        layer, share = each.layer, spec.layers[name].share
        assert share is not None
        layer.fill_start(starts.start(name, share, weight=layer.stands_for, dtype=layer.weight.dtype))
        dense = _put_formed(root, layer)
        if each.head is not None:
            waiting = root.get_submodule(each.head)
            assert isinstance(waiting, _WaitingHead)
            assert isinstance(dense.weight, nn.Parameter)
            tied = waiting.dense[0]
            tied.register_parameter("weight", dense.weight)
            tied.register_parameter("bias", waiting.bias if isinstance(waiting.bias, nn.Parameter) else None)
            put_layer(root, each.head, tied.train(waiting.training))
            for module, attribute, said in each.declared:
                setattr(module, attribute, said)


def formed(root: nn.Module) -> nn.Module:
    """The module, with the ordinary dense layer in the place of every `InitialLayer`, each of which has its start.

    It is changed in place, unless it is such a layer itself.
    """
    if isinstance(root, InitialLayer):
        return _formed(root)
    for layer in [each for each in root.modules() if isinstance(each, InitialLayer)]:
        _put_formed(root, layer)
    return root


def _put_formed(root: nn.Module, layer: InitialLayer) -> nn.Module:
    """Put the dense layer in all the places of an `InitialLayer` below the root."""
    dense = _formed(layer)
    for place in [place for place, each in root.named_modules(remove_duplicate=False) if each is layer]:
        put_layer(root, place, dense)
    return dense


def _formed(layer: InitialLayer) -> nn.Module:
    dense = layer.formed()
    carry_hooks(layer, dense)
    carry_state_hooks(layer, dense)
    return dense
