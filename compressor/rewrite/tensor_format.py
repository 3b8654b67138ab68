"""The file format: which tensors stand for a low-rank layer, written from a dense weight and multiplied back to one.

A plain pair replaces `X.weight` by `X.down.weight` (`r x d_in`) and `X.up.weight` (`d_out x r`), and `X.bias` becomes
`X.up.bias`. A pivoted pair has `X.up.weight` of `(d_out - r) x r` and `X.order` of `d_out` int32; its bias stays
`X.bias`. For a convolution of c channels `X.down.weight` is `r x c x kernel` and `X.up.weight` is `d_out x r x 1 ..` in
a channel pair, and `r x c x k_h x 1` and `d_out x r x 1 x k_w` in a spatial pair. A zero-size `X.weight` stays behind
in each, so that a loader that does not know the format stops. Everything else is passed through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import Checkpoint, Kind, Layer, Skeleton, TensorInfo, is_weight, layer_name
from compressor.errors import BadInput
from compressor.factorize import (
    FactorPair,
    Metric,
    PivotedPair,
    SpatialPair,
    pivoted_pair,
    spatial_pair,
    truncated_svd,
    weighted_truncated_svd,
)
from compressor.planning import LayerPlan
from compressor.planning.form import Form

FORMAT_VERSION = 1
METADATA_KEY = "lowrank"


@dataclass(frozen=True)
class StoredPair:
    """A low-rank layer found in a checkpoint: where its tensors are and which dense tensor it stands for."""

    name: str
    form: Form
    rank: int
    kind: Kind
    tensor_shape: tuple[int, ...]
    has_bias: bool

    @property
    def tensors(self) -> dict[str, str]:
        """Role to tensor name, for the tensors that stand for the dense weight and bias."""
        roles = {"weight": "weight", "down": "down.weight", "up": "up.weight"}
        if self.form == "pivoted":
            roles["order"] = "order"
        if self.has_bias:
            roles["bias"] = "bias" if self.form == "pivoted" else "up.bias"
        return {role: join(self.name, tensor) for role, tensor in roles.items()}


def join(name: str, tensor: str) -> str:
    """A tensor's name under a layer's; the layer that is the whole model has an empty one."""
    return f"{name}.{tensor}" if name else tensor


def pair_infos(layer: Layer, plan: LayerPlan, dtype: torch.dtype, bias: TensorInfo | None) -> list[TensorInfo]:
    """Names, shapes and dtypes of the tensors that will stand for a layer, before any of them is computed."""
    assert plan.rank is not None
    (d_out, d_in), rank = layer.shape, plan.rank
    name = layer.name
    kernel = layer.tensor_shape[2:] if layer.kind == "convolution" else ()
    down = (rank, layer.tensor_shape[1], *kernel) if layer.kind == "convolution" else (rank, d_in)
    up = (d_out - rank, rank) if plan.form == "pivoted" else (d_out, rank, *(1 for _ in kernel))
    if plan.form == "spatial":
        _, channels, height, width = layer.tensor_shape
        down, up = (rank, channels, height, 1), (d_out, rank, 1, width)
    infos = [
        TensorInfo(join(name, "weight"), (0,), dtype),
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
    return weight.T if layer.kind == "transposed linear" else weight.reshape(layer.shape)


@dataclass(frozen=True)
class Factors:
    """The tensors that stand for a layer, and the relative error of the matrix that they give when stored."""

    tensors: dict[str, Tensor]
    error: float


def factorize(
    layer: Layer, plan: LayerPlan, weight: Tensor, bias: Tensor | None, metric: Metric | None = None
) -> Factors:
    """The factors of a layer: the arithmetic in float64, the result in the weight's own dtype.

    With a metric the pair is the best in it (a spatial one close to a local optimum), and so is the error; else both
    are of the Frobenius norm.
    """
    matrix = as_matrix(layer, weight).to(torch.float64)
    return factors_of(layer, plan, approximate(layer, plan, matrix, metric), matrix, bias, metric, weight.dtype)


def approximate(layer: Layer, plan: LayerPlan, matrix: Tensor, metric: Metric | None) -> FactorPair | SpatialPair:
    """The pair of the planned rank that is nearest to a `d_out x d_in` matrix, in float64."""
    assert plan.rank is not None
    if plan.form == "spatial":
        return spatial_pair(matrix.reshape(layer.tensor_shape), plan.rank, metric)
    return truncated_svd(matrix, plan.rank) if metric is None else weighted_truncated_svd(matrix, plan.rank, metric)


def factors_of(
    layer: Layer,
    plan: LayerPlan,
    pair: FactorPair | SpatialPair,
    matrix: Tensor,
    bias: Tensor | None,
    metric: Metric | None,
    dtype: torch.dtype,
) -> Factors:
    """The tensors by which a pair stands for a layer, in its planned form and in `dtype`.

    Where the metric knows the mean of the inputs, the bias takes up what the change of the matrix makes of it.
    """
    stored: FactorPair | PivotedPair | SpatialPair = pair
    if plan.form == "pivoted":
        assert isinstance(pair, FactorPair)
        stored = pivoted_pair(pair)
    stored = replace(stored, up=stored.up.to(dtype), down=stored.down.to(dtype))
    values: list[Tensor] = [stored.down.new_empty(0), stored.down, stored.up]
    if isinstance(stored, PivotedPair):
        values.append(stored.order)
    change = matrix - replace(stored, up=stored.up.to(torch.float64), down=stored.down.to(torch.float64)).product()
    if bias is not None:
        if metric is not None and metric.mean is not None:
            bias = (bias.to(matrix) + change @ metric.mean).to(bias.dtype)
        values.append(bias)
    infos = pair_infos(layer, plan, dtype, None if bias is None else TensorInfo("", tuple(bias.shape), bias.dtype))
    tensors = {info.name: value.reshape(info.shape).contiguous() for info, value in zip(infos, values, strict=True)}
    total, left = (_squared_size(each, metric) for each in (matrix, change))
    return Factors(tensors, (left / total) ** 0.5 if total > 0 else 0.0)


def _squared_size(matrix: Tensor, metric: Metric | None) -> float:
    """Of a matrix in the metric, else its squared Frobenius norm."""
    if metric is None:
        return float(matrix.square().sum())
    return max(0.0, float((metric.gradients @ matrix @ metric.inputs * matrix).sum()))


def stored_pairs(checkpoint: Checkpoint, skeleton: Skeleton | None = None) -> dict[str, StoredPair]:
    """The low-rank layers of a checkpoint by name, recognised by the tensors that stand for them.

    Whether a linear layer was a transposed one is read from what the file says of itself, else from the skeleton.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    said = file_record(checkpoint).get("layers")
    record = said if isinstance(said, dict) else {}
    pairs = {}
    for tensor, shape in shapes.items():
        if shape != (0,) or not is_weight(tensor):
            continue
        name = layer_name(tensor)
        down, up = shapes.get(join(name, "down.weight")), shapes.get(join(name, "up.weight"))
        if down is None or up is None:
            continue
        order = shapes.get(join(name, "order"))
        form: Form = "pivoted" if order is not None else "channel" if len(down) > 2 else "plain"
        if form == "channel" and max(up[2:], default=1) > 1:
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
        entry = record.get(name)
        transposed = (
            entry.get("kind") == "transposed linear"
            if isinstance(entry, dict)
            else skeleton is not None and _is_conv1d(skeleton, tensor)
        )
        kind: Kind = "convolution" if len(down) > 2 else "transposed linear" if transposed else "linear"
        dense = (down[1], d_out) if transposed else (d_out, *down[1:])
        if form == "spatial":
            dense = (d_out, down[1], down[2], up[3])
        bias = join(name, "bias" if form == "pivoted" else "up.bias")
        pairs[name] = StoredPair(name, form, down[0], kind, dense, bias in shapes)
    return pairs


