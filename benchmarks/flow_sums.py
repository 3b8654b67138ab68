"""Sums of ReLU networks at stationary points that gradient flow reaches: does adding weights keep every task?

    OMP_NUM_THREADS=1 python benchmarks/theory.py --studies sums

Tasks are pairs of digits (one output, logistic loss) or three digits (softmax), 20 training examples of a class. A
network without biases is trained on each task by itself, by gradient flow (`gradient_flow.py`).

The inputs of task t lie in a subspace of their own, spanned by the orthonormal columns of `E_t`, with
`E_t.T @ E_u = overlap * identity`: orthogonal, or nearly so, since no two inputs of two tasks have a cosine above
`overlap`. At a stationary point the rows of a first layer lie in the span of its inputs, so the network is trained in
the 64 coordinates of its subspace, and its first layer is `V_t @ E_t.T`: one training serves every overlap, and on the
input `E_a @ x` the sum's first layer computes `V_a @ x + overlap * (sum of the other V_t) @ x`.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from gradient_flow import Array, Flowed, Problem, Steps, cross_entropy, flow, outputs, residual, start
from numpy.typing import NDArray

from compressor.data.builtin_data import Split, digits
from compressor.measure import energy_rank

mpl.use("Agg")
from matplotlib import pyplot as plt
from pictures import MARKERS, save

Row = dict[str, Any]


@dataclass(frozen=True)
class Sums:
    """What is studied: `tasks` are lists of digits, by the name of their kind."""

    tasks: Mapping[str, Sequence[Sequence[int]]]
    depths: Sequence[int] = (2, 3, 4)
    seeds: Sequence[int] = (0, 1, 2)
    overlaps: Sequence[float] = (0.0, 0.05, 0.2)
    width: int = 48
    examples: int = 20
    weight_decay: float = 0.01
    corner: float = 1e-3
    steps: Steps = field(default_factory=Steps)


PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
WHOLE = (
    Sums({"two classes": PAIRS, "three classes": ((0, 1, 2), (3, 4, 5), (6, 7, 8))}),
    Sums({"two classes, width 192": PAIRS}, depths=(2, 3), seeds=(0,), width=192),
)
QUICK = (Sums({"two classes": PAIRS[:2]}, depths=(2, 3), seeds=(0,), overlaps=(0.0, 0.2), width=24),)


@dataclass(frozen=True)
class Examples:
    inputs: Array
    labels: NDArray[np.int64]


def examples_of(classes: Sequence[int], splits: Sequence[Split], each: int | None = None) -> Examples:
    """The digits of a task, at most `each` of a class, in 64 coordinates."""
    inputs, labels = [], []
    for split in splits:
        images, digit = digits(split)
        for label, chosen in enumerate(classes):
            found = images[digit == chosen][:each].flatten(1).double().numpy()
            inputs.append(found)
            labels.append(np.full(len(found), label))
    return Examples(np.concatenate(inputs), np.concatenate(labels))


@dataclass(frozen=True)
class Trained:
    """A network at the end of its flow."""

    problem: Problem
    flowed: Flowed
    halving: float | None

    @property
    def layers(self) -> list[Array]:
        return self.problem.layers(self.flowed.weights)


def trained(problem: Problem, steps: Steps, *, seed: int, halved: bool) -> Trained:
    """Follow the flow; also with all steps halved, to see how far off the end then is, relative to its norm."""
    begin = start(problem.sizes, seed)
    flowed = flow(problem, begin, steps)
    moved = None
    if halved:
        again = flow(problem, begin, steps.halved())
        moved = float(np.linalg.norm(again.weights - flowed.weights) / np.linalg.norm(flowed.weights))
    return Trained(problem, flowed, moved)


def summed(networks: Sequence[Sequence[Array]], of: int, overlap: float) -> list[Array]:
    """The sum of networks, in the coordinates of the inputs of network `of`."""
    first, *others = (np.sum(layers, axis=0) for layers in zip(*networks, strict=True))
    own = networks[of][0]
    return [own + overlap * (first - own), *others]


def correct(logits: Array, labels: NDArray[np.int64]) -> float:
    """Accuracy."""
    chosen = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(1)
    return float((chosen == labels).mean())


def interference(own: Sequence[Array], other: Sequence[Array], inputs: Array, *, overlap: float) -> list[float]:
    """For each layer the size of what the other's layer adds on the inputs of the own one, relative to its outputs."""
    found = []
    for place, (layer, added) in enumerate(zip(own, other, strict=True)):
        output = inputs @ layer.T
        disturbing = (overlap if place == 0 else 1.0) * (inputs @ added.T)
        found.append(float(np.linalg.norm(disturbing) / np.linalg.norm(output)))
        inputs = np.maximum(output, 0)
    return found


