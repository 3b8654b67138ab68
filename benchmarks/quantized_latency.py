"""Latency of weights of 8 to 3 bits beside dense ones in bfloat16, on the CPU: layers, and a Llama of hidden 1024.

    OMP_NUM_THREADS=1 python benchmarks/quantized_latency.py

Layers at 1 to 128 rows, of sizes that are not among those by which a device is measured, each in the turn of as many of
its kind as a model has: a layer that runs again and again finds its weights in the cache, that of a model does not. And
the whole model: decode with a cache of keys and values at batches of 1 and 8, and prefill of 32 tokens. Dense and
quantized ones run in turn, every other time in the opposite order; a speed-up is the dense time over the quantized one,
in CPU time of the process, the median over the repeats with its quartiles. `predicted` is what the shipped constants of
a CPU say; of a model, that its layers change so while the rest takes what it takes. Writes
benchmarks/results/quantized-latency.json, and prints its tables. Takes ten minutes of one core.
"""

from __future__ import annotations

import copy
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from latency_networks import Workload, decode, llama, tokens
from latency_timing import ProcessClock, Quartiles, Repeats, Timed, timed_in_turn
from torch import nn

from compressor.factorize.settings import DEFAULTS
from compressor.forms import DENSE, FORMS, StoredWeight, predicted_seconds
from compressor.latency import LayerUse, shipped_profile
from compressor.latency.measure import device_name
from compressor.lowrank import put_pair

RESULT = Path(__file__).parent / "results" / "quantized-latency.json"
FORMS_TIMED = ("dense@8", "dense@6g128", "dense@4g128", "dense@3g64")
SIDES = ((1024, 1024), (2816, 1024), (768, 1536))
ROWS = (1, 2, 16, 64, 128)
# Bytes of the dense layers that run in turn at least: more than a cache holds.
TOGETHER = 2**26
DTYPE = torch.bfloat16
# What is asked at one row, of 8 bits.
WANTED = 1.3


def quantized(module: nn.Module, form: str) -> nn.Module:
    """A module whose linear layers but the head are in a form."""
    names = [name for name, each in module.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"]
    for name in names:
        dense = module.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        weight = StoredWeight("linear", tuple(dense.weight.shape))
        matrix = dense.weight.detach().double()
        pair = FORMS[form].approximate(weight, matrix, 0, metric=None, settings=DEFAULTS)
        module = put_pair(module, name, form, rank=0)
        module.get_submodule(name).load_state_dict(FORMS[form].stored(weight, pair, DTYPE))
    return module.eval()


def seconds_of(form: str, sides: tuple[int, int], rows: int) -> float:
    """What the shipped constants predict of a layer."""
    weight, use = StoredWeight("linear", sides), LayerUse(rows=rows)
    return float(predicted_seconds(shipped_profile("cpu"), weight, form, rank=0, use=use, dtype=DTYPE))


def in_turn(layers: list[nn.Module], x: torch.Tensor) -> None:
    """Run layers one after the other."""
    for layer in layers:
        layer(x)


def speed_up(times: Timed, place: int) -> dict[str, float]:
    """How many times faster a call is than the first."""
    return Quartiles.of([row[0] / row[place] for row in times.repeats]).to_dict()


def of_layers() -> list[dict[str, Any]]:
    """Single layers."""
    found = []
    for sides in SIDES:
        count = -(-TOGETHER // (2 * sides[0] * sides[1]))
        dense = nn.Sequential(nn.Linear(sides[1], sides[0], bias=False, dtype=DTYPE))
        each = [dense, *(quantized(copy.deepcopy(dense), form) for form in FORMS_TIMED)]
        layers = [[copy.deepcopy(one)[0] for _ in range(count)] for one in each]
        for rows in ROWS:
            x = torch.randn(rows, sides[1]).to(DTYPE)
            times = timed_in_turn([partial(in_turn, alike, x) for alike in layers], ProcessClock(), Repeats(most=9))
            for place, form in enumerate(FORMS_TIMED, 1):
                predicted = seconds_of(DENSE, sides, rows) / seconds_of(form, sides, rows)
                row = {"sides": list(sides), "rows": rows, "form": form, "speed_up": speed_up(times, place)}
                found.append(row | {"predicted": float(f"{predicted:.4g}")})
    return found


def of_models() -> list[dict[str, Any]]:
    """The whole Llama."""
    models = [llama().to(DTYPE).eval(), *(quantized(llama().to(DTYPE), form) for form in FORMS_TIMED)]
    linear = [each for name, each in models[0].named_modules() if isinstance(each, nn.Linear) and name != "lm_head"]
    sides = [(layer.out_features, layer.in_features) for layer in linear]
    workloads: list[tuple[Workload, int, int]] = [
        (decode(32), 1, 1),
        (decode(32), 8, 8),
        (tokens("prefill", 32), 1, 32),
    ]
    found = []
    for workload, batch, rows in workloads:
        runs = [workload.prepare(model, batch) for model in models]
        calls = [partial(run, model) for run, model in zip(runs, models, strict=True)]
        times = timed_in_turn(calls, ProcessClock(), Repeats(enough=10))
        dense, whole = sum(seconds_of(DENSE, each, rows) for each in sides), times.seconds(0)
        for place, form in enumerate(FORMS_TIMED, 1):
            layers = sum(seconds_of(form, each, rows) for each in sides)
            row = {"workload": workload.name, "batch": batch, "form": form, "speed_up": speed_up(times, place)}
            found.append(row | {"predicted": float(f"{whole / (max(0.0, whole - dense) + layers):.4g}")})
    return found


def layers_table(document: dict[str, Any]) -> str:
    """Speed-ups of the layers."""
    lines = ["| layer | rows | form | speed-up (quartiles) | predicted |", "|---|---|---|---|---|"]
    for row in document["layers"]:
        d_out, d_in = row["sides"]
        lines.append(
            f"| {d_out} x {d_in} | {row['rows']} | `{row['form']}` | {_of(row['speed_up'])} | {row['predicted']:.2f} |"
        )
    return "\n".join(lines)


def models_table(document: dict[str, Any]) -> str:
    """Speed-ups of the Llama."""
    lines = ["| workload | batch | form | speed-up (quartiles) | predicted |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['workload']} | {row['batch']} | `{row['form']}` | {_of(row['speed_up'])} | {row['predicted']:.2f} |"
        for row in document["models"]
    ]
    return "\n".join(lines)


def _of(quartiles: dict[str, float]) -> str:
    return f"{quartiles['median']:.2f} ({quartiles['low']:.2f} to {quartiles['high']:.2f})"


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        document = {
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "layers": of_layers(),
            "models": of_models(),
        }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(models_table(document), layers_table(document), sep="\n\n")
    at_one = [row["speed_up"]["median"] for row in document["models"] if row["batch"] == 1 and row["form"] == "dense@8"]
    print(f"\n8 bits decode {at_one[0]:.2f} times as fast as dense at batch 1; {WANTED} is wanted")


if __name__ == "__main__":
    main()
