"""The file format: which tensors stand for a low-rank layer, written from a dense weight and multiplied back to one.

A plain pair replaces `X.weight` by `X.down.weight` (`r x d_in`) and `X.up.weight` (`d_out x r`), and `X.bias` becomes
`X.up.bias`. A pivoted pair has `X.up.weight` of `(d_out - r) x r` and `X.order` of `d_out` int32; its bias stays
`X.bias`. For a convolution of c channels `X.down.weight` is `r x c x kernel` and `X.up.weight` is `d_out x r x 1 ..` in
a channel pair, and `r x c x k_h x 1` and `d_out x r x 1 x k_w` in a spatial pair. For a transposed convolution of c
channels they are transposed convolutions too, of `c x r x 1 ..` and `r x d_out x kernel`. For an embedding of d_in
tokens `X.down.weight` is `d_in x r`, itself an embedding, and a head tied to it has no tensors. A zero-size `X.weight`
stays behind in each, so that a loader that does not know the format stops; its shape, one of `MARKERS`, says how the
dense weight is laid out, which the factors of a square one leave open. A weight `X` that is not called so, such as
`rnn.weight_ih_l0`, becomes `X.down.weight` and `X.up.weight` beside a zero-size `X`. Everything else is passed through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.documents import parse_json
from compressor.errors import BadInput
from compressor.factorize import (
    FactorizationSettings,
    FactorPair,
    Metric,
    PivotedPair,
    SpatialPair,
    TiedMetric,
    pivoted_pair,
    spatial_pair,
    tied_truncated_svd,
    truncated_svd,
    weighted_truncated_svd,
)
from compressor.factorize.settings import DEFAULTS
from compressor.io import Checkpoint, TensorInfo, require_in_range
from compressor.lowrank.modules import MARKERS
from compressor.lowrank.spec import METADATA_KEY, LowRankSpec
from compressor.measure.scale import power_of_two
from compressor.network import Kind, Layer, is_weight, layer_name
from compressor.network.forms import Form
from compressor.planning import LayerPlan

# Kinds of layers whose stored tensor is the transpose of the matrix that they apply to their inputs.
TRANSPOSED: tuple[Kind, ...] = ("transposed linear", "transposed convolution", "embedding")


@dataclass(frozen=True)
class StoredPair:
    """A low-rank layer found in a checkpoint: where its tensors are and which dense tensor it stands for."""

    name: str
    tensor: str
    form: Form
    rank: int
    kind: Kind
    tensor_shape: tuple[int, ...]
    has_bias: bool

    @property
    def tensors(self) -> dict[str, str]:
        """Role to tensor name, for the tensors that stand for the dense weight and bias."""
        roles = {"down": "down.weight", "up": "up.weight"}
        if self.form == "pivoted":
            roles["order"] = "order"
        if self.has_bias:
            roles["bias"] = "bias" if self.form == "pivoted" else "up.bias"
        return {"weight": self.tensor} | {role: join(self.name, tensor) for role, tensor in roles.items()}


def join(name: str, tensor: str) -> str:
    """A tensor's name under a layer's; the layer that is the whole model has an empty one."""
    return f"{name}.{tensor}" if name else tensor


def pair_infos(layer: Layer, plan: LayerPlan, dtype: torch.dtype, *, bias: TensorInfo | None) -> list[TensorInfo]:
    """Names, shapes and dtypes of the tensors that will stand for a layer, before any of them is computed."""
    assert plan.rank is not None
    (d_out, d_in), rank = layer.shape, plan.rank
    name = layer.name
    kernel = layer.tensor_shape[2:]
    pointwise = tuple(1 for _ in kernel)
    down: tuple[int, ...] = (rank, d_in)
    up: tuple[int, ...] = (d_out - rank if plan.form == "pivoted" else d_out, rank)
    if layer.kind == "embedding":
        down = (d_in, rank)
    elif layer.kind == "transposed convolution":
        down, up = (d_in, rank, *pointwise), (rank, layer.tensor_shape[1], *kernel)
    elif plan.form == "spatial":
        down, up = (rank, layer.tensor_shape[1], kernel[0], 1), (d_out, rank, 1, kernel[1])
    elif kernel:
        down, up = (rank, layer.tensor_shape[1], *kernel), (d_out, rank, *pointwise)
    infos = [
        TensorInfo(layer.tensor, MARKERS[layer.kind], dtype),
        TensorInfo(join(name, "down.weight"), down, dtype),
        TensorInfo(join(name, "up.weight"), up, dtype),
    ]
    if plan.form == "pivoted":
        infos.append(TensorInfo(join(name, "order"), (d_out,), torch.int32))
    if bias is not None:
        infos.append(TensorInfo(join(name, "bias" if plan.form == "pivoted" else "up.bias"), bias.shape, bias.dtype))
    return infos


def as_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """The stored weight as the `d_out x d_in` matrix that it applies to its inputs."""
    return weight.flatten(1).T if layer.kind in TRANSPOSED else weight.reshape(layer.shape)


@dataclass(frozen=True)
class DenseWeights:
    """The weights of a layer before it is factorized: its `d_out x d_in` matrix in float64, its bias, and its dtype."""

    matrix: Tensor
    bias: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Factors:
    """The tensors that stand for a layer, and the relative error of the matrix that they give as they are stored."""

    tensors: dict[str, Tensor]
    error: float


def factorize(
    layer: Layer, plan: LayerPlan, weight: Tensor, *, bias: Tensor | None, metric: Metric | TiedMetric | None = None
) -> Factors:
    """The factors of a layer: the arithmetic in float64, the result in the weight's own dtype.

    With a metric the pair is the best in it (a spatial one close to a local optimum), and so is the error; else both
    are of the Frobenius norm.
    """
    matrix = as_matrix(layer, weight).to(torch.float64)
    pair = approximate(layer, plan, matrix, metric=metric)
    tensors = stored_tensors(layer, plan, pair, dense=DenseWeights(matrix, bias, weight.dtype), metric=metric)
    return Factors(tensors, stored_error(layer, plan, tensors, matrix=matrix, metric=metric))


def approximate(
    layer: Layer,
    plan: LayerPlan,
    matrix: Tensor,
    *,
    metric: Metric | TiedMetric | None = None,
    settings: FactorizationSettings = DEFAULTS,
) -> FactorPair | SpatialPair:
    """The pair of the planned rank that is nearest to a `d_out x d_in` matrix, in float64."""
    assert plan.rank is not None
    if plan.form == "spatial":
        assert not isinstance(metric, TiedMetric)
        return spatial_pair(matrix.reshape(layer.tensor_shape), plan.rank, metric, settings=settings)
    if isinstance(metric, TiedMetric):
        return tied_truncated_svd(matrix, plan.rank, metric, settings=settings)
    return truncated_svd(matrix, plan.rank) if metric is None else weighted_truncated_svd(matrix, plan.rank, metric)


def stored_tensors(
    layer: Layer,
    plan: LayerPlan,
    pair: FactorPair | SpatialPair,
    *,
    dense: DenseWeights,
    metric: Metric | TiedMetric | None,
) -> dict[str, Tensor]:
    """The tensors by which a pair stands for a layer, in its planned form and the dtype of the dense one.

    Where the metric knows the mean of the inputs, the bias takes up what the change of the matrix makes of it.
    """
    matrix, bias, dtype = dense.matrix, dense.bias, dense.dtype
    stored: FactorPair | PivotedPair | SpatialPair
    if plan.form == "pivoted":
        assert isinstance(pair, FactorPair)
        stored = pivoted_pair(pair)
    else:
        stored = balanced(pair, dtype)
    stored = replace(stored, up=stored.up.to(dtype), down=stored.down.to(dtype))
    down = stored.down.T if layer.kind in ("embedding", "transposed convolution") else stored.down
    up = stored.up.T if layer.kind == "transposed convolution" else stored.up
    values: list[Tensor] = [stored.down.new_empty(0), down, up]
    if isinstance(stored, PivotedPair):
        values.append(stored.order)
    change = matrix - replace(stored, up=stored.up.to(torch.float64), down=stored.down.to(torch.float64)).product()
    if bias is not None:
        if isinstance(metric, Metric) and metric.mean is not None:
            bias = (bias.to(matrix) + change @ metric.mean).to(bias.dtype)
        values.append(bias)
    infos = pair_infos(layer, plan, dtype, bias=None if bias is None else TensorInfo("", tuple(bias.shape), bias.dtype))
    return {info.name: _row_major(value.reshape(info.shape)) for info, value in zip(infos, values, strict=True)}


def balanced(pair: FactorPair | SpatialPair, dtype: torch.dtype) -> FactorPair | SpatialPair:
    """The same pair, each component's column of `up` and row of `down` brought to like size, where `dtype` needs it.

    float16 does: what the factors of a matrix span is wider than its range. The other types only near their limits, and
    elsewhere a power of two changes no digit.
    """
    sizes = [factor.transpose(0, side).flatten(1).abs().amax(1) for factor, side in ((pair.up, 1), (pair.down, 0))]
    if dtype != torch.float16 and max(float(size.max()) for size in sizes) <= torch.finfo(dtype).max:
        return pair
    above, below = (np.frexp(size.cpu().numpy())[1] for size in sizes)
    powers = torch.from_numpy(np.ldexp(1.0, (below - above) // 2)).to(pair.up)
    powers[(sizes[0] == 0) | (sizes[1] == 0)] = 1
    up = (pair.up.transpose(0, 1) * powers.view(-1, *[1] * (pair.up.dim() - 1))).transpose(0, 1)
    return replace(pair, up=up, down=pair.down / powers.view(-1, *[1] * (pair.down.dim() - 1)))


def _row_major(tensor: Tensor) -> Tensor:
    """A copy with the strides that a loader gives it: `contiguous` keeps others where a side is 1, and kernels mind."""
    return tensor.clone(memory_format=torch.contiguous_format)


def stored_error(
    layer: Layer, plan: LayerPlan, tensors: Mapping[str, Tensor], *, matrix: Tensor, metric: Metric | TiedMetric | None
) -> float:
    """The relative error of a layer: how far what is stored is from its dense matrix, beside the matrix itself.

    In the metric of the loss where there is one, else in the Frobenius norm.
    """
    change = matrix - stored_matrix(layer, plan, tensors).to(matrix.device)
    scale = power_of_two(matrix)
    total, changed = (
        float(each.square().sum()) if metric is None else metric.squared_size(each)
        for each in (matrix / scale, change / scale)
    )
    return (changed / total) ** 0.5 if total > 0 else 0.0


def stored_matrix(layer: Layer, plan: LayerPlan, tensors: Mapping[str, Tensor]) -> Tensor:
    """The `d_out x d_in` matrix that the stored factors of a layer give, in float64."""
    down, up = (tensors[join(layer.name, f"{role}.weight")].to(torch.float64) for role in ("down", "up"))
    if plan.form == "spatial":
        return SpatialPair(up=up.squeeze(2), down=down.squeeze(3)).product().reshape(layer.shape)
    down, up = down.flatten(1), up.flatten(1)
    if layer.kind in ("embedding", "transposed convolution"):
        down = down.T
    if layer.kind == "transposed convolution":
        up = up.T
    if plan.form == "pivoted":
        return PivotedPair(up=up, down=down, order=tensors[join(layer.name, "order")].long()).product()
    return FactorPair(up=up, down=down).product()


def stored_pairs(checkpoint: Checkpoint) -> dict[str, StoredPair]:
    """The low-rank layers of a checkpoint by name, recognized by the tensors that stand for them.

    A layer that several names share is there under the first.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in checkpoint.aliases.items()}
    spec = spec_of(checkpoint)
    pairs: dict[str, StoredPair] = {}
    found: set[str] = set()
    for tensor, shape in shapes.items():
        if shape not in MARKERS.values():
            continue
        name = layer_name(tensor)
        down, up = shapes.get(join(name, "down.weight")), shapes.get(join(name, "up.weight"))
        shared = _stored_name(checkpoint, join(name, "down.weight"))
        if down is None or up is None or shared in found:
            continue
        found.add(shared)
        order = shapes.get(join(name, "order"))
        kind = spec.layers[name].kind if name in spec.layers else _kind_of_pair(tensor, shape, down)
        if kind == "embedding":
            down = down[::-1]
        if kind == "transposed convolution":
            down, up = (*up[:1], *down[:1], *down[2:]), (*up[1:2], *up[:1], *up[2:])
        form: Form = "pivoted" if order is not None else "channel" if len(down) > 2 else "plain"
        if form == "channel" and kind == "convolution" and max(up[2:], default=1) > 1:
            form = "spatial"
        d_out = order[0] if order is not None and order else up[0]
        fits = len(down) >= 2 and len(up) == len(down) and up[1] == down[0] and min(down) > 0
        if form == "spatial":
            fits = fits and len(down) == 4 and down[3] == up[2] == 1
        if not fits or (form == "pivoted" and up[0] + down[0] != d_out):
            raise BadInput(
                f"the factors of {name} do not fit together",
                where=checkpoint.source,
                remedy="compress the original checkpoint again",
            )
        dense = (down[1], d_out) if kind in ("transposed linear", "embedding") else (d_out, *down[1:])
        if form == "spatial":
            dense = (d_out, down[1], down[2], up[3])
        if kind == "transposed convolution":
            dense = (down[1], d_out, *up[2:])
        bias = join(name, "bias" if form == "pivoted" else "up.bias")
        pairs[name] = StoredPair(name, tensor, form, down[0], kind, dense, bias in shapes)
    return pairs


