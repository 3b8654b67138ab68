"""Networks whose blocks are read when they run: what they compute, and how much of them is in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compressor import BadInput
from compressor.calibration.calibration import frozen
from compressor.io import open_checkpoint
from compressor.model import evaluation_mode, load_model, load_transformers, open_model
from compressor.model.inference import forward_call
from compressor.model.streaming import (
    Blocks,
    NotStreamed,
    blocks_of,
    parameter_of,
    streamed_module,
    streamed_transformers,
    whole,
)
from compressor.network import module_architecture, with_separate_experts
from tests.calibration.tiny_models import Block, inputs_for, odd, transformer
from tests.lowrank.architectures import ARCHITECTURES

CPU = torch.device("cpu")


def streamed(folder: Path) -> nn.Module:
    model = streamed_transformers(open_model(folder).checkpoint, folder)
    blocks(model).kept_bytes = 0
    return model


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with evaluation_mode(CPU, model):
        found: Any = forward_call(model, inputs)()
    values = found.values() if isinstance(found, Mapping) else [found]
    return [each for each in values if isinstance(each, Tensor)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return bool(ours) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def matrices_in_memory(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters() if each.dim() > 1 and not each.is_meta)


def blocks(model: nn.Module) -> Blocks:
    found = blocks_of(model)
    assert found is not None
    return found


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    if name in ARCHITECTURES and name != "whisper":  # which has one block alone there
        return ARCHITECTURES[name].dense(), ARCHITECTURES[name].inputs()
    return odd(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARCHITECTURES, "bart", "clip", "swin"])
def test_it_computes_what_the_loaded_model_does(name: str, tmp_path: Path) -> None:
    dense, inputs = built(name)
    dense.save_pretrained(tmp_path)
    model, loaded = streamed(tmp_path), with_separate_experts(load_transformers(tmp_path))
    for parameter in loaded.parameters():  # matrices of experts are views of transposed ones
        parameter.data = parameter.data.contiguous()
    assert matrices_in_memory(model) < matrices_in_memory(loaded)
    for _ in range(2):
        assert same(outputs(model, inputs), outputs(loaded, inputs))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert whole(model).state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert same(outputs(model, inputs), outputs(loaded, inputs))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    transformer("llama").save_pretrained(tmp_path)
    return tmp_path


def test_two_blocks_at_most_are_in_memory(llama: Path) -> None:
    model, seen = streamed(llama), []
    outside, each = matrices_in_memory(model), []
    for block in blocks(model).every:
        block.module.register_forward_hook(lambda *_: seen.append(matrices_in_memory(model) - outside))
        each.append(sum(p.numel() for p in block.module.parameters() if p.dim() > 1))
    outputs(model, inputs_for("llama", 2))
    assert seen == [each[0], each[0] + each[1], each[1] + each[2]]
    assert 2 * outside < 3 * each[0]


def test_small_models_are_read_once(llama: Path) -> None:
    checkpoint, read = open_checkpoint(llama), []
    object.__setattr__(checkpoint, "read", lambda name, own=checkpoint.read: read.append(name) or own(name))
    model = streamed_transformers(checkpoint, llama)
    for _ in range(3):
        outputs(model, inputs_for("llama", 2))
    assert sorted(read) == sorted(checkpoint.tensors)


def test_a_block_that_does_not_run_is_not_read(llama: Path) -> None:
    model = streamed(llama)
    first, second, third = blocks(model).every

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    second.module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        outputs(model, inputs_for("llama", 2))
    assert first.held
    assert not second.held
    assert not third.held


def test_of_a_block_with_other_layers_only_what_is_left_is_read(llama: Path) -> None:
    model, loaded = streamed(llama), load_transformers(llama)
    for each in (model, loaded):
        torch.manual_seed(3)
        each.get_submodule("model.layers.1.mlp").down_proj = nn.Linear(24, 16, bias=False)
    inputs = inputs_for("llama", 2)
    assert same(outputs(model, inputs), outputs(loaded, inputs))
    read = {held.owner for block in blocks(model).every for held in block.held}
    assert model.get_submodule("model.layers.1.mlp.up_proj") in read
    assert len(blocks(model).every[1].held) == 6


def test_a_layer_that_comes_back_is_read(llama: Path) -> None:
    model, loaded = streamed(llama), load_transformers(llama)
    mlp, inputs = model.get_submodule("model.layers.1.mlp"), inputs_for("llama", 2)
    dense = mlp.down_proj
    mlp.down_proj = nn.Linear(24, 16, bias=False)
    outputs(model, inputs)
    mlp.down_proj = dense
    assert same(outputs(model, inputs), outputs(loaded, inputs))


def test_gradients_reach_inputs_through_blocks_that_are_let_go(llama: Path) -> None:
    found = []
    for model in (streamed(llama), load_transformers(llama)):
        hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        with evaluation_mode(CPU, model), torch.enable_grad():
            model(inputs_embeds=hidden).logits.square().sum().backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_no_gradients_of_what_is_read_are_computed_while_it_is_frozen(llama: Path) -> None:
    model = streamed(llama)
    inputs = inputs_for("llama", 2)["input_ids"]
    outputs(model, {"input_ids": inputs})
    for _ in range(2):
        with evaluation_mode(CPU, model), frozen(model), torch.enable_grad():
            assert not model(input_ids=inputs).logits.requires_grad
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(block.held[0].empty.requires_grad for block in blocks(model).in_memory)


def test_what_is_read_while_it_is_frozen_is_trained_again_after(llama: Path) -> None:
    model = streamed(llama)
    with evaluation_mode(CPU, model):
        with frozen(model):
            model(input_ids=inputs_for("llama", 2)["input_ids"])
        assert blocks(model).in_memory
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_runs_by_itself(llama: Path) -> None:
    model, inputs = streamed(llama), inputs_for("llama", 2)
    expected = outputs(model, inputs)
    copied = copy.deepcopy(model)
    assert {id(block.module) for block in blocks(copied).every} <= {id(module) for module in copied.modules()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(outputs(copied, inputs), expected)


def test_a_copy_holds_no_block_and_lacks_what_is_left_out_of_it(llama: Path) -> None:
    model, inputs = streamed(llama), inputs_for("llama", 2)
    outputs(model, inputs)
    place = "model.layers.1.self_attn.q_proj"
    copied = copy.deepcopy(model, {id(model.get_submodule(place).weight): None})
    assert not blocks(copied).in_memory
    copied.get_submodule(place.rpartition(".")[0]).q_proj = nn.Linear(16, 16, bias=False)
    assert not same(outputs(copied, inputs), outputs(model, inputs))


def test_a_parameter_is_read_where_it_is_not_in_memory(llama: Path) -> None:
    model, loaded = streamed(llama), load_transformers(llama)
    for name, parameter in loaded.named_parameters():
        module, _, own = name.rpartition(".")
        assert torch.equal(parameter_of(model, module, own), parameter)
    assert not any(block.held for block in blocks(model).every)


def test_it_generates_the_same_text(llama: Path) -> None:
    ids = inputs_for("llama", 2)["input_ids"]
    ours, theirs = (
        model.generate(ids, max_new_tokens=5, do_sample=False) for model in (streamed(llama), load_transformers(llama))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_has_the_dtypes_of_the_loaded_model(dtype: torch.dtype, tmp_path: Path, *, named: bool) -> None:
    for name in ("llama", "bert"):
        folder = tmp_path / name
        model = transformer(name).to(dtype)
        if not named:
            model.config.dtype = None
        model.save_pretrained(folder, max_shard_size=4000)
        if not named:
            config = (folder / "config.json").read_text().replace(f'"dtype": "{str(dtype)[6:]}",', "")
            (folder / "config.json").write_text(config)
        assert len(open_checkpoint(folder).files) > 2
        inputs = inputs_for(name, 2)
        assert same(outputs(streamed(folder), inputs), outputs(load_transformers(folder), inputs))


def test_a_dtype_in_the_configuration_counts(llama: Path) -> None:
    config = (llama / "config.json").read_text()
    (llama / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    found = outputs(streamed(llama), inputs := inputs_for("llama", 2))
    assert found[0].dtype == torch.bfloat16
    assert same(found, outputs(load_transformers(llama), inputs))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*(Block(8) for _ in range(4))))


class Recurrent(nn.Module):
    """Blocks of a recurrent layer and attention, whose weights their own code multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Sequential(*(Recurrent() for _ in range(3))), nn.Linear(8, 2))


