"""How often a calibrated compression waits for an accelerator, and what it copies there and back.

    python benchmarks/device_traffic.py [--networks NAME ...]

It runs on the stand-in of `tests/standin`, which needs Linux and g++, so it counts and measures no time. Small networks
lie on the CPU and are compressed on the device with 4 batches of 4 examples. `waits` are numbers that are read from the
device and operators that make it wait; `to device` and `to host` are copies, with their bytes; `model moves` is how
often the whole model went there; `launches` are all other operations. `for each batch` is what 8 batches add to 4, a
quarter of it. Writes benchmarks/results/device_traffic.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "device_traffic.json"
sys.path.insert(0, str(ROOT))

import compressor  # noqa: E402
from compressor import CalibrationSettings  # noqa: E402
from compressor.calibration import RefinementSettings  # noqa: E402
from tests.standin.accelerator import counted, load  # noqa: E402
from tests.standin.networks import NETWORKS  # noqa: E402

BRIEF = CalibrationSettings(refinement=RefinementSettings(passes=1, steps=2))
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best, one pass": {"calibration_settings": BRIEF},
}
NAMES = ("llama", "convolutions", "recurrent", "mixture", "bert", "vit")
COUNTS = {
    "waits": "synchronize",
    "to device": "copy to device",
    "to host": "copy to host",
    "bytes to device": "bytes to device",
    "bytes to host": "bytes to host",
}


def counts_of(name: str, at: torch.device | str, batches: int, **asked: Any) -> Counter[str]:
    """What the accelerator does while a network that lies `at` a device is compressed on it."""
    network = NETWORKS[name]
    model, data = network.on(at), network.batches(batches)
    with counted() as counts:
        given: dict[str, Any] = {"keep": 0.6, "prefer": "size", "bits": 16, "device": "standin", "calibration": data}
        compressor.compress(model, **given, **asked)
    return counts


def measured(name: str, effort: str, device: torch.device) -> dict[str, Any]:
    """A row of the table."""
    asked = EFFORTS[effort]
    few, many = (counts_of(name, "cpu", batches, **asked) for batches in (4, 8))
    there = counts_of(name, device, 4, **asked)
    model = NETWORKS[name].on("cpu")
    size = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    return {
        "network": name,
        "effort": effort,
        **{what: few[count] for what, count in COUNTS.items()},
        "launches": sum(count for what, count in few.items() if what.startswith("aten::")),
        "model moves": round((few["bytes to device"] - there["bytes to device"]) / size, 2),
        "for each batch": {what: (many[count] - few[count]) / 4 for what, count in COUNTS.items()},
    }


def traffic_table(document: dict[str, Any]) -> str:
    """A line for each network and effort."""
    head = ["network", "effort", "waits", "copies to device", "copies to host", "model moves", "launches"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in document["rows"]:
        counted_there = ("waits", "to device", "to host", "model moves", "launches")
        cells = [row["network"], row["effort"], *(row[what] for what in counted_there)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=NAMES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        device = load(Path(folder))
    document = {
        "torch": torch.__version__,
        "rows": [measured(name, effort, device) for name in asked.networks for effort in EFFORTS],
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(traffic_table(document) + "\n")


if __name__ == "__main__":
    main()
