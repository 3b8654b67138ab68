"""A checkpoint that is compressed already, seen as a dense one: each pair as the weight that it stands for.

The weight is multiplied out where somebody reads it. Its singular values, and its pairs of lower rank, come from its
factors alone.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.documents import text_mapping
from compressor.encodings import encoded_in
from compressor.errors import BadInput
from compressor.factorize import FactorPair, PivotedPair, product_difference, product_norm, product_svd
from compressor.forms import FORMS, GROUPED, SPATIAL, TRANSPOSED, DenseWeight, quantization_of
from compressor.io import Checkpoint, StoredTensor, TensorInfo, require_finite
from compressor.lowrank.sources import said_of_source
from compressor.lowrank.spec import METADATA_KEY, LayerSpec, LowRankSpec
from compressor.lowrank.stacked import stacks_of
from compressor.lowrank.stored_pairs import StoredPair, file_record, join, stored_name, stored_pairs
from compressor.lowrank.tensor_format import (
    DenseWeights,
    Factors,
    dense_aliases,
    dense_infos,
    require_memory,
    stored_tensors,
)
from compressor.network import Layer, StoredAs, layer_name
from compressor.planning import LayerPlan
from compressor.torch_state import in_float64


@dataclass(frozen=True, eq=False)
class ProductTensor:
    """The dense weight of a pair, multiplied out whenever it is read.

    `parts` are the tensors that the file has in its place, with marker and bias, by their names there.
    """

    pair: StoredPair
    parts: Mapping[str, StoredTensor]
    source: Path | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pair.tensor_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.pair.dtype

    @property
    def region(self) -> Hashable:
        return id(self)

    def read(self) -> Tensor:
        """The weight, in memory of its own and in its own dtype.

        Raises:
            BadInput: it does not fit into memory, or its tensors cannot be used.
        """
        require_memory(self.pair, self.source)
        matrix = FORMS[self.pair.form].product(self.pair, self._tensors())
        dense = (matrix.T if self.pair.kind in TRANSPOSED else matrix).reshape(self.shape)
        return dense.to(self.dtype).contiguous()

    def factors(self) -> FactorPair:
        """The pair as factors of its `d_out x d_in` matrix, in float64."""
        return _matrix_factors(self.pair, self.pair.form, self._tensors())

    @property
    def infos(self) -> list[TensorInfo]:
        """The tensors that the file has in its place."""
        return [TensorInfo(name, part.shape, part.dtype) for name, part in self.parts.items()]

    @property
    def spec(self) -> LayerSpec:
        """What a model says of it that has it as it is."""
        return LayerSpec(self.pair.form, self.pair.rank, self.pair.kind)

    @property
    def stored_as(self) -> StoredAs:
        """Its form and rank, and what it takes."""
        form, rank = FORMS[self.pair.form], self.pair.rank
        nbytes = form.nbytes(self.pair, rank, self.dtype.itemsize)
        return StoredAs(self.pair.form, rank, form.parameters(self.pair, rank), nbytes)

    @property
    def obstacle(self) -> str | None:
        """Why its rank is not lowered; None where it can be."""
        if (quantization := quantization_of(self.pair.form)) is not None:
            return f"it has {quantization.bits} bits already, and stays as it is"
        apart = self.pair.form in (SPATIAL.name, GROUPED.name)
        return f"a {self.pair.form} pair already, which stays as it is" if apart else None

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the pair by their names below the layer's, those with fractions in float64."""
        names = {name: join(self.pair.name, name) for name in FORMS[self.pair.form].names_at(self.pair.rank)}
        found = {name: self.parts[stored].read() for name, stored in names.items()}
        for name, tensor in found.items():
            require_finite(names[name], tensor, self.source)
        if (defect := FORMS[self.pair.form].defect(self.pair.rank, found.__getitem__)) is not None:
            remedy = "compress the original checkpoint again"
            raise BadInput(join(self.pair.name, defect), where=self.source, remedy=remedy)
        return {name: in_float64(each) if each.is_floating_point() else each for name, each in found.items()}


