"""Latency of low-rank layers and networks beside dense ones, the ideal, and what the cost model predicts.

    python benchmarks/latency.py [--device auto] [--threads 1] [--parts layers models compiled] [--networks NAME ...]
                                 [--batches 1 8 32 128] [--output FOLDER]

`layers`: linear layers and the convolutions of ResNet-50 and digits-resnet in every form, at 75, 50 and 25 % of their
numbers. `models`: digits-vit, a Llama of hidden 1024 with 4 blocks (prefill, and decode with a cache of keys and
values), BERT-base and ResNet-50, at half of the numbers of each layer in each form, and as `prefer="speed"` plans it
for batches of 1 and 32. `compiled`: the same networks after `torch.compile`, at a batch of 32.

Dense and low-rank ones run in turn, every other time in the opposite order; a ratio is the median over the repeats,
with its quartiles. With one thread what is measured is the CPU time of the process, with more the time that passes, and
on a GPU that between CUDA events. Ideally every layer takes as much less time than the dense one in the same network
as it stores fewer numbers; the share of the ideal speed-up that is reached is that time divided by the measured one.

Before anything is timed the low-rank networks are checked: the class of the module in each layer's place, the shapes of
its tensors, that a forward calls it, that it computes what the product of its factors does, and the network's bytes.
A failed check ends the run.

What ran replaces the same part and networks in benchmarks/results/latency-DEVICE.json (latency-cpu-2-threads.json of
two threads), and the rest stays. Prints the tables of these results and what falls short of its target. On one core
`layers` and `models` take 20 minutes, and on a GPU under five.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from latency_layers import KEEPS, LayerTiming, convolution_cases, linear_cases, measured_layer
from latency_models import BATCHES, SPEED, ModelTiming, measured_network
from latency_networks import digits_resnet, images, network_of_images, networks, resnet
from latency_timing import Clock, CudaClock, ProcessClock, Quartiles, Repeats, WallClock

from compressor.engine import Run
from compressor.latency import DeviceProfile, device_profile
from compressor.latency.measure import device_name

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.float32, torch.bfloat16)
PARTS = ("layers", "models", "compiled")
SHORT = {"float32": "f32", "bfloat16": "bf16"}

# What is asked of the networks, and of the predictions.
SLOWEST = 1.03
LEAST_OF_IDEAL = {"float32": 0.8, "bfloat16": 0.65}
CLOSE, LEAST_CLOSE = 0.15, 0.9

Document = dict[str, Any]
Rows = list[dict[str, Any]]


def measured_layers(device: torch.device, clock: Clock, profile: DeviceProfile) -> Iterator[dict[str, Any]]:
    """The rows of `layers`."""
    timing = LayerTiming(device, clock, Repeats(warm_ups=2, most=7, enough=0.25, least=0.003, lead=1), profile)
    large = network_of_images("ResNet-50", resnet, images(3, 112))
    small = network_of_images("digits-resnet", digits_resnet, images(1, 8))
    cases = chain(linear_cases(), convolution_cases(large), convolution_cases(small))
    for case in cases:
        for dtype in DTYPES:
            for keep in KEEPS:
                yield from measured_layer(case, dtype, keep, timing=timing)


def measured_models(timing: ModelTiming, names: Iterable[str], *, compiled: bool) -> Iterator[dict[str, Any]]:
    """The rows of `models`, or of `compiled`."""
    known = networks()
    for name in names:
        for dtype in DTYPES:
            yield from measured_network(known[name], dtype, timing, compiled=compiled)


def clock_of(device: torch.device, threads: int) -> Clock:
    """How time is measured on a device."""
    if device.type == "cuda":
        return CudaClock()
    return ProcessClock() if threads == 1 else WallClock()


def environment(device: torch.device, threads: int) -> Document:
    """What the times depend on beside the code."""
    vectors = "" if device.type == "cuda" else f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device_name(device) + vectors,
        "threads": threads,
        "clock": clock_of(device, threads).name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


# Tables, each from the document of the results


def models_table(document: Mapping[str, Any]) -> str:
    """Ratios to dense of the networks at half of their layers' numbers, and the shares of the ideal speed-up."""
    return networks_table(document["models"])


def compiled_table(document: Mapping[str, Any]) -> str:
    """Ratios to the compiled dense network."""
    return networks_table(document["compiled"])


