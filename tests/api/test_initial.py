"""Where training started, through every verb: a seed, a checkpoint, a state, and what does not fit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from compressor import (
    BadInput,
    CompressOptions,
    InspectOptions,
    compress,
    diagnose,
    evaluate,
    export,
    inspect,
    load_model,
    plan,
    restore,
)
from compressor.cli.run import run
from compressor.initial import InitialWeights, keep_initial
from compressor.io import open_checkpoint
from compressor.lowrank import formed_layers
from compressor.report import diagnosis_page
from tests.lowrank.started import RANK, SEED, gpt2, outputs

torch.set_num_threads(1)

# Without weight decay all of the start is left.
RECIPE = {"weight_decay": 0.0}
QUICK = {"keep": 0.5, "prefer": "size", "calibration": "none", "recipe": RECIPE}


class Net(nn.Module):
    """Two layers that are large enough for a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, rows: Any) -> Any:
        return self.second(torch.relu(self.first(rows)))


def untrained(build: Callable[[], Any] = Net) -> Any:
    """A network from the seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        return build()


def trained(build: Callable[[], Any] = Net) -> Any:
    """The same after training: a matrix of rank two is added to each of its matrices."""
    model, generator = untrained(build), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            sides = [torch.randn(side, RANK, generator=generator) for side in parameter.shape]
            parameter.data += 0.02 * sides[0] @ sides[1].T
    return model.eval()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A file of weights that started from a seed."""
    torch.save(trained().state_dict(), tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A file of the weights that these started from."""
    torch.save(untrained().state_dict(), tmp_path / "start.pt")
    return tmp_path / "start.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transformers folder whose weights started from a seed."""
    trained(gpt2).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def rows() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def close(model: nn.Module, path: Path) -> None:
    expected = Net()
    expected.load_state_dict(torch.load(path, weights_only=True))
    torch.testing.assert_close(model.eval()(rows()), expected.eval()(rows()), rtol=1e-4, atol=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_what_is_found_says_the_seed_the_shares_and_the_ranks(dense):
    found = inspect(dense, factory=Net, initial=SEED, recipe=RECIPE).initial
    assert (found.source, found.seed, found.origin, found.eligible) == (f"seed {SEED}", SEED, "given", 2)
    assert [layer.name for layer in found.layers] == ["first", "second"]
    for layer in found.layers:
        assert layer.start.z > 8
        assert layer.start.share == layer.start.predicted == 1.0
        assert layer.start.fitted == pytest.approx(1.0, abs=0.1)
        assert layer.ranks.energy > layer.written_ranks.numerical == RANK
    assert found.to_dict()["layers"][0]["z"] == found.layers[0].start.z
    assert inspect(dense, factory=Net).initial is None


@pytest.mark.parametrize("from_a_seed", [True, False])
def test_a_file_holds_what_training_wrote_from_a_seed_or_a_checkpoint(from_a_seed, dense, start):
    initial, tmp_path = SEED if from_a_seed else start, dense.parent
    compression = compress(dense, output=tmp_path / "small.safetensors", factory=Net, initial=initial, **QUICK)
    assert {layer.form.partition("+")[0] for layer in compression.plan.layers} == {"initial"}
    assert len(compression.initial.layers) == 2
    assert f"--initial {SEED if from_a_seed else 'start.pt'}" in compression.command
    named = None if from_a_seed else start
    close(load_model(tmp_path / "small.safetensors", Net, initial=named), dense)
    restore(tmp_path / "small.safetensors", output=tmp_path / "restored.safetensors", initial=named)
    close(load_model(tmp_path / "restored.safetensors", Net), dense)
    # A reader that knows nothing of the form loads nothing instead of random numbers.
    assert formed_layers(open_checkpoint(tmp_path / "small.safetensors")) == ()


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_a_folder_holds_what_training_wrote_from_a_seed(shard, folder, tmp_path):
    compression = compress(folder, output=tmp_path / "small", initial=SEED, max_shard_size=shard, **QUICK)
    assert (tmp_path / "small" / "model.safetensors.index.json").exists() == (shard == "2KB")
    assert "initial+plain" in {layer.form for layer in compression.plan.layers}
    found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "small")
    expected = transformers.GPT2LMHeadModel.from_pretrained(folder)
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=1e-3, atol=1e-4)
    restore(tmp_path / "small", output=tmp_path / "restored")
    torch.testing.assert_close(outputs(load_model(tmp_path / "restored")), outputs(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["seed", "state", "function", "module", "weights"])
def test_a_module_is_stored_from_whatever_names_its_start(kind, tmp_path, dense):
    fresh = untrained()
    initial = {
        "seed": SEED,
        "state": fresh.state_dict(),
        "function": fresh.state_dict,
        "module": fresh,
        "weights": InitialWeights.from_seed(Net, SEED),
    }[kind]
    factory = Net if kind == "seed" else None
    compression = compress(trained(), initial=initial, factory=factory, output=tmp_path / "small.safetensors", **QUICK)
    assert len(compression.initial.layers) == 2
    close(compression.model, dense)
    named = None if kind in ("seed", "weights") else initial
    close(load_model(tmp_path / "small.safetensors", Net, initial=named), dense)


def test_a_transformers_module_is_built_again_from_its_configuration():
    found = inspect(trained(gpt2), initial=SEED).initial
    assert len(found.layers) == found.eligible == 4


def test_a_wrong_seed_changes_no_byte_and_is_said_to_be_wrong(folder, tmp_path):
    compress(folder, output=tmp_path / "without", **QUICK)
    compression = compress(folder, output=tmp_path / "wrong", initial=SEED + 1, **QUICK)
    assert contents(tmp_path / "without") == contents(tmp_path / "wrong")
    assert compression.initial.layers == ()
    assert "no layer correlates with it" in str(compression)


def test_a_plan_says_what_was_found_and_is_applied_with_the_same_start(dense, tmp_path):
    chosen = plan(dense, factory=Net, initial=SEED, **QUICK)
    assert len(chosen.initial.layers) == 2
    assert chosen.to_dict()["initial"]["seed"] == SEED
    with pytest.raises(BadInput, match="name them with `initial`"):
        compress(dense, factory=Net, plan=chosen, output=tmp_path / "small.safetensors")
    compress(dense, factory=Net, plan=chosen, initial=SEED, output=tmp_path / "small.safetensors")
    close(load_model(tmp_path / "small.safetensors", Net), dense)


def test_what_a_compressed_model_needs_is_asked_for_by_name(dense, start, tmp_path):
    small = tmp_path / "small.safetensors"
    compress(dense, output=small, factory=Net, initial=start, **QUICK)
    data = (rows(), torch.zeros(5, dtype=torch.int64))
    for call in (
        lambda: evaluate(small, factory=Net, data=data),
        lambda: restore(small, output=tmp_path / "r.safetensors"),
        lambda: export(small, to="dense", output=tmp_path / "e.safetensors"),
        lambda: load_model(small, Net),
    ):
        with pytest.raises(BadInput, match=r"needs start\.pt, .* for first\.weight and 1 more.*`initial`") as refused:
            call()
        assert refused.value.option == "initial"
    other = tmp_path / "other.pt"
    torch.save(Net().state_dict(), other)
    with pytest.raises(BadInput, match=r"first\.weight of other\.pt is not what .*; give start\.pt"):
        evaluate(small, factory=Net, data=data, initial=other)
    assert evaluate(small, factory=Net, data=data, initial=start).score
    export(small, to="dense", output=tmp_path / "e.safetensors", initial=start)
    close(load_model(tmp_path / "e.safetensors", Net), dense)
    with pytest.raises(BadInput, match="needs no initial weights"):
        evaluate(dense, factory=Net, data=data, initial=start)
    with pytest.raises(BadInput, match="has the draws itself"):
        evaluate(small, factory=Net, data=data, initial=SEED)


def test_a_diagnosis_says_what_is_left_of_the_start(dense):
    found = diagnose(dense, factory=Net, initial=SEED)
    assert len(found.initial.layers) == 2
    assert f"the initialization is seed {SEED}" in str(diagnosis_page(found))


def test_a_seed_without_what_builds_the_model_is_refused(dense):
    with pytest.raises(BadInput, match="needs what builds the untrained model") as refused:
        inspect(dense, initial=SEED)
    assert refused.value.option == "initial"


@pytest.mark.parametrize("written", ["-1", -1, 2**64, 0.5, "", True, [3], "nowhere.pt"])
def test_what_names_no_start_is_refused_before_anything_is_written(written, dense, tmp_path):
    with pytest.raises(BadInput) as refused:
        compress(dense, factory=Net, initial=written, output=tmp_path / "small.safetensors", **QUICK)
    assert refused.value.option == "initial"
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "small.safetensors").exists()