@pytest.mark.parametrize(("build", "shape"), [(network, (5, 6)), (recurrent, (5, 4, 8))])
def test_the_module_of_a_factory_computes_what_it_does_when_it_is_filled(
    build: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trained = build()
    trained(torch.randn(*shape))  # the statistics of batch normalization
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    model = streamed_module(module_architecture(build()), checkpoint)
    blocks(model).kept_bytes = 0
    inputs = {"input": torch.randn(*shape)}
    assert matrices_in_memory(model) < matrices_in_memory(trained) / 4
    assert same(outputs(model, inputs), outputs(trained, inputs))
    assert same(outputs(whole(model), inputs), outputs(trained, inputs))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_channels_stay_last(tmp_path: Path) -> None:
    def build() -> nn.Module:
        blocks = (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(2))
        return nn.Sequential(*blocks).to(memory_format=torch.channels_last)

    save_file({name: each.contiguous() for name, each in build().state_dict().items()}, tmp_path / "a.safetensors")
    model = streamed_module(module_architecture(build()), open_checkpoint(tmp_path / "a.safetensors"))
    outputs(model, {"input": torch.randn(1, 4, 9, 9)})
    [held] = blocks(model).every[0].held
    assert held.values.is_contiguous(memory_format=torch.channels_last)


class WithOwnLoading(nn.Linear):
    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)


