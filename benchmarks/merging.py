"""What adding networks, and putting them side by side, costs each task: over depth, weight decay and input overlap.

    OMP_NUM_THREADS=1 python benchmarks/theory.py --studies merging

Two tasks share five classes: the digits 0 to 4 in one block of 64 of 128 inputs, 5 to 9 (as classes 0 to 4) in another,
which lies beside the first or over some of it. Bias-free ReLU networks are trained on each by plain SGD, with PyTorch's
initialization or four times it, and merged by `compressor.merge`.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import Merging, merge
from compressor.data.builtin_data import Split, digits

mpl.use("Agg")
from matplotlib import pyplot as plt
from pictures import MARKERS, save

INPUTS, BLOCK, CLASSES, WIDTH = 128, 64, 5, 128
BATCH, LEARNING_RATE = 16, 0.2
# PyTorch's initialization is studied at every overlap, the large one on disjoint inputs.
INITIALIZATIONS = (1.0, 4.0)
LEARNED = 0.9  # the accuracy of a network alone from which on a loss of it is one of merging


@dataclass(frozen=True)
class Grid:
    """What is studied: networks of `depths` layers; `shared` of the 64 inputs of a task are the other's inputs too."""

    depths: tuple[int, ...] = (2, 3, 4, 5)
    weight_decays: tuple[float, ...] = (0.0, 0.002, 0.01)
    seeds: tuple[int, ...] = (0, 1, 2)
    shared: tuple[int, ...] = (0, 16, 32, 64)
    steps: int = 3500


QUICK = Grid(depths=(2, 3), weight_decays=(0.0, 0.01), seeds=(0,), shared=(0, 64), steps=1000)


def task_data(first_input: int, digits_from: int, split: Split) -> tuple[Tensor, Tensor]:
    """Inputs `(N, 128)` with five of the digits in the block from `first_input` on, and their classes."""
    images, labels = digits(split)
    chosen = (labels >= digits_from) & (labels < digits_from + CLASSES)
    inputs = torch.zeros(int(chosen.sum()), INPUTS)
    inputs[:, first_input : first_input + BLOCK] = images[chosen].flatten(1)
    return inputs, labels[chosen] - digits_from


def network(depth: int) -> nn.Sequential:
    """A bias-free ReLU network with `depth` linear layers."""
    sizes = [INPUTS, *[WIDTH] * (depth - 1), CLASSES]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(
    tasks: Sequence[tuple[Tensor, Tensor]],
    seeds: Sequence[int],
    depth: int,
    *,
    initialization: float,
    weight_decay: float,
    steps: int,
) -> list[dict[str, Tensor]]:
    """Train a network on each task, each from its own random start, and return their state dicts.

    All are trained at once, as batched matrix products: the sum of their losses has for each the gradient of its own.
    """
    starts = []
    for seed in seeds:
        torch.manual_seed(seed)
        starts.append(network(depth).state_dict())
    names = list(starts[0])
    weights = [torch.stack([initialization * start[name] for start in starts]).requires_grad_() for name in names]
    optimizer = torch.optim.SGD(weights, lr=LEARNING_RATE, weight_decay=weight_decay)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(steps):
        drawn = [torch.randint(len(y), (BATCH,), generator=g) for (_, y), g in zip(tasks, generators, strict=True)]
        hidden = torch.stack([x[rows] for (x, _), rows in zip(tasks, drawn, strict=True)])
        labels = torch.stack([y[rows] for (_, y), rows in zip(tasks, drawn, strict=True)])
        for weight in weights[:-1]:
            hidden = torch.bmm(hidden, weight.mT).relu()
        logits = torch.bmm(hidden, weights[-1].mT)
        loss = len(tasks) * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [
        {name: weight[index].detach().clone() for name, weight in zip(names, weights, strict=True)}
        for index in range(len(tasks))
    ]


