"""How to share a size among layers without data: ways to do it, on small networks of many kinds.

    OMP_NUM_THREADS=1 python benchmarks/without_data.py

Trains the networks of without_data_networks.py, three random seeds each, and truncates their layers to 0.8, 0.6 and
0.4 of their parameters by each rule of `RULES`. The rule of the tool was chosen on the first seed; the table is of the
others. Writes benchmarks/results/without_data.json and prints the table of the README. `--table` only prints it, and
`--seeds 0 --networks VGG GRU --output FILE` measures a part.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from without_data_networks import NETWORKS, Network, Task, measured, trained

from compressor.engine import Run
from compressor.forms import TRANSPOSED
from compressor.lowrank import approximate, as_matrix
from compressor.model import inspect_layers, measured_layers, open_model
from compressor.planning import MeasuredLayer
from compressor.planning.allocation import Choices, allocate, even_shares, spend
from compressor.planning.layer_choices import LayerChoices, layer_choices
from compressor.planning.measured import layer_plan
from compressor.planning.size import chosen_within

RESULT = Path(__file__).parent / "results" / "without_data.json"
KEEPS = (0.8, 0.6, 0.4)
CHOSEN_ON, REPORTED = (0,), (1, 2)

Rule = Callable[[Sequence[MeasuredLayer], Sequence[LayerChoices], int], list[int] | None]


def summed(losses: Callable[[LayerChoices], np.ndarray[Any, Any]]) -> Rule:
    """The allocation of the least sum of some loss."""
    return lambda layers, tables, budget: allocate(
        [Choices(each.choices.cost, losses(each)) for each in tables], budget
    )


def even(layers: Sequence[MeasuredLayer], tables: Sequence[LayerChoices], budget: int) -> list[int]:
    """The same share of every layer; what is left of the budget goes where it saves most error, mostly small layers."""
    choices = [Choices(each.choices.cost, np.square(each.errors)) for each in tables]
    chosen = even_shares(choices, budget)
    left = budget - sum(int(each.cost[i]) for each, i in zip(choices, chosen, strict=True))
    return spend(choices, chosen, left) if left > 0 else chosen


def half_even(layers: Sequence[MeasuredLayer], tables: Sequence[LayerChoices], budget: int) -> list[int] | None:
    """Squared relative errors, where every layer keeps at least half of its even share."""
    floors = [each.choices.cost[i] / 2 for i, each in zip(even(layers, tables, budget), tables, strict=True)]
    allowed = [np.flatnonzero(each.choices.cost >= floor) for floor, each in zip(floors, tables, strict=True)]
    chosen = allocate(
        [
            Choices(each.choices.cost[some], np.square(each.errors[some]))
            for some, each in zip(allowed, tables, strict=True)
        ],
        budget,
    )
    return None if chosen is None else [int(some[i]) for some, i in zip(allowed, chosen, strict=True)]


def beside_even(layers: Sequence[MeasuredLayer], tables: Sequence[LayerChoices], budget: int) -> list[int] | None:
    """Each layer's loss divided by its own at an even share, and nothing else."""
    own = [each.choices.loss[i] + 1e-14 for i, each in zip(even(layers, tables, budget), tables, strict=True)]
    return allocate(
        [Choices(each.choices.cost, each.choices.loss / loss) for loss, each in zip(own, tables, strict=True)], budget
    )


RULES: dict[str, Rule] = {
    "even share": even,
    "relative error": summed(lambda each: np.square(each.errors)),
    "kept energy": summed(lambda each: each.choices.loss),
    "relative error, half even": half_even,
    "beside an even share": beside_even,
    "ours": chosen_within,
}


def truncated(
    model: nn.Module, layers: Sequence[MeasuredLayer], tables: Sequence[LayerChoices], *, chosen: list[int]
) -> nn.Module:
    """A copy of the model with the matrices that the choices stand for."""
    model = copy.deepcopy(model)
    for m, each, index in zip(layers, tables, chosen, strict=True):
        if each.forms[index] == "dense":
            continue
        weight = getattr(model.get_submodule(m.layer.module), m.layer.parameter)
        assert isinstance(weight, Tensor)
        plan = layer_plan(m, int(each.ranks[index]), each.forms[index], reason="")
        matrix = approximate(m.layer, plan, as_matrix(m.layer, weight.detach()).double()).product()
        weight.data = (matrix.T if m.layer.kind in TRANSPOSED else matrix).reshape(weight.shape).to(weight.dtype)
    return model


def rows_of(network: Network, model: nn.Module, task: Task, *, seed: int) -> list[dict[str, Any]]:
    """Loss, score and what is left of the score, for every size and rule."""
    subject = open_model(model)
    layers = measured_layers(subject, inspect_layers(subject, 0.1, Run(torch.device("cpu"))))
    tables = [layer_choices(m, "auto", "parameters") for m in layers]
    parameters = sum(m.layer.parameters for m in layers)
    loss, score = measured(model, task)
    rows = [{"network": network.name, "seed": seed, "rule": "dense", "loss": loss, "score": score}]
    for keep in KEEPS:
        for name, rule in RULES.items():
            chosen = rule(layers, tables, int(keep * parameters))
            if chosen is None:
                continue
            lost, found = measured(truncated(model, layers, tables, chosen=chosen), task)
            rows.append(
                {
                    "network": network.name,
                    "seed": seed,
                    "keep": keep,
                    "rule": name,
                    "parameters": sum(int(each.choices.cost[i]) for i, each in zip(chosen, tables, strict=True)),
                    "eligible": parameters,
                    "loss": lost,
                    "score": found,
                    "left": (found - task.chance) / (score - task.chance),
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What is left of each network's score above chance, mean over the reported seeds."""
    shown = ("even share", "relative error", "ours")
    heads = [f"{name}, {keep:g}" for keep in KEEPS for name in shown]
    lines = [f"| network | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]

    def left(network: str | None, keep: float, rule: str) -> list[float]:
        return [
            max(0.0, row["left"])
            for row in rows
            if row["seed"] in REPORTED
            and (network is None or row["network"] == network)
            and row.get("keep") == keep
            and row["rule"] == rule
        ]

    for name in dict.fromkeys(row["network"] for row in rows):
        cells = [left(name, keep, rule) for keep in KEEPS for rule in shown]
        lines.append(f"| {name} | {' | '.join(f'{np.mean(cell):.0%}' for cell in cells)} |")
    lines.append("")
    lines += ["| rule | mean left | worst against an even share, in points |", "|---|---|---|"]
    for rule in RULES:
        everything = [(left(None, keep, rule), left(None, keep, "even share")) for keep in KEEPS]
        mean = np.mean([value for ours, _ in everything for value in ours])
        worst = min(a - b for ours, theirs in everything for a, b in zip(ours, theirs, strict=True))
        lines.append(f"| {rule} | {mean:.0%} | {100 * worst:+.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*CHOSEN_ON, *REPORTED])
    parser.add_argument("--networks", nargs="+", default=[network.name for network in NETWORKS])
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        rows: list[dict[str, Any]] = []
        for network in NETWORKS:
            for seed in asked.seeds if network.name in asked.networks else ():
                task = network.task(seed)
                rows += rows_of(network, trained(network, task, seed), task, seed=seed)
                print(f"{network.name}, seed {seed}", file=sys.stderr, flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        asked.output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(asked.output.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()
