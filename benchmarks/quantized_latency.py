"""Latency of weights of 8 and 4 bits beside dense ones in bfloat16, on the CPU: layers, and a Llama of hidden 1024.

    OMP_NUM_THREADS=1 python benchmarks/quantized_latency.py

The linear layers of the Llama at 1 to 128 rows, and the whole model: decode with a cache of keys and values at batches
of 1 and 8, and prefill of 32 tokens. Dense and quantized ones run in turn, every other time in the opposite order; a
speed-up is the dense time over the quantized one, in CPU time of the process, the median over the repeats with its
quartiles. `predicted` is what the shipped constants of a CPU say. Writes
benchmarks/results/quantized-latency.json, and prints its tables. Takes two minutes of one core.
"""

from __future__ import annotations

import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from latency_networks import Workload, decode, llama, tokens
from latency_timing import ProcessClock, Quartiles, Repeats, timed_in_turn
from torch import nn

from compressor.factorize.settings import DEFAULTS
from compressor.forms import DENSE, FORMS, StoredWeight, predicted_seconds
from compressor.latency import LayerUse, shipped_profile
from compressor.latency.measure import device_name
from compressor.lowrank import put_pair

RESULT = Path(__file__).parent / "results" / "quantized-latency.json"
FORMS_TIMED = ("dense@8", "dense@4g128")
SIDES = ((1024, 1024), (2816, 1024), (1024, 2816))
ROWS = (1, 4, 16, 64, 128)
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


def speed_ups(calls: list[Any]) -> list[dict[str, float]]:
    """How many times faster each call is than the first."""
    times = timed_in_turn(calls, ProcessClock(), Repeats())
    return [Quartiles.of([row[0] / row[place] for row in times.repeats]).to_dict() for place in range(1, len(calls))]


def of_layers() -> list[dict[str, Any]]:
    """The linear layers of the Llama."""
    profile, found = shipped_profile("cpu"), []
    for d_out, d_in in SIDES:
        dense = nn.Sequential(nn.Linear(d_in, d_out, bias=False, dtype=DTYPE))
        made = [quantized(nn.Sequential(nn.Linear(d_in, d_out, bias=False, dtype=DTYPE)), form) for form in FORMS_TIMED]
        weight = StoredWeight("linear", (d_out, d_in))
        for rows in ROWS:
            x, use = torch.randn(rows, d_in).to(DTYPE), LayerUse(rows=rows)
            measured = speed_ups([partial(each, x) for each in (dense, *made)])
            seconds = [
                float(predicted_seconds(profile, weight, form, rank=0, use=use, dtype=DTYPE))
                for form in (DENSE, *FORMS_TIMED)
            ]
            for form, speed_up, each in zip(FORMS_TIMED, measured, seconds[1:], strict=True):
                predicted = float(f"{seconds[0] / each:.4g}")
                found.append(
                    {"sides": [d_out, d_in], "rows": rows, "form": form, "speed_up": speed_up, "predicted": predicted}
                )
    return found


def of_models() -> list[dict[str, Any]]:
    """The whole Llama."""
    models = [llama().to(DTYPE).eval(), *(quantized(llama().to(DTYPE), form) for form in FORMS_TIMED)]
    workloads: list[tuple[Workload, int]] = [(decode(32), 1), (decode(32), 8), (tokens("prefill", 32), 1)]
    found = []
    for workload, batch in workloads:
        runs = [workload.prepare(model, batch) for model in models]
        measured = speed_ups([partial(run, model) for run, model in zip(runs, models, strict=True)])
        found += [
            {"workload": workload.name, "batch": batch, "form": form, "speed_up": speed_up}
            for form, speed_up in zip(FORMS_TIMED, measured, strict=True)
        ]
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
    lines = ["| workload | batch | form | speed-up (quartiles) |", "|---|---|---|---|"]
    lines += [
        f"| {row['workload']} | {row['batch']} | `{row['form']}` | {_of(row['speed_up'])} |"
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
