"""Loss against size: ours beside published low-rank compressors, at the same number of stored parameters.

    python benchmarks/quality.py [--models MODEL ...] [--keeps 0.6 ...] [--seeds 0 ...] [--methods METHOD ...]
                                 [--conditions CONDITION ...]

For every reference model, and for the larger one that `benchmarks/larger_model.py` trains where its folder exists,
three draws of calibration data each: every method gets the same examples of the training split and the same size,
counted in the numbers of the tensors that would be saved; the loss is that of the test split, in nats per prediction.
The published methods keep the same fraction of every linear layer (of digits-resnet: of every convolution but the
first) and leave the other layers and the classifier as they are, which counts as stored; ours shares one budget. Beside
ours stand ours with one part switched off at a time, ours with the ranks of the published methods, and SVD-LLM with our
ranks, which tell the metric's part from the allocation's.

The language models are compressed under two more conditions. `byte left out`: no calibration text contains one byte,
the most frequent one that at least half of the training windows lack; the loss is that of the (at most) 64 predictions
after it in the test text. `other text`: calibrated on Python source, measured on English prose, the topics of `pydoc`.

What is measured replaces the same cells of benchmarks/results/quality-MODEL.json and leaves the others as they are.
Prints a table for each model and condition.
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from baselines import (
    Size,
    Weights,
    asvd,
    equalized,
    factors,
    input_statistics,
    matrices,
    mpifa,
    pivoted_factors,
    pivoted_size,
    plain_size,
    plain_svd,
    product,
    set_matrix,
    svd_llm,
    svd_llm_sequential,
)
from torch import Tensor, nn

from compressor import CalibrationSettings, Plan, PlanningSettings, compress, inspect
from compressor.calibration.criterion import divergence
from compressor.data import Batch, EvaluationData, Preprocessing, Sample, load_preprocessing, open_data
from compressor.data.builtin_data import standard_library_files
from compressor.evaluation import measure_quality
from compressor.forms import StoredWeight, stored_parameters
from compressor.lowrank import put_layer
from compressor.model import load_model, logits_of
from compressor.network import Layer
from compressor.planning import Budget, LayerPlan

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = (0, 1, 2)
KEEPS = (0.8, 0.6, 0.4, 0.2)
BATCH_SIZE = 16
REACH = 64  # predictions after the byte that was left out
# Of a size from the one asked for, as a share of the eligible parameters; one rank of the largest layer may be more.
LARGEST_DIFFERENCE = 0.002

TEST = "test split"
BYTE_LEFT_OUT = "byte left out"
OTHER_TEXT = "other text"


@dataclass(frozen=True)
class Subject:
    """A model of the benchmark, and how many examples are used of its data.

    The published methods compress the layers of one kind, `compressed`, but for those that are left dense: the
    classifier, and the first convolution, as is usual for convolutional networks.
    """

    weights: Path
    data: str
    calibration_examples: int
    test_examples: int | None = None
    left_dense: tuple[str, ...] = ()
    compressed: Literal["linear", "convolution"] = "linear"
    factory: str | None = None
    keeps: tuple[float, ...] = KEEPS
    conditions: tuple[str, ...] = (TEST,)


CARDS = ROOT / "model_cards"
ALL_CONDITIONS = (TEST, BYTE_LEFT_OUT, OTHER_TEXT)
SUBJECTS = {
    "digits-mlp": Subject(
        CARDS / "digits-mlp" / "model.safetensors",
        "builtin:digits",
        128,
        left_dense=("6",),
        factory=f"{CARDS / 'digits-mlp' / 'train.py'}:build_model",
    ),
    "digits-resnet": Subject(
        CARDS / "digits-resnet",
        "builtin:digits",
        128,
        left_dense=("resnet.embedder.embedder.convolution",),
        compressed="convolution",
        keeps=(0.8, 0.6, 0.5, 0.4, 0.2),
    ),
    "digits-vit": Subject(CARDS / "digits-vit", "builtin:digits", 128, left_dense=("classifier",)),
    "stdlib-llama": Subject(CARDS / "stdlib-llama", "builtin:stdlib", 64, 128, conditions=ALL_CONDITIONS),
    "stdlib-llama-large": Subject(
        ROOT / "benchmarks" / "models" / "stdlib-llama-large", "builtin:stdlib", 64, 128, conditions=ALL_CONDITIONS
    ),
}


@dataclass(frozen=True)
class Measurement:
    """Loss in nats per prediction, of a classifier the accuracy, and the divergence from the dense model's predictions.

    The loss of a classifier that is sure of its errors may fall when it is compressed; the divergence cannot. `error`
    is the standard error of the loss's change from the dense model, over the examples.
    """

    loss: float
    accuracy: float | None = None
    divergence: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Setting:
    """One model under one condition: what calibrates it, `read` by position, and what it is measured by."""

    model: nn.Module
    layers: tuple[Layer, ...]
    count: int
    read: Callable[[Sequence[int]], Mapping[str, Tensor]]
    measure: Callable[[nn.Module], Measurement]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What every method is given: the model, its eligible layers, calibration batches, and the size to meet.

    `published` are the layers that the papers compress, and `room` the numbers that are left for these.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    published: Mapping[str, nn.Module]
    batches: Sequence[Mapping[str, Tensor]]
    keep: float
    seed: int
    room: int

    @property
    def eligible(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {layer.name: layer.shape for layer in self.layers if layer.name in self.published}

    @property
    def pivotable(self) -> bool:
        return all(type(module) is nn.Linear for module in self.published.values())

    def uniform_ranks(self, size: Size) -> dict[str, int]:
        """Those of the published methods: the same fraction of every layer."""
        return equalized(self.shapes, self.room, size)


@dataclass(frozen=True)
class Compressed:
    """A compressed model to run, and the numbers that it stores in place of the eligible layers."""

    model: nn.Module
    stored: int


Method = Callable[[Cell], Compressed]


# The published methods, as tests/benchmarks checks them.


def published(replace: Callable[[Cell, dict[str, int]], Weights], *, pivoted: bool = False) -> Method:
    """A method that replaces the matrices of the published layers by others of the published ranks."""
    size, stored_as = (pivoted_size, pivoted_factors) if pivoted else (plain_size, factors)

    def method(cell: Cell) -> Compressed:
        ranks = cell.uniform_ranks(size)
        stored = {name: stored_as(matrix, ranks[name]) for name, matrix in replace(cell, ranks).items()}
        return replaced(cell, {name: (product(tensors), _numbers(tensors)) for name, tensors in stored.items()})

    return method


def replaced(cell: Cell, matrices_and_sizes: Mapping[str, tuple[Tensor, int]]) -> Compressed:
    """The model with some matrices as their stored factors give them, and the numbers that those are."""
    changed = copy.deepcopy(cell.model)
    stored = sum(layer.parameters for layer in cell.layers if layer.name not in matrices_and_sizes)
    for name, (matrix, size) in matrices_and_sizes.items():
        set_matrix(changed.get_submodule(name), matrix)
        stored += size
    return Compressed(changed, stored)


def by_truncated_svd(cell: Cell, ranks: dict[str, int]) -> Weights:
    return plain_svd(matrices(cell.published), ranks)


def by_asvd(cell: Cell, ranks: dict[str, int]) -> Weights:
    _, magnitudes = input_statistics(cell.model, cell.published, cell.batches)
    return asvd(matrices(cell.published), ranks, magnitudes)


def by_svd_llm(cell: Cell, ranks: dict[str, int]) -> Weights:
    moments, _ = input_statistics(cell.model, cell.published, cell.batches)
    return svd_llm(matrices(cell.published), ranks, moments)


def by_svd_llm_sequential(cell: Cell, ranks: dict[str, int]) -> Weights:
    moments, _ = input_statistics(cell.model, cell.published, cell.batches)
    return svd_llm_sequential(cell.model, cell.published, ranks, batches=cell.batches, moments=moments)


def by_mpifa(cell: Cell, ranks: dict[str, int]) -> Weights:
    moments, _ = input_statistics(cell.model, cell.published, cell.batches)
    return mpifa(cell.model, cell.published, ranks, batches=cell.batches, moments=moments)


PUBLISHED: dict[str, Method] = {
    "truncated SVD": published(by_truncated_svd),
    "ASVD": published(by_asvd),
    "SVD-LLM": published(by_svd_llm),
    "SVD-LLM, sequential": published(by_svd_llm_sequential),
    "SVD-LLM, pivoted": published(by_svd_llm, pivoted=True),
    "SVD-LLM, sequential, pivoted": published(by_svd_llm_sequential, pivoted=True),
    "MPIFA": published(by_mpifa, pivoted=True),
}
CONVOLUTIONS_ONLY = ("ours without refinement, with channel pairs",)
LINEAR_ONLY = ("SVD-LLM, pivoted", "SVD-LLM, sequential, pivoted", "MPIFA", "SVD-LLM at our ranks")


# Ours, and ours with a part switched off.

# The refinement makes up for a part of what any other part contributes, so these are switched off without it.
UNREFINED = CalibrationSettings(refine=False)


def ours(cell: Cell, *, settings: CalibrationSettings | None = None, **options: Any) -> Compressed:
    """`compress`, with `options` and settings of the calibration in place of its own."""
    given: dict[str, Any] = {
        "keep": cell.keep,
        "calibration": cell.batches,
        "seed": cell.seed,
        "prefer": "size",
        "bits": 16,
    } | options
    if given["calibration"] is None:
        del given["seed"]
        given["calibration"] = "none"
    small = compress(cell.model, calibration_settings=settings, **given).model
    assert small is not None
    return Compressed(small, cell.eligible - (numbers(cell.model) - numbers(small)))


def numbers(model: nn.Module) -> int:
    """How many numbers the weight file holds; tied tensors are in it once, and an index of int32 is two of 16 bits."""
    once = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    return sum(tensor.numel() if tensor.is_floating_point() else tensor.nbytes // 2 for tensor in once)


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def at_published_ranks(cell: Cell) -> Compressed:
    """Our metric and our factors with the same fraction of every layer, pivoted where they can be."""
    form = "pivoted" if cell.pivotable else "channel"
    ranks = cell.uniform_ranks(lambda shape, rank: stored_parameters(StoredWeight("linear", shape), form, rank))
    layers = tuple(
        LayerPlan(
            name=layer.name,
            shape=layer.shape,
            kind=layer.kind,
            rank=ranks.get(layer.name),
            form=form if layer.name in ranks else "dense",
            parameters=0,
            error=math.nan,
            reason="the same fraction of every layer",
        )
        for layer in cell.layers
    )
    chosen = Plan("published ranks", None, Budget("plan"), layers)
    return ours(cell, settings=UNREFINED, keep=None, prefer=None, bits=None, plan=chosen)


def svd_llm_at_our_ranks(cell: Cell) -> Compressed:
    """The published metric with the ranks that `compress` chooses, in the linear layers; the others are as ours."""
    chosen = compress(
        cell.model,
        keep=cell.keep,
        calibration=cell.batches,
        seed=cell.seed,
        calibration_settings=UNREFINED,
        prefer="size",
        bits=16,
    )
    assert chosen.model is not None
    ranks = {
        layer.name: layer.rank for layer in chosen.plan.layers if layer.kind == "linear" and layer.rank is not None
    }
    modules = {name: cell.model.get_submodule(name) for name in ranks}
    moments, _ = input_statistics(cell.model, modules, cell.batches)
    for name, matrix in svd_llm(matrices(modules), ranks, moments).items():
        dense = copy.deepcopy(modules[name])
        set_matrix(dense, product(factors(matrix, ranks[name])))
        put_layer(chosen.model, name, dense)
    return Compressed(chosen.model, chosen.plan.eligible_after)


# Every part of ours has one entry here that switches it off, but what needs a recipe, which `window_rule.py` has.
OURS: dict[str, Method] = {
    "ours": ours,
    "ours without refinement": partial(ours, settings=UNREFINED),
    "ours without refinement and the gradients' moment": partial(
        ours, settings=replace(UNREFINED, gradient_moments=False)
    ),
    "ours without refinement, with one allocation (p = 1)": partial(
        ours, settings=replace(UNREFINED, exponents=(1.0,))
    ),
    "ours without refinement and compensation": partial(ours, settings=replace(UNREFINED, compensate=False)),
    "ours without refinement and stages": partial(ours, settings=replace(UNREFINED, recalibration_rounds=0)),
    "ours without refinement, at the published ranks": at_published_ranks,
    "ours without refinement, with plain pairs": partial(ours, settings=UNREFINED, form="plain"),
    "ours without refinement, with channel pairs": partial(
        ours, settings=UNREFINED, planning_settings=PlanningSettings(excluded_forms=("spatial",))
    ),
    "ours without data": partial(ours, calibration=None),
    "SVD-LLM at our ranks": svd_llm_at_our_ranks,
}
METHODS = PUBLISHED | OURS
# Under the other conditions: whether what calibration never saw is safe, and the order of the methods.
COMPARED_UNDER_CONDITIONS = ("truncated SVD", "SVD-LLM", "SVD-LLM, pivoted", "MPIFA", "ours")


# Models and data.


def opened(name: str, split: Any, limit: int | None) -> EvaluationData:
    subject = SUBJECTS[name]
    prepared = load_preprocessing(subject.weights) if subject.weights.is_dir() else Preprocessing()
    return open_data(subject.data, prepared, Sample(split=split, limit=limit))


def setting(name: str, condition: str) -> Setting:
    """A model with the data of a condition."""
    subject = SUBJECTS[name]
    model = load_model(subject.weights, subject.factory).eval()
    layers = tuple(each.layer for each in inspect(model).layers if each.layer.eligible)
    given = partial(Setting, model, layers)
    test = opened(name, "test", subject.test_examples)
    train = opened(name, "train", None)
    if condition == TEST:
        return given(
            train.count, lambda positions: train.read(positions).inputs, partial(measured, data=test, dense=model)
        )
    if condition == BYTE_LEFT_OUT:
        windows = train.read(range(train.count)).inputs["input_ids"]
        byte = left_out(windows)
        lacking = windows[(windows != byte).all(1)]
        return given(
            len(lacking),
            partial(token_windows, lacking),
            lambda model: Measurement(loss_after(model, test, byte)),
            {"byte": chr(byte), "windows_lacking_it": len(lacking) / len(windows)},
        )
    assert condition == OTHER_TEXT
    source = "".join(
        path.read_text(encoding="utf-8") for path in standard_library_files("train") if "pydoc_data" not in path.parts
    )
    windows = tokenized(name, source)
    prose = tokenized(name, topics())
    chosen = prose[torch.linspace(0, len(prose) - 1, subject.test_examples or len(prose)).long()]
    return given(len(windows), partial(token_windows, windows), partial(measured, data=as_data("pydoc topics", chosen)))


def token_windows(windows: Tensor, positions: Sequence[int]) -> Mapping[str, Tensor]:
    return {"input_ids": windows[list(positions)]}


def as_data(name: str, windows: Tensor) -> EvaluationData:
    """Windows of token ids `(N, L)` as data for language modeling."""

    def read(positions: Sequence[int]) -> Batch:
        return Batch({"input_ids": windows[list(positions)]}, windows[list(positions), 1:])

    return EvaluationData(name, "language-modeling", len(windows), 32, read)


def topics() -> str:
    """The reference texts that `help()` shows, which every Python has: English prose."""
    from pydoc_data.topics import topics as texts  # type: ignore[import-untyped]

    return "\n".join(texts[name] for name in sorted(texts))


def tokenized(name: str, text: str) -> Tensor:
    """The text as windows of the model's length that do not overlap."""
    prepared = load_preprocessing(SUBJECTS[name].weights)
    assert prepared.tokenizer is not None
    assert prepared.sequence_length is not None
    length = prepared.sequence_length
    tokens = torch.tensor(prepared.tokenizer(text, verbose=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


def left_out(windows: Tensor) -> int:
    """The most frequent token that at least half of the windows lack."""
    counts = torch.bincount(windows.flatten())
    order = counts.argsort(descending=True)
    return next(int(token) for token in order if (windows != token).all(1).float().mean() >= 0.5)


def measured(model: nn.Module, data: EvaluationData, dense: nn.Module | None = None) -> Measurement:
    quality = measure_quality(model, data)
    accuracy = quality.value if quality.metric == "accuracy" else None
    if dense is None:
        return Measurement(quality.loss, accuracy)
    error, diverging = error_and_divergence(dense, model, data)
    return Measurement(quality.loss, accuracy, diverging, error)


@torch.inference_mode()
def error_and_divergence(dense: nn.Module, model: nn.Module, data: EvaluationData) -> tuple[float, float]:
    """How a model differs from the dense one.

    Returns:
        The standard error of the mean change in loss over the examples, and the Kullback-Leibler divergence per
        prediction, in nats.
    """
    changes, divergences, count = [], 0.0, 0
    for batch in data:
        before, after = (logits_of(each, batch.inputs) for each in (dense, model))
        changes.append(losses_of(after, batch.labels) - losses_of(before, batch.labels))
        total, rows = divergence(before, after, (), criterion="likelihood")
        divergences += float(total)
        count += rows
    together = torch.cat(changes)
    return float(together.std() / math.sqrt(len(together))), divergences / count


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of each image, or its mean over the predictions of each window of text."""
    return losses_of(logits_of(model, batch.inputs), batch.labels)


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.double()
    if labels.dim() > 1:
        logits = logits[:, :-1].movedim(-1, 1)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


@torch.inference_mode()
def loss_after(model: nn.Module, data: EvaluationData, token: int) -> float:
    """Mean cross-entropy of the predictions for which `token` is among the last 64 tokens of the text before."""
    total, count = 0.0, 0
    for batch in data:
        logits = logits_of(model, batch.inputs)[:, :-1]
        seen = (batch.inputs["input_ids"][:, :-1] == token).float()
        # Position i is after the token if it stands at one of the positions i - 63 .. i.
        recently = nn.functional.max_pool1d(nn.functional.pad(seen, (REACH - 1, 0)), REACH, stride=1) > 0
        losses = nn.functional.cross_entropy(logits.double().transpose(1, 2), batch.labels, reduction="none")
        total += float(losses[recently].sum())
        count += int(recently.sum())
    return total / count


# The table.


def compare_at(name: str, condition: str, methods: Sequence[str], *, keep: float, seed: int) -> list[dict[str, Any]]:
    """All methods at one size, with the calibration data of one seed."""
    torch.set_num_threads(1)
    subject = SUBJECTS[name]
    given = setting(name, condition)
    dense = given.measure(given.model)
    chosen = torch.randperm(given.count, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = chosen[: subject.calibration_examples]
    batches = [given.read(chosen[start : start + BATCH_SIZE]) for start in range(0, len(chosen), BATCH_SIZE)]
    eligible = sum(layer.parameters for layer in given.layers)
    compressed_by_papers = [
        layer for layer in given.layers if layer.kind == subject.compressed and layer.name not in subject.left_dense
    ]
    cell = Cell(
        model=given.model,
        layers=given.layers,
        published={layer.name: given.model.get_submodule(layer.name) for layer in compressed_by_papers},
        batches=batches,
        keep=keep,
        seed=seed,
        room=int(keep * eligible) - eligible + sum(layer.parameters for layer in compressed_by_papers),
    )
    one_rank = max(sum(layer.shape) for layer in given.layers) / eligible
    rows = []
    for method in methods:
        if method in (CONVOLUTIONS_ONLY if cell.pivotable else LINEAR_ONLY):
            continue
        small = METHODS[method](cell)
        kept = small.stored / eligible
        if abs(kept - keep) > max(LARGEST_DIFFERENCE, one_rank):
            raise RuntimeError(f"{name} {keep} {seed} {method}: keeps {kept:.4f}, which is not the size of the others")
        after = given.measure(small.model)
        row = {"model": name, "condition": condition, "keep": keep, "seed": seed, "method": method, "kept": kept}
        row |= {"dense_loss": dense.loss, "loss_increase": after.loss - dense.loss} | given.about
        if after.divergence is not None:
            row |= {"loss_increase_error": after.error, "divergence": after.divergence}
        if dense.accuracy is not None and after.accuracy is not None:
            row |= {"dense_accuracy": dense.accuracy, "accuracy_drop": dense.accuracy - after.accuracy}
        rows.append(row)
        sys.stderr.write(
            f"{name}, {condition}, {keep}, {seed}, {method}: {row['loss_increase']:+.4f} nats, kept {kept:.4f}\n"
        )
    return rows


CELL = ("model", "condition", "keep", "seed", "method")


def merged(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put rows in place of the same cells of the model's results, in a fixed order, and return all of them."""
    path = RESULTS / f"quality-{name}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    known = [row for row in known if row.get("condition") in ALL_CONDITIONS and row["method"] in METHODS]
    cells = {tuple(row[key] for key in CELL): dict(row) for row in [*known, *rows]}
    order = (ALL_CONDITIONS, tuple(METHODS))
    ordered = sorted(
        cells.values(),
        key=lambda row: (order[0].index(row["condition"]), -row["keep"], row["seed"], order[1].index(row["method"])),
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    RESULTS.mkdir(exist_ok=True)
    document = json.dumps({"versions": versions, "rows": ordered}, indent=1) + "\n"
    path.write_text(document, encoding="utf-8")
    return ordered


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean loss increase over the seeds (least to most), in nats per prediction, as Markdown.

    Of classifiers also the mean divergence from the dense model's predictions, and the points of accuracy lost.
    """
    lines = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        here = [row for row in rows if row["condition"] == condition]
        keeps = sorted({row["keep"] for row in here}, reverse=True)
        lines.append(f"| {here[0]['model']}, {condition} | " + " | ".join(f"keep {keep}" for keep in keeps) + " |")
        lines.append("|---" * (len(keeps) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in here):
            cells = []
            for keep in keeps:
                found = [row for row in here if (row["method"], row["keep"]) == (method, keep)]
                cells.append(summary(found))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        difference = max(abs(row["kept"] / row["keep"] - 1) for row in here)
        lines += ["", f"Sizes within {difference:.2%} of those asked for.", ""]
    return "\n".join(lines)


# What the page of results compares; the other methods are ours with a part switched off.
PUBLISHED = (
    *("truncated SVD", "ASVD", "SVD-LLM", "SVD-LLM, sequential", "SVD-LLM, pivoted", "SVD-LLM, sequential, pivoted"),
    *("MPIFA", "ours", "ours without refinement", "ours without data"),
)
SAID = {"byte left out": "a byte left out"}


def methods_table(document: Mapping[str, Any]) -> str:
    """The methods on the test split at the sizes that truncated SVD was measured at, those that were at all of them."""
    rows = [row for row in document["rows"] if row["condition"] == TEST]
    keeps = sorted({row["keep"] for row in rows if row["method"] == PUBLISHED[0]}, reverse=True)
    columns = {f"keep {keep}": [row for row in rows if row["keep"] == keep] for keep in keeps}
    return _compared(rows[0]["model"], columns)


def conditions_table(document: Mapping[str, Any]) -> str:
    """The methods on what calibration never saw."""
    rows = [row for row in document["rows"] if row["condition"] != TEST]
    columns = {
        SAID.get(condition, condition): [row for row in rows if row["condition"] == condition]
        for condition in dict.fromkeys(row["condition"] for row in rows)
    }
    return _compared(f"{rows[0]['model']}, keep {rows[0]['keep']}", columns)


def _compared(name: str, columns: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows = [row for own in columns.values() for row in own]
    small = max(row["loss_increase"] for row in rows if row["method"] == PUBLISHED[0]) < 1
    digits = 4 if small and not any("accuracy_drop" in row for row in rows) and len(columns) > 2 else 3
    for method in PUBLISHED:
        found = [[row for row in own if row["method"] == method] for own in columns.values()]
        if found and min(map(len, found)) == max(map(len, found)) > 1:  # as many draws of all
            lines.append(f"| {method} | {' | '.join(summary(each, digits) for each in found)} |")
    return "\n".join(lines)


def summary(rows: Sequence[Mapping[str, Any]], digits: int = 3) -> str:
    """One cell: the loss increase, and of a classifier the divergence and the points of accuracy lost."""
    if not rows:
        return ""
    losses = [row["loss_increase"] for row in rows]
    mean, least, most = (f"{each:.{digits}f}" for each in (statistics.mean(losses), min(losses), max(losses)))
    text = f"{mean} ({least} to {most})"
    drops = [row["accuracy_drop"] for row in rows if "accuracy_drop" in row]
    if not drops:
        return text
    away = statistics.mean(row["divergence"] for row in rows)
    return f"{text}; {away:.4f}; {100 * statistics.mean(drops):.1f} points"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--keeps", nargs="+", type=float, help="default: 0.8 0.6 0.4 0.2, and 0.5 of digits-resnet")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--conditions", nargs="+", choices=ALL_CONDITIONS, default=ALL_CONDITIONS)
    parser.add_argument("--processes", type=int, help="at the same time, of one thread each; default one per core")
    asked = parser.parse_args()
    tables = {}
    with ProcessPoolExecutor(asked.processes, mp_context=get_context("spawn")) as pool:
        running = {}
        for name in asked.models:
            subject = SUBJECTS[name]
            if not subject.weights.exists():
                sys.stderr.write(f"{name} is left out: train it with benchmarks/larger_model.py\n")
                continue
            sizes = [(keep, seed) for seed in asked.seeds for keep in asked.keeps or subject.keeps]
            for condition in (each for each in subject.conditions if each in asked.conditions):
                compared = METHODS if condition == TEST else COMPARED_UNDER_CONDITIONS
                methods = [method for method in compared if method in asked.methods]
                for keep, seed in sizes:
                    running[pool.submit(compare_at, name, condition, methods, keep=keep, seed=seed)] = name
        for done in as_completed(running):
            # Written as soon as it is known: the whole table takes hours.
            tables[running[done]] = table(merged(running[done], done.result()))
    for name in asked.models:
        if name in tables:
            sys.stdout.write(tables[name] + "\n")


if __name__ == "__main__":
    main()