def _kind_of_pair(tensor: str, marker: tuple[int, ...], down: tuple[int, ...]) -> Kind:
    """The kind of layer that factors stand for, by what stays in the place of the weight and the number of sides."""
    if not is_weight(tensor):
        return "parameter"
    if marker == MARKERS["embedding"]:
        return "embedding"
    if marker == MARKERS["linear"]:
        return "linear" if len(down) == 2 else "convolution"
    return "transposed linear" if len(down) == 2 else "transposed convolution"


def spec_of(checkpoint: Checkpoint) -> LowRankSpec:
    """What the metadata of a compressed file says of its low-rank layers; of none where there is no such metadata."""
    record = file_record(checkpoint)
    if "layers" not in record:
        return LowRankSpec({})
    try:
        return LowRankSpec.from_dict(record)
    except ValueError as error:
        raise BadInput(
            f"the metadata {METADATA_KEY!r} cannot be used: {error}",
            where=checkpoint.source,
            remedy="compress the original checkpoint again",
        ) from None


def file_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a compressed file says of itself in its metadata; {} where there is nothing, or nothing that can be read."""
    with suppress(BadInput):
        record = parse_json(checkpoint.metadata.get(METADATA_KEY, "{}"), where=checkpoint.name)
        if isinstance(record, dict):
            return record
    return {}


def dense_weight(checkpoint: Checkpoint, pair: StoredPair) -> Tensor:
    """The dense tensor a pair stands for, multiplied in float64 and rounded to the factors' dtype."""
    dtype = checkpoint.tensors[_stored_name(checkpoint, pair.tensors["down"])].dtype
    return require_in_range(pair.tensors["weight"], multiplied(checkpoint, pair).to(dtype))


