"""Models from a user's own code and from transformers folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import BadInput
from compressor.model import build_model, load_factory, load_state, load_transformers

SOURCE = """
from dataclasses import dataclass

from torch import nn

@dataclass
class Widths:
    hidden: "int" = 3

def build():
    return nn.Linear(2, Widths().hidden)

def wrong():
    return 3

def fails():
    raise ValueError("no such\\nwidth")

def needs_an_argument(width):
    return nn.Linear(width, width)

number = 3
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(SOURCE)
    return path


def test_a_factory_in_a_file(source):
    path_before = list(sys.path)
    assert load_factory(f"{source}:build")().weight.shape == (3, 2)
    assert sys.path == path_before


def test_a_file_may_import_its_neighbors(source):
    (source.parent / "neighbor_of_my_model.py").write_text("from my_model import build")
    assert isinstance(load_factory(f"{source.parent}/neighbor_of_my_model.py:build")(), nn.Linear)


def test_a_factory_in_a_module_may_be_a_class_or_lie_in_the_current_folder(source, monkeypatch):
    assert isinstance(load_factory("torch.nn:ReLU")(), nn.ReLU)
    monkeypatch.chdir(source.parent)
    source.rename(source.with_name("my_model_in_the_current_folder.py"))
    assert isinstance(load_factory("my_model_in_the_current_folder:build")(), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("build", "names no function"),
        ("FILE", "names no function"),
        ("FILE:", "names no function"),
        ("missing.py:build", "there is no such file"),
        ("no_such_module_at_all:build", "No module named"),
        ("FILE:absent", "absent is not defined there"),
        ("FILE:number", "number is not callable there"),
    ],
)
def test_a_factory_that_cannot_be_found_is_bad_input(source, spec, message):
    with pytest.raises(BadInput, match=message) as raised:
        load_factory(spec.replace("FILE", str(source)))
    assert raised.value.option == "factory"


def test_a_callable_that_builds_no_module_is_bad_input():
    def build():
        return {}

    def broken():
        raise ZeroDivisionError

    with pytest.raises(BadInput, match="build: it returned dict, not a torch"):
        build_model(build)
    with pytest.raises(BadInput, match=r"broken: building the model raised ZeroDivisionError: .*mend the function"):
        build_model(broken)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "returned int, not a torch.nn.Module"),
        ("fails", "ValueError: no such width"),
        ("needs_an_argument", "called without arguments"),
    ],
)
def test_a_factory_that_gives_no_module_is_bad_input(source, name, message):
    factory = load_factory(f"{source}:{name}")
    with pytest.raises(BadInput, match=message) as raised:
        factory()
    assert "\n" not in str(raised.value)
    assert raised.value.option == "factory"


def test_a_file_that_cannot_be_imported_is_bad_input(source):
    source.write_text("def build(:")
    with pytest.raises(BadInput, match="SyntaxError"):
        load_factory(f"{source}:build")


def test_a_transformers_folder_loads_as_it_was_saved(llama, tmp_path, capfd):
    llama.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load_transformers(tmp_path)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, llama(ids).logits, rtol=0, atol=0)
    assert type(loaded) is type(llama)
    assert capfd.readouterr() == ("", ""), "nothing is printed"


def edited_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": ["NobodysForCausalLM"]}, "has no model NobodysForCausalLM"),
        ({"architectures": ["pipeline"]}, "has no model pipeline"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "missing score.weight"),
        ({"num_hidden_layers": 3}, "missing model.layers.2.* and 6 more"),
        ({"hidden_size": 32}, "cannot load it"),
    ],
)
def test_a_transformers_folder_that_does_not_fit_is_bad_input(llama, tmp_path, changes, *, message):
    llama.save_pretrained(tmp_path)
    edited_config(tmp_path, **changes)
    with pytest.raises(BadInput, match=message) as raised:
        load_transformers(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_usable_config_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"there is no config\.json"):
        load_transformers(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=message):
            load_transformers(tmp_path)


def test_a_folder_without_weights_is_bad_input(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    edited_config(tmp_path, architectures=["LlamaForCausalLM"])
    with pytest.raises(BadInput, match="transformers cannot load it"):
        load_transformers(tmp_path)


def load(module: nn.Module, state: dict[str, torch.Tensor], **options: int) -> None:
    load_state(module, {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__, **options)


def test_a_state_is_read_in_parts_of_whole_modules():
    source, target = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(2))
    state, loaded = source.state_dict(), []
    for module in target.modules():
        module.register_load_state_dict_post_hook(lambda module, _: loaded.append(module))
    load(target, state, at_once=8 * 9 * 4)
    assert loaded.count(target) == 3, "the last part has what is left: here nothing but the last layer"
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())


def test_a_state_round_trips_and_keeps_the_modules_dtype():
    source, target = nn.Linear(3, 2).to(torch.bfloat16), nn.Linear(3, 2)
    load(target, source.state_dict())
    assert target.weight.dtype == torch.float32
    torch.testing.assert_close(target.weight, source.weight.float(), rtol=0, atol=0)


def test_a_tied_tensor_may_be_stored_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    for name in ("embedding.weight", "head.weight"):
        weight = torch.randn(4, 3)
        load(model, {name: weight})
        assert torch.equal(model.embedding.weight, weight)
        assert torch.equal(model.head.weight, weight)


def test_a_state_that_does_not_fit_is_bad_input_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.ones(5),
        "1.weight": torch.ones(2, 2),
        "2.weight": torch.ones(1),
    }
    message = r"missing 1\.bias; unexpected 2\.weight; misshapen 0\.bias \(5,\) for \(2,\)"
    with pytest.raises(BadInput, match=message):
        load(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
