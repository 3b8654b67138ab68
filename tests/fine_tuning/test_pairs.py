"""Files of pairs and modules: what training added to its start, of the rank that the memory window bounds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import BadInput, TrainingRecipe, compress, export, restore
from compressor.cli.run import run
from compressor.lowrank import METADATA_KEY

torch.set_num_threads(1)

BATCH, STEPS, RATE, DECAY = 2, 4, 0.2, 0.5
RECIPE = TrainingRecipe(
    optimizer="sgd",
    learning_rate=RATE,
    momentum=0.0,
    weight_decay=DECAY,
    batch_size=BATCH,
    steps=STEPS,
    schedule="constant",
    sequence_length=1,
    base_model="start",
)
FACTORY = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4))
"""


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, nn.Sequential]:
    """A start, and what a few steps of SGD with strong weight decay made of it."""
    start = perceptron()
    tuned = copy.deepcopy(start)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=RATE, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, 16, generator=generator)
        labels = torch.randint(0, 4, (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(tuned(inputs), labels).backward()
        optimizer.step()
    return start, tuned


@pytest.fixture
def files(trained: tuple[nn.Sequential, nn.Sequential], tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "start.safetensors", tmp_path / "tuned.safetensors"
    for module, path in zip(trained, paths, strict=True):
        save_file(module.state_dict(), path, metadata={"format": "pt"})
    return paths


def test_the_window_rule_finds_what_training_wrote(files: tuple[Path, Path], tmp_path: Path) -> None:
    start, tuned = files
    report = compress(tuned, base=start, recipe=RECIPE)
    assert report.plan.budget.kind == "window-rule"
    assert report.output == str(tmp_path / "tuned-difference.safetensors")
    # The theory: W_T - (1 - lr wd)^T W_0 is of rank B T at most, and W_T - W_0 is not.
    share = (1 - RATE * DECAY) ** STEPS
    stored = load_file(report.output)
    record = json.loads(_metadata(Path(report.output))[METADATA_KEY])
    old, new = load_file(start), load_file(tuned)
    for layer in report.plan.layers[:2]:
        assert layer.rank is not None
        assert layer.rank <= BATCH * STEPS
        assert record["layers"][layer.name]["share"] == pytest.approx(share)
        weight, first = (state[f"{layer.name}.weight"].double().numpy() for state in (new, old))
        values = np.linalg.svd(weight - share * first, compute_uv=False)
        assert values[BATCH * STEPS] < 1e-6 * values[0]
        assert np.linalg.svd(weight - first, compute_uv=False)[BATCH * STEPS] > 0.01 * values[0]
        pair = stored[f"{layer.name}.up.weight"].double() @ stored[f"{layer.name}.down.weight"].double()
        error = np.linalg.norm(weight - share * first - pair.numpy()) / np.linalg.norm(weight - share * first)
        assert error <= 0.1
        assert layer.error == pytest.approx(error, rel=1e-3)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


def test_start_and_pairs_are_the_fine_tune(files: tuple[Path, Path], tmp_path: Path) -> None:
    start, tuned = files
    pairs = tmp_path / "pairs.safetensors"
    compress(tuned, base=start, output=pairs, recipe=RECIPE, tolerance=1e-4)
    exported = export(pairs, to="dense", base=start, output=tmp_path / "dense.safetensors")
    assert exported.layers == 3  # the last of rank 3: gradients at the outputs of a softmax sum to zero
    again = load_file(tmp_path / "dense.safetensors")
    for name, tensor in load_file(tuned).items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-4)
    with pytest.raises(BadInput, match="is not the base of"):
        export(pairs, to="dense", base=tuned, output=tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="name the base"):
        export(pairs, to="dense", output=tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="name the base"):
        restore(pairs, output=tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="of the base, and LoRA adds to all of it"):
        export(pairs, to="lora", base=start, output=tmp_path / "adapter")
    with pytest.raises(BadInput, match="compressed already"):
        compress(pairs, keep=0.5)
    assert {path.name for path in tmp_path.iterdir()} == {
        "start.safetensors",
        "tuned.safetensors",
        "pairs.safetensors",
        "dense.safetensors",
    }


def test_a_module_gets_pairs_beside_its_layers(
    trained: tuple[nn.Sequential, nn.Sequential], files: tuple[Path, Path]
) -> None:
    start, tuned = trained
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in trained]
    report = compress(tuned, base=start, recipe=RECIPE, tolerance=1e-4)
    small = report.model
    assert small is not None
    inputs = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(small(inputs), tuned(inputs), rtol=0, atol=1e-4)
        assert (start(inputs) - tuned(inputs)).abs().max() > 0.01
    for module, state in zip(trained, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert report.parameters.after < report.parameters.before
    with pytest.raises(BadInput, match="both as modules, or both as files"):
        compress(tuned, base=files[0])


def test_a_wrong_recipe_takes_nothing_from_the_base(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A share that makes the rest larger is not believed."""
    start, tuned = files
    recipe = TrainingRecipe.from_dict(RECIPE.to_dict() | {"weight_decay": 4.9, "sources": {}})
    compress(tuned, base=start, output=tmp_path / "pairs.safetensors", recipe=recipe, keep=0.5)
    record = json.loads(_metadata(tmp_path / "pairs.safetensors")[METADATA_KEY])
    assert {layer["share"] for layer in record["layers"].values()} == {1.0}


def test_the_predicted_share_is_shown_beside_the_fitted_one(tmp_path: Path) -> None:
    """Inputs that are zero give no gradients, and there AdamW only shrinks the base."""
    start = perceptron()
    tuned = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.01, weight_decay=2.0)
    for step in range(10):
        inputs = torch.zeros(8, 16)
        inputs[:, :2] = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        tuned(inputs).square().sum().backward()
        optimizer.step()
    for name, module in (("start", start), ("tuned", tuned)):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    recipe = TrainingRecipe(
        optimizer="adamw", learning_rate=0.01, weight_decay=2.0, batch_size=8, steps=10, schedule="constant"
    )
    asked = {"base": tmp_path / "start.safetensors", "output": tmp_path / "pairs.safetensors", "overwrite": True}
    known = compress(tmp_path / "tuned.safetensors", recipe=recipe, keep=0.5, **asked)
    unknown = compress(tmp_path / "tuned.safetensors", keep=0.5, **asked)
    assert known.fine_tune is not None
    assert unknown.fine_tune is not None
    old, new = (each[0].weight.detach().double() for each in (start, tuned))
    share = known.fine_tune.shares["0"]
    torch.testing.assert_close(new[:, 2:], share.predicted * old[:, 2:], rtol=1e-5, atol=0)
    assert share.share == share.predicted == pytest.approx(0.98**10)
    assert share.fitted == pytest.approx(np.linalg.lstsq(old.reshape(-1, 1), new.flatten())[0][0])
    assert share.fitted != pytest.approx(share.predicted, rel=1e-3)
    told = known.to_dict()["fine_tune"]["shares"]["0"]
    assert told == {"predicted": share.predicted, "fitted": share.fitted, "share": share.predicted}
    assert f"exp(-K) = {0.98**10:.6g} of the base is left; fitted: " in " ".join(str(known).split())
    assert unknown.fine_tune.shares["0"] == replace(share, predicted=None, share=1.0)
    assert "exp(-K)" not in str(unknown)


def test_a_base_of_zeros_has_no_share(tmp_path: Path) -> None:
    start, tuned = tmp_path / "start.safetensors", tmp_path / "tuned.safetensors"
    save_file({"weight": torch.zeros(24, 20)}, start)
    save_file({"weight": torch.randn(24, 2) @ torch.randn(2, 20)}, tuned)
    report = compress(tuned, base=start, output=tmp_path / "pairs.safetensors", recipe=RECIPE, tolerance=0.01)
    assert [layer.rank for layer in report.plan.layers] == [2]
    assert report.fine_tune is not None
    assert report.fine_tune.shares == {}


def test_what_is_measured_is_base_and_pairs_together(
    files: tuple[Path, Path],
    trained: tuple[nn.Sequential, nn.Sequential],
    tmp_path: Path,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, tuned = files
    (tmp_path / "networks.py").write_text(FACTORY)
    inputs = torch.randn(60, 16)
    with torch.no_grad():
        labels = trained[1](inputs).argmax(-1)
        of_start = float((trained[0](inputs).argmax(-1) == labels).float().mean())
    np.savez(tmp_path / "data.npz", x=inputs.numpy(), y=labels.numpy())
    arguments = [str(tuned), "--base", str(start), "-o", str(tmp_path / "pairs.safetensors"), "--tolerance", "0.001"]
    arguments += ["--data", str(tmp_path / "data.npz"), "--model", f"{tmp_path / 'networks.py'}:mlp", "--json"]
    assert run(arguments) == 0
    evaluation = json.loads(capsys.readouterr().out)["evaluation"]
    assert of_start < 0.9
    assert evaluation["baseline"] == 1.0
    assert evaluation["compressed"] == 1.0


def test_a_file_is_written_as_safetensors(files: tuple[Path, Path], tmp_path: Path) -> None:
    start, tuned = files
    with pytest.raises(BadInput, match=r"name it with \.safetensors"):
        compress(tuned, base=start, output=tmp_path / "pairs.pt", keep=0.5)
    with pytest.raises(BadInput, match="is the input itself"):
        compress(tuned, base=start, output=start, keep=0.5, overwrite=True)
