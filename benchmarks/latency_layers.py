"""Single layers: dense against every form, and how well the cost model predicts the ratio."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from latency_networks import Network
from latency_timing import Clock, Repeats, timed_in_turn
from latency_variants import Placed, check_layer, fill, multiple_of, rank_within
from torch import Tensor, nn

from compressor.forms import DENSE, pair_forms, predicted_seconds
from compressor.latency import DeviceProfile, LayerUse
from compressor.latency.stopwatch import StopwatchSettings, keep_freed_memory
from compressor.lowrank import low_rank_layer
from compressor.network import Kind, Layer

# d_out x d_in: square ones, and those of the Llama and of BERT.
LINEAR = (
    *((d, d) for d in (64, 128, 256, 512, 1024, 2048, 4096)),
    (2816, 1024),
    (1024, 2816),
    (3072, 768),
    (768, 3072),
)
ROWS = (1, 8, 32, 128, 512)
BATCHES = (1, 8, 32)
KEEPS = (0.75, 0.5, 0.25)

# A network's layers take turns, and most of their weights do not stay in a cache. So copies do: as many layers as the
# cost model is measured with, and of so many bytes together that a quarter of them is more than a cache holds.
IN_TURN = StopwatchSettings(memory=2**28)


@dataclass(frozen=True)
class LayerCase:
    """One dense layer and its input.

    Attributes:
        kind: The kind of the layer.
        build: Makes it, with random weights.
        input_shape: The shape of its input: rows x d_in, or a batch of images.
    """

    kind: Kind
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Rows of a linear layer, examples of a convolution."""
        return self.input_shape[0]


@dataclass(frozen=True)
class LayerTiming:
    """Where layers are timed, and how."""

    device: torch.device
    clock: Clock
    repeats: Repeats
    profile: DeviceProfile


def linear_cases(sides: Sequence[tuple[int, int]] = LINEAR, rows: Sequence[int] = ROWS) -> Iterator[LayerCase]:
    """Linear layers without a bias."""
    for d_out, d_in in sides:
        for count in rows:
            yield LayerCase("linear", lambda d_in=d_in, d_out=d_out: nn.Linear(d_in, d_out, bias=False), (count, d_in))


def convolution_cases(network: Network, batches: Sequence[int] = BATCHES) -> Iterator[LayerCase]:
    """The distinct convolutions of a network, on the inputs that they get in it."""
    model, found = network.build().eval(), {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape = tuple(inputs[0].shape[1:])
        found[repr(layer), shape] = copy.deepcopy(layer)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(note)
    with torch.no_grad():
        network.workloads[0].prepare(model, 1)(model)
    for (_, shape), layer in found.items():
        layer._forward_pre_hooks.clear()
        for batch in batches:
            yield LayerCase("convolution", lambda layer=layer: copy.deepcopy(layer), (batch, *shape))


def measured_layer(
    case: LayerCase, dtype: torch.dtype, keep: float, *, timing: LayerTiming
) -> Iterator[dict[str, Any]]:
    """Rows of the table: of each form that the layer can have, the ratio to dense, measured and predicted."""
    dense = case.build().to(timing.device, dtype).eval()
    weight: Any = dense.weight
    shape = tuple(weight.shape)
    matrix = (shape[0], weight[0].numel())
    layer = Layer("layer", "", "weight", None, case.kind, shape, matrix)
    placed, modules = [], [dense]
    for form in pair_forms(layer):
        rank = rank_within(form, layer, keep, multiple=multiple_of(layer, timing.profile, dtype))
        if rank:
            pair = low_rank_layer(dense, form.name, rank).eval()
            fill(pair)
            check_layer(Placed(layer, form.name, rank), pair, dense)
            placed.append(Placed(layer, form.name, rank))
            modules.append(pair)
    keep_freed_memory()
    inputs = torch.randn(case.input_shape, generator=torch.Generator().manual_seed(0)).to(timing.device, dtype)
    with torch.inference_mode():
        outputs = dense(inputs)
        use = layer_use(dense, inputs, outputs)
        count = copies_in_turn(dense, outputs)
        calls = [in_turn(module, inputs, count) for module in modules]
        timed = timed_in_turn(calls, timing.clock, timing.repeats)

    def predicted(form: str, rank: int) -> float:
        return float(predicted_seconds(timing.profile, layer, form, rank=rank, use=use, dtype=dtype))

    for number, each in enumerate(placed, start=1):
        yield {
            "kind": case.kind,
            "shape": list(shape),
            "input": list(case.input_shape),
            "dtype": str(dtype).removeprefix("torch."),
            "keep": keep,
            "form": each.form,
            "rank": each.rank,
            "dense_microseconds": round(timed.seconds(0) / count * 1e6, 1),
            "ratio": timed.ratio(number).to_dict(),
            "predicted_dense_microseconds": round(predicted(DENSE, 0) * 1e6, 1),
            "predicted_ratio": round(predicted(each.form, each.rank) / predicted(DENSE, 0), 4),
        }


def layer_use(dense: nn.Module, inputs: Tensor, outputs: Tensor) -> LayerUse:
    """How one call of the layer uses it."""
    bias = getattr(dense, "bias", None) is not None
    if isinstance(dense, nn.Linear):
        return LayerUse(rows=inputs.shape[0], bias=bias)
    sizes = {"in_size": tuple(inputs.shape[2:]), "out_size": tuple(outputs.shape[2:])}
    return LayerUse(batch=inputs.shape[0], bias=bias, **sizes)


def in_turn(module: nn.Module, inputs: Tensor, count: int) -> Callable[[], None]:
    """A pass through so many copies of a layer, as through a network of such layers."""
    copies = [module, *(copy.deepcopy(module) for _ in range(count - 1))]

    def run() -> None:
        for each in copies:
            each(inputs)

    return run


def copies_in_turn(dense: nn.Module, outputs: Tensor) -> int:
    """How many layers take turns: a network has as many pairs as it had dense layers."""
    weight: Any = dense.weight
    positions = outputs.numel() / weight.shape[0]
    of_memory = IN_TURN.memory // weight.nbytes
    of_time = IN_TURN.flops / (2 * positions * weight.numel())
    return min(IN_TURN.layers, max(2, int(min(of_memory, of_time))))


def within(row: dict[str, Any], share: float) -> bool:
    """Whether the predicted ratio is within a share of the measured one."""
    return bool(abs(row["predicted_ratio"] / row["ratio"]["median"] - 1) <= share)
