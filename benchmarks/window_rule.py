"""What the window rule contributes: the recipe's part of the ranks switched off, without and with calibration data.

    OMP_NUM_THREADS=1 python benchmarks/window_rule.py

Without data, for every reference model: what is compressed when nothing is asked, beside a relative error of 0.05 and
of 0.1 in every layer (the energy rank at 0.99), and beside the same number of stored parameters shared by the relative
Frobenius errors. With calibration: every size with and without the rule's caps on the ranks, three draws each. Where
the rule caps nothing there is one row, with the reason that `inspect` gives.

The reference models forgot nearly all of their initialization or kept most of it, and the edge of what survives matters
in between. So networks are trained here that kept a third to two thirds of it: 64-128-128-10 with biases, plain SGD,
digits. The rule, which does not apply above a share of exp(-2), is applied up to exp(-1/2) for all of this. Writes
benchmarks/results/window_rule.json and prints its rows.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quality import ROOT, error_and_divergence
from reference_models import MODELS, SAMPLES
from torch import nn

from compressor import (
    BadInput,
    CalibrationSettings,
    Compression,
    PlanningSettings,
    QualityGateNotMet,
    TrainingRecipe,
    compress,
    inspect,
)
from compressor.data import Sample, open_data
from compressor.data.builtin_data import digits
from compressor.evaluation import measure_quality

RESULT = ROOT / "benchmarks" / "results" / "window_rule.json"
KEEPS = (0.4, 0.2, 0.1, 0.05)
SEEDS = (0, 1, 2)
LEARNING_RATE, BATCH_SIZE, EPOCHS = 0.05, 16, 80
WEIGHT_DECAYS = (0.002, 0.004)
LENIENT = PlanningSettings(largest_surviving_share=math.exp(-0.5))

Compress = Callable[..., Compression]


def sizes(report: Compression) -> dict[str, Any]:
    return {
        "budget": str(report.plan.budget),
        "ranks": {layer.name: layer.rank for layer in report.plan.layers},
        "eligible_kept": report.plan.eligible_after / report.plan.eligible_before,
    }


def quality(report: Compression) -> dict[str, Any]:
    found = report.evaluation
    assert found is not None
    assert found.baseline_loss is not None
    assert found.compressed_loss is not None
    return {
        "metric": found.metric,
        "baseline": found.baseline,
        "compressed": found.compressed,
        "loss_increase": found.compressed_loss - found.baseline_loss,
    }


def without_data(name: str, compressed: Compress) -> list[dict[str, Any]]:
    """The default, two tolerances, and the default's size shared by the relative Frobenius errors alone."""
    rows = []
    stored: float | None = None
    for asked, request in (
        ("nothing", {}),
        ("tolerance 0.05", {"tolerance": 0.05}),
        ("tolerance 0.1", {"tolerance": 0.1}),
        ("keep, the size of nothing asked", None),
    ):
        row: dict[str, Any] = {"model": name, "calibrated": False, "asked": asked}
        if request is None and stored is None:
            continue
        try:
            report = compressed(**({"keep": stored} if request is None else request))
        except QualityGateNotMet as refused:
            rows.append(row | {"refused": str(refused).replace(f"{ROOT}/", "")})
            continue
        rows.append(row | sizes(report) | quality(report))
        if asked == "nothing":
            # Half a parameter more, so that asking for this size is not rounded to less than it.
            stored = min(1.0, (report.plan.eligible_after + 0.5) / report.plan.eligible_before)
        show(rows[-1])
    return rows


