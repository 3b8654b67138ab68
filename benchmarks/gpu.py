"""What a GPU does with the package, in one command of less than eight minutes.

    python benchmarks/gpu.py [--device cuda] [--seconds 450] [--output FOLDER] [--tiny]

In this order, as long as there is time left:

`tests`: the tests of `tests/gpu`.
`profile`: the constants of the cost model, measured anew.
`decompositions`: eigenvalues and eigenvectors on the device and on the CPU, in float32 and float64.
`calibration`: a folder of a few blocks of a Llama of the shape of an 8B one, with random weights, compressed with
calibration at `--effort fast`: times, memory, and tokens a second. A line through two numbers of blocks says what all
32 blocks would take; that is extrapolated, and rows say so. The head is left as it is.
`generation`: prefill and decoding with a cache, dense against half of the numbers of each layer in two forms, and as
`prefer="speed"` plans it. Layout, bytes, and outputs are checked before anything is timed.
`integers`: linear layers in 8, 4, and 3 bits: whether a kernel runs them, by what their outputs differ from the CPU's,
and times at few rows and many beside bfloat16.
`repeatable`: whether the same command gave the same bytes twice, with calibration and without.
`more effort`: `calibration` at `--effort balanced` and `best`.

Everything is written to benchmarks/results/gpu-NAME.json as soon as it is known, so that a run that is stopped leaves
what it found. A part that fails is in the file with its error, and the exit status is 1. `--tiny` does all of it with a
tiny model on any device, a CPU too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import transformers
from device_profile import shipped
from latency import clock_of
from latency_models import ModelTiming, measured_network
from latency_networks import Network, decode, tokens
from latency_timing import Repeats, timed_in_turn
from quantized_latency import quantized
from torch import nn

import compressor
from compressor.engine import Run
from compressor.evaluation import process_memory
from compressor.forms import DENSE, quantized_name
from compressor.latency import DeviceProfile
from compressor.latency.measure import ACCELERATOR, CPU, MeasuringSettings, device_name, measure_profile
from compressor.quantize import quantizations
from compressor.quantize.products import has_kernel
from compressor.torch_state import synchronize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEEP = 0.6
HOST = torch.device("cpu")

Document = dict[str, Any]


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama, with fewer blocks than the whole one has."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    whole: int

    def build(self, blocks: int) -> nn.Module:
        """Make it with random weights."""
        config = transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            num_hidden_layers=blocks,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.LlamaForCausalLM(config)


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Attributes:
        llama: The model.
        blocks: Two numbers of blocks that are calibrated; the line through them is extrapolated.
        windows: The calibration examples.
        length: Their tokens, and those of a prefill and of a context.
        generating: The blocks that generate.
        batches: The batches that generate.
        sides: The matrices that are decomposed.
        settings: How the device is measured.
        repeats: How often forwards run.
        selection: Which tests run, as `pytest -k` says it; all of them where it is empty.
    """

    llama: Llama
    blocks: tuple[int, int]
    windows: int
    length: int
    generating: int
    batches: tuple[int, ...]
    sides: tuple[int, ...]
    settings: MeasuringSettings
    repeats: Repeats
    selection: str = ""


LIKE_8B = Measured(
    Llama(4096, 14336, 32, 8, 128_256, 32),
    blocks=(1, 2),
    windows=32,
    length=512,
    generating=4,
    batches=(1, 32),
    sides=(256, 512, 1024, 2048, 4096),
    settings=ACCELERATOR,
    repeats=Repeats(warm_ups=2, most=9, enough=1.5),
)
TINY = Measured(
    Llama(32, 48, 4, 2, 64, 4),
    blocks=(1, 2),
    windows=4,
    length=8,
    generating=1,
    batches=(1,),
    sides=(8,),
    settings=replace(CPU, rows=(1, 8), sides=(16, 64), batches=(2,), images=(7,), channels=(16,), residues=(0, 16)),
    repeats=Repeats(warm_ups=1, fewest=2, most=2, enough=0.0, least=0.0),
    selection="perceptron and best",
)


class OutOfTimeError(Exception):
    """The time is over."""