def _is_conv1d(skeleton: Skeleton, tensor: str) -> bool:
    in_model = skeleton.module_name(tensor)
    modules = dict(skeleton.module.named_modules())
    owner = modules.get(layer_name(in_model)) if in_model else None
    return type(owner).__name__ == "Conv1D"


def file_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a compressed file says of itself in its metadata; {} where there is nothing, or nothing that can be read."""
    with suppress(ValueError, RecursionError):
        record = json.loads(checkpoint.metadata.get(METADATA_KEY, "{}"))
        if isinstance(record, dict):
            return record
    return {}


def dense_weight(checkpoint: Checkpoint, pair: StoredPair) -> Tensor:
    """The dense tensor a pair stands for, multiplied in float64 and rounded to the factors' dtype."""
    down = checkpoint.read(pair.tensors["down"])
    up = checkpoint.read(pair.tensors["up"])
    wide_down = down.to(torch.float64).flatten(1)
    wide_up = up.to(torch.float64).flatten(1)
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
    if pair.kind == "transposed linear":
        matrix = matrix.T
    return matrix.reshape(pair.tensor_shape).to(down.dtype).contiguous()


def dense_infos(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> dict[str, tuple[TensorInfo, str | None]]:
    """For every tensor of the restored checkpoint its shape and dtype, and the tensor to copy it from.

    The source is None for a weight that has to be multiplied back.
    """
    factors: dict[str, tuple[TensorInfo, str | None]] = {}
    consumed: set[str] = set()
    for pair in pairs.values():
        tensors = pair.tensors
        consumed.update(tensors.values())
        weight = TensorInfo(tensors["weight"], pair.tensor_shape, checkpoint.tensors[tensors["down"]].dtype)
        factors[weight.name] = (weight, None)
        if pair.has_bias:
            info = checkpoint.tensors[tensors["bias"]]
            name = join(pair.name, "bias")
            factors[name] = (TensorInfo(name, info.shape, info.dtype), tensors["bias"])
    passed = {name: (info, name) for name, info in checkpoint.tensors.items() if name not in consumed}
    return passed | factors


def dense_tensors(checkpoint: Checkpoint, pairs: Mapping[str, StoredPair]) -> Iterator[tuple[str, Tensor]]:
    """The restored checkpoint, one tensor at a time."""
    for name, (_, copied_from) in dense_infos(checkpoint, pairs).items():
        if copied_from is None:
            yield name, dense_weight(checkpoint, pairs[layer_name(name)])
        else:
            yield name, checkpoint.read(copied_from)
