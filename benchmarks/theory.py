"""The theory's studies: what training hyperparameters do to ranks, what rules for ranks keep and cost, and merging.

    OMP_NUM_THREADS=1 python benchmarks/theory.py [--quick] [--output FOLDER]
        [--studies ranks rules momentum merging sums]

Perceptrons, small convolutional networks with batch normalization and small transformers are trained on the digits by
plain SGD at a constant learning rate (`theory_networks.py`), over a grid of batch size B, learning rate and weight
decay.

`ranks`: the effective ranks of the hidden matrices, after the same number of epochs for all, and after as many steps as
leave exp(-4) of every start (K = 4, a memory window of 1.7 times 90 %), where that many are affordable.

`rules`: every matrix of every network is truncated by a rule, and the accuracy measured again: by the window rule, the
energy rank at 99 %, one relative error for all layers that gives the window rule's size, the threshold of Gavish and
Donoho (2014, for an unknown level of noise) and the stable rank. Sizes are those of pivoted pairs, r (d_out + d_in - r)
numbers. Networks of AdamW are added here.

`momentum`: `theory_momentum.py`, ranks over momentum, at equal epochs and at equal K.

`merging`: `merging.py`, the sum of networks and networks side by side over depth, weight decay and input overlap.

`sums`: `flow_sums.py`, sums of networks that gradient flow has brought to a stationary point.

Accuracies are of the validation and test splits together; nothing was trained on them, but the least K at which the
window rule decides was chosen by them. `--quick`
takes one seed and a corner of the grid. Writes theory-ranks.json and .svg, theory-rules.json and .svg,
theory-momentum.json and .svg, merging.json and .svg, theory-sums.json and .svg to benchmarks/results (with `--quick` to
FOLDER only, which is then needed), and prints the tables of the README.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flow_sums
import matplotlib as mpl
import merging
import numpy as np
import theory_momentum
import torch
from scipy.stats import spearmanr
from theory_networks import NETWORKS, Network, accuracy, steps_of, trained
from torch import nn

from compressor import TrainingRecipe, inspect, memory_window
from compressor.measure import Spectrum, energy_rank, frobenius_rank, stable_rank

mpl.use("Agg")
from matplotlib import pyplot as plt
from pictures import save

RESULTS = Path(__file__).parent / "results"
FIXED_EXPONENT = 4.0
EPSILON = 0.1
SEEDS = (0, 1)
# A network below this accuracy on its own training data has collapsed, or was not trained: its ranks say nothing.
TRAINED = 0.9
ADAMW_RATE, ADAMW_BATCH = 3e-3, 16
# The sources' count: singular values above this share of the Frobenius norm.
COUNTED = 1e-3

Row = dict[str, Any]


def recipe_for(optimizer: str, batch: int, *, learning_rate: float, weight_decay: float) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer=optimizer,
        momentum=0.0 if optimizer == "sgd" else None,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="constant",
        batch_size=batch,
    )


def lengths_of(network: Network, batch: int, *, learning_rate: float, weight_decay: float) -> dict[str, int]:
    """The steps after which a run is measured: those of the epochs, and those that leave exp(-4) of its start."""
    lengths = {"epochs": steps_of(network, batch)}
    if weight_decay > 0:
        forgotten = round(-FIXED_EXPONENT / math.log1p(-learning_rate * weight_decay))
        if forgotten <= network.most_steps:
            lengths["K"] = forgotten
    return lengths


def run(network: Network, recipe: TrainingRecipe, lengths: Mapping[str, int], *, seed: int) -> list[Row]:
    """One training run: its ranks and what every rule does to it, at every length."""
    rows = []
    for model, of_length in trained(network, recipe, lengths=sorted(set(lengths.values())), seed=seed):
        about: Row = {
            "network": network.name,
            "optimizer": recipe.optimizer,
            "batch": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "seed": seed,
            "steps": of_length.steps,
            "compared": [name for name, steps in lengths.items() if steps == of_length.steps],
        }
        about |= {"train_accuracy": accuracy(model, ["train"]), "accuracy": accuracy(model)}
        rows.append(about | measured(network, model, of_length))
    return rows


def measured(network: Network, model: nn.Module, recipe: TrainingRecipe) -> Row:
    """The ranks of the hidden matrices, and what the rules keep of all matrices and lose."""
    found = [each for each in inspect(model, recipe=recipe).layers if each.initialization and each.singular_values]
    spectra = {each.layer.name: np.array(each.singular_values) for each in found}
    above = {each.layer.name: each.initialization.above_edge for each in found if each.initialization}
    hidden = {}
    for each in found:
        if (uses := network.hidden.get(each.layer.name)) is None or each.ranks is None:
            continue
        window = memory_window(recipe, each.layer.shape, uses, epsilon=EPSILON)
        ranks = each.ranks.to_dict()
        counted = int(np.count_nonzero(spectra[each.layer.name] > COUNTED * np.linalg.norm(spectra[each.layer.name])))
        hidden[each.layer.name] = ranks | {"counted": counted, "bound": window.rank_bound, "vacuous": window.vacuous}
    exponent = found[0].initialization.forgetting_exponent if found[0].initialization else None
    return {"K": exponent, "hidden": hidden, "rules": ruled(model, spectra, above)}


# Rules for ranks


def gavish_donoho_rank(spectrum: Spectrum, shape: tuple[int, int]) -> int:
    """Singular values above omega(beta) times their median (arXiv 1305.5870, eq. 5 for omega), for unknown noise."""
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int(np.count_nonzero(spectrum > omega * np.median(spectrum)))


def size(shape: tuple[int, int], rank: int) -> int:
    """Numbers of a pivoted pair; at full rank those of the matrix."""
    return rank * (sum(shape) - rank)


def rule_ranks(
    spectra: Mapping[str, Spectrum], shapes: Mapping[str, tuple[int, int]], above: Mapping[str, int | None]
) -> dict[str, dict[str, int]]:
    """The rank of every matrix by every rule."""

    def by(rank: Callable[[str], int]) -> dict[str, int]:
        return {name: max(1, rank(name)) for name in spectra}

    def window(name: str) -> int:
        edge = above[name]
        energy = frobenius_rank(spectra[name], EPSILON)
        return energy if edge is None else min(edge, energy)

    ranks = {"window rule": by(window)}
    target = sum(size(shapes[name], rank) for name, rank in ranks["window rule"].items())

    def of_error(error: float) -> dict[str, int]:
        return by(lambda name: frobenius_rank(spectra[name], error))

    low, high = 0.0, 1.0  # the error at which all layers together have the window rule's size, or just less
    for _ in range(40):
        middle = (low + high) / 2
        if sum(size(shapes[name], rank) for name, rank in of_error(middle).items()) <= target:
            high = middle
        else:
            low = middle
    ranks["energy, same size"] = of_error(high)
    ranks["energy 99 %"] = by(lambda name: energy_rank(spectra[name]))
    ranks["Gavish-Donoho"] = by(lambda name: gavish_donoho_rank(spectra[name], shapes[name]))
    ranks["stable rank"] = by(lambda name: math.ceil(stable_rank(spectra[name])))
    return ranks


@torch.no_grad()
def ruled(model: nn.Module, spectra: Mapping[str, Spectrum], above: Mapping[str, int | None]) -> Row:
    """For every rule the share of the parameters kept, and the accuracy left."""
    weights = {name: model.get_parameter(f"{name}.weight") for name in spectra}
    factors = {name: torch.linalg.svd(weight.flatten(1), full_matrices=False) for name, weight in weights.items()}
    shapes = {name: (weight.shape[0], weight[0].numel()) for name, weight in weights.items()}
    found = {}
    for rule, ranks in rule_ranks(spectra, shapes, above).items():
        truncated = copy.deepcopy(model)
        for name, rank in ranks.items():
            u, s, v = factors[name]
            truncated.get_parameter(f"{name}.weight").copy_((u[:, :rank] * s[:rank] @ v[:rank]).view_as(weights[name]))
        kept = sum(size(shapes[name], rank) for name, rank in ranks.items()) / sum(map(math.prod, shapes.values()))
        found[rule] = {"kept": kept, "accuracy": accuracy(truncated)}
    return found


# Tables


def grid(networks: Sequence[Network], seeds: Sequence[int], *, adamw: bool) -> list[Row]:
    rows = []
    for network in networks:
        for batch in network.batches:
            for rate in network.learning_rates:
                for decay in network.weight_decays:
                    lengths = lengths_of(network, batch, learning_rate=rate, weight_decay=decay)
                    for seed in seeds:
                        rows += run(
                            network,
                            recipe_for("sgd", batch, learning_rate=rate, weight_decay=decay),
                            lengths,
                            seed=seed,
                        )
                        show(rows[-1])
        for decay in network.adamw_decays if adamw else ():
            for seed in seeds:
                recipe = recipe_for("adamw", ADAMW_BATCH, learning_rate=ADAMW_RATE, weight_decay=decay)
                rows += run(network, recipe, {"epochs": steps_of(network, ADAMW_BATCH)}, seed=seed)
                show(rows[-1])
    return rows


def show(row: Row) -> None:
    sys.stderr.write(f"{ {key: value for key, value in row.items() if key not in ('hidden', 'rules')} }\n")


def compared(rows: Iterable[Row], network: str, how: str) -> list[Row]:
    """The runs of plain SGD that learned, of a network, that are compared after as many epochs or at the same K."""
    return [
        row
        for row in rows
        if row["network"] == network
        and row["optimizer"] == "sgd"
        and how in row["compared"]
        and row["train_accuracy"] >= TRAINED
    ]


def mean_share(row: Row, kind: str) -> float:
    """An effective rank as a share of the full one, the mean over the hidden matrices."""
    return statistics.mean(ranks[kind] / ranks["full"] for ranks in row["hidden"].values())


# What the ranks of runs are correlated with.
OF_RUNS: dict[str, Callable[[Row], float]] = {
    "B": lambda row: row["batch"],
    "lr": lambda row: row["learning_rate"],
    "wd": lambda row: row["weight_decay"],
    "B / (lr wd)": lambda row: row["batch"] / row["learning_rate"] / row["weight_decay"],
    "accuracy": lambda row: row["accuracy"],
}


def ranks_table(document: Mapping[str, Any]) -> str:
    """How Frobenius ranks follow B, the learning rate and the decay, at the same epochs and at the same K."""
    rows = document["rows"]
    columns = ["network", "compared at", "runs", "rank at B = 4", "B = 16", "B = 64", *OF_RUNS]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for network in dict.fromkeys(row["network"] for row in rows):
        for how, name in (("epochs", "the same epochs"), ("K", "K = 4")):
            runs = [row for row in compared(rows, network, how) if row["weight_decay"] > 0]
            cells = []
            for batch in (4, 16, 64):
                shares = [mean_share(row, "frobenius") for row in runs if row["batch"] == batch]
                cells.append(f"{statistics.mean(shares):.0%}" if shares else "-")
            cells += [correlation(runs, of) for of in OF_RUNS.values()]
            lines.append(f"| {network} | {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correlation(rows: Sequence[Row], of: Callable[[Row], float]) -> str:
    """Spearman's rank correlation of the Frobenius rank; a dash where there is nothing to rank."""
    values, shares = [of(row) for row in rows], [mean_share(row, "frobenius") for row in rows]
    if len(set(values)) < 2 or len(set(shares)) < 2:
        return "-"
    return f"{spearmanr(values, shares).statistic:+.2f}"


