"""What transformers and the libraries around it do with models, done with a compressed one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from compressor import compress, restore
from tests.lowrank.architectures import ARCHITECTURES
from tests.warm import Warm

pytestmark = pytest.mark.slow

TOKENS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Folders:
    """A tiny Llama, dense and compressed."""

    dense: Path
    small: Path

    def load(self, **keywords: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.small, **keywords)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("llama")
    ARCHITECTURES["llama"].dense().save_pretrained(root / "dense")
    compress(root / "dense", output=root / "small", keep=0.6, calibration="none", prefer="size")
    return Folders(root / "dense", root / "small")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def factors(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("down", "up")
    }


def test_generation_with_a_cache_is_that_of_the_dense_products(llama: Folders, tmp_path: Path) -> None:
    restore(llama.small, output=tmp_path / "restored")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    request: dict[str, Any] = {"input_ids": TOKENS, "max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    generated = llama.load().generate(**request)
    assert generated.shape == (2, 19)
    assert torch.equal(generated, dense.generate(**request))
    assert torch.equal(generated, llama.load().generate(**request, use_cache=False))


def test_device_map_auto(llama: Folders) -> None:
    placed = llama.load(device_map="auto")
    torch.testing.assert_close(logits(placed).cpu(), logits(llama.load()))


def test_device_map_auto_leaves_on_disk_what_memory_does_not_hold(llama: Folders, tmp_path: Path) -> None:
    little = (llama.small / "model.safetensors").stat().st_size * 3 // 4
    limits: dict[Any, Any] = {"cpu": little} | dict.fromkeys(range(torch.cuda.device_count()), 0)
    placed = llama.load(device_map="auto", max_memory=limits, offload_folder=str(tmp_path / "offload"))
    assert {"cpu", "disk"} == set(placed.hf_device_map.values())
    assert torch.equal(logits(placed), logits(llama.load()))


def test_layers_offloaded_to_disk(llama: Folders, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = llama.load(device_map={**places, "model.layers.0": "disk"}, offload_folder=str(tmp_path / "offload"))
    away = [name for name, parameter in offloaded.named_parameters() if parameter.is_meta]
    assert any(name.endswith("down.weight") for name in away)
    assert all(name.startswith("model.layers.0.") for name in away)
    assert torch.equal(logits(offloaded), logits(llama.load()))


def test_torch_compile_in_one_graph(llama: Folders) -> None:
    model = llama.load()
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


def test_trainer_tunes_the_factors(llama: Folders, tmp_path: Path) -> None:
    model = llama.load()
    before = {name: factor.weight.detach().clone() for name, factor in factors(model).items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    assert before
    for name, factor in factors(model).items():
        assert not torch.equal(factor.weight, before[name]), name
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(tuned), logits(model))
    assert not torch.equal(logits(tuned), logits(llama.load()))


@pytest.mark.parametrize("targets", [["down", "up"], "all-linear"])
def test_an_adapter_on_the_factors(llama: Folders, targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = llama.load()
    names = factors(base).keys()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    adapted_names = {name.removeprefix("base_model.model.") for name, _ in adapted.named_modules()}
    assert {f"{name}.lora_A" for name in names} <= adapted_names
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=10.0).step()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llama.load(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.equal(logits(again), logits(llama.load()))


def test_int8_factors(llama: Folders) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, expected = llama.load(), logits(llama.load())
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    quantized = factors(model)
    assert quantized
    for factor in quantized.values():
        assert type(factor.weight) not in (nn.Parameter, Tensor)
        assert "int8" in str(factor.weight).lower()
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def test_dequantized_in_another_dtype(llama: Folders) -> None:
    wide, narrow = llama.load().dequantize(), llama.load().dequantize(dtype=torch.bfloat16)
    for name, parameter in wide.named_parameters():
        assert torch.equal(narrow.get_parameter(name), parameter.to(torch.bfloat16))
    torch.testing.assert_close(logits(narrow).float(), logits(wide), rtol=0.1, atol=0.01)


def test_dequantized_after_it_was_saved(llama: Folders, tmp_path: Path) -> None:
    model = llama.load()
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(model.dequantize()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "whisper"])
def test_dequantized_embeddings_are_tied_again(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    assert architecture.tied is not None
    architecture.dense().save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense",
        output=tmp_path / "small",
        keep=0.6,
        calibration="none",
        embeddings=True,
        include=["re:embed|wte"],
        prefer="size",
    )
    restore(tmp_path / "small", output=tmp_path / "restored")
    dequantized, restored = architecture.load(tmp_path / "small").dequantize(), architecture.load(tmp_path / "restored")
    for model in (dequantized, restored):
        head, embedding = (model.get_parameter(parameter) for parameter in architecture.tied)
        assert head is embedding
    ours, theirs = dequantized.state_dict(), restored.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    dequantized.save_pretrained(tmp_path / "saved")
    saved = architecture.load(tmp_path / "saved").state_dict()
    assert saved.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in saved.items())


LOAD = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except Exception as error:
        print("size" in str(error) and "stopped by a size" or repr(error))
"""


def test_without_this_package_loading_stops(tmp_path: Path, warm: Warm) -> None:
    folders = []
    for name in ("llama", "gpt2", "mixtral"):
        ARCHITECTURES[name].dense().save_pretrained(tmp_path / name)
        compress(tmp_path / name, output=tmp_path / f"small-{name}", keep=0.6, calibration="none", prefer="size")
        folders.append(str(tmp_path / f"small-{name}"))

    def outcomes(first: str) -> list[str]:
        ran = warm.run(first + LOAD, *folders)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.splitlines()

    assert outcomes("import sys; sys.modules['compressor'] = None") == ["stopped by a size"] * 3
    assert outcomes("import compressor") == ["loaded"] * 3
