"""How much networks are in each other's way: principal angles of their row spaces, and interference of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.data import EvaluationData
from compressor.forms import FORMS, LowRankEmbedding
from compressor.measure import energy_rank
from compressor.measure.eigen import eigh
from compressor.measure.scale import power_of_two
from compressor.model import evaluation_mode, logits_of
from compressor.progress import Progress
from compressor.torch_state import in_float64

# How many examples of each task the input angles and the interference are measured on: both are means or maxima
# over pairs of examples and over all outputs, so they settle early.
MEASURED_EXAMPLES = 128
MEASURED_TOKENS = 1024


@dataclass(frozen=True)
class InputOverlap:
    """How far the tasks' inputs are from orthogonal: the largest and the mean `|cos|` between those of two tasks.

    From the `data` it is taken over pairs of examples, flattened; from the `embeddings` over pairs of the tokens of the
    data, each as its own network embeds it. From the `row spaces` of the first layer, to which
    weight decay confines them where the inputs are confined, over the principal angles. Of several pairs of tasks it
    is the one with the largest mean.
    """

    source: Literal["data", "embeddings", "row spaces"]
    largest: float
    mean: float


@dataclass(frozen=True)
class LayerOverlap:
    """One layer of the networks beside each other.

    `interference` is, for each task, `||sum of the others' W_j h|| / ||W_i h||` in the Frobenius norm: over inputs h
    that the layer of task i sees, where there are data, else over inputs from the row space of its own matrix,
    `h = W_i^T z` with z white. `subspace` is `||V_1^T V_2||_F^2 / min(r_1, r_2)`, the mean squared cosine of the
    principal angles of two row spaces, of the leading singular vectors that hold 99 % of the energy; `random` what
    random subspaces of those ranks would have, and `smallest_angle` in degrees. Of several pairs of networks it is
    the one with the largest overlap.
    """

    name: str
    shape: tuple[int, int]
    interference: tuple[float, ...] | None
    subspace: float
    random: float
    smallest_angle: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}


def row_space(matrix: Tensor, edge: float = 0.0) -> Tensor:
    """Orthonormal columns, `d_in x r`, that span the leading right singular vectors with 99 % of the energy.

    Singular values up to `edge` are left out, such as those of rounding.
    """
    d_out, d_in = matrix.shape
    scale = power_of_two(matrix)
    wide = in_float64(matrix) / scale
    eigenvalues, vectors = eigh(wide.T @ wide if d_in <= d_out else wide @ wide.T)
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    rank = energy_rank(values.cpu().numpy()) if float(values[0]) > 0 else 0
    rank = min(rank, int((values > edge / scale).sum()))
    leading = vectors.flip(1)[:, :rank]
    # From the left side the right vectors are W^T u / s; no s among the leading ones is small.
    basis: Tensor = leading if d_in <= d_out else wide.T @ leading / values[:rank]
    return basis


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of two orthonormal bases, `d x r_1` and `d x r_2`, descending.

    They are the singular values of `V_1^T V_2` (Bjorck and Golub, "Numerical methods for computing angles between
    linear subspaces", 1973).
    """
    cosines: Tensor = torch.linalg.svdvals(first.T @ second)
    return cosines.clamp(max=1.0)


def layer_overlap(
    name: str,
    matrices: Sequence[Tensor],
    interference: Sequence[float] | None = None,
    *,
    edges: Sequence[float] | None = None,
) -> LayerOverlap:
    """The overlap of one layer's matrices, each `d_out x d_in` with the same d_in, in float64.

    `edges` are the singular values up to which each is rounding.

    The interference is that measured on data, if it was; else it is computed from the matrices if they are of one
    shape.
    """
    spaces = [row_space(matrix, edge) for matrix, edge in zip(matrices, edges or [0.0] * len(matrices), strict=True)]
    d_in = matrices[0].shape[1]
    largest, expected, angle = 0.0, 0.0, 90.0
    for first, second in combinations(spaces, 2):
        if min(first.shape[1], second.shape[1]) == 0:
            continue
        cosines = principal_cosines(first, second)
        overlap = float(cosines.square().mean())
        if overlap >= largest:
            largest, expected = overlap, max(first.shape[1], second.shape[1]) / d_in
            angle = float(torch.rad2deg(torch.arccos(cosines[0])))
    if interference is None and len({matrix.shape for matrix in matrices}) == 1:
        interference = [_interference_of(matrices, task) for task in range(len(matrices))]
    shape = (matrices[0].shape[0], d_in)
    return LayerOverlap(name, shape, None if interference is None else tuple(interference), largest, expected, angle)


def _interference_of(matrices: Sequence[Tensor], task: int) -> float:
    scale = power_of_two(matrices[task])
    own = matrices[task] / scale
    others = sum((matrix / scale for index, matrix in enumerate(matrices) if index != task), torch.zeros_like(own))
    norm = float((own @ own.T).norm())
    return float((others @ own.T).norm()) / norm if norm > 0 else 0.0


def row_space_overlap(matrices: Sequence[Tensor]) -> InputOverlap:
    """The overlap of inputs that the first layers' matrices, all with the same d_in, let expect."""
    worst = InputOverlap("row spaces", 0.0, 0.0)
    for first, second in combinations([row_space(matrix) for matrix in matrices], 2):
        if min(first.shape[1], second.shape[1]) == 0:
            continue
        cosines = principal_cosines(first, second)
        worst = max(worst, InputOverlap("row spaces", float(cosines[0]), float(cosines.mean())), key=_mean)
    return worst