def multiplied(checkpoint: Checkpoint, pair: StoredPair) -> Tensor:
    """The dense tensor a pair stands for, in float64."""
    down = checkpoint.read(pair.tensors["down"])
    up = checkpoint.read(pair.tensors["up"])
    wide_down = down.to(torch.float64).flatten(1)
    wide_down = wide_down.T if pair.kind == "embedding" else wide_down
    wide_up = up.to(torch.float64).flatten(1)
    if pair.kind == "transposed convolution":  # its own tensor is their product in the other order
        wide_down, wide_up = wide_up, wide_down
    if pair.form == "pivoted":
        order = checkpoint.read(pair.tensors["order"]).long()
        if not torch.equal(order.sort().values, torch.arange(order.numel())):
            raise BadInput(
                f"{pair.tensors['order']} is not an order of rows",
                where=checkpoint.source,
                remedy="compress the original checkpoint again",
            )
        matrix = PivotedPair(up=wide_up, down=wide_down, order=order).product()
    elif pair.form == "spatial":
        matrix = SpatialPair(up=up.to(torch.float64).squeeze(2), down=down.to(torch.float64).squeeze(3)).product()
    else:
        matrix = FactorPair(up=wide_up, down=wide_down).product()
    if pair.kind in ("transposed linear", "embedding"):
        matrix = matrix.T
    return matrix.reshape(pair.tensor_shape).contiguous()


