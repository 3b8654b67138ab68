"""Checkpoints of a run go into an archive, and each comes back within the tolerance; what does not fit is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compressor
from compressor import BadInput
from compressor.cli.run import run

STEPS = (2, 4, 8, 12)
RECIPE = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.02,
    "momentum": 0.0,
    "batch_size": 2,
    "schedule": "constant",
    "steps": 12,
    "sequence_length": 1,
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3)
    )


def states(dtype: torch.dtype = torch.float32) -> dict[int, dict[str, Tensor]]:
    """What plain SGD made of a network after some steps."""
    torch.manual_seed(5)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), RECIPE["learning_rate"], weight_decay=RECIPE["weight_decay"])
    found = {}
    for step in range(1, STEPS[-1] + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(2, 12)), torch.randint(3, (2,))).backward()
        optimizer.step()
        if step in STEPS:
            found[step] = {
                name: (each.to(dtype) if each.is_floating_point() else each).clone()
                for name, each in model.state_dict().items()
            }
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The checkpoints of the run, as files, with its recipe beside them."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    for step, state in states().items():
        save_file(state, folder / f"checkpoint-{step}.safetensors")
    return sorted(folder.glob("checkpoint-*"))  # by name: 12 comes before 2


def without_seconds(archived: compressor.Archiving) -> dict[str, Any]:
    """The result but for what two runs differ in."""
    return archived.to_dict() | {"seconds": 0.0, "output": "", "initial": None}


def errors(stored: Path, original: Path) -> dict[str, float]:
    """The relative error of each tensor."""
    found, wanted = load_file(stored), load_file(original)
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: (each.shape, each.dtype) for name, each in wanted.items()
    }
    return {
        name: float((found[name].double() - each.double()).norm()) / max(float(each.double().norm()), 1e-30)
        for name, each in wanted.items()
    }


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 1e-3, 0.05])
def test_every_checkpoint_comes_back_within_the_tolerance(files: list[Path], tmp_path: Path, tolerance: float) -> None:
    archived = compressor.archive(files, output=tmp_path / "archive", tolerance=tolerance)
    assert [each.number for each in archived.checkpoints] == list(STEPS)
    for file, stored in zip(
        sorted(files, key=lambda path: int(path.stem.split("-")[1])), archived.checkpoints, strict=True
    ):
        restored = compressor.restore(
            tmp_path / "archive", checkpoint=file.stem, output=tmp_path / f"again-{file.name}"
        )
        assert restored.checkpoint == file.name
        found = errors(Path(restored.output), file)
        # Errors do not add up: each change is one from the checkpoint before as it is restored.
        assert max(found.values()) <= tolerance
        assert max(found.values()) == pytest.approx(stored.error, rel=1e-6)
    assert archived.bytes.after == sum(each.stat().st_size for each in (tmp_path / "archive").iterdir())
    assert archived.bytes.before == sum(each.stat().st_size for each in files)


def test_the_window_bounds_the_rank_of_the_pairs(files: list[Path], tmp_path: Path) -> None:
    archived = compressor.archive(files, output=tmp_path / "archive", tolerance=1e-5)
    for stored, steps in zip(archived.checkpoints[1:], (2, 4, 4), strict=True):
        # Of the 48 x 48 matrix; what the others may have is more than they can.
        assert (stored.rank_bound, stored.bounded) == (2 * steps, 3 if 2 * steps < 3 else 2 if 2 * steps < 12 else 1)
        assert stored.largest_rank <= 2 * steps
        assert stored.from_previous == 11
    assert "at most the rank that was written since" in " ".join(str(archived).split())
    whole = 4 * 48 * 48
    assert archived.checkpoints[1].stored_bytes < whole / 2


def test_what_a_seed_draws_is_not_stored(files: list[Path], tmp_path: Path) -> None:
    without = compressor.archive(files, output=tmp_path / "without")
    archived = compressor.archive(files, output=tmp_path / "archive", initial=5, factory=network)
    first = archived.checkpoints[0]
    # The three matrices of the first checkpoint; nothing else correlates with 8 standard deviations.
    assert (first.from_initial, first.from_previous, first.in_full) == (3, 0, 8)
    assert first.stored_bytes < 0.6 * without.checkpoints[0].stored_bytes
    for file in files:
        compressor.restore(tmp_path / "archive", checkpoint=file.stem, output=tmp_path / file.name)
        assert max(errors(tmp_path / file.name, file).values()) <= 1e-3
    assert "initial    seed 5" in str(archived)


def test_a_checkpoint_may_be_where_training_started(files: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_file(network().state_dict(), tmp_path / "start.safetensors")
    archived = compressor.archive(files, output=tmp_path / "archive", initial=tmp_path / "start.safetensors")
    assert archived.checkpoints[0].from_initial == 3
    again = tmp_path / "again.safetensors"
    with pytest.raises(BadInput, match=r"needs start\.safetensors"):
        compressor.restore(tmp_path / "archive", checkpoint="checkpoint-4", output=again)
    with pytest.raises(BadInput, match=r"weight of checkpoint-2\.safetensors is not what this model was"):
        compressor.restore(tmp_path / "archive", checkpoint="checkpoint-4", output=again, initial=files[1])
    compressor.restore(
        tmp_path / "archive", checkpoint="checkpoint-4", output=again, initial=tmp_path / "start.safetensors"
    )
    assert max(errors(again, tmp_path / "run" / "checkpoint-4.safetensors").values()) <= 1e-3


def test_a_seed_is_not_used_where_every_bit_is_kept(files: list[Path], tmp_path: Path) -> None:
    archived = compressor.archive(files, output=tmp_path / "archive", initial=5, factory=network, tolerance=0)
    assert archived.checkpoints[0].from_initial == 0
    assert "seed 5, not used" in str(archived)


def test_a_wrong_seed_changes_nothing_and_that_is_said(files: list[Path], tmp_path: Path) -> None:
    without = compressor.archive(files, output=tmp_path / "without")
    wrong = compressor.archive(files, output=tmp_path / "wrong", initial=6, factory=network)
    assert without_seconds(wrong) == without_seconds(without)
    contents = [{each.name: each.read_bytes() for each in (tmp_path / name).iterdir()} for name in ("without", "wrong")]
    assert contents[0] == contents[1]
    assert "seed 6, from which no change is smaller" in str(wrong)


def test_other_draws_are_refused(files: list[Path], tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    compressor.archive(files, output=archive, initial=5, factory=network)
    _change(archive, lambda each: each["initial"]["draws"].update(seed=6))
    with pytest.raises(BadInput, match=r"weight is not drawn as it was"):
        compressor.restore(archive, checkpoint="checkpoint-4", output=tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_a_tighter_tolerance_takes_more_bytes_and_an_archive_less_than_the_files(
    files: list[Path], tmp_path: Path
) -> None:
    sizes = [
        compressor.archive(files, output=tmp_path / f"{tolerance}", tolerance=tolerance).checkpoints[-1].stored_bytes
        for tolerance in (0.0, 1e-5, 1e-3, 1e-2)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < files[0].stat().st_size


def test_the_command_archives_and_restores(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, again = tmp_path / "archive", tmp_path / "again.pt"
    assert run(["archive", *map(str, files), "-o", str(archive), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "4 checkpoints, step 2 to 12; their weights, and no states of optimizers" in " ".join(printed.split())
    assert "tolerance  0.1 % of the norm of each tensor" in printed
    assert run(["restore", str(archive), "--checkpoint", "checkpoint-8", "-o", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "checkpoint-8.safetensors"
    network().load_state_dict(torch.load(again, weights_only=True))


def test_without_an_output_a_checkpoint_is_restored_under_its_name_beside_the_archive(
    files: list[Path], tmp_path: Path
) -> None:
    compressor.archive(files, output=tmp_path / "archive")
    restored = compressor.restore(tmp_path / "archive", checkpoint="checkpoint-4")
    assert Path(restored.output) == tmp_path / "checkpoint-4.safetensors"


def test_an_archive_is_replaced_only_if_that_is_asked(files: list[Path], tmp_path: Path) -> None:
    compressor.archive(files, output=tmp_path / "archive")
    with pytest.raises(BadInput, match="already exists"):
        compressor.archive(files[:2], output=tmp_path / "archive")
    compressor.archive(files[:2], output=tmp_path / "archive", overwrite=True)
    assert len(list((tmp_path / "archive").glob("*.change"))) == 2
    (tmp_path / "archive" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"notes\.txt, which would be lost"):
        compressor.archive(files, output=tmp_path / "archive", overwrite=True)


def test_an_interrupted_run_leaves_nothing(files: list[Path], tmp_path: Path) -> None:
    def stop(_: str, done: int, __: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.archive(files, output=tmp_path / "archive", progress=stop)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]


def test_tied_and_other_tensors_of_torch_files_come_back(tmp_path: Path) -> None:
    for step in (1, 2):
        shared = torch.randn(6, 4)
        state = {"in.weight": shared, "out.weight": shared, "count": torch.tensor(step), "flags": torch.ones(3) > 0}
        torch.save({"state_dict": state, "optimizer": {"state": torch.randn(500)}}, tmp_path / f"step-{step}.pt")
    archived = compressor.archive(sorted(tmp_path.glob("*.pt")), output=tmp_path / "archive", tolerance=0)
    assert [each.bytes for each in archived.left_out] != []
    compressor.restore(tmp_path / "archive", checkpoint="step-2", output=tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(torch.equal(again[name], each) for name, each in state.items())


@pytest.mark.slow
def test_folders_come_back_as_folders_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config)
    for step in (10, 20):
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.01 * torch.randn_like(each))
        # The names say nothing: the trainer's state does.
        folder = tmp_path / "run" / f"saved {'later' if step == 20 else 'once'}"
        model.save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "optimizer.pt").write_bytes(b"large")
    archived = compressor.archive(
        [tmp_path / "run/saved later", tmp_path / "run/saved once"], output=tmp_path / "archive"
    )
    assert [each.name for each in archived.checkpoints] == ["saved once", "saved later"]
    compressor.restore(tmp_path / "archive", checkpoint="saved later", output=tmp_path / "again")
    assert not list(tmp_path.rglob("again/optimizer*"))
    again = AutoModel.from_pretrained(tmp_path / "again")
    for name, each in model.state_dict().items():
        assert float((again.state_dict()[name] - each).norm()) <= 1e-3 * float(each.norm())


def _other_shape(folder: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 3)}, folder / "checkpoint-4.safetensors")


def _other_dtype(folder: Path) -> None:
    state = load_file(folder / "checkpoint-4.safetensors")
    save_file(state | {"3.weight": state["3.weight"].half()}, folder / "checkpoint-4.safetensors")


def _same_step(folder: Path) -> None:
    shutil.copy(folder / "checkpoint-4.safetensors", folder / "ckpt_4.safetensors")


def _no_step(folder: Path) -> None:
    shutil.copy(folder / "checkpoint-4.safetensors", folder / "best.safetensors")


def _no_weights(folder: Path) -> None:
    (folder / "checkpoint-4.safetensors").write_text("nothing of the kind")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_other_shape, "lacks 0.bias, unlike checkpoint-2"),
        (_other_dtype, "3.weight has another shape or dtype than in checkpoint-2"),
        (_same_step, "are both of step 4"),
        (_no_step, "best.safetensors: no step is known of it"),
        (_no_weights, "checkpoint-4.safetensors: is"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused(
    files: list[Path], tmp_path: Path, spoil: Callable[[Path], None], *, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tmp_path / "run")
    given = sorted((tmp_path / "run").glob("*.safetensors"))
    assert run(["archive", *map(str, given), "-o", str(tmp_path / "archive"), "--quiet"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert says in printed[-1]
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN/step-*", "-o", "OUT"], "step-*: matches no checkpoint"),
        (["RUN/checkpoint-7.safetensors", "-o", "OUT"], "no such file or folder"),
        (["RUN/checkpoint-2.safetensors"], "--output is missing"),
        (["RUN/checkpoint-2.safetensors", "-o", "OUT", "--tolerance", "1"], "--tolerance 1 is out of range"),
        (["RUN/checkpoint-2.safetensors", "-o", "RUN"], "contains the input"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(
    files: list[Path], tmp_path: Path, arguments: list[str], *, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "archive")}
    given = [each.replace("RUN", places["RUN"]).replace("OUT", places["OUT"]) for each in arguments]
    assert run(["archive", *given, "--quiet"]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def _change(archive: Path, change: Callable[[dict[str, object]], object]) -> None:
    document = json.loads((archive / "compression.json").read_text())
    change(document["archive"])
    (archive / "compression.json").write_text(json.dumps(document))


def _flipped(archive: Path) -> None:
    file = archive / "checkpoint-2.safetensors.change"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (_flipped, "was changed since it was archived"),
    "a missing file": (lambda archive: (archive / "checkpoint-2.safetensors.change").unlink(), "no such file"),
    "a shortened file": (
        lambda archive: (archive / "checkpoint-4.safetensors.change").write_bytes(b"12345678901"),
        "is not a valid safetensors file",
    ),
    "no checkpoints": (lambda archive: _change(archive, lambda each: each.update(checkpoints=[])), "no checkpoints"),
    "another format": (
        lambda archive: _change(archive, lambda each: each.update(format_version=99)),
        "it is of format 99",
    ),
    "a name that leads elsewhere": (
        lambda archive: _change(archive, lambda each: each["checkpoints"][0].update(name="../../etc/passwd")),
        "is no name of a checkpoint",
    ),
    "a checkpoint too few": (
        lambda archive: _change(archive, lambda each: each["checkpoints"].pop(0)),
        "its first checkpoint is a change from one before it",
    ),
    "another shape": (
        lambda archive: _change(archive, lambda each: each["tensors"].update({"3.bias": [[50], "F32"]})),
        "tensor 3.bias is damaged",
    ),
    "a dtype that is none": (
        lambda archive: _change(archive, lambda each: each["tensors"].update({"3.weight": [[48, 48], "F31"]})),
        "has no shape and dtype",
    ),
    "no initial weights": (
        lambda archive: _change(archive, lambda each: each.update(initial=None)),
        "does not say what the initial weights of 0.weight are",
    ),
    "an error that is none": (
        lambda archive: _change(archive, lambda each: each["checkpoints"][1].update(error="small")),
        "has no error or digest",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_refused_in_a_line(
    files: list[Path], tmp_path: Path, damage: str, *, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "archive"
    compressor.archive(files, output=archive, initial=5, factory=network)
    spoil, says = DAMAGES[damage]
    spoil(archive)
    capsys.readouterr()
    assert run(["restore", str(archive), "--checkpoint", "checkpoint-8", "-o", str(tmp_path / "again.pt"), "-q"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert says in printed[0]
    assert not (tmp_path / "again.pt").exists()


def test_a_run_that_diverged_for_a_while_comes_back(tmp_path: Path) -> None:
    weight = torch.randn(20, 30)
    weights = [weight, weight + 0.01, weight.clone(), weight.clone(), weight + 0.02]
    weights[2][3, 4], weights[3][5, 6] = math.nan, math.inf
    given = [tmp_path / f"step-{step}.safetensors" for step in range(len(weights))]
    for file, each in zip(given, weights, strict=True):
        save_file({"weight": each}, file)
    archived = compressor.archive(given, output=tmp_path / "archive")
    assert [each.exact for each in archived.checkpoints] == [0, 0, 1, 1, 0]
    for file, each in zip(given, weights, strict=True):
        compressor.restore(tmp_path / "archive", checkpoint=file.name, output=tmp_path / f"again-{file.name}")
        again = load_file(tmp_path / f"again-{file.name}")["weight"]
        assert torch.equal(torch.isfinite(again), torch.isfinite(each))
        kept = torch.isfinite(each)
        assert float((again - each)[kept].norm()) <= 1e-3 * float(each[kept].norm())


def test_checkpoints_of_one_name_are_refused(files: list[Path], tmp_path: Path) -> None:
    given = []
    for step, file in ((10, files[0]), (20, files[1])):
        folder = tmp_path / str(step) / "last"
        folder.mkdir(parents=True)
        shutil.copy(file, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        given.append(folder)
    with pytest.raises(BadInput, match="2 checkpoints are called last"):
        compressor.archive(given, output=tmp_path / "archive")


def test_an_archive_is_no_model_and_a_model_is_no_archive(files: list[Path], tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    compressor.archive(files, output=archive)
    with pytest.raises(BadInput, match=r"is an archive of checkpoints; restore one first"):
        compressor.inspect(archive)
    with pytest.raises(BadInput, match=r"name one of them with `checkpoint`, such as checkpoint-12"):
        compressor.restore(archive)
    with pytest.raises(BadInput, match=r"holds no checkpoint 'checkpoint-3'; it has checkpoint-2\.safetensors, "):
        compressor.restore(archive, checkpoint="checkpoint-3")
    with pytest.raises(BadInput, match="about an archive"):
        compressor.restore(files[0], checkpoint="checkpoint-3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_come_back_within_the_tolerance_or_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    for step, state in states(dtype).items():
        save_file(state, tmp_path / f"step-{step}.safetensors")
    given = sorted(tmp_path.glob("step-*"))
    for tolerance in (1e-5, 1e-2):
        archived = compressor.archive(given, output=tmp_path / f"{tolerance}", tolerance=tolerance)
        compressor.restore(
            tmp_path / f"{tolerance}", checkpoint="step-12", output=tmp_path / f"{tolerance}.safetensors"
        )
        found = errors(tmp_path / f"{tolerance}.safetensors", tmp_path / "step-12.safetensors")
        assert max(found.values()) <= tolerance
        assert math.isclose(max(found.values()), archived.checkpoints[-1].error, rel_tol=1e-6)