def network_row(about: Row, classes: Sequence[int], network: Trained) -> Row:
    """One network: whether it is at a stationary point, and what is proven of these."""
    problem, flowed, layers = network.problem, network.flowed, network.layers
    norms = [float(np.linalg.norm(layer)) for layer in layers]
    return {
        "row": "network",
        **about,
        "classes": list(classes),
        "time": flowed.time,
        "K": problem.weight_decay * flowed.time,
        "residual": flowed.residual,
        "residual_of_corners": residual(flowed.weights, replace(problem, corner=0.0)),
        "halving": network.halving,
        "norm_spread": max(norms) / min(norms),
        "energy_ranks": [energy_rank(np.linalg.svd(layer, compute_uv=False)) for layer in layers],
        "accuracy": correct(outputs(layers, problem.inputs), problem.labels),
    }


def sum_rows(grid: Sums, networks: Sequence[Trained], about: Row) -> list[Row]:
    """Every pair of neighbors, and all tasks at once: each task alone and in the sum, at every overlap."""
    tasks = grid.tasks[about["kind"]]
    held_out = [examples_of(classes, ("validation", "test")) for classes in tasks]
    pairs = [(place, (place + 1) % len(tasks)) for place in range(len(tasks) if len(tasks) > 2 else 1)]
    together = [tuple(range(len(tasks)))] if len(tasks) > 2 else []
    rows = []
    for chosen in [*pairs, *together]:
        layers = [networks[place].layers for place in chosen]
        for overlap in grid.overlaps:
            found = []
            for of, place in enumerate(chosen):
                problem, merged, unseen = networks[place].problem, summed(layers, of, overlap), held_out[place]
                alone, after = (outputs(each, problem.inputs) for each in (layers[of], merged))
                others = [
                    interference(layers[of], layers[other], problem.inputs, overlap=overlap)
                    for other in range(len(chosen))
                    if other != of
                ]
                found.append(
                    {
                        "classes": list(tasks[place]),
                        "accuracy": [correct(each, problem.labels) for each in (alone, after)],
                        "held_out_accuracy": [
                            correct(outputs(each, unseen.inputs), unseen.labels) for each in (layers[of], merged)
                        ],
                        "loss": [cross_entropy(each, problem.labels)[0] for each in (alone, after)],
                        "change": float(np.linalg.norm(after - alone) / np.linalg.norm(alone)),
                        "interference": np.mean(others, axis=0).tolist(),
                    }
                )
            rows.append({"row": "sum", **about, "merged": len(chosen), "overlap": overlap, "tasks": found})
    return rows


def study(grid: Sums) -> list[Row]:
    """Train every network, add them, and measure both."""
    rows = []
    for kind, tasks in grid.tasks.items():
        for depth in grid.depths:
            for seed in grid.seeds:
                about, networks = {"kind": kind, "depth": depth, "seed": seed}, []
                for place, classes in enumerate(tasks):
                    examples = examples_of(classes, ("train",), grid.examples)
                    hidden = (grid.width,) * (depth - 1)
                    sizes = (64, *hidden, 1 if len(classes) == 2 else len(classes))
                    problem = Problem(examples.inputs, examples.labels, sizes, grid.weight_decay, grid.corner)
                    begun = time.perf_counter()
                    # No two networks start alike: the seed of each is its own.
                    network = trained(problem, grid.steps, seed=1000 * seed + place, halved=seed == grid.seeds[0])
                    networks.append(network)
                    rows.append(network_row(about, classes, network))
                    sys.stderr.write(f"{rows[-1]} {time.perf_counter() - begun:.0f} s\n")
                rows += sum_rows(grid, networks, about)
    return rows


def lost(rows: Sequence[Row], measure: str, **setting: Any) -> list[float]:
    """Points of accuracy that the task loses that loses most, of every sum of a setting."""
    return [
        100 * max(task[measure][0] - task[measure][1] for task in row["tasks"])
        for row in rows
        if row["row"] == "sum" and all(row[key] == value for key, value in setting.items())
    ]