def networks_table(rows: Rows) -> str:
    """A line each variant of a network, a column each batch."""
    batches = sorted({row["batch"] for row in rows})
    lines = [table_head(["network", "", *(f"batch {batch}" for batch in batches)])]
    for (network, workload, dtype), found in grouped(rows, "network", "workload", "dtype").items():
        by_batch = {row["batch"]: row for row in found}
        names = [f"{network}, {workload}, {SHORT[dtype]}", "", "", ""]
        if any("ideal" in row for row in found):
            cells = [dense_cell(by_batch.get(batch)) for batch in batches]
            lines.append(table_line([names.pop(0), "dense; ideal", *cells]))
        for variant in ("plain", "pivoted", SPEED):
            cells = [variant_cell(by_batch.get(batch), variant) for batch in batches]
            lines.append(table_line([names.pop(0), f"**{variant}**" if variant == SPEED else variant, *cells]))
    return "\n".join(lines)


def dense_cell(row: Mapping[str, Any] | None) -> str:
    """The time of the dense network, and the ideal ratio."""
    if row is None:
        return ""
    dense = row["dense_milliseconds"]
    return f"{dense:.0f} ms; {row['ideal']:.2f}" if dense >= 100 else f"{dense:.3g} ms; {row['ideal']:.2f}"


def variant_cell(row: Mapping[str, Any] | None, variant: str) -> str:
    """The median ratio with its quartiles, and the share of the ideal speed-up."""
    if row is None:
        return ""
    if variant not in row["variants"]:
        return "stays dense" if variant == SPEED else ""
    found = row["variants"][variant]
    ratio = found["ratio"]
    cell = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{cell}; {found['of_ideal']:.0%}" if "of_ideal" in found else cell


def linear_table(document: Mapping[str, Any]) -> str:
    """Ratios to dense of linear layers at half of their numbers: plain / pivoted."""
    rows = [row for row in document["layers"] if row["kind"] == "linear" and row["keep"] == 0.5]
    counts = sorted({row["input"][0] for row in rows})
    lines = [table_head(["d_out x d_in", "", *(f"{count} rows" if count > 1 else "1 row" for count in counts)])]
    for (shape, dtype), found in grouped(rows, "shape", "dtype").items():
        cells = [" / ".join(median_of(found, form, count) for form in ("plain", "pivoted")) for count in counts]
        lines.append(table_line([f"{shape[0]} x {shape[1]}", SHORT[dtype], *cells]))
    return "\n".join(lines)


def convolution_table(document: Mapping[str, Any]) -> str:
    """Median ratios to dense of the convolutions of one kernel, at half of their numbers: channel / spatial."""
    rows = [
        row | {"kernel": f"{row['shape'][2]} x {row['shape'][3]}", "channels": sizes_of(row)}
        for row in document["layers"]
        if row["kind"] == "convolution" and row["keep"] == 0.5
    ]
    batches = sorted({row["input"][0] for row in rows})
    lines = [table_head(["convolutions", "inputs", "", *(f"batch {batch}" for batch in batches)])]
    for (kernel, channels, dtype), found in grouped(rows, "kernel", "channels", "dtype").items():
        forms = [form for form in ("channel", "spatial") if any(row["form"] == form for row in found)]
        cells = [" / ".join(median_of(found, form, batch) for form in forms) for batch in batches]
        lines.append(table_line([kernel, channels, SHORT[dtype], *cells]))
    return "\n".join(lines)


def sizes_of(row: Mapping[str, Any]) -> str:
    """The inputs of a convolution, coarsely."""
    side = row["input"][2]
    return "up to 7 x 7" if side <= 7 else "8 x 8 to 14 x 14" if side <= 14 else "28 x 28 and more"


def median_of(rows: Rows, form: str, count: int) -> str:
    ratios = [row["ratio"]["median"] for row in rows if row["form"] == form and row["input"][0] == count]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def prediction_table(document: Mapping[str, Any]) -> str:
    """How far the predicted ratios are from the measured ones."""
    rows = [row | {"all": "all"} for row in document["layers"]]
    lines = [table_head(["layers", "", "form", "measured", "within 15 %", "predicted / measured"])]
    for (kind, dtype, form), found in grouped(rows, "kind", "dtype", "form").items():
        lines.append(table_line([kind, SHORT[dtype], form, *prediction_cells(found)]))
    lines.append(table_line(["all", "", "", *prediction_cells(rows)]))
    return "\n".join(lines)