def dense_infos(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> dict[str, tuple[TensorInfo, str | None]]:
    """For every tensor of the restored checkpoint its shape and dtype, and the tensor to copy it from.

    The source is None for a weight that has to be multiplied back.
    """
    factors: dict[str, tuple[TensorInfo, str | None]] = {}
    consumed: set[str] = set()
    for pair in pairs.values():
        tensors = {role: _stored_name(checkpoint, name) for role, name in pair.tensors.items()}
        consumed.update(tensors.values())
        weight = TensorInfo(pair.tensor, pair.tensor_shape, checkpoint.tensors[tensors["down"]].dtype)
        factors[weight.name] = (weight, None)
        if pair.has_bias:
            info = checkpoint.tensors[tensors["bias"]]
            name = join(pair.name, "bias")
            factors[name] = (TensorInfo(name, info.shape, info.dtype), tensors["bias"])
    consumed.update(tensor for tensor, _ in _further_places(checkpoint, pairs))
    passed = {name: (info, name) for name, info in checkpoint.tensors.items() if name not in consumed}
    return passed | factors


def dense_aliases(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> dict[str, str]:
    """Further names of tensors of the restored checkpoint: those of layers and of heads that share a low-rank one."""
    infos = dense_infos(checkpoint, pairs)
    aliases = {alias: name for alias, name in checkpoint.aliases.items() if name in infos}
    for tensor, pair in _further_places(checkpoint, pairs):
        aliases[tensor] = pair.tensor
        if pair.has_bias:
            aliases[join(layer_name(tensor), "bias")] = join(pair.name, "bias")
    for pair in pairs.values():
        aliases |= {f"{head}.weight": pair.tensor for head in _tied_heads(checkpoint, pair)}
    return {alias: name for alias, name in aliases.items() if alias not in infos}


def _further_places(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> Iterator[tuple[str, StoredPair]]:
    """The further names under which a low-rank layer is in the checkpoint: those of its dense weight."""
    owners = {_stored_name(checkpoint, pair.tensors["down"]): pair for pair in pairs.values()}
    for alias, name in checkpoint.aliases.items():
        layer = alias.removesuffix("down.weight").removesuffix(".")
        pair = owners.get(name)
        if pair is None or layer == pair.name or alias != join(layer, "down.weight"):
            continue
        yield (join(layer, "weight") if is_weight(pair.tensor) else layer), pair


def _tied_heads(checkpoint: Checkpoint, pair: StoredPair) -> Iterator[str]:
    """The output heads that a module's own state dict says are tied to a low-rank embedding."""
    down = _stored_name(checkpoint, pair.tensors["down"])
    for name in (down, *(alias for alias, of in checkpoint.aliases.items() if of == down)):
        if pair.kind == "embedding" and name.endswith(".down_weight"):
            yield name.removesuffix(".down_weight")


def _stored_name(checkpoint: Checkpoint, name: str) -> str:
    """The first name of a tensor that has several."""
    return checkpoint.aliases.get(name, name)


def dense_tensors(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> Iterator[tuple[str, Tensor]]:
    """The restored checkpoint, one tensor at a time."""
    for name, (_, copied_from) in dense_infos(checkpoint, pairs).items():
        if copied_from is None:
            yield name, dense_weight(checkpoint, pairs[layer_name(name)])
        else:
            yield name, checkpoint.read(copied_from)