def in_words(values: Sequence[float]) -> str:
    """Mean (least to most)."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"


def stationary_table(document: Mapping[str, Any]) -> str:
    """How stationary the networks are: the worst of each setting."""
    columns = "tasks", "layers", "networks", "K", "residual", "halving moves", "norms", "energy ranks", "accuracy"
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    networks = [row for row in document["rows"] if row["row"] == "network"]
    for kind, depth in dict.fromkeys((row["kind"], row["depth"]) for row in networks):
        chosen = [row for row in networks if (row["kind"], row["depth"]) == (kind, depth)]
        ranks = [statistics.mean(row["energy_ranks"][layer] for row in chosen) for layer in range(depth)]
        cells = (
            kind,
            depth,
            len(chosen),
            f"{min(row['K'] for row in chosen):.0f} to {max(row['K'] for row in chosen):.0f}",
            f"{max(row['residual'] for row in chosen):.1e}",
            f"{max(row['halving'] for row in chosen if row['halving'] is not None):.1e}",
            f"{max(row['norm_spread'] for row in chosen):.3f}",
            ", ".join(f"{rank:.1f}" for rank in ranks),
            f"{min(row['accuracy'] for row in chosen):.0%}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def sums_table(document: Mapping[str, Any]) -> str:
    """Points of training accuracy lost by the worst task of a sum, and how much the others' layers interfere."""
    sums = [row for row in document["rows"] if row["row"] == "sum"]
    overlaps = list(dict.fromkeys(row["overlap"] for row in sums))
    titles = ["orthogonal" if overlap == 0 else f"cosines to {overlap:g}" for overlap in overlaps]
    columns = ["tasks", "layers", "added", "within a point", *titles]
    columns += ["orthogonal, unseen", "loss", "outputs change", "interference"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for kind, depth, merged in dict.fromkeys((row["kind"], row["depth"], row["merged"]) for row in sums):
        setting = {"kind": kind, "depth": depth, "merged": merged}
        orthogonal = lost(sums, "accuracy", overlap=0.0, **setting)
        cells = [f"{sum(points <= 1 for points in orthogonal)} of {len(orthogonal)}"]
        cells += [in_words(lost(sums, "accuracy", overlap=overlap, **setting)) for overlap in overlaps]
        tasks = _tasks(sums, overlap=0.0, **setting)
        losses = [statistics.mean(task["loss"][place] for task in tasks) for place in (0, 1)]
        layers = [statistics.mean(task["interference"][layer] for task in tasks) for layer in range(depth)]
        cells += [
            in_words(lost(sums, "held_out_accuracy", overlap=0.0, **setting)),
            f"{losses[0]:.3f} to {losses[1]:.3f}",
            f"{statistics.mean(task['change'] for task in tasks):.0%}",
            ", ".join(f"{layer:.2f}" for layer in layers),
        ]
        lines.append(f"| {kind} | {depth} | {merged} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _tasks(rows: Sequence[Row], **setting: Any) -> list[Row]:
    chosen = [row for row in rows if all(row[key] == value for key, value in setting.items())]
    return [task for row in chosen for task in row["tasks"]]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Points lost against depth, on orthogonal and on nearly orthogonal inputs: a panel a kind and number of tasks."""
    sums = [row for row in rows if row["row"] == "sum"]
    panels = list(dict.fromkeys((row["kind"], row["merged"]) for row in sums))
    height = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(
        height, 3, figsize=(10.5, 3.1 * height), squeeze=False, sharey=True, layout="constrained"
    )
    overlaps = list(dict.fromkeys(row["overlap"] for row in sums))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (kind, merged) in zip(axes.flat, panels, strict=False):
        depths = list(dict.fromkeys(row["depth"] for row in sums if row["kind"] == kind))
        for place, overlap in enumerate(overlaps):
            setting = {"kind": kind, "merged": merged, "overlap": overlap}
            series = [lost(rows, "accuracy", depth=depth, **setting) for depth in depths]
            means = [statistics.mean(values) for values in series]
            bars = (
                [mean - min(values) for mean, values in zip(means, series, strict=True)],
                [max(values) - mean for mean, values in zip(means, series, strict=True)],
            )
            shifted = [depth + 0.06 * (place - 1) for depth in depths]
            axis.errorbar(
                shifted,
                means,
                yerr=bars,
                fmt=f"{MARKERS[place % len(MARKERS)]}-",
                markersize=4,
                elinewidth=0.8,
                color=mpl.colormaps["viridis"](0.85 * place / max(1, len(overlaps) - 1)),
                label=f"{overlap:g}",
            )
        axis.set(title=f"{merged} tasks of {kind}", xlabel="layers", xticks=depths)
        axis.title.set_fontsize(9)
        axis.grid(color="0.9")
    for line in axes:
        line[0].set_ylabel("training accuracy lost by the\nworst task (points; range of the sums)")
    axes[0, 0].legend(title="cosines up to", fontsize=7, title_fontsize=7)
    save(figure, path)
