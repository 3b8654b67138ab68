"""What momentum does to ranks: at equal epochs, and where as much of the start is forgotten.

    OMP_NUM_THREADS=1 python benchmarks/theory.py --studies momentum

The perceptron of `theory_networks.py` is trained on the digits by SGD at momentum 0, 0.5, 0.9 and 0.95. At equal epochs
learning rate and weight decay are those of all; momentum multiplies the forgetting exponent
`K = -sum log|1 - lr wd| / (1 - momentum)` by up to 20, and shortens the memory window as much. At equal K it is held at
4 in each of three ways: by the weight decay, by the steps, or by the learning rate, which is in proportion to
`1 - momentum`; that changes neither the epochs nor the strength of the decay.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from theory_networks import NETWORKS, Network, accuracy, steps_of, trained

from compressor import TrainingRecipe, memory_window
from compressor.measure import energy_rank
from compressor.measure.memory_window import forgetting_exponent, retention

mpl.use("Agg")
from matplotlib import pyplot as plt
from pictures import MARKERS, save

Row = dict[str, Any]


@dataclass(frozen=True)
class Momenta:
    """What is studied.

    Attributes:
        learning_rate: Of all runs but those that hold K by it.
        equal_decays: The weight decays of the runs at equal epochs.
        exponent: K of the others.
        decay: The weight decay of the runs that hold K by their steps or their learning rate.
        fast: The learning rate over `1 - momentum` of those that hold K by it.
        counted: The source's count: singular values above this share of the Frobenius norm.
    """

    network: Network = NETWORKS[0]
    momenta: Sequence[float] = (0.0, 0.5, 0.9, 0.95)
    seeds: Sequence[int] = (0, 1, 2)
    batch: int = 16
    learning_rate: float = 0.05
    equal_decays: Sequence[float] = (3e-4, 1e-3, 3e-3)
    exponent: float = 4.0
    decay: float = 3e-3
    fast: float = 0.1
    counted: float = 1e-3
    epsilon: float = 0.1


WHOLE = Momenta()
QUICK = Momenta(momenta=(0.0, 0.9), seeds=(0,), equal_decays=(3e-3,), exponent=0.5)


@dataclass(frozen=True)
class Run:
    """A recipe, and what it is compared at."""

    compared: str
    recipe: TrainingRecipe


def decay_for(exponent: float, *, learning_rate: float, momentum: float, steps: int) -> float:
    """The weight decay at which `-steps log(1 - lr wd) / (1 - momentum)` is the exponent."""
    return -math.expm1(-exponent * (1 - momentum) / steps) / learning_rate


def steps_for(exponent: float, *, learning_rate: float, momentum: float, weight_decay: float) -> int:
    """The steps after which it is."""
    return round(-exponent * (1 - momentum) / math.log1p(-learning_rate * weight_decay))


def runs(grid: Momenta) -> Iterator[Run]:
    """Every recipe."""
    epochs, k, rate = steps_of(grid.network, grid.batch), grid.exponent, grid.learning_rate

    def recipe(momentum: float, learning_rate: float, *, weight_decay: float, steps: int) -> TrainingRecipe:
        return TrainingRecipe(
            optimizer="sgd",
            momentum=momentum,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule="constant",
            batch_size=grid.batch,
            steps=steps,
        )

    for momentum in grid.momenta:
        for decay in grid.equal_decays:
            yield Run(f"equal epochs, wd {decay:g}", recipe(momentum, rate, weight_decay=decay, steps=epochs))
        decay = decay_for(k, learning_rate=rate, momentum=momentum, steps=epochs)
        yield Run("equal K by weight decay", recipe(momentum, rate, weight_decay=decay, steps=epochs))
        steps = steps_for(k, learning_rate=rate, momentum=momentum, weight_decay=grid.decay)
        yield Run("equal K by steps", recipe(momentum, rate, weight_decay=grid.decay, steps=steps))
        slow = grid.fast * (1 - momentum)
        steps = steps_for(k, learning_rate=grid.fast, momentum=0.0, weight_decay=grid.decay)
        yield Run("equal K by learning rate", recipe(momentum, slow, weight_decay=grid.decay, steps=steps))


def study(grid: Momenta) -> list[Row]:
    """Train every recipe from every start, and measure the hidden matrices."""
    rows = []
    for run in runs(grid):
        for seed in grid.seeds:
            rows.append(measured(grid, run, seed))
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def measured(grid: Momenta, run: Run, seed: int) -> Row:
    """One training run: the ranks of the hidden matrices and of what training wrote, and the window's prediction."""
    recipe = run.recipe
    steps = recipe.total_steps or 0
    torch.manual_seed(seed)
    initial = grid.network.build()
    ((model, _),) = trained(grid.network, recipe, lengths=[steps], seed=seed)
    kept = retention(recipe, steps).weights
    layers = {}
    for name, uses in grid.network.hidden.items():
        weight, before = (each.get_parameter(f"{name}.weight").detach().double().numpy() for each in (model, initial))
        window = memory_window(recipe, (weight.shape[0], weight.shape[1]), uses, epsilon=grid.epsilon)
        written = weight - kept * before
        layers[name] = {
            "full": min(weight.shape),
            "counted": counted_rank(weight, grid.counted),
            "energy": energy_rank(np.linalg.svd(weight, compute_uv=False)),
            "written_counted": counted_rank(written, grid.counted),
            "written_energy": energy_rank(np.linalg.svd(written, compute_uv=False)),
            "written": float(np.linalg.norm(written) / np.linalg.norm(weight)),
            "norm": float(np.linalg.norm(weight)),
            "window": window.steps,
            "bound": window.rank_bound,
            "vacuous": window.vacuous,
        }
    return {
        "compared": run.compared,
        "momentum": recipe.momentum,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "steps": steps,
        "seed": seed,
        "K": forgetting_exponent(recipe)[0],
        "layers": layers,
        "train_accuracy": accuracy(model, ["train"]),
        "accuracy": accuracy(model),
    }