def study(folder: Path, grid: Grid) -> list[dict[str, Any]]:
    """Every setting and seed: how much the networks overlap, and each task's accuracy alone, summed, concatenated."""
    recipe, rows = folder / "recipe.yaml", []
    for depth in grid.depths:
        for weight_decay in grid.weight_decays:
            recipe.write_text(
                f"optimizer: sgd\nlearning_rate: {LEARNING_RATE}\nweight_decay: {weight_decay}\nsteps: {grid.steps}\n"
                f"batch_size: {BATCH}\nschedule: constant\nmomentum: 0\n"
            )
            for initialization in INITIALIZATIONS:
                overlaps = grid.shared if initialization == 1 else (0,)
                blocks = [(0, 0), *((BLOCK - shared, CLASSES) for shared in overlaps)]
                tasks = [task_data(*block, "train") for block in blocks]
                # No two networks start alike: the seed of each is its own.
                everything = trained(
                    [task for _ in grid.seeds for task in tasks],
                    [1000 * seed + number for seed in grid.seeds for number in range(len(tasks))],
                    depth,
                    initialization=initialization,
                    weight_decay=weight_decay,
                    steps=grid.steps,
                )
                for seed in grid.seeds:
                    first, *others = everything[seed * len(tasks) : (seed + 1) * len(tasks)]
                    for shared, block, second in zip(overlaps, blocks[1:], others, strict=True):
                        if not all(tensor.isfinite().all() for each in (first, second) for tensor in each.values()):
                            continue  # five layers of four times the usual start diverge at this learning rate
                        setting = {"depth": depth, "weight_decay": weight_decay, "initialization": initialization}
                        modes = merged(folder, depth, (first, second), blocks=(blocks[0], block))
                        rows.append({**setting, "shared_inputs": shared, "seed": seed, **described(modes)})
                        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def merged(
    folder: Path, depth: int, networks: Sequence[dict[str, Tensor]], *, blocks: Sequence[tuple[int, int]]
) -> dict[str, Merging]:
    """The two networks merged in both modes, measured on the validation and test splits together."""
    files, data = [], []
    for name, weights, block in zip("AB", networks, blocks, strict=True):
        files.append(folder / f"{name}.safetensors")
        save_file(weights, files[-1])
        # Neither split was trained on or used to choose anything, and both together are twice as exact.
        held_out = [task_data(*block, split) for split in ("validation", "test")]
        inputs, labels = (torch.cat(halves) for halves in zip(*held_out, strict=True))
        data.append(folder / f"{name}-test.safetensors")
        save_file({"inputs": inputs, "labels": labels}, data[-1])
    return {
        mode: merge(
            files,
            output=folder / f"{mode}.safetensors",
            mode=mode,  # type: ignore[arg-type]
            data=data,
            factory=lambda: network(depth),
            overwrite=True,
        )
        for mode in ("sum", "concat")
    }


def described(modes: dict[str, Merging]) -> dict[str, Any]:
    """The numbers of one pair of networks."""
    found = modes["sum"]
    assert found.inputs is not None
    return {
        "largest_input_cosine": found.inputs.largest,
        "mean_input_cosine": found.inputs.mean,
        "interference": [layer.interference for layer in found.layers],
        "subspace_overlap": [layer.subspace for layer in found.layers],
        "warnings": len(found.warnings),
        "alone": [task.alone for task in found.tasks],
        "sum": [task.merged for task in found.tasks],
        "concat": [task.merged for task in modes["concat"].tasks],
    }


def drops(rows: Sequence[dict[str, Any]], mode: str, **setting: float) -> list[float]:
    """For each seed of a setting, what the task that loses more loses, in points of accuracy.

    Pairs of which a network alone did not learn its task are left out.
    """
    return [
        100 * max(alone - after for alone, after in zip(row["alone"], row[mode], strict=True))
        for row in rows
        if min(row["alone"]) >= LEARNED and all(row[key] == value for key, value in setting.items())
    ]


def in_words(values: Sequence[float], starts: int) -> str:
    """Mean (least to most) of the random starts from which both networks learned."""
    if not values:
        return "none learned"
    some = "" if len(values) == starts else f", {len(values)} of {starts} starts"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}{some})"


