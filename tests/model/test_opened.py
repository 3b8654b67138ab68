"""The one front door: what is refused there, and that a network is built and loaded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from compressor import BadInput, TrainingRecipe, compress
from compressor.measure import initial_standard_deviation
from compressor.model import LayerSelection, Model, ModelLike, load_model, open_model, open_runnable
from compressor.model.opened import CompressedModel
from compressor.network import SeparateExperts
from tests.lowrank.architectures import ARCHITECTURES


class Counted:
    """A factory that counts how often it was called."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.build, self.calls = build, 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        return self.build()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))


@pytest.fixture
def trained() -> nn.Sequential:
    torch.manual_seed(1)
    return network()


@pytest.fixture
def file(trained: nn.Module, tmp_path: Path) -> Path:
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("open_it", [open_model, open_runnable])
def test_a_factory_builds_one_network_which_gets_the_weights(
    file: Path, trained: nn.Module, open_it: Callable[..., Model]
) -> None:
    factory = Counted(network)
    model = open_it(file, factory=factory)
    copied = replace(model, layers=())
    assert model.module is copied.module is model.with_separate_experts
    assert factory.calls == 1
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.module.state_dict().items())


def test_the_initialization_is_that_of_the_new_network_also_after_loading(file: Path) -> None:
    torch.manual_seed(0)
    built = network()
    model = open_model(file, factory=lambda: built)
    expected = [float(weight.detach().double().square().mean().sqrt()) for weight in built.parameters()][::2]
    assert model.module is built
    assert [initial_standard_deviation(layer, model.architecture) for layer in model.layers] == expected


def test_a_folder_is_loaded_when_it_is_first_run(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.save_pretrained(tmp_path)
    loaded: list[Any] = []
    load = LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    model = open_model(tmp_path)
    assert loaded == []
    assert model.architecture is not None
    assert all(tensor.is_meta for tensor in model.architecture.module.parameters())
    assert model.module is model.module
    assert len(loaded) == 1


def test_a_module_is_its_own_model(trained: nn.Module) -> None:
    for model in (open_model(trained), open_runnable(trained)):
        assert model.module is trained
        assert model.in_memory
        assert model.name == "Sequential"


def test_experts_are_apart_for_calibration_alone_and_hold_no_second_copy(tmp_path: Path) -> None:
    dense = ARCHITECTURES["mixtral"].dense()
    dense.save_pretrained(tmp_path)
    for model in (open_model(dense), open_model(tmp_path)):
        apart = [part for part in model.with_separate_experts.modules() if isinstance(part, SeparateExperts)]
        assert apart
        assert not any(isinstance(part, SeparateExperts) for part in model.module.modules())
        memory = {tensor.untyped_storage().data_ptr() for tensor in model.module.parameters()}
        assert {tensor.untyped_storage().data_ptr() for tensor in model.with_separate_experts.parameters()} == memory
        assert {layer.module for layer in model.layers} <= dict(model.with_separate_experts.named_modules()).keys()


def test_what_is_compressed_opens_where_it_may(file: Path, trained: nn.Module) -> None:
    small = compress(file, keep=0.5).output
    assert small is not None
    with pytest.raises(BadInput, match="is compressed already"):
        open_model(small)
    model = open_model(small, factory=network, compressed="as stored")
    assert model.pairs.keys() == open_runnable(small, network).pairs.keys() != set()
    assert open_runnable(file).pairs == {}
    x = torch.randn(5, 12)
    torch.testing.assert_close(model.module(x), load_model(small, network)(x), rtol=0, atol=0)


def test_pairs_are_checked_as_the_layers_that_they_stand_for(file: Path) -> None:
    small = compress(file, keep=0.5).output
    assert small is not None
    wider = nn.Sequential(nn.Linear(12, 21), nn.ReLU(), nn.Linear(21, 20), nn.ReLU(), nn.Linear(20, 3))
    with pytest.raises(BadInput, match=r"0\.weight is 20 x 12 in the file and 21 x 12 in the model"):
        open_model(small, factory=lambda: wider, compressed="as stored")


def adapter(folder: Path) -> ModelLike:
    save_file({"layer.lora_A.weight": torch.ones(2, 8)}, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def fp8(folder: Path) -> ModelLike:
    save_file({"0.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, folder / "fp8.safetensors")
    return folder / "fp8.safetensors"


def quantized(folder: Path) -> ModelLike:
    save_file({"0.weight": torch.ones(8, 8)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    return folder


@pytest.mark.parametrize("compressed", ["refused", "as stored", "as dense"])
@pytest.mark.parametrize(
    ("make", "message"), [(adapter, "not a model"), (fp8, "is FP8"), (quantized, r"is quantized already \(gptq\)")]
)
def test_what_is_no_model_of_plain_numbers_is_refused(
    tmp_path: Path, make: Callable[[Path], ModelLike], message: str, *, compressed: CompressedModel
) -> None:
    with pytest.raises(BadInput, match=message):
        open_model(make(tmp_path), compressed=compressed)


def test_weights_without_an_architecture_are_opened_but_not_run(file: Path) -> None:
    model = open_model(file)
    assert [layer.name for layer in model.layers] == ["0", "2", "4"]
    for run in (model.require_runnable, lambda: model.module):
        with pytest.raises(BadInput, match="running it needs its architecture"):
            run()


def test_what_is_stated_of_the_training_is_trusted_in_order(file: Path, trained: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.02\nbatch_size: 2\n")
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.03\nbatch_size: 3\nepochs: 4\n")
    stated = (TrainingRecipe(learning_rate=0.01), tmp_path / "mine.yaml")
    for model, epochs in ((file, 4), (trained, None)):
        recipe = open_model(model, recipe=stated).recipe
        assert (recipe.learning_rate, recipe.batch_size, recipe.epochs) == (0.01, 2, epochs)


def test_layers_are_selected(file: Path) -> None:
    select = LayerSelection(include=("[02]",), exclude=("0",))
    assert [layer.name for layer in open_model(file, select=select).layers if layer.eligible] == ["2"]
