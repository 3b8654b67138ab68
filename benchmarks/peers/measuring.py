"""What is given to every peer and what is taken down of it; runs in the peer's own environment, without compressor.

Each script beside this one is run by `benchmarks/bytes.py` as

    python with_PEER.py METHOD MODEL WINDOWS FOLDER

METHOD is one of the names in its `METHODS`, MODEL a transformers folder, WINDOWS a safetensors file with the token ids
`calibration` and `test`, both `(N, L)`, and FOLDER the place to write to. The model is quantized in float16, saved as
its users save it, and loaded again from these files in float32 for the losses. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

BATCH_SIZE = 16

# Of a folder, token ids `(N, L)`, and where to write: quantizes, and returns a function that loads what was written.
Method = Callable[[Path, Tensor, Path], Callable[[], nn.Module]]


def run(
    methods: Mapping[str, Method], packages: tuple[str, ...], sizes: Callable[[Path], dict[str, int]] | None = None
) -> None:
    """Run the method that the command line names and print what came of it.

    `sizes` gives the bytes of each tensor in the files of a folder that are not safetensors.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=methods)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    windows = load_file(asked.windows)
    started = time.monotonic()
    loaded = methods[asked.method](asked.model, windows["calibration"], asked.folder)
    seconds = time.monotonic() - started
    losses = window_losses(loaded(), windows["test"])
    document = {
        "losses": losses.tolist(),
        "bytes": (sizes or tensor_bytes)(asked.folder),
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }
    sys.stdout.write("\n" + json.dumps(document) + "\n")


@torch.inference_mode()
def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the predictions in each window, in nats, in float64."""
    model.eval()
    losses = []
    for batch in windows.split(BATCH_SIZE):
        logits = model(input_ids=batch).logits[:, :-1].double()
        found = nn.functional.cross_entropy(logits.movedim(-1, 1), batch[:, 1:], reduction="none")
        losses.append(found.mean(1))
    return torch.cat(losses)


def tensor_bytes(folder: Path) -> dict[str, int]:
    """How many bytes each tensor takes in the safetensors files of a folder."""
    found: dict[str, int] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = end - begin
    return found
