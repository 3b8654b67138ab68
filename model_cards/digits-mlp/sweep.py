"""Tries settings for digits-mlp and writes `sweep.json`: validation accuracy while the rank bound binds."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from compressor.data.builtin_data import digits

FOLDER = Path(__file__).resolve().parent
SEEDS = (0, 1)
FULL = 2.5  # forgetting exponent, above log(10): the memory window is shorter than the training


def main() -> None:
    """Train every setting under every seed; the test split is never looked at."""
    sys.path.append(str(FOLDER))
    from train import Settings, accuracy, train, truncated

    def binding(**variation: Any) -> Settings:
        """Return the settings with the least weight decay, to three digits, whose bound is below the width."""
        decay = 0.001
        while True:
            settings = replace(Settings(), **variation, weight_decay=float(f"{decay:.3g}"))
            if settings.forgetting_exponent() > FULL and settings.memory_window() < settings.width:
                return settings
            decay *= 1.002

    torch.set_num_threads(1)
    simplest = {"candidates": 1, "standardized": False, "max_gradient_norm": 0.0, "milestones": ()}
    variations: list[dict[str, Any]] = [
        {"learning_rate": 0.05, **simplest},
        {"learning_rate": 0.1, **simplest},
        {"candidates": 1},
        {"standardized": False},
        {"max_gradient_norm": 0.0},
        {"milestones": ()},
        {"learning_rate": 0.1},
        {"learning_rate": 0.2},
        {"candidates": 4},
        {"candidates": 8},
        {"candidates": 32},
        {"width": 512, "milestones": (2700, 2830, 2920)},
        {"width": 960, "milestones": (2400, 2650, 2850)},
        {},
    ]
    rows = []
    for variation in variations:
        settings = binding(**variation)
        runs = []
        for seed in SEEDS:
            model, norm_ratios = train(replace(settings, seed=seed))
            cut, truncation = truncated(model, replace(settings, seed=seed))
            runs.append(
                {
                    "seed": seed,
                    "train_accuracy": accuracy(model, *digits("train")),
                    "validation_accuracy": accuracy(model, *digits("validation")),
                    "hidden_norm_ratio": norm_ratios[1],
                    "hidden_frobenius_rank": truncation["layers"][1]["frobenius_rank"],
                    "truncated_validation_accuracy": accuracy(cut, *digits("validation")),
                    "parameters_kept": truncation["parameters_kept"],
                }
            )
        mean = sum(run["validation_accuracy"] for run in runs) / len(runs)
        described = {name: value for name, value in asdict(settings).items() if name != "seed"}
        rows.append(
            {
                **described,
                "rank_bound": settings.memory_window(),
                "mean_validation_accuracy": mean,
                "runs": runs,
            }
        )
        print(f"{variation} -> weight decay {settings.weight_decay}, validation accuracy {mean:.4f}", flush=True)
    (FOLDER / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