def test_a_checkpoint_of_other_shapes_is_refused(dense, tmp_path):
    torch.save(nn.ModuleDict({"first": nn.Linear(8, 8)}).state_dict(), tmp_path / "other.pt")
    with pytest.raises(BadInput, match=r"first\.weight of shape \(48, 32\) it has one of shape \(8, 8\)") as refused:
        inspect(dense, factory=Net, initial=tmp_path / "other.pt")
    assert refused.value.option == "initial"


def test_the_trained_state_is_no_start():
    model = trained()
    with pytest.raises(BadInput, match="has the trained weights"):
        compress(model, initial=model.state_dict(), **QUICK)


def test_a_pickled_checkpoint_runs_no_code(dense, tmp_path):
    class Harmful:
        def __reduce__(self) -> Any:
            return (shutil.rmtree, (str(tmp_path / "kept"),))

    (tmp_path / "kept").mkdir()
    torch.save({"first.weight": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(BadInput):
        inspect(dense, factory=Net, initial=tmp_path / "harmful.pt")
    assert (tmp_path / "kept").is_dir()


def test_a_seed_is_read_alike_as_a_number_and_as_text():
    for written in (7, "7", " 7"):
        asked = CompressOptions(initial=written)
        assert asked.initial == 7
        assert asked.portable() == {"initial": 7}
        assert asked.command("m") == "compress m --initial 7"
    assert InspectOptions(initial="auto").command("m") == "compress m --initial auto"
    named = CompressOptions(initial="/home/me/start.pt")
    assert named.command("m") == "compress m --initial start.pt"
    held = CompressOptions(initial=copy.deepcopy(Net().state_dict()))
    assert (held.portable(), held.command("m")) == ({}, "compress m --initial ...")
    drawn = InitialWeights.from_seed(Net, SEED)
    assert CompressOptions(initial=drawn).initial is drawn


def test_a_search_finds_the_seed_and_says_what_it_did(dense):
    heard = []
    found = inspect(
        dense, factory=Net, initial="auto", recipe=RECIPE, progress=lambda *step: heard.append(step)
    ).initial
    assert (found.source, found.seed, found.origin) == (f"seed {SEED}", SEED, "searched")
    assert len(found.layers) == 2
    assert found.search.tried == SEED + 1
    assert found.search.next_best < 8 < found.search.z
    assert "what accelerators draw" in found.search.searched
    assert found.search.false_hits < 1e-9
    assert heard[0][:2] == ("search the seed", SEED + 1)


@pytest.mark.slow
def test_a_search_that_finds_nothing_changes_no_byte_and_says_so(tmp_path):
    torch.save(nn.Linear(32, 32).state_dict(), tmp_path / "dense.pt")
    asked = QUICK | {"factory": lambda: nn.Linear(32, 32)}
    compress(tmp_path / "dense.pt", output=tmp_path / "without.safetensors", **asked)
    compression = compress(tmp_path / "dense.pt", output=tmp_path / "searched.safetensors", initial="auto", **asked)
    assert (tmp_path / "without.safetensors").read_bytes() == (tmp_path / "searched.safetensors").read_bytes()
    assert compression.initial.seed is None
    assert compression.initial.search.tried > 10_000
    assert "no seed was found" in str(compression)


def test_a_seed_that_the_recipe_states_is_tried_without_being_asked_for(dense, tmp_path):
    asked = QUICK | {"factory": Net, "recipe": RECIPE | {"seed": SEED}}
    compression = compress(dense, output=tmp_path / "small.safetensors", **asked)
    assert (compression.initial.seed, compression.initial.origin) == (SEED, "stated")
    assert {layer.form.partition("+")[0] for layer in compression.plan.layers} == {"initial"}
    close(load_model(tmp_path / "small.safetensors", Net), dense)


def test_a_seed_that_the_recipe_states_and_that_drew_something_else_changes_nothing(dense, tmp_path):
    asked = QUICK | {"factory": Net}
    compress(dense, output=tmp_path / "without.safetensors", **asked)
    wrong = asked | {"recipe": RECIPE | {"seed": SEED + 1}}
    compression = compress(dense, output=tmp_path / "wrong.safetensors", **wrong)
    assert compression.initial.layers == ()
    paths = tmp_path / "without.safetensors", tmp_path / "wrong.safetensors"
    one, other = (load_file(path) for path in paths)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    # Nothing says how the model is built.
    assert inspect(dense, recipe=RECIPE | {"seed": SEED}).initial is None


def test_a_record_beside_a_checkpoint_is_found(folder, tmp_path):
    keep_initial(untrained(gpt2), folder, seeds=[SEED])
    found = inspect(folder, recipe=RECIPE).initial
    assert (found.seed, found.origin, len(found.layers)) == (SEED, "stated", found.eligible)
    named = inspect(folder, recipe=RECIPE, initial=folder / "initial" / "draws.json").initial
    assert (named.origin, named.layers) == ("given", found.layers)
    (folder / "initial" / "draws.json").write_text("[]")
    assert inspect(folder, recipe=RECIPE).initial is None
    with pytest.raises(BadInput) as refused:
        inspect(folder, recipe=RECIPE, initial=folder / "initial" / "draws.json")
    assert refused.value.option == "initial"


def test_weights_that_a_run_kept_are_not_used_unasked(folder, tmp_path):
    kept = keep_initial(untrained(gpt2), folder)
    assert inspect(folder, recipe=RECIPE).initial is None
    assert len(inspect(folder, recipe=RECIPE, initial=kept).initial.layers) == 4


def test_a_folder_names_the_checkpoint_that_it_needs(folder, tmp_path):
    untrained(gpt2).save_pretrained(tmp_path / "start")
    small = tmp_path / "small"
    compress(folder, output=small, initial=tmp_path / "start", **QUICK)
    with pytest.raises(BadInput, match=r"needs start, .* `compressor\.load_model\(FOLDER, initial='start'\)`"):
        transformers.GPT2LMHeadModel.from_pretrained(small)
    found = load_model(small, initial=tmp_path / "start")
    expected = transformers.GPT2LMHeadModel.from_pretrained(folder)
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=1e-3, atol=1e-4)


def test_what_is_written_with_a_checkpoint_is_measured(dense, start, tmp_path):
    data = (rows(), torch.zeros(5, dtype=torch.int64))
    asked = QUICK | {"data": data, "initial": start, "factory": Net}
    assert compress(dense, output=tmp_path / "small.safetensors", **asked).evaluation.score


@pytest.mark.parametrize("asked", [SEED, "auto"])
def test_draws_that_cannot_be_recorded_are_refused_with_a_remedy(asked, dense, tmp_path):
    def build() -> nn.Module:
        module = Net()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(parameter.shape))))
        return module

    with pytest.raises(BadInput, match=r"cannot be recorded.*save the untrained model") as refused:
        inspect(dense, factory=build, initial=asked)
    assert refused.value.option == "initial"
    # Unasked it is no reason to stop.
    assert inspect(dense, factory=build, recipe=RECIPE | {"seed": SEED}).initial is None


