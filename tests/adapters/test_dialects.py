"""What is read and what is refused, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compressor
from compressor.errors import BadInput
from tests.adapters.adapters_of import kohya_file, peft_folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "no number"),
        ({"alpha_pattern": {"(a+)+": 1}}, "not simple"),
        ({"alpha_pattern": {".*" * 12 + "Q": 1}}, "not simple"),
        ({"alpha_pattern": {"a?" * 30: 1}}, "not simple"),
        ({"alpha_pattern": {"(a|a)" * 30: 1}}, "not simple"),
        ({"alpha_pattern": {"[": 1}}, "no expression"),
        ({"alpha_pattern": [1]}, "no mapping"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    folder = peft_folder(tmp_path / "lora", config)
    with pytest.raises(BadInput, match=words):
        compressor.compress(folder, rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_names_of_peft_without_their_configuration_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "lora")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        compressor.compress(folder, rank=2)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora_down.weight": (4, 8)}, "no up"),
        ({"lora_down.weight": (4, 8), "lora_up.weight": (8, 5)}, "do not fit"),
        ({"lora_down.weight": (4, 8, 3, 3), "lora_up.weight": (8, 4)}, "do not fit"),
        ({"lora_down.weight": (4, 8), "lora_up.weight": (8, 4), "alpha": (2,)}, "no single number"),
        ({"lora_down.weight": (0, 8), "lora_up.weight": (8, 0)}, "do not fit"),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2)}, "hada_w2_b"),
        (
            {"hada_w1_a": (30000, 90), "hada_w1_b": (90, 9000), "hada_w2_a": (30000, 90), "hada_w2_b": (90, 9000)},
            "memory",
        ),
        ({"lokr_w1": (4096, 4096), "lokr_w2": (65536, 1)}, "larger than any"),
        ({"lokr_w1": (0, 8), "lokr_w2": (8, 1)}, "do not fit"),
        (
            {"lora_down.weight": (1, 2000, 1, 1), "lora_up.weight": (4, 1, 1, 1), "lora_mid.weight": (1, 1, 999, 999)},
            "matrix of",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, parts: dict[str, tuple[int, ...]], words: str) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({f"lora_unet_x.{name}": torch.ones(shape) for name, shape in parts.items()}, file)
    with pytest.raises(BadInput, match=words):
        compressor.compress(file, rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64])
def test_factors_of_other_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "lora.safetensors"
    parts = {"lora_unet_x.lora_down.weight": (4, 8), "lora_unet_x.lora_up.weight": (8, 4)}
    save_file({name: torch.ones(shape).to(dtype) for name, shape in parts.items()}, file)
    with pytest.raises(BadInput, match=r"lora_down\.weight is stored in .*; convert"):
        compressor.compress(file, rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_patterns_are_not_matched_to_names_of_thousands_of_characters(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "lora", {"alpha_pattern": {".*x.*y": 1}})
    long = "base_model.model." + "x" * 3000
    save_file(
        {f"{long}.lora_A.weight": torch.ones(4, 8), f"{long}.lora_B.weight": torch.ones(8, 4)},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(BadInput, match="3,000 characters"):
        compressor.compress(folder, rank=2)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    down = torch.ones(4, 8)
    down[1, 2] = torch.nan
    save_file({"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": torch.ones(8, 4)}, file)
    with pytest.raises(BadInput, match=r"lora_unet_x\.lora_down\.weight: holds 1 NaN"):
        compressor.compress(file, rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_what_is_of_models_is_refused(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "lora.safetensors")
    for name, value in {
        "form": "plain",
        "bits": 4,
        "max_latency": 0.5,
        "embeddings": True,
        "engine": "processes",
    }.items():
        with pytest.raises(BadInput, match=rf"`{name}` is not for adapters"):
            compressor.compress(file, **{name: value})


def test_what_is_of_adapters_is_refused_of_models() -> None:
    for options in ({"rank": 4}, {"energy": 0.9}):
        with pytest.raises(BadInput, match="is about adapters"):
            compressor.compress(torch.nn.Linear(4, 4), **options)
