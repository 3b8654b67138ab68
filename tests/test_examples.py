"""What the pages promise to builds and servers: the release gate of the examples, and pairs in plain PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import socket
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

import compressor
from compressor.cli.run import run
from compressor.model import load_model

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
        statuses[name] = gate([str(model), "--keep", keep, "--prefer", "size", *options, *code, *tracking])
    return place, statuses


def test_a_tracking_server_that_does_not_answer_is_one_line_before_the_work(
    gate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressor, "compress", pytest.fail)
    options = ["--keep", "0.4", "--data", "builtin:digits", "--max-drop", "0.01", "--output", str(tmp_path / "out")]
    with socket.socket() as unused:
        # Bound and not listening, so that every connection is refused.
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert gate([str(MODEL), *options, "--tracking-uri", address]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: MLflow at {address}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_that_came_meanwhile_is_replaced(gate: Any, tmp_path: Path, kind: str) -> None:
    release = gate.__globals__["release"]

    def made(place: Path, content: str) -> None:
        if kind == "folder":
            place.mkdir()
        (place / "weights" if kind == "folder" else place).write_text(content)

    made(tmp_path / "candidate", "new")
    made(tmp_path / "there", "old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "empty", "link"):
        with pytest.raises(compressor.BadInput, match="already exists"):
            release(tmp_path / "candidate", tmp_path / name)
    assert next(tmp_path.glob("there/weights" if kind == "folder" else "there")).read_text() == "old"
    assert not list((tmp_path / "empty").iterdir())
    release(tmp_path / "candidate", tmp_path / "free")
    assert next(tmp_path.glob("free/weights" if kind == "folder" else "free")).read_text() == "new"


def logged(place: Path, name: str) -> tuple[Any, MlflowClient]:
    client = MlflowClient((place / "mlruns").as_uri())
    [experiment] = [each for each in client.search_experiments() if each.name == "compression"]
    [run] = [each for each in client.search_runs([experiment.experiment_id]) if each.info.run_name == name]
    return run, client


@pytest.mark.slow
def test_only_what_passes_is_released(runs: tuple[Path, dict[str, int]]) -> None:
    place, statuses = runs
    assert statuses == {"good": 0, "bad": 3, "there": 2}
    assert sorted(path.name for path in place.iterdir()) == ["good", "mlruns", "there"]
    assert (place / "good" / "model.safetensors").exists()
    assert not list((place / "there").iterdir())


@pytest.mark.slow
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
    assert run.data.params["command"].startswith("compress digits-mlp --keep 0.4 --prefer size")


def test_the_gate_of_the_pages_is_a_workflow_whose_command_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (EXAMPLE.parents[1] / "docs" / "quality-gates.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    [job] = yaml.safe_load(snippet)["jobs"].values()
    [command] = [step["run"] for step in job["steps"] if step.get("run", "").startswith("compress ")]
    asked: list[Any] = []

    def refuse(model: str, options: Any, **_: Any) -> None:
        asked.append((model, options))
        raise compressor.QualityGateNotMet("no size holds")

    monkeypatch.setattr(compressor, "compress", refuse)
    monkeypatch.chdir(EXAMPLE.parents[1])
    assert run(shlex.split(command)[1:]) == 3
    [(model, options)] = asked
    assert Path(model).is_dir()
    assert (options.max_drop, str(options.data)) == (0.01, "builtin:digits")
    assert {str(options.output), "report.html"} == set(job["steps"][-1]["with"]["path"].split())


@pytest.mark.slow
def test_plain_pairs_are_two_ordinary_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 6))
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    small = compressor.compress(tmp_path / "dense.safetensors", keep=0.3, form="plain").output
    assert small is not None
    state = load_file(small)
    plain = copy.deepcopy(dense)
    for name in ("0", "2"):
        if f"{name}.down.weight" in state:
            rank, d_in = state[f"{name}.down.weight"].shape
            down, up = torch.nn.Linear(d_in, rank, bias=False), torch.nn.Linear(rank, len(state[f"{name}.up.weight"]))
            plain[int(name)] = torch.nn.Sequential(OrderedDict(down=down, up=up))
    assert not any(isinstance(layer, torch.nn.Linear) for layer in plain)
    keys = plain.load_state_dict(state, strict=False)
    # Left over are the empty tensors by which other loaders know that something is missing.
    assert (keys.missing_keys, keys.unexpected_keys) == ([], ["0.weight", "2.weight"])
    loaded = load_model(small, lambda: copy.deepcopy(dense))
    x = torch.randn(5, 12)
    assert torch.equal(plain(x), loaded(x))
    assert not torch.equal(plain(x), dense(x))