def counted_rank(matrix: np.ndarray[Any, Any], share: float) -> int:
    """Singular values above a share of the Frobenius norm."""
    return int(np.count_nonzero(np.linalg.svd(matrix, compute_uv=False) > share * np.linalg.norm(matrix)))


def mean(rows: Iterable[Row], kind: str) -> float:
    """An effective rank as a share of the full one, over hidden matrices and starts."""
    return statistics.mean(layer[kind] / layer["full"] for row in rows for layer in row["layers"].values())


def spread(rows: Iterable[Row], kind: str) -> str:
    """The mean over the starts (least to most) of the mean over hidden matrices."""
    values = [mean([row], kind) for row in rows]
    return f"{statistics.mean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def table(document: Mapping[str, Any]) -> str:
    """Ranks against momentum for every comparison, as shares of the full rank."""
    columns = ["compared at", "momentum", "lr", "wd", "steps", "K", "window", "bound"]
    columns += ["energy 99 %", "count", "written, 99 %", "accuracy"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows = document["rows"]
    for compared in dict.fromkeys(row["compared"] for row in rows):
        for momentum in dict.fromkeys(row["momentum"] for row in rows):
            chosen = [row for row in rows if (row["compared"], row["momentum"]) == (compared, momentum)]
            layers = [layer for row in chosen for layer in row["layers"].values()]
            window = layers[0]["window"]
            cells = (
                compared,
                f"{momentum:g}",
                f"{chosen[0]['learning_rate']:.3g}",
                f"{chosen[0]['weight_decay']:.3g}",
                f"{chosen[0]['steps']:,}",
                f"{chosen[0]['K']:.2f}",
                "longer" if window is None else f"{window:,}",
                "-" if window is None else f"{layers[0]['bound']:,}",
                spread(chosen, "energy"),
                spread(chosen, "counted"),
                spread(chosen, "written_energy"),
                f"{statistics.mean(row['accuracy'] for row in chosen):.1%}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Three ranks against momentum, a panel each: lines of equal epochs, and of equal K."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.6), sharey=True, layout="constrained")
    titles = {
        "energy": "energy rank, 99 %",
        "counted": "count above 1e-3",
        "written_energy": "written by training, 99 %",
    }
    compared = list(dict.fromkeys(row["compared"] for row in rows))
    momenta = sorted({row["momentum"] for row in rows})
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for place, name in enumerate(compared):
            series = [
                [mean([row], kind) for row in rows if (row["compared"], row["momentum"]) == (name, momentum)]
                for momentum in momenta
            ]
            means = [statistics.mean(values) for values in series]
            bars = (
                [center - min(values) for center, values in zip(means, series, strict=True)],
                [max(values) - center for center, values in zip(means, series, strict=True)],
            )
            axis.errorbar(
                range(len(momenta)),
                means,
                yerr=bars,
                color=mpl.colormaps["tab10"](place),
                linestyle="--" if "epochs" in name else "-",
                marker=MARKERS[place % len(MARKERS)],
                markersize=4,
                elinewidth=0.8,
                label=name,
            )
        axis.set(title=title, xlabel="momentum", ylim=(0, 1.02))
        axis.set_xticks(range(len(momenta)), [f"{momentum:g}" for momentum in momenta])
        axis.grid(color="0.9")
    axes[0].set_ylabel("share of the full rank\n(mean of hidden matrices; range of starts)")
    axes[2].legend(fontsize=7, handlelength=3.5)
    save(figure, path)