def prediction_cells(rows: Rows) -> list[str]:
    shares = [row["predicted_ratio"] / row["ratio"]["median"] for row in rows]
    found = Quartiles.of(shares)
    close = sum(abs(share - 1) <= CLOSE for share in shares) / len(shares)
    return [str(len(rows)), f"{close:.0%}", f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"]


def shortfalls(document: Mapping[str, Any]) -> list[str]:
    """What is asked for and not reached, a sentence each, with the terms of the cost model that it is due to."""
    found = []
    for network, dtype, refused in grouped(document.get("models", []), "network", "dtype", "refused"):
        if refused:
            found.append(f"{network}, {SHORT[dtype]}: stays dense under speed. {refused}")
    for row in document.get("models", []):
        speed = row["variants"].get(SPEED)
        if speed is None:
            continue
        name = f"{row['network']}, {row['workload']}, {SHORT[row['dtype']]}, batch {row['batch']}"
        if speed["ratio"]["median"] > SLOWEST:
            found.append(f"{name}: {speed['ratio']['median']:.2f} of dense. {due_to(speed['above_ideal'])}")
        asked = row["dtype"] == "float32" or "1024" in row["network"]
        reached = row["ideal"] / speed["ratio"]["median"]  # of half of every layer's time, whatever the plan left dense
        if row["batch"] == 32 and asked and reached < LEAST_OF_IDEAL[row["dtype"]]:
            dense = f", with {speed['dense_layers']} layers left dense" if speed["dense_layers"] else ""
            found.append(f"{name}: {reached:.0%} of the ideal speed-up{dense}. {due_to(speed['above_ideal'])}")
    for (kind,), rows in grouped(document.get("layers", []), "kind").items():
        close = [abs(row["predicted_ratio"] / row["ratio"]["median"] - 1) <= CLOSE for row in rows]
        if sum(close) < LEAST_CLOSE * len(close):
            found.append(f"{kind} layers: {sum(close) / len(close):.0%} of the predictions are within {CLOSE:.0%}")
    return found


def shortfall_list(document: Mapping[str, Any]) -> str:
    """`shortfalls` as Markdown."""
    return "\n".join(f"- {each}" for each in shortfalls(document)) or "Nothing falls short."


def due_to(above_ideal: Mapping[str, float]) -> str:
    """What the cost model says that the layers take too long by, as shares of the dense network's time."""
    above = sorted(((share, name) for name, share in above_ideal.items() if share > 0.005), reverse=True)
    terms = ", ".join(f"{name} {share:.2f}" for share, name in above)
    return f"Predicted above the ideal: {terms} of dense." if above else "No term is predicted above the ideal."


def grouped(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], Rows]:
    """Rows by what they say of some fields, in the order in which these come first."""
    found: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        found[tuple(tuple(row[n]) if isinstance(row[n], list) else row[n] for n in names)].append(row)
    return dict(found)


def table_head(cells: Sequence[str]) -> str:
    return table_line(cells) + "\n" + "|" + "---|" * len(cells)


def table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def printed(document: Mapping[str, Any]) -> str:
    """All that there is of the tables, and the shortfalls."""
    tables: dict[str, list[Callable[[Mapping[str, Any]], str]]] = {
        "layers": [linear_table, convolution_table, prediction_table],
        "models": [models_table],
        "compiled": [compiled_table],
    }
    made = [table(document) for part, each in tables.items() if document.get(part) for table in each]
    return "\n\n".join([*made, shortfall_list(document)])


def result_path(folder: Path, device: torch.device, threads: int) -> Path:
    several = f"-{threads}-threads" if device.type == "cpu" and threads > 1 else ""
    return folder / f"latency-{device.type}{several}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["layers", "models"])
    parser.add_argument("--networks", nargs="+", choices=list(networks()), default=list(networks()))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="of the part `models`")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if asked.device == "auto" else asked.device)
    clock, profile = clock_of(device, asked.threads), device_profile(Run(device), DTYPES)
    path = result_path(asked.output, device, asked.threads)
    models = ModelTiming(device, clock, Repeats(), profile, batches=tuple(asked.batches))
    for part in asked.parts:
        if part == "layers":
            rows = noted(measured_layers(device, clock, profile))
        else:
            timing = replace(models, batches=(32,)) if part == "compiled" else models
            rows = noted(measured_models(timing, asked.networks, compiled=part == "compiled"))
        keep_rows(path, {part: rows}, environment(device, asked.threads))
    sys.stdout.write(printed(json.loads(path.read_text(encoding="utf-8"))) + "\n")


def keep_rows(path: Path, measured: Mapping[str, Rows], environment: Document) -> None:
    """Put the rows of parts in the file of the results, in the place of those of the same networks."""
    document: Document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document |= environment
    for part, rows in measured.items():
        again = {row.get("network") for row in rows}
        others = [row for row in document.get(part, []) if row.get("network") not in again]
        document[part] = in_order([*others, *rows])
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(document).replace('}, {"', '},\n{"') + "\n", encoding="utf-8")


def in_order(rows: Rows) -> Rows:
    """Rows in the order of the networks, however they came."""
    names = list(networks())
    return sorted(rows, key=lambda row: names.index(row["network"]) if "network" in row else 0)


def noted(rows: Iterator[dict[str, Any]]) -> Rows:
    """The rows as a list, counted on a terminal."""
    found = []
    for row in rows:
        found.append(row)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{len(found)} rows")
    return found


if __name__ == "__main__":
    main()
