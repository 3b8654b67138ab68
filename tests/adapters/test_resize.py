"""A resized adapter adds the best approximation, of its rank, of what the adapter added."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compressor
from compressor.adapters import read_adapter, resized_artifact
from compressor.io import open_checkpoint
from tests.adapters.adapters_of import (
    MODULES,
    diffusers_file,
    kohya_file,
    kohya_updates,
    peft_folder,
    tensors_in,
    truncated,
)


@given(rank=st.integers(1, 8), alpha=st.sampled_from([None, 1.0, 3.0, 8.0, 0.7]), seed=st.integers(0, 2**31))
def test_each_update_is_the_truncated_svd(
    rank: int, alpha: float | None, seed: int, *, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    file = kohya_file(tmp_path_factory.mktemp("lora") / "lora.safetensors", alpha=alpha, dtype=torch.float32)
    small = compressor.compress(file, rank=rank)
    assert small.output is not None
    before, after = kohya_updates(file), kohya_updates(Path(small.output))
    assert before.keys() == after.keys()
    for name, update in before.items():
        # The factors are written in float32.
        torch.testing.assert_close(after[name], truncated(update, rank), rtol=0, atol=1e-6 * float(update.norm()))


def test_the_change_that_is_reported_is_the_change_that_is_made(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors", dtype=torch.float32)
    small = compressor.compress(file, output=tmp_path / "small.safetensors", rank=3)
    before, after = kohya_updates(file), kohya_updates(tmp_path / "small.safetensors")
    for layer, name in zip(small.plan.layers, before, strict=True):
        error = float((before[name] - after[name]).norm() / before[name].norm())
        assert layer.error == pytest.approx(error, rel=1e-4)
    dropped = sum(float((before[name] - after[name]).square().sum()) for name in before)
    whole = sum(float(each.square().sum()) for each in before.values())
    assert small.adapter is not None
    assert small.adapter.error == pytest.approx((dropped / whole) ** 0.5, rel=1e-4)
    assert small.bytes.after == (tmp_path / "small.safetensors").stat().st_size
    planned = compressor.plan(file, rank=3)
    assert [layer.error for layer in planned.layers] == pytest.approx([layer.error for layer in small.plan.layers])


@pytest.mark.parametrize("rank", [8, 9, 1000])
def test_a_module_that_has_no_larger_rank_is_kept_bit_for_bit(tmp_path: Path, rank: int) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors")
    compressor.compress(file, output=tmp_path / "same.safetensors", rank=rank)
    before, after = tensors_in(file), tensors_in(tmp_path / "same.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_keep_their_dtype_and_alpha_its_meaning(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors", alpha=5.0, dtype=dtype)
    compressor.compress(file, output=tmp_path / "small.safetensors", rank=3)
    before, after = kohya_updates(file), kohya_updates(tmp_path / "small.safetensors")
    for name, tensor in tensors_in(tmp_path / "small.safetensors").items():
        # 5 / 8 * 3 is no number of bfloat16 with eight bits, and may not be rounded.
        assert tensor.dtype == dtype or name.endswith(".alpha")
    for name, update in before.items():
        error = (after[name] - truncated(update, 3)).norm() / update.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_files_of_diffusers_old_and_new_keep_their_names(tmp_path: Path) -> None:
    for ends in (("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")):
        torch.manual_seed(0)
        file = diffusers_file(tmp_path / "lora.safetensors", ends=ends)
        small = tmp_path / "small.safetensors"
        compressor.compress(file, output=small, rank=2, overwrite=True)
        before, after = tensors_in(file), tensors_in(small)
        assert before.keys() == after.keys()
        for name, (d_in, _, kernel) in MODULES.items():
            down, up = (f"unet.{name}.{end}.weight" for end in ends)
            assert after[down].shape == (2, d_in, *kernel)
            update = before[up].double().flatten(1) @ before[down].double().flatten(1)
            ours = after[up].double().flatten(1) @ after[down].double().flatten(1)
            torch.testing.assert_close(ours, truncated(update, 2), rtol=0, atol=1e-6 * float(update.norm()))


def test_the_core_of_a_convolution_becomes_part_of_its_factors(tmp_path: Path) -> None:
    """LoCon with a core (Tucker) is `sum_pq up[o, p] core[p, q, x, y] down[q, i]`, whose rank the core's is too."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    place, rank = "lora_unet_down_blocks_0_resnets_0_conv1", 12
    down, up = torch.randn(rank, 64, 1, 1), torch.randn(48, rank, 1, 1)
    core = torch.randn(rank, rank, 3, 3)
    file, small = tmp_path / "locon.safetensors", tmp_path / "small.safetensors"
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core, "alpha": torch.tensor(6.0)}
    save_file({f"{place}.{name}": each for name, each in parts.items()}, file)
    update = 0.5 * torch.einsum("op,pqxy,qi->oixy", up[..., 0, 0].double(), core.double(), down[..., 0, 0].double())
    compressor.compress(file, output=small, rank=2)
    assert tensors_in(small)[f"{place}.lora_down.weight"].shape == (2, 64, 3, 3)
    expected = truncated(update.flatten(1), 2)
    torch.testing.assert_close(kohya_updates(small)[place], expected, rtol=0, atol=1e-6 * float(update.norm()))


def test_a_core_in_other_names_keeps_what_it_adds(tmp_path: Path) -> None:
    """Beside a module of another alpha, which all modules of the file then have."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    query, conv = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.1.conv1"
    down, up, core = torch.randn(4, 64, 1, 1), torch.randn(48, 4, 1, 1), torch.randn(4, 4, 3, 3)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core, "alpha": torch.tensor(6.0)}
    tensors = {f"unet.{conv}.{name}": each for name, each in parts.items()}
    others = {"lora_down.weight": torch.randn(8, 32), "lora_up.weight": torch.randn(32, 8), "alpha": torch.tensor(2.0)}
    tensors |= {f"unet.{query}.{name}": each for name, each in others.items()}
    file, exported = tmp_path / "dotted.safetensors", tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    compressor.export(file, to="kohya", output=exported)
    update = 1.5 * torch.einsum("op,pqxy,qi->oixy", up[..., 0, 0].double(), core.double(), down[..., 0, 0].double())
    ours = kohya_updates(exported)["lora_unet_" + conv.replace(".", "_")]
    torch.testing.assert_close(ours, update.flatten(1), rtol=0, atol=1e-6 * float(update.norm()))


def test_modules_are_read_one_at_a_time(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "lora.safetensors")
    adapter = read_adapter(open_checkpoint(file))
    file.unlink()  # nothing of the values was read
    assert [module.rank for module in adapter.modules] == [8] * len(MODULES)
    assert resized_artifact(adapter, [2] * len(MODULES)).bytes > 0


def test_a_folder_keeps_what_stands_beside_the_weights(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "lora")
    (folder / "README.md").write_text("# Mine\n")
    small = compressor.compress(folder, rank=2)
    assert small.output is not None
    assert sorted(path.name for path in Path(small.output).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "compression.json",
        "options.yaml",
    ]