def test_what_is_not_read_one_to_one_is_loaded_whole(tmp_path: Path) -> None:
    trained, file = network(), tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file)
    reasons = {
        "code of its own": nn.Sequential(WithOwnLoading(6, 8), nn.Sequential(Block(8), Block(8))),
        "no chain": nn.Sequential(nn.Linear(6, 8), nn.Sequential(Block(8))),
    }
    for reason, module in reasons.items():
        before = {name: each.clone() for name, each in module.state_dict().items()}
        save_file(before, tmp_path / "other.safetensors")
        with pytest.raises(NotStreamed, match=reason):
            streamed_module(module_architecture(module), open_checkpoint(tmp_path / "other.safetensors"))
        assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    save_file({**trained.state_dict(), "more": torch.ones(1)}, file)
    model = open_model(file, factory=network)
    with pytest.raises(BadInput, match="unexpected more"):
        _ = model.streamed


def test_a_model_is_streamed_until_all_of_it_is_asked_for(tmp_path: Path) -> None:
    trained, file = network(), tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file)
    model = open_model(file, factory=network)
    by_block = model.streamed
    assert blocks_of(by_block) is not None
    assert model.module is by_block
    assert blocks_of(by_block) is None
    assert model.streamed is by_block
    loaded = open_model(file, factory=network)
    assert loaded.module is loaded.streamed


@pytest.mark.slow
def test_a_folder_is_streamed_beside_the_loaded_model(llama: Path) -> None:
    model = open_model(llama)
    by_block = model.streamed
    assert by_block is model.streamed
    assert blocks_of(by_block) is not None
    assert isinstance(model.module, LlamaForCausalLM)
    assert model.module is not by_block
    inputs = inputs_for("llama", 2)
    assert same(outputs(by_block, inputs), outputs(load_model(llama), inputs))


def test_what_was_loaded_whole_is_let_go_for_its_blocks(llama: Path) -> None:
    model = open_model(llama)
    first = model.module
    assert model.streamed is first
    model.let_go()
    assert blocks_of(model.streamed) is not None
    assert model.module is not first
    assert blocks_of(model.streamed) is not None
    given = open_model(first)
    given.let_go()
    assert given.module is first


def test_modules_in_memory_stay_as_they_are() -> None:
    module = transformer("llama")
    assert open_model(module).streamed is module
    assert blocks_of(module) is None


def test_every_chain_of_the_tiny_models_is_streamed(tmp_path: Path) -> None:
    for name in ("bert", "gpt2", "vit"):
        transformer(name).save_pretrained(tmp_path / name)
        model = streamed(tmp_path / name)
        assert len(blocks(model).every) == 3
        inputs = inputs_for(name, 2)
        assert same(outputs(model, inputs), outputs(load_transformers(tmp_path / name), inputs))
