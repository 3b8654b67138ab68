"""What `compress` will need before it begins: memory, temporary files, the size of the output, and time.

The formulas count what the stages keep, one line for each thing kept; what depends on the network's own code, such as
the size of the states between blocks, is taken from a forward on one example. They tend to say a little more than is
taken. So a run is refused only where much less is free than they say (`NeedsSettings`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir

import torch

from compressor.calibration import CalibrationData, CalibrationSettings
from compressor.engine import InProcess, Run
from compressor.errors import BadInput
from compressor.evaluation import resident_memory
from compressor.evaluation.metrics import SCORED_AT_ONCE
from compressor.factorize import product_bytes, working_bytes
from compressor.formatting import format_size
from compressor.free_memory import free_memory
from compressor.io import Checkpoint
from compressor.lowrank import stored_infos
from compressor.network import Layer
from compressor.planning import Budget, Plan
from compressor.progress import Step
from compressor.results import Amount, Needs

FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True)
class NeedsSettings:
    """When a run is refused for what it will need, and when that is said."""

    margin: float = 0.25
    """A need is refused where less than this share short of it is free: the estimates are not exact."""

    negligible: int = 2**28
    """Bytes that are never refused: nobody runs this near to the end of a disk or of memory."""

    worth_saying: float = 10.0
    """Seconds from which on a run says beforehand what it will take."""


NEEDS = NeedsSettings()


@dataclass(frozen=True)
class Footprint:
    """What one example leaves on its way through a model, in bytes.

    Attributes:
        state: The tensor between two blocks.
        block: The outputs of the modules inside of a block; of the whole model where it has no blocks.
        outputs: The model's outputs in float32.
    """

    state: int
    block: int
    outputs: int


@dataclass(frozen=True)
class ModelSize:
    """A model as the formulas see it.

    Attributes:
        dense: Bytes of all tensors.
        itemsize: Bytes of a number of the eligible layers.
        blocks: The eligible layers of each block of the longest chain.
        others: The eligible layers outside of it.
        kept: The share of their parameters that is expected to remain; 1 where the request does not say.
        stored: Bytes of the tensors in the files, where some layers are not dense in them.
    """

    dense: int
    itemsize: int
    blocks: Sequence[Sequence[Layer]]
    others: Sequence[Layer] = ()
    kept: float = 1.0
    stored: int | None = None

    def kept_by(self, budget: Budget | None, plan: object) -> ModelSize:
        """The same with the share that a request leaves, where it says."""
        kept = 1.0
        if isinstance(plan, Plan) and plan.eligible_before:
            kept = plan.eligible_after / plan.eligible_before
        elif budget is not None and budget.value is not None and budget.kind == "keep":
            kept = budget.value
        elif budget is not None and budget.value is not None and budget.kind == "max-size" and self.eligible:
            kept = min(1.0, max(0.0, (budget.value - self.in_files) / self.stored_eligible + 1))
        return replace(self, kept=kept)

    @property
    def parts(self) -> list[Sequence[Layer]]:
        """The layers that are calibrated together."""
        return [part for part in (*self.blocks, self.others) if part]

    @property
    def layers(self) -> list[Layer]:
        return [layer for part in self.parts for layer in part]

    @property
    def eligible(self) -> int:
        """Bytes of the eligible layers."""
        return self.itemsize * sum(layer.parameters for layer in self.layers)

    @property
    def streamed(self) -> int:
        """Bytes of the model in memory where its blocks are read when they run: one of them, and what is outside."""
        blocks = [self.itemsize * sum(layer.parameters for layer in block) for block in self.blocks]
        return self.dense - sum(blocks) + max(blocks, default=0)

    @property
    def factors(self) -> int:
        """Bytes of what becomes of them."""
        return round(self.kept * self.stored_eligible)

    @property
    def in_files(self) -> int:
        """Bytes of the tensors in the files."""
        return self.dense if self.stored is None else self.stored

    @property
    def stored_eligible(self) -> int:
        """Bytes that the eligible layers take as they are."""
        own = (None if layer.stored is None else layer.stored.nbytes for layer in self.layers)
        return sum(
            self.itemsize * layer.parameters if nbytes is None else nbytes
            for layer, nbytes in zip(self.layers, own, strict=True)
        )


def model_size(checkpoint: Checkpoint, eligible: Sequence[Layer], blocks: Sequence[str]) -> ModelSize:
    """The sizes of a model whose blocks have these names."""
    inside = [[layer for layer in eligible if layer.module.startswith(f"{block}.")] for block in blocks]
    found = {layer.name for block in inside for layer in block}
    return ModelSize(
        dense=sum(info.nbytes for info in checkpoint.tensors.values()),
        itemsize=max((checkpoint.tensors[layer.tensor].dtype.itemsize for layer in eligible), default=0),
        blocks=inside,
        others=[layer for layer in eligible if layer.name not in found],
        stored=sum(info.nbytes for info in stored_infos(checkpoint)),
    )


@dataclass(frozen=True)
class SlicesInWorkers:
    """Slices of the examples that workers run through the model.

    Attributes:
        kept: Slices whose sums are on disk at a time: of one more than there are workers, and the total of those added.
        at_once: How many are run at a time in this memory.
    """

    kept: int
    at_once: int

    @classmethod
    def of(cls, data: CalibrationData, settings: CalibrationSettings, run: Run) -> SlicesInWorkers | None:
        """Those of a run on a model that its workers can open; on accelerators each has one of its own."""
        count = min(settings.slices, len(data.fit))
        if isinstance(run.engine, InProcess) or count < 2:
            return None
        at_once = min(count, run.engine.here) if run.device.type == "cpu" else 1
        return cls(min(count, run.engine.workers + 2), at_once)


@dataclass(frozen=True)
class SizesInWorkers:
    """Sizes that workers plan, each with a model of its own: how many at a time, and how many in this memory."""

    at_once: int = 0
    here: int = 0

    @classmethod
    def of(cls, at_once: int, run: Run) -> SizesInWorkers:
        """Those of a search that tries so many at a time; on accelerators each worker has one of its own."""
        if at_once == 1:
            return cls()
        return cls(at_once, min(at_once, run.engine.here) if run.device.type == "cpu" else 1)


@dataclass(frozen=True)
class CalibrationSize:
    """Examples as the formulas see them: how many, how many of them at a time, and what each leaves in the model.

    The factors of so many `candidates` wait on disk at a time. A language model writes so many `texts` that its
    quantized layers are fitted to, all together.
    """

    fit: int
    holdout: int
    at_once: int
    footprint: Footprint
    settings: CalibrationSettings
    candidates: int = 1
    slices: SlicesInWorkers | None = None
    sizes: SizesInWorkers = SizesInWorkers()
    texts: int = 0

    @classmethod
    def of(cls, data: CalibrationData, footprint: Footprint, settings: CalibrationSettings) -> CalibrationSize:
        at_once = max(batch.examples for batch in (*data.fit, *data.holdout))
        return cls(data.examples, data.holdout_examples, at_once, footprint, settings)

    @property
    def walks(self) -> bool:
        """Whether the compressed model is walked through beside the dense one."""
        return self.settings.compensate or self.settings.refine


def output_bytes(model: ModelSize) -> int:
    """Bytes of the weight files: what is not compressed, and the factors."""
    return model.in_files - model.stored_eligible + model.factors


def temporary_bytes(model: ModelSize, calibration: CalibrationSize | None) -> int:
    """Most bytes of temporary files at a time; without calibration there are none.

    The activation cache holds, until the factors are written,

    - the states before every block and before the head, of all examples;
    - the states in the compressed model before one block, of all examples;
    - the gradients before one block, of the fit examples that are run backward;
    - the metric of every layer: the triangles of `d_in x d_in` and `d_out x d_out` in float32, as if no layers shared
      their inputs;
    - its decomposition, `n x n` for the smaller side n in float32;
    - the second moment of the gradients before every block, as wide as its narrowest layer: a triangle in float32;
    - of every slice of the examples that a worker takes, the sums of all moments: triangles in float64;
    - the factors: truncated, of every candidate that waits, compensated, and refined;
    - the states before the head of the texts that all layers are fitted to together, and of the fit examples.

    Recalibration has one of its own beside it, of the fit examples.
    """
    if calibration is None:
        return 0
    state, every = calibration.footprint.state, calibration.fit + calibration.holdout
    dense = (len(model.blocks) + 1) * every * state
    compressed = every * state if calibration.walks else 0
    gradients = math.ceil(calibration.fit / calibration.settings.gradient_every) * state
    metrics = FLOAT32 * sum(map(partial(_moments, settings=calibration.settings), model.layers)) // 2
    decompositions = FLOAT32 * sum(layer.groups * min(layer.block_shape) ** 2 for layer in model.layers)
    boundaries = FLOAT32 * sum(min(min(layer.shape) for layer in block) ** 2 for block in model.blocks) // 2
    of_layers = metrics + decompositions + boundaries
    sums = 0 if calibration.slices is None else calibration.slices.kept * metrics * FLOAT64 // FLOAT32
    again = (len(model.blocks) + 1) * calibration.fit * state + gradients + of_layers
    again += 0 if calibration.slices is None else model.factors  # of the smaller model, for the workers
    rounds = 1 if calibration.settings.recalibration_rounds else 0
    kinds = calibration.candidates + calibration.settings.compensate + calibration.settings.refine
    # A worker has the factors of each segment for one that goes on with its size, all of them, and those it hands over.
    in_workers = calibration.sizes.at_once * (compressed + rounds * again + 3 * model.factors)
    together = (calibration.fit + calibration.texts) * state if calibration.texts else 0
    states = dense + compressed + gradients + together
    return states + of_layers + sums + rounds * again + kinds * model.factors + in_workers


@dataclass(frozen=True)
class Held:
    """Bytes of models in memory, beside what there is before the work begins.

    Attributes:
        calibrating: While ranks are looked for, in workers on this machine too.
        compared: When the result is measured or returned, with what a batch leaves on its way.
        freed: What is free again, and not given back to the system yet.
        jobs: Layers that are worked on at a time.
        jobs_memory: The most bytes that these take together; None where only their number is limited.
    """

    calibrating: int = 0
    compared: int = 0
    freed: int = 0
    jobs: int = 1
    jobs_memory: int | None = None


def memory_bytes(model: ModelSize, calibration: CalibrationSize | None, held: Held) -> int:
    """Most bytes of memory at a time beside the libraries."""
    if calibration is None:
        return held.freed + max(held.calibrating + factorization_bytes(model, held, multiplied=False), held.compared)
    calibrating = calibration_bytes(model, calibration)
    workers = 0 if calibration.slices is None else calibration.slices.at_once * (model.streamed + calibrating)
    # A size is planned, and then measured with its factors in memory.
    workers = max(workers, calibration.sizes.here * (model.streamed + max(calibrating, model.factors)))
    work = max(factorization_bytes(model, held), calibrating, workers)
    return held.freed + max(held.calibrating + work, held.compared)


def factorization_bytes(model: ModelSize, held: Held, *, multiplied: bool = True) -> int:
    """Of the largest layers, as many as are worked on at a time, or of the largest alone where it takes more.

    With `multiplied`, layers that are pairs already are multiplied out.
    """
    largest = sorted((_working_bytes(layer, multiplied=multiplied) for layer in model.layers), reverse=True)
    together = sum(largest[: held.jobs])
    return together if held.jobs_memory is None else max(*largest[:1], min(together, held.jobs_memory), 0)


def _working_bytes(layer: Layer, *, multiplied: bool) -> int:
    rank = None if layer.stored is None else layer.stored.rank
    return working_bytes(layer.shape) if multiplied or rank is None else product_bytes(layer.shape, rank)


def calibration_bytes(model: ModelSize, calibration: CalibrationSize) -> int:
    """Most bytes of memory that calibration takes at a time, of one block and one batch unless said otherwise:

    - the moments of the block's layers in float64, and those of a batch;
    - what a backward pass keeps: the outputs of the block's modules, as much again of what are no modules, and the
      gradients;
    - the model's outputs of a few positions in float32, with their logarithms, probabilities and gradients, or those of
      one example, on which the head is found;
    - of the factors of a block, which refinement fits, copies, gradients and Adam's moments in float32; where all
      blocks are fitted together, of how each of their weights is rounded, beside the states before each block.
    """
    settings = calibration.settings
    parts = [sum(map(partial(_moments, settings=settings), part)) for part in model.parts]
    moments = 2 * FLOAT64 * max(parts, default=0)
    passing = 3 * calibration.at_once * calibration.footprint.block
    outputs = calibration.footprint.outputs
    outputs = 5 * max(outputs, min(calibration.at_once * outputs, 2 * settings.logit_bytes))
    weights = [sum(layer.parameters for layer in part) for part in model.parts]
    optimizing = round(6 * FLOAT32 * model.kept * max(weights, default=0)) if settings.refine else 0
    if calibration.texts:
        states = len(model.parts) * calibration.at_once * calibration.footprint.state
        optimizing = 6 * FLOAT32 * sum(weights) + states
    return max(moments, optimizing) + max(passing, outputs)


def evaluation_bytes(footprint: Footprint, at_once: int) -> int:
    """Of one batch that is measured: the outputs of a block's modules, or those of the model in float32, in float64,
    and as logarithms."""
    outputs = min(at_once * footprint.outputs, FLOAT32 * SCORED_AT_ONCE)
    return at_once * footprint.state + max(at_once * footprint.block, 5 * outputs)


def _moments(layer: Layer, settings: CalibrationSettings) -> int:
    """Numbers in the second moments of a layer's inputs and gradients.

    Those of an embedding's inputs are a vector, and those of the gradients at a head of many classes: a layer of many
    more outputs than inputs, as far as is known here.
    """
    outputs, inputs = layer.block_shape
    head = outputs > max(settings.most_classes, 6 * inputs)
    of_group = (outputs if head else outputs**2) + (inputs if layer.kind == "embedding" else inputs**2)
    return layer.groups * of_group


@dataclass(frozen=True)
class Places:
    """Where a run works, as it is before anything is loaded.

    Attributes:
        device: The device that computes.
        temporary: The folder of temporary files.
        kept: Bytes of those that an interrupted run has left there for this one.
        output: That of the output; None where nothing is written.
        memory: The most bytes that the process, or on an accelerator its tensors, may have; None where not known.
        taken: Those that it has.
    """

    device: torch.device
    temporary: Path
    kept: int
    output: Path | None
    memory: int | None
    taken: int

    @classmethod
    def now(cls, device: torch.device, work: Path | None, output: Path | None) -> Places:
        """The places of a run that is about to begin, with its work folder if it has one."""
        taken = resident_memory() if device.type == "cpu" else 0
        free = free_memory(device)
        kept = 0 if work is None else sum(path.stat().st_size for path in work.rglob("*.safetensors"))
        return cls(device, work or Path(gettempdir()), kept, output, None if free is None else taken + free, taken)


def needs_of(model: ModelSize, calibration: CalibrationSize | None, places: Places, *, held: Held) -> Needs:
    """What a run is expected to take, and what there is."""
    memory = places.taken + memory_bytes(model, calibration, held)
    written = 0 if places.output is None else output_bytes(model)
    free = _free_space(places.temporary)
    return Needs(
        Amount(memory, places.memory, places.device.type),
        Amount(
            temporary_bytes(model, calibration), None if free is None else free + places.kept, str(places.temporary)
        ),
        Amount(written, None if places.output is None else _free_space(places.output), str(places.output or "")),
    )


def in_time(needs: Needs, steps: Sequence[Step]) -> Needs:
    """The needs with the seconds of the steps of a run: of those that are certain, and of all."""
    certain = sum(step.cost for step in steps if step.certain)
    return replace(needs, seconds=certain, most_seconds=sum(step.cost for step in steps))


def require_available(needs: Needs, settings: NeedsSettings = NEEDS) -> None:
    """Raise `BadInput` where memory or a disk will not do, naming what is needed, what there is, and what to change."""
    memory, temporary, output = needs.memory, needs.temporary, needs.output
    less = "ask for `effort='fast'` or for fewer examples (`calibration_samples`)" if temporary.needed else ""
    elsewhere = "set TMPDIR or `work_dir` to a folder on another disk"
    if _is_short(memory, settings):
        remedy = f"{less}, or use a machine that has more" if less else "use a machine that has more"
        raise BadInput(_short(memory, f"of memory ({memory.place})"), remedy=remedy)
    if _is_short(temporary, settings):
        what = _short(temporary, "for temporary files")
        raise BadInput(what, where=temporary.place, remedy=f"{elsewhere}, or {less}")
    if _is_short(output, settings):
        what = _short(output, "for the output")
        raise BadInput(what, where=output.place, remedy="free some space, or choose an output on another disk")
    if temporary.needed and output.needed and _on_one_disk(Path(temporary.place), Path(output.place)):
        both = replace(temporary, needed=temporary.needed + output.needed)
        if _is_short(both, settings):
            what = _short(both, "for temporary files and the output")
            raise BadInput(what, where=temporary.place, remedy=f"{elsewhere}, or {less}")


def _is_short(amount: Amount, settings: NeedsSettings) -> bool:
    if amount.available is None or amount.needed <= settings.negligible:
        return False
    return amount.available < (1 - settings.margin) * amount.needed


def _short(amount: Amount, of_what: str) -> str:
    return (
        f"about {format_size(amount.needed)} are needed {of_what}, and there are {format_size(amount.available or 0)}"
    )


def _free_space(folder: Path) -> int | None:
    """Bytes free to this user on the disk of a folder, or of the nearest one above it that exists."""
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None


def _on_one_disk(first: Path, second: Path) -> bool:
    try:
        return _existing(first).stat().st_dev == _existing(second).stat().st_dev
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    return next((each for each in (folder, *folder.parents) if each.exists()), Path())