def tables(rows: Sequence[dict[str, Any]], grid: Grid) -> str:
    """The Markdown tables of the README: disjoint inputs by initialization and decay, and PyTorch's by overlap."""
    lines = ["| layers | weight decay | start left | sum | sum, initialization x 4 | concat | concat, x 4 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for depth in grid.depths:
        for decay in grid.weight_decays:
            left = math.exp(grid.steps * math.log1p(-LEARNING_RATE * decay))
            cells = [
                in_words(
                    drops(rows, mode, depth=depth, weight_decay=decay, initialization=initialization, shared_inputs=0),
                    len(grid.seeds),
                )
                for mode in ("sum", "concat")
                for initialization in INITIALIZATIONS
            ]
            lines.append(f"| {depth} | {decay:g} | {left:.1%} | {' | '.join(cells)} |")
    lines += ["", "| layers | mode | " + " | ".join(f"{shared} of 64 shared" for shared in grid.shared) + " |"]
    lines.append("|---|---|" + "---|" * len(grid.shared))
    for depth in grid.depths:
        for mode in ("sum", "concat"):
            setting = {"depth": depth, "weight_decay": grid.weight_decays[-1], "initialization": 1.0}
            cells = [
                in_words(drops(rows, mode, shared_inputs=shared, **setting), len(grid.seeds)) for shared in grid.shared
            ]
            lines.append(f"| {depth} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def disjoint_table(document: Mapping[str, Any]) -> str:
    """What is lost on disjoint inputs, by initialization and weight decay."""
    return tables(document["rows"], Grid()).split("\n\n")[0]


def overlap_table(document: Mapping[str, Any]) -> str:
    """What is lost by the inputs in common."""
    return tables(document["rows"], Grid()).split("\n\n")[1]


def plot(rows: Sequence[dict[str, Any]], grid: Grid, path: Path) -> None:
    """Accuracy lost against input overlap, and against weight decay, one column per depth."""
    figure, axes = plt.subplots(
        2, len(grid.depths), figsize=(3.4 * len(grid.depths), 6.4), squeeze=False, sharey="row", layout="constrained"
    )
    colors = dict(zip(grid.weight_decays, ("#b2182b", "#ef8a62", "#2166ac"), strict=False))
    for column, depth in enumerate(grid.depths):
        over_overlap, over_decay = axes[0, column], axes[1, column]
        for mode, dash in (("sum", "-"), ("concat", "--")):
            for decay, marker in zip(grid.weight_decays, MARKERS, strict=False):
                setting = {"depth": depth, "weight_decay": decay, "initialization": 1.0}
                series = [drops(rows, mode, shared_inputs=shared, **setting) for shared in grid.shared]
                _line(
                    over_overlap,
                    [shared / BLOCK for shared in grid.shared],
                    series,
                    style=marker + dash,
                    color=colors[decay],
                    label=f"{mode}, {decay:g}",
                )
            for initialization, color in zip(INITIALIZATIONS, ("#4d4d4d", "#b35806"), strict=True):
                marker = MARKERS[INITIALIZATIONS.index(initialization)]
                setting = {"depth": depth, "initialization": initialization, "shared_inputs": 0}
                series = [drops(rows, mode, weight_decay=decay, **setting) for decay in grid.weight_decays]
                _line(
                    over_decay,
                    range(len(grid.weight_decays)),
                    series,
                    style=marker + dash,
                    color=color,
                    label=f"{mode}, start x {initialization:g}",
                )
        over_overlap.set_title(f"{depth} layers")
        over_overlap.set_xlabel("share of inputs in common")
        over_decay.set_xlabel("weight decay (disjoint inputs)")
        over_decay.set_xticks(range(len(grid.weight_decays)), [f"{decay:g}" for decay in grid.weight_decays])
        for axis in (over_overlap, over_decay):
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
    for row, title in enumerate(("mode, weight decay", "mode, random start")):
        axes[row, 0].set_ylabel("accuracy lost by the worse task\n(points; range of the seeds)")
        axes[row, 0].legend(title=title, fontsize=8, title_fontsize=8)
    save(figure, path)


def _line(
    axis: Any, places: Sequence[float], series: Sequence[Sequence[float]], *, style: str, color: str, label: str
) -> None:
    places = [place for place, values in zip(places, series, strict=True) if values]
    series = [values for values in series if values]
    means = [statistics.mean(values) for values in series]
    below = [mean - min(values) for mean, values in zip(means, series, strict=True)]
    above = [max(values) - mean for mean, values in zip(means, series, strict=True)]
    axis.errorbar(places, means, yerr=[below, above], fmt=style, color=color, capsize=2, markersize=4, label=label)


def whole_study(output: Path, *, quick: bool = False) -> str:
    """Train, merge and measure everything, write merging.json and merging.svg to a folder, and give the tables."""
    grid = QUICK if quick else Grid()
    with tempfile.TemporaryDirectory() as folder:
        rows = study(Path(folder), grid)
    document = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "training": {"steps": grid.steps, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "width": WIDTH},
        "rows": rows,
    }
    (output / "merging.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(rows, grid, output / "merging.svg")
    return tables(rows, grid)
