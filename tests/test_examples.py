"""The release gate of the examples: what passes is released and logged, what does not is logged and fails the build."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

EXAMPLE = Path(__file__).parents[1] / "examples" / "pipeline.py"
MODEL = Path(__file__).parents[1] / "model_cards" / "digits-mlp"


@pytest.fixture(scope="module")
def gate() -> Any:
    spec = importlib.util.spec_from_file_location("release_gate", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def runs(gate: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Exit statuses of the gate on a good size, a bad one, and where there is something already."""
    place = tmp_path_factory.mktemp("gate")
    (place / "there").mkdir()
    statuses = {}
    for name, keep, model in (("good", "0.4", MODEL), ("bad", "0.005", MODEL), ("there", "0.4", MODEL)):
        options = ["--data", "builtin:digits", "--max-drop", "0.01", "--output", str(place / name)]
        code = ["--model-code", f"{MODEL / 'train.py'}:build_model"]
        tracking = ["--tracking-uri", (place / "mlruns").as_uri()]
        statuses[name] = gate([str(model), "--keep", keep, *options, *code, *tracking])
    return place, statuses


def logged(place: Path, name: str) -> tuple[Any, MlflowClient]:
    client = MlflowClient((place / "mlruns").as_uri())
    [experiment] = [each for each in client.search_experiments() if each.name == "compression"]
    [run] = [each for each in client.search_runs([experiment.experiment_id]) if each.info.run_name == name]
    return run, client


def test_only_what_passes_is_released(runs: tuple[Path, dict[str, int]]) -> None:
    place, statuses = runs
    assert statuses == {"good": 0, "bad": 3, "there": 2}
    assert sorted(path.name for path in place.iterdir()) == ["good", "mlruns", "there"]
    assert (place / "good" / "model.safetensors").exists()
    assert not list((place / "there").iterdir())


def test_both_outcomes_are_logged_with_numbers_and_files(runs: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    place, _ = runs
    for name, status, tag in (("good", "FINISHED", "passed"), ("bad", "FAILED", "not met")):
        run, client = logged(place, name)
        metrics = run.data.metrics
        assert (run.info.status, run.data.tags["gate"]) == (status, tag)
        assert (metrics["drop"] <= 0.01) == (tag == "passed")
        assert metrics["drop"] == pytest.approx(metrics["accuracy_before"] - metrics["accuracy_after"])
        assert metrics["kept"] == metrics["eligible_parameters_after"] / metrics["eligible_parameters_before"]
        assert sorted(file.path for file in client.list_artifacts(run.info.run_id)) == [
            "README.md",
            "plan.json",
            "report.html",
        ]
        plan = json.loads(Path(client.download_artifacts(run.info.run_id, "plan.json", str(tmp_path))).read_text())
        assert plan["eligible"]["after"] == metrics["eligible_parameters_after"]
    run, _ = logged(place, "good")
    released = place / "good" / "model.safetensors"
    assert run.data.metrics["bytes_after"] == released.stat().st_size
    assert run.data.params["command"].startswith("compress digits-mlp --keep 0.4")