def data_overlap(data: Sequence[EvaluationData], models: Sequence[nn.Module]) -> InputOverlap | None:
    """The overlap of the tasks' inputs, those of a language model as it embeds them; None for others than vectors.

    Also None where the inputs are of several tensors or of different shapes.
    """
    directions = []
    source: Literal["data", "embeddings"] = "data"
    for task, model in zip(data, models, strict=True):
        inputs = task.read(_spread(task)).inputs
        if "input_ids" in inputs:
            source, vectors = "embeddings", _embedded_tokens(model, inputs)
        elif len(inputs) == 1 and next(iter(inputs.values())).is_floating_point():
            vectors = next(iter(inputs.values())).flatten(1)
        else:
            vectors = None
        if vectors is None:
            return None
        directions.append(nn.functional.normalize(vectors.cpu().double(), dim=1))
    if len({each.shape[1] for each in directions}) > 1:
        return None
    worst = InputOverlap(source, 0.0, 0.0)
    for first, second in combinations(directions, 2):
        cosines = (first @ second.T).abs()
        worst = max(worst, InputOverlap(source, float(cosines.max()), float(cosines.mean())), key=_mean)
    return worst


@torch.no_grad()
def _embedded_tokens(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Token embeddings, evenly spaced over those of the examples that are no padding; None if the model has none."""
    embed: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embed, nn.Module):
        return None
    tokens = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    tokens = tokens.flatten() if mask is None else tokens[mask.bool()]
    kept = torch.arange(min(MEASURED_TOKENS, len(tokens))) * len(tokens) // min(MEASURED_TOKENS, len(tokens))
    vectors: Tensor = embed(tokens[kept].to(next(embed.parameters()).device))
    return vectors


def _mean(overlap: InputOverlap) -> float:
    return overlap.mean


def _spread(data: EvaluationData) -> list[int]:
    """Positions of the measured examples, evenly spaced, because the first ones are often all of one class."""
    count = min(MEASURED_EXAMPLES, data.count)
    return [position * data.count // count for position in range(count)]


def measured_interference(
    models: Sequence[nn.Module],
    data: Sequence[EvaluationData],
    *,
    device: torch.device,
    base: nn.Module | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, ...]]:
    """Each layer's interference for each task, on the inputs that the layer sees when its own network runs alone.

    With a base the others' matrices are those of what was trained on top of it. Biases are left out: what they add
    does not depend on the inputs. The layers are those that all networks have and that ran in all of them.
    """
    found: list[dict[str, float]] = []
    layers = [_matrix_layers(model) for model in models]
    start = {} if base is None else _matrix_layers(base)
    for task, (model, examples) in enumerate(zip(models, data, strict=True)):
        squares: dict[str, list[float]] = {}
        others = [each for index, each in enumerate(layers) if index != task]

        def add(
            name: str,
            inputs: Tensor,
            *,
            squares: dict[str, list[float]] = squares,
            others: Sequence[Mapping[str, nn.Module]] = others,
            task: int = task,
        ) -> None:
            if any(name not in each for each in (*others, *([start] if base is not None else []))):
                return
            own = _without_bias(layers[task][name], inputs)
            foreign = torch.stack([_without_bias(each[name], inputs) for each in others]).sum(0)
            if base is not None:
                foreign = foreign - len(others) * _without_bias(start[name], inputs)
            total = squares.setdefault(name, [0.0, 0.0])
            total[0] += float(in_float64(foreign).square().sum())
            total[1] += float(in_float64(own).square().sum())

        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
            for name, layer in layers[task].items()
        ]
        try:
            with evaluation_mode(device, *models, *([] if base is None else [base])):
                for batch in _batches(examples):
                    logits_of(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        found.append({name: (top / bottom) ** 0.5 if bottom > 0 else 0.0 for name, (top, bottom) in squares.items()})
        if progress:
            progress("interference", task + 1, len(models))
    return {name: tuple(each[name] for each in found) for name in found[0] if all(name in each for each in found)}


def output_change(alone: nn.Module, merged: nn.Module, data: EvaluationData, *, device: torch.device) -> float:
    """`||f_merged - f|| / ||f||` of a task's logits, in the Frobenius norm over the measured examples."""
    change = size = 0.0
    with evaluation_mode(device, alone, merged):
        for batch in _batches(data):
            before, after = in_float64(logits_of(alone, batch)), in_float64(logits_of(merged, batch))
            change += float((after - before).square().sum())
            size += float(before.square().sum())
    return (change / size) ** 0.5 if size > 0 else 0.0


def _batches(data: EvaluationData) -> list[Mapping[str, Tensor]]:
    positions = _spread(data)
    size = data.batch_size
    return [data.read(positions[start : start + size]).inputs for start in range(0, len(positions), size)]


def _matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by a matrix, by name; a low-rank one is one layer, not two."""
    pairs = tuple(each for form in FORMS.values() for each in form.classes)
    names = dict(model.named_modules())

    def multiplies(module: nn.Module) -> bool:
        if isinstance(module, pairs):
            return not isinstance(module, LowRankEmbedding) and any(map(multiplies, module.children()))
        return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).__name__ == "Conv1D"

    return {
        name: module
        for name, module in names.items()
        if multiplies(module) and not isinstance(names.get(name.rpartition(".")[0]), pairs)
    }


def _without_bias(layer: nn.Module, inputs: Tensor) -> Tensor:
    # `forward`, not a call: the hooks that listen to the network must not hear this.
    forward: Any = layer.forward
    result: Tensor = forward(inputs) - forward(torch.zeros_like(inputs[:1]))
    return result
