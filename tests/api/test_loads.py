"""Every verb builds and loads a network once, however many of its steps run it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from compressor import TimingSettings, compress, diagnose, evaluate, merge
from compressor.planning import Budget, LayerPlan, Plan
from tests.calibration.tiny_models import TWO_PASSES
from tests.model.test_opened import Counted, network


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(60, 12, generator=generator), torch.randint(3, (60,), generator=generator)
    np.savez(tmp_path / "data.npz", inputs=inputs.numpy(), labels=labels.numpy())
    return tmp_path / "data.npz"


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(10, 4, 12, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_file(network().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each folder was loaded, by its name."""
    found: Counter[str] = Counter()
    load = LlamaForCausalLM.from_pretrained

    def counted(folder: Path, *arguments: Any, **named: Any) -> Any:
        found[Path(folder).name if Path(folder).name == "dense" else "compressed"] += 1
        return load(folder, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", counted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"max_drop": 0.9}])
def test_compress_builds_the_dense_network_once_and_the_compressed_one(
    file: Path, data: Path, batches: list[torch.Tensor], *, budget: dict[str, Any]
) -> None:
    factory = Counted(network)
    report = compress(
        file,
        factory=factory,
        calibration=batches,
        calibration_settings=TWO_PASSES,
        data=data,
        progress=lambda *_: None,
        **budget,
    )
    assert report.evaluation is not None
    assert factory.calls == 2


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"max_drop": 100.0}])
def test_compress_loads_the_dense_folder_once_and_the_compressed_one(
    llama: LlamaForCausalLM, tmp_path: Path, loads: Counter[str], *, budget: dict[str, Any]
) -> None:
    llama.save_pretrained(tmp_path / "dense")
    tokens = torch.randint(12, (12, 16), generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "tokens.npz", input_ids=tokens.numpy())
    report = compress(
        tmp_path / "dense",
        output=tmp_path / "small",
        calibration=list(tokens.split(3)),
        calibration_settings=TWO_PASSES,
        data=tmp_path / "tokens.npz",
        timing_settings=TimingSettings(most_repeats=7),
        progress=lambda *_: None,
        prefer="size",
        bits=16,
        **budget,
    )
    assert report.evaluation is not None
    assert loads == {"dense": 1, "compressed": 1}


def test_the_factors_are_in_memory_once_when_the_compressed_network_is_measured(
    file: Path, data: Path, batches: list[torch.Tensor]
) -> None:
    found: list[int] = []

    def progress(step: str, done: int, total: int) -> None:
        if (step, done) == ("evaluate", 0):
            tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
            found.append(len({each.data_ptr() for each in tensors if each.shape == (7, 12)}))

    plan = Plan("", None, Budget("plan"), (LayerPlan("0", (20, 12), "linear", 7, "plain", 224, 0.0, "asked for"),))
    compress(
        file,
        plan=plan,
        factory=network,
        calibration=batches,
        calibration_settings=TWO_PASSES,
        data=data,
        progress=progress,
    )
    assert found == [1]


@pytest.mark.parametrize("verb", [evaluate, diagnose])
def test_one_model_is_built_once(file: Path, data: Path, verb: Callable[..., Any]) -> None:
    factory = Counted(network)
    verb(file, data=data, factory=factory)
    assert factory.calls == 1


def test_evaluate_builds_each_of_two_models_once(file: Path, data: Path) -> None:
    factory = Counted(network)
    small = compress(file, keep=0.5).output
    assert small is not None
    evaluate(small, baseline=file, data=data, factory=factory)
    assert factory.calls == 2


def test_merge_builds_each_network_once_the_merged_one_and_the_one_whose_layers_are_traced(
    file: Path, data: Path, tmp_path: Path
) -> None:
    factory = Counted(network)
    merge([file, file], output=tmp_path / "both.safetensors", mode="concat", data=[data, data], factory=factory)
    assert factory.calls == 4


def test_a_fine_tune_is_built_once_and_its_base(file: Path, data: Path, tmp_path: Path) -> None:
    base = network()
    with torch.no_grad():
        for layer in base:
            if isinstance(layer, nn.Linear):
                layer.weight.add_(torch.outer(torch.ones(layer.out_features), torch.randn(layer.in_features)))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    factory = Counted(network)
    report = compress(file, base=tmp_path / "base.safetensors", keep=0.5, data=data, factory=factory)
    assert report.evaluation is not None
    assert factory.calls == 2