@dataclass(frozen=True)
class Timekeeper:
    """When the command has to be done."""

    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Raise `OutOfTimeError` in the block when the time is over."""

        def stop(*_: Any) -> None:
            raise OutOfTimeError

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self.left))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Job:
    """One run of this command: the device, what is measured there, and the time there is."""

    device: torch.device
    measured: Measured
    time: Timekeeper
    folder: Path

    @cached_property
    def profile(self) -> DeviceProfile:
        """The constants of the cost model, measured anew."""
        dtypes = (torch.bfloat16, torch.float32)
        return measure_profile(Run(self.device), dtypes, convolutions=False, settings=self.measured.settings)


def run_tests(job: Job) -> Document:
    """Run the tests for a GPU in a process of their own, which may take a quarter of the time."""
    report = job.folder / "tests.xml"
    chosen = ["-k", job.measured.selection] if job.measured.selection else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    started, limit = time.monotonic(), max(30.0, job.time.left / 4)
    environment = os.environ | {"GPU_TESTS_ON": job.device.type, "PYTHONPATH": str(ROOT)}
    try:
        subprocess.run(
            [*command, *chosen], cwd=ROOT, env=environment, timeout=limit, check=False, stdout=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} seconds"}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": {case.get("name"): _last_line(case) for case in failed},
        "seconds": round(time.monotonic() - started, 1),
    }


def _last_line(case: ElementTree.Element) -> str:
    found = case.find("failure") if case.find("failure") is not None else case.find("error")
    assert found is not None
    return (found.get("message") or "").strip().splitlines()[0][:300]


def measure_constants(job: Job) -> Document:
    """The constants of the cost model."""
    return shipped(job.profile)


def time_decompositions(job: Job) -> Document:
    """Milliseconds of `eigh` of one matrix of every size, on the device and on the CPU."""
    rows = []
    for side in job.measured.sides:
        for dtype in (torch.float32, torch.float64):
            row: Document = {"side": side, "dtype": str(dtype).removeprefix("torch.")}
            for device in dict.fromkeys((job.device, HOST)):
                try:
                    row[device.type] = _milliseconds_of_eigh(side, dtype, device)
                except (RuntimeError, TypeError) as error:  # a device without the dtype
                    row[device.type] = str(error).splitlines()[0]
            rows.append(row)
    return {"milliseconds of eigh": rows, "threads": torch.get_num_threads()}


def _milliseconds_of_eigh(side: int, dtype: torch.dtype, device: torch.device) -> float:
    root = torch.randn(side, 2 * side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gram = root @ root.T
    torch.linalg.eigh(gram[:8, :8])
    synchronize(device)
    started = time.perf_counter()
    torch.linalg.eigh(gram)
    synchronize(device)
    return round(1e3 * (time.perf_counter() - started), 3)


def calibrate(job: Job, efforts: Sequence[str]) -> Iterator[Document]:
    """Rows of compressions with calibration: each effort at two numbers of blocks, and extrapolated to all."""
    for effort in efforts:
        rows = []
        for blocks in job.measured.blocks:
            rows.append(_compressed(job, blocks, effort))
            yield rows[-1]
        yield _extrapolated(job, rows)


def _compressed(job: Job, blocks: int, effort: str | None, *, output: str = "small") -> Document:
    """One compression of a folder; without calibration where no effort is named."""
    measured = job.measured
    source = _source(job, blocks)
    generator = torch.Generator().manual_seed(1)
    shape = (1, measured.length)
    windows = [torch.randint(measured.llama.vocabulary, shape, generator=generator) for _ in range(measured.windows)]
    asked: Document = {"calibration": "none"} if effort is None else {"calibration": windows, "effort": effort}
    accelerated = job.device.type != "cpu"
    if accelerated:
        torch.accelerator.reset_peak_memory_stats(job.device)
    started = time.monotonic()
    found = compressor.compress(
        source,
        output=job.folder / output,
        overwrite=True,
        keep=KEEP,
        prefer="size",
        bits=16,
        exclude=("lm_head",),
        device=str(job.device),
        **asked,
    )
    seconds = time.monotonic() - started
    row = {
        "effort": effort,
        "blocks": blocks,
        "windows": measured.windows if effort else 0,
        "seconds": round(seconds, 2),
        "calibration tokens a second": round(measured.windows * measured.length / seconds) if effort else 0,
        "dense_bytes": found.bytes.before,
        "bytes": found.bytes.after,
        "device_bytes": torch.accelerator.max_memory_allocated(job.device) if accelerated else None,
        "process_bytes_so_far": process_memory(),
    }
    gc.collect()
    return row


def _source(job: Job, blocks: int) -> Path:
    """The folder of a model in bfloat16, which is made once."""
    folder = job.folder / f"dense-{blocks}"
    if not folder.exists():
        model = _built(job, blocks)
        model.to("cpu").save_pretrained(folder)
        del model
        gc.collect()
    return folder


def _built(job: Job, blocks: int) -> nn.Module:
    """A model in bfloat16, drawn on the device: on a CPU that takes as long as much of the rest."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with job.device:
            return job.measured.llama.build(blocks)
    finally:
        torch.set_default_dtype(torch.float32)


def _extrapolated(job: Job, rows: list[Document]) -> Document:
    """What the line through two rows says of the whole model."""
    few, many = rows
    whole, between = job.measured.llama.whole, many["blocks"] - few["blocks"]
    each = (many["seconds"] - few["seconds"]) / between
    return {
        "effort": few["effort"],
        "blocks": whole,
        "extrapolated": True,
        "seconds a block": round(each, 2),
        "seconds": round(few["seconds"] + each * (whole - few["blocks"]), 1),
    }