def with_calibration(name: str, compressed: Compress, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every size that is feasible, with the caps and without."""
    rows = []
    for keep in KEEPS:
        for seed in seeds:
            for caps in (True, False):
                row: dict[str, Any] = {"model": name, "calibrated": True, "asked": f"keep {keep}"}
                row |= {"seed": seed, "caps": caps}
                try:
                    settings = CalibrationSettings(window_caps=caps, refine=False)
                    request = {"keep": keep, "seed": seed, "calibration_settings": settings}
                    report = compressed(calibration="builtin:digits", **request)
                except BadInput as refused:
                    rows.append(row | {"refused": str(refused)})
                    continue
                result = report.plan.calibration
                assert result is not None
                row |= sizes(report) | {"holdout_loss": result.holdout_loss, "capped": result.capped}
                rows.append(row | quality(report))
                show(rows[-1])
    return rows


def reference_model(name: str, folder: Path) -> list[dict[str, Any]]:
    source, data, factory = MODELS[name]

    def compressed(**request: Any) -> Compression:
        return compress(
            source,
            output=folder / f"{name}{source.suffix}",
            data=data,
            data_samples=SAMPLES.get(name),
            factory=factory,
            overwrite=True,
            planning_settings=LENIENT,
            prefer="size",
            bits=16,
            **request,
        )

    rows = without_data(name, compressed)
    advice = inspect(source, planning_settings=LENIENT).advice
    if advice is None:
        return rows + with_calibration(name, compressed, SEEDS)
    return [*rows, {"model": name, "calibrated": True, "caps": False, "reason": advice}]


def trained(weight_decay: float, seed: int) -> tuple[nn.Module, TrainingRecipe]:
    """A perceptron trained on the digits, and how."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    images, labels = digits("train")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, weight_decay=weight_decay)
    steps = 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            steps += 1
    recipe = TrainingRecipe(
        optimizer="sgd",
        learning_rate=LEARNING_RATE,
        schedule="constant",
        weight_decay=weight_decay,
        momentum=0.0,
        batch_size=BATCH_SIZE,
        steps=steps,
    )
    return model.eval(), recipe


def trained_here(weight_decay: float, seed: int) -> list[dict[str, Any]]:
    """Each with its own initialization, calibration draw and order of the training data."""
    model, recipe = trained(weight_decay, seed)
    test = open_data("builtin:digits", sample=Sample(split="test"))
    before = measure_quality(model, test)
    name = f"perceptron, weight decay {weight_decay}"
    found = [each for each in inspect(model, recipe=recipe).layers if each.initialization is not None]
    about: dict[str, Any] = {
        "seed": seed,
        "start_left": found[0].initialization.share if found[0].initialization else None,
        "above_edge": {each.layer.name: each.initialization.above_edge for each in found if each.initialization},
    }

    def row_of(asked: str, report: Compression) -> dict[str, Any]:
        assert report.model is not None
        after = measure_quality(report.model, test)
        row = {"model": name, "asked": asked} | about | sizes(report)
        return row | {
            "metric": before.metric,
            "baseline": before.value,
            "compressed": after.value,
            "loss_increase": after.loss - before.loss,
            "divergence": error_and_divergence(model, report.model, test)[1],
        }

    images, labels = digits("train")
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:128].split(16)
    batches = [(images[each], labels[each]) for each in drawn]
    rows: list[dict[str, Any]] = []

    def add(asked: str, extra: Mapping[str, Any], **request: Any) -> Compression | None:
        try:
            report = compress(model, recipe=recipe, planning_settings=LENIENT, prefer="size", bits=16, **request)
        except (BadInput, QualityGateNotMet) as refused:
            rows.append({"model": name, "asked": asked, "seed": seed, "refused": str(refused)} | dict(extra))
            return None
        result = report.plan.calibration
        chosen = {} if result is None else {"holdout_loss": result.holdout_loss, "capped": result.capped}
        rows.append(row_of(asked, report) | dict(extra) | chosen)
        show(rows[-1])
        return report

    default = add("nothing", {"calibrated": False})
    for tolerance in (0.05, 0.1):
        add(f"tolerance {tolerance}", {"calibrated": False}, tolerance=tolerance)
    if default is not None:
        size = min(1.0, (default.plan.eligible_after + 0.5) / default.plan.eligible_before)
        add("keep, the size of nothing asked", {"calibrated": False}, keep=size)
    for keep in KEEPS:
        for caps in (True, False):
            request = {"keep": keep, "calibration": batches, "seed": seed}
            request["calibration_settings"] = CalibrationSettings(window_caps=caps, refine=False)
            add(f"keep {keep}", {"calibrated": True, "caps": caps}, **request)
    return rows


WITHOUT_DATA = {
    "nothing": "the window rule",
    "keep, the size of nothing asked": "its size, shared without the recipe",
    "tolerance 0.1": "relative error of 0.1",
    "tolerance 0.05": "relative error of 0.05",
}


def without_data_table(document: Mapping[str, Any]) -> str:
    """What the rule and others keep of the perceptrons trained here and of `digits-mlp`, and what that costs."""
    lines = ["| networks | ranks by | kept | points lost | nats lost |", "|---|---|---|---|---|"]
    for networks in ("perceptron", "digits-mlp"):
        for asked, name in WITHOUT_DATA.items():
            found = [row for row in document["rows"] if row["model"].startswith(networks)]
            rows = [row for row in found if row.get("asked") == asked]
            points = [100 * (row["baseline"] - row["compressed"]) for row in rows]
            kept, nats = (statistics.mean(row[key] for row in rows) for key in ("eligible_kept", "loss_increase"))
            lost = f"{statistics.mean(points):.2f} ({max(points):.2f})"
            lines.append(f"| {len(rows)} x {networks} | {name} | {kept:.1%} | {lost} | {nats:.4f} |")
    return "\n".join(lines)


def show(row: Mapping[str, Any]) -> None:
    sys.stderr.write(f"{dict(row)}\n")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in MODELS for row in reference_model(name, Path(folder))]
        rows += [row for weight_decay in WEIGHT_DECAYS for seed in SEEDS for row in trained_here(weight_decay, seed)]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    RESULT.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