def _matrix_factors(weight: DenseWeight, form: str, tensors: Mapping[str, Tensor]) -> FactorPair:
    """Stored tensors of a form that factorizes a layer's own matrix, as factors of this `d_out x d_in` matrix."""
    pair = FORMS[form].merged(weight.kind, tensors)
    if isinstance(pair, PivotedPair):
        own = torch.eye(pair.rank, dtype=pair.up.dtype, device=pair.up.device)
        return FactorPair(up=torch.cat([own, pair.up]).index_select(0, pair.order.long()), down=pair.down)
    up, down = pair.up.flatten(1), pair.down.flatten(1)
    # The tensor of a transposed convolution is the transpose of its matrix.
    return FactorPair(up=down.T, down=up.T) if weight.kind == "transposed convolution" else FactorPair(up, down)


def multiplied_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a dense tensor for each of its pairs; nothing is read yet.

    Its record says how it was made, and no longer that it has pairs.
    """
    pairs = stored_pairs(checkpoint)
    if not pairs:
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    stored: dict[str, StoredTensor] = {}
    for name, (info, copied_from) in dense_infos(checkpoint, pairs).items():
        if copied_from is None:
            pair = pairs[layer_name(name)]
            names = [each for each in pair.tensors.values() if stored_name(checkpoint, each) in checkpoint.tensors]
            parts = {each: checkpoint.stored(each) for each in names}
            stored[name] = ProductTensor(pair, parts, checkpoint.source)
        else:
            stored[name] = checkpoint.stored(copied_from)
        tensors[name] = info
    record = file_record(checkpoint)
    # How other layers are stored, and which were taken apart.
    others = LowRankSpec({}, source=said_of_source(checkpoint) or None, stacks=stacks_of(checkpoint))
    recorded = dense_aliases(checkpoint, pairs) | text_mapping(record.get("aliases"))
    aliases = {alias: name for alias, name in recorded.items() if name in tensors and alias not in tensors}
    kept = {key: said for key, said in record.items() if key != "batched"}  # they are read one by one
    without = {**kept, "layers": {}} if "layers" in kept else kept
    return replace(
        checkpoint,
        tensors=tensors,
        aliases=aliases,
        metadata={**checkpoint.metadata, METADATA_KEY: json.dumps(without, sort_keys=True)},
        config=None if checkpoint.config is None else others.described(checkpoint.config),
        _stored=stored,
    )


def product_in(checkpoint: Checkpoint, tensor: str) -> ProductTensor | None:
    """The pair that a dense tensor of a checkpoint is stored as; None for any other."""
    stored = checkpoint.stored(tensor)
    return stored if isinstance(stored, ProductTensor) else None


def stored_infos(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The tensors that the files hold, which are other ones for pairs and for what others quantized."""
    beside = _biases_of_pairs(checkpoint)
    # Where others quantized a tensor that holds several layers, it is counted once, as it is stored.
    whole = {name: held for name, held in checkpoint.held_by.items() if encoded_in(checkpoint, held) is not None}
    found: list[TensorInfo] = []
    for name in dict.fromkeys(whole.get(name, name) for name in checkpoint.tensors):
        info = checkpoint.wholes[name] if name in checkpoint.wholes else checkpoint.tensors[name]
        pair, encoded = product_in(checkpoint, name), encoded_in(checkpoint, name)
        own = [] if name in beside else [info]
        found += pair.infos if pair is not None else own if encoded is None else encoded.infos
    return found


def _biases_of_pairs(checkpoint: Checkpoint) -> set[str]:
    """The biases that are stored with pairs."""
    pairs = (product_in(checkpoint, name) for name in checkpoint.tensors)
    return {join(each.pair.name, "bias") for each in pairs if each is not None and each.pair.has_bias}


def squeezed(
    layer: Layer, plan: LayerPlan, weight: ProductTensor, *, bias: Tensor | None, device: torch.device
) -> Factors:
    """The factors of a lower rank of a layer that is a pair already: the best in the Frobenius norm, in its dtype.

    Neither they nor their error come from the matrix, which is not multiplied out.
    """
    assert plan.rank is not None
    before = weight.factors()
    before = FactorPair(up=before.up.to(device), down=before.down.to(device))
    pair = product_svd(before).pair(plan.rank)
    tensors = stored_tensors(layer, plan, pair, dense=DenseWeights(before.up, bias, weight.dtype), metric=None)
    own = {name: tensors[join(layer.name, name)] for name in FORMS[plan.form].names_at(plan.rank)}
    wide = {name: in_float64(each) if each.is_floating_point() else each for name, each in own.items()}
    after = _matrix_factors(layer, plan.form, wide)
    total = product_norm(before)
    error = product_norm(product_difference(before, after)) / total if total > 0 else 0.0
    return Factors(tensors, error)