def generate(job: Job) -> Iterator[Document]:
    """Rows of prefill and decoding, dense and compressed, with tokens a second."""
    measured = job.measured
    network = Network(
        f"Llama, hidden {measured.llama.hidden}, {measured.generating} of {measured.llama.whole} blocks",
        lambda: _built(job, measured.generating),
        (tokens("prefill", measured.length, use_cache=False), decode(measured.length)),
    )
    dtype = torch.bfloat16
    clock = clock_of(job.device, torch.get_num_threads())
    timing = ModelTiming(job.device, clock, measured.repeats, job.profile, measured.batches, measured.batches)
    for row in measured_network(network, dtype, timing):
        count = row["batch"] * (measured.length if row["workload"] == "prefill" else 1)
        a_second = count / (row["dense_milliseconds"] / 1e3)
        speeds = {name: round(a_second / each["ratio"]["median"]) for name, each in row["variants"].items()}
        yield row | {"tokens a second": {"dense": round(a_second), **speeds}}


def time_integers(job: Job) -> Iterator[Document]:
    """Rows of quantized layers: whether a kernel runs them, their error, and times beside those of dense ones."""
    llama = job.measured.llama
    for sides in ((llama.hidden, llama.hidden), (llama.intermediate, llama.hidden)):
        torch.manual_seed(0)
        dense = nn.Linear(sides[1], sides[0], bias=False, dtype=torch.bfloat16)
        for bits in (8, 4, 3):
            form = quantized_name(DENSE, quantizations(sides, bits)[0])
            [layer] = quantized(nn.Sequential(copy.deepcopy(dense)), form)
            for rows in (1, 16, 256):
                with torch.no_grad():
                    measured = _beside_dense(job, dense, layer, rows=rows)
                kernel = has_kernel(8 if bits == 8 else 4, layer.weight_shape.device)
                yield {"sides": list(sides), "form": form, "rows": rows, "has kernel": kernel, **measured}


def _beside_dense(job: Job, dense: nn.Module, layer: Any, *, rows: int) -> Document:
    """A quantized layer on the device beside the dense one there, and beside its matrix in float64 on the CPU."""
    expected = copy.deepcopy(layer).to("cpu").dequantized().double()
    there, beside = layer.to(job.device), copy.deepcopy(dense).to(job.device)
    x = torch.randn(rows, expected.shape[1]).bfloat16()
    on_device, outputs = x.to(job.device), x.double() @ expected.T
    difference = there(on_device).cpu().double() - outputs
    calls = [partial(beside, on_device), partial(there, on_device)]
    times = timed_in_turn(calls, clock_of(job.device, torch.get_num_threads()), job.measured.repeats)
    return {
        "relative error": float(f"{float(difference.norm() / outputs.norm()):.3g}"),
        "microseconds": float(f"{1e6 * times.seconds(1):.4g}"),
        "dense microseconds": float(f"{1e6 * times.seconds(0):.4g}"),
    }


def repeat(job: Job) -> Iterator[Document]:
    """Whether the same command gives the same bytes again."""
    for effort in (None, "fast"):
        outputs = []
        for number in range(2):
            name = f"again-{number}"
            _compressed(job, job.measured.blocks[0], effort, output=name)
            outputs.append([each.read_bytes() for each in sorted((job.folder / name).glob("*.safetensors"))])
        yield {"effort": effort, "same bytes": outputs[0] == outputs[1]}


Part = Callable[[Job], Document | Iterator[Document]]
PARTS: dict[str, Part] = {
    "tests": run_tests,
    "profile": measure_constants,
    "decompositions": time_decompositions,
    "calibration": partial(calibrate, efforts=("fast",)),
    "generation": generate,
    "integers": time_integers,
    "repeatable": repeat,
    "more effort": partial(calibrate, efforts=("balanced", "best")),
}


def measured_parts(job: Job, keep: Callable[[Document], None], parts: Mapping[str, Part] = PARTS) -> bool:
    """Do all parts, and keep the document whenever there is more of it; whether none failed."""
    document: Document = environment(job)
    fine = True
    for name, part in parts.items():
        started = time.monotonic()
        try:
            with job.time.stopping():
                found = part(job)
                if isinstance(found, dict):
                    document[name] = found
                else:
                    document[name] = []
                    for row in found:
                        document[name].append(row)
                        keep(document)
        except OutOfTimeError:
            document.setdefault("out of time", []).append(name)
        except Exception as error:
            fine = False
            document.setdefault("errors", {})[name] = "".join(traceback.format_exception(error)[-3:])
        tests = document.get("tests", {})
        fine = fine and not tests.get("failed") and "error" not in tests
        document.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        keep(document)
    return fine


def environment(job: Job) -> Document:
    """What ran, and on what."""
    return {
        "device": device_name(job.device),
        "model": vars(job.measured.llama) | {"weights": "random", "dtype": "bfloat16"},
        "keep": KEEP,
        "length": job.measured.length,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def result_path(folder: Path, device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return folder / f"gpu-{name}.json"


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=450, help="when to stop")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(asked.device)
    path = result_path(asked.output, device)
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(document: Document) -> None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        measured = TINY if asked.tiny else LIKE_8B
        fine = measured_parts(Job(device, measured, Timekeeper(started + asked.seconds), Path(folder)), keep)
    sys.stdout.write(f"{path}\n")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