RULES = ("window rule", "energy, same size", "energy 99 %", "Gavish-Donoho", "stable rank")


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The networks that learned, by their kind and how much of the start they forgot."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["train_accuracy"] < TRAINED:
            continue
        if row["optimizer"] == "adamw":
            name = f"{row['network']}, AdamW (K > 1)"
        else:
            forgot = "K < 1/2" if row["K"] < 0.5 else "1/2 to 2" if row["K"] < 2 else "K >= 2"
            name = f"{row['network']}, {forgot}"
        found.setdefault(name, []).append(row)
    order = ("K >= 2", "1/2 to 2", "K < 1/2", "(")
    return dict(sorted(found.items(), key=lambda each: next(n for n, part in enumerate(order) if part in each[0])))


def lost(row: Row, rule: str) -> float:
    """Points of accuracy."""
    return 100 * (row["accuracy"] - row["rules"][rule]["accuracy"])


def rules_table(document: Mapping[str, Any]) -> str:
    """What each rule keeps of the parameters, and the points of accuracy it loses: mean (most)."""
    lines = ["| networks | runs | " + " | ".join(RULES) + " |", "|---|---|" + "---|" * len(RULES)]
    for name, runs in groups(document["rows"]).items():
        cells = []
        for rule in RULES:
            kept, points = (
                statistics.mean(row["rules"][rule]["kept"] for row in runs),
                [lost(row, rule) for row in runs],
            )
            cells.append(f"{kept:.0%}; {statistics.mean(points):.1f} ({max(points):.1f})")
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Plots