def test_a_command_says_in_one_line_what_is_wrong_with_a_start_and_writes_nothing(dense, start, capsys):
    tmp_path = dense.parent
    other, small = tmp_path / "other.pt", tmp_path / "small.safetensors"
    torch.save({"first.weight": torch.zeros(2, 2)}, other)
    asked = [dense, "--keep", "0.5", "--calibration", "none", "-o", small]
    wrong = {
        ("--initial", "-1"): "--initial -1 is out of range; give a whole number from 0 to 18446744073709551615",
        ("--initial", "7"): "a seed needs what builds the untrained model; pass --model",
        ("--initial", "auto"): "a seed needs what builds the untrained model; pass --model",
        ("--initial", tmp_path / "nowhere.pt"): "no such file or folder",
        ("--initial", "0.5"): "give a seed (a whole number), auto, a file, a folder",
        ("--initial", other): "for first.weight of shape (48, 32) it has one of shape (2, 2)",
        ("--initial", dense): "has the trained weights of",
    }
    for given, said in wrong.items():
        assert run([*map(str, (*asked, *given)), "-q"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert said in err
        assert not small.exists()
    assert run([*map(str, (*asked, "--initial", start)), "-q"]) == 0
    capsys.readouterr()
    assert run(["restore", str(small), "-q"]) == 2
    assert "needs start.pt, to which what training wrote is added, for first.weight" in capsys.readouterr().err
    assert run(["restore", str(small), "-q", "--initial", str(start)]) == 0


@pytest.mark.parametrize("recipe", [RECIPE, {}])
def test_calibration_uses_the_predicted_share_or_fits_it_in_the_metric_of_the_loss(recipe):
    examples = torch.randn(96, 32, generator=torch.Generator().manual_seed(2))
    asked = {"keep": 0.5, "prefer": "size", "bits": 16, "calibration": examples, "effort": "fast", "recipe": recipe}
    compression = compress(trained(), initial=SEED, factory=Net, **asked)
    plain = inspect(trained(), initial=SEED, factory=Net, recipe=recipe).initial.starts
    shares = {layer.name: layer.share for layer in compression.plan.layers if layer.share is not None}
    assert shares
    for name, share in shares.items():
        start = compression.initial.starts[name]
        assert share == start.share
        assert start.share == (1.0 if recipe else start.fitted)
        assert start.fitted != plain[name].fitted