def plot_ranks(rows: Sequence[Row], path: Path) -> None:
    """The Frobenius rank against B, a column a network; above at the same epochs, below at the same K."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(3.9 * len(names), 6.6), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        for line, (how, title) in enumerate((("epochs", "after the same epochs"), ("K", "at K = 4"))):
            axis = axes[line, column]
            runs = compared(rows, name, how)
            settings = sorted({(row["learning_rate"], row["weight_decay"]) for row in compared(rows, name, "epochs")})
            decays = sorted({decay for _, decay in settings})
            for rate, decay in settings:
                chosen = [row for row in runs if (row["learning_rate"], row["weight_decay"]) == (rate, decay)]
                batches = sorted({row["batch"] for row in chosen})
                series = [[mean_share(row, "frobenius") for row in chosen if row["batch"] == b] for b in batches]
                if not series:
                    continue
                means = [statistics.mean(values) for values in series]
                bars = (
                    [mean - min(values) for mean, values in zip(means, series, strict=True)],
                    [max(values) - mean for mean, values in zip(means, series, strict=True)],
                )
                axis.errorbar(
                    batches,
                    means,
                    yerr=bars,
                    color=mpl.colormaps["viridis"](0.9 * decays.index(decay) / max(1, len(decays) - 1)),
                    linestyle="-" if rate == settings[-1][0] else "--",
                    marker="os^D"[decays.index(decay)],
                    markersize=4,
                    elinewidth=0.8,
                    label=f"lr {rate:g}, wd {decay:g}",
                )
            axis.set(title=f"{name}\n{title}", xscale="log", ylim=(0, 1.02))
            batches = sorted({row["batch"] for row in rows})
            axis.set_xticks(batches, [str(batch) for batch in batches])
            axis.minorticks_off()
            axis.grid(color="0.9")
        axes[0, column].legend(fontsize=7, handlelength=3.5)
        axes[1, column].set_xlabel("batch size")
    for line in axes:
        line[0].set_ylabel("Frobenius rank at 0.1, share of the full\n(mean of hidden matrices; range of seeds)")
    save(figure, path)


STYLES = {
    "window rule": ("o", "black"),
    "energy, same size": ("s", "#4477aa"),
    "energy 99 %": ("D", "#66ccee"),
    "Gavish-Donoho": ("^", "#228833"),
    "stable rank": ("v", "#ee6677"),
}


def plot_rules(rows: Sequence[Row], path: Path) -> None:
    """Points lost against parameters kept: every network by every rule, a panel a kind of network."""
    found = groups(rows)
    columns = 3
    height = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(height, columns, figsize=(11.5, 3.4 * height), squeeze=False, layout="constrained")
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    for axis, (name, runs) in zip(axes.flat, found.items(), strict=False):
        for rule, (marker, color) in STYLES.items():
            points = [(row["rules"][rule]["kept"], lost(row, rule)) for row in runs]
            axis.scatter(*zip(*points, strict=True), s=16, marker=marker, color=color, alpha=0.6, label=rule)
        axis.axhspan(-1, 1, color="0.93", zorder=0)
        axis.set_yscale("symlog", linthresh=1)
        axis.set(title=f"{name} ({len(runs)} runs)", xlim=(0, 1), ylim=(-2, 100))
        axis.set_yticks([-1, 0, 1, 10, 100], ["-1", "0", "1", "10", "100"])
        axis.title.set_fontsize(9)
        axis.grid(color="0.9")
    for line in axes:
        line[0].set_ylabel("points of accuracy lost")
    for axis in list(axes.flat)[max(0, len(found) - columns) : len(found)]:
        axis.set_xlabel("share of the parameters kept")
    axes[0, 0].legend(fontsize=7)
    save(figure, path)


def write(path: Path, rows: Sequence[Row]) -> None:
    """One row a line: readable, and small."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    studies = ("ranks", "rules", "momentum", "merging", "sums")
    parser.add_argument("--studies", nargs="+", choices=studies, default=studies)
    parser.add_argument("--output", type=Path, default=None)
    asked = parser.parse_args()
    if asked.quick and asked.output is None:
        parser.error("--quick needs --output: benchmarks/results holds what the whole studies wrote")
    output = asked.output or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rules = "rules" in asked.studies
    if rules or "ranks" in asked.studies:
        networks = [quick(network) for network in NETWORKS] if asked.quick else NETWORKS
        rows = grid(networks, SEEDS[:1] if asked.quick else SEEDS, adamw=rules)
        if "ranks" in asked.studies:
            write(output / "theory-ranks.json", [without(row, "rules") for row in rows if row["optimizer"] == "sgd"])
            plot_ranks(rows, output / "theory-ranks.svg")
            sys.stdout.write(ranks_table({"rows": rows}) + "\n\n")
        if rules:
            write(output / "theory-rules.json", [without(row, "hidden") for row in rows])
            plot_rules(rows, output / "theory-rules.svg")
            sys.stdout.write(rules_table({"rows": rows}) + "\n\n")
    if "momentum" in asked.studies:
        found = theory_momentum.study(theory_momentum.QUICK if asked.quick else theory_momentum.WHOLE)
        write(output / "theory-momentum.json", found)
        theory_momentum.plot(found, output / "theory-momentum.svg")
        sys.stdout.write(theory_momentum.table({"rows": found}) + "\n\n")
    if "merging" in asked.studies:
        sys.stdout.write(merging.whole_study(output, quick=asked.quick) + "\n\n")
    if "sums" in asked.studies:
        grids = flow_sums.QUICK if asked.quick else flow_sums.WHOLE
        found = [row for grid in grids for row in flow_sums.study(grid)]
        write(output / "theory-sums.json", found)
        flow_sums.plot(found, output / "theory-sums.svg")
        sys.stdout.write(flow_sums.stationary_table({"rows": found}) + "\n\n")
        sys.stdout.write(flow_sums.sums_table({"rows": found}) + "\n")


def quick(network: Network) -> Network:
    """A corner of a network's grid."""
    return replace(
        network,
        epochs=max(1, network.epochs // 2),
        batches=network.batches[1:],
        learning_rates=network.learning_rates[-1:],
        weight_decays=(network.weight_decays[0], network.weight_decays[-1]),
        most_steps=network.most_steps // 2,
        adamw_decays=network.adamw_decays[-1:],
    )


def without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}


if __name__ == "__main__":
    main()
