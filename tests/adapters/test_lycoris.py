"""LoHa and LoKr mean the products that LyCORIS forms, and are resized as these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import compressor
from compressor.errors import BadInput
from tests.adapters.adapters_of import kohya_updates, tensors_in, truncated

PLACE = "lora_unet_down_blocks_0_attentions_0_proj_in"


def saved(path: Path, parts: dict[str, Tensor]) -> Path:
    save_file({f"{PLACE}.{name}": each for name, each in parts.items()}, path)
    return path


def tucker(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The convolution of a core and two factors, `out x in x positions`."""
    return torch.einsum("ijxy,jr,ip->prxy", core, second, first)


def loha(rank: int, *, core: bool) -> tuple[dict[str, Tensor], Tensor]:
    a = [torch.randn(rank, 24) if core else torch.randn(24, rank) for _ in range(2)]
    b = [torch.randn(rank, 20) for _ in range(2)]
    parts = {"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_w2_a": a[1], "hada_w2_b": b[1], "alpha": torch.tensor(3.0)}
    if not core:
        return parts, 3 / rank * (a[0] @ b[0]) * (a[1] @ b[1])
    cores = [torch.randn(rank, rank, 3, 3) for _ in range(2)]
    parts |= {"hada_t1": cores[0], "hada_t2": cores[1]}
    return parts, 3 / rank * tucker(cores[0], a[0], b[0]) * tucker(cores[1], a[1], b[1])


def lokr(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    w1, w2 = torch.randn(3, 4), torch.randn(8, 5)
    parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(3.0)}
    scale = 1.0  # of two whole factors, whatever alpha says
    if kind != "whole":
        a, b = torch.randn(8, 2), torch.randn(2, 5)
        del parts["lokr_w2"]
        w2, scale = a @ b, 3 / 2
        parts |= {"lokr_w2_a": a, "lokr_w2_b": b}
    if kind == "core":
        core = torch.randn(2, 2, 3, 3)
        parts |= {"lokr_w2_a": a.T.contiguous(), "lokr_t2": core}
        w2 = tucker(core, a.T.contiguous(), b)
        return parts, scale * torch.einsum("ab,cdxy->acbdxy", w1, w2).reshape(24, 20, 3, 3)
    return parts, scale * torch.kron(w1, w2)


@pytest.mark.parametrize("side", [64, 128])
def test_a_kronecker_product_as_large_as_a_layer_is_never_formed(tmp_path: Path, side: int) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(side, side), torch.randn(side, side)
    file = saved(tmp_path / "lora.safetensors", {"lokr_w1": first, "lokr_w2": second})
    inspection = compressor.inspect(file)
    assert inspection.adapter is not None
    (module,) = inspection.adapter.modules
    # In full: 134 MB of 64 x 64 each, and 2 GB of 128 x 128.
    values = np.outer(*(np.linalg.svd(each.double().numpy(), compute_uv=False) for each in (first, second)))
    assert (module.shape, module.rank) == ((side**2, side**2), side**2)
    assert module.norm == pytest.approx(float(np.linalg.norm(values)), rel=1e-9)
    shares = np.cumsum(np.sort(values.ravel())[::-1] ** 2) / np.sum(values**2)
    assert module.energy_90 == int((shares < 0.9).sum()) + 1
    small = compressor.compress(file, output=tmp_path / "small.safetensors", rank=8)
    assert small.adapter is not None
    assert small.adapter.resized == 0  # a pair of rank one has as many numbers


def test_a_kronecker_product_is_cut_to_its_largest_singular_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 2), torch.randn(40, 40)
    file, small = (
        saved(tmp_path / "lora.safetensors", {"lokr_w1": first, "lokr_w2": second}),
        tmp_path / "small.safetensors",
    )
    compressor.compress(file, output=small, rank=7)
    update = torch.kron(first.double(), second.double())
    assert len(tensors_in(small)[f"{PLACE}.lora_down.weight"]) == 7
    torch.testing.assert_close(
        kohya_updates(small)[PLACE], truncated(update, 7), rtol=0, atol=1e-6 * float(update.norm())
    )


def test_a_product_that_is_too_large_in_full_is_refused_in_other_names(tmp_path: Path) -> None:
    file = saved(tmp_path / "lora.safetensors", {"lokr_w1": torch.ones(128, 128), "lokr_w2": torch.ones(128, 128)})
    with pytest.raises(BadInput, match="16,384 x 16,384, of rank 16,384, which takes too much memory; leave it"):
        compressor.export(file, to="diffusers", output=tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="of rank 16,384, which takes too much memory"):
        compressor.merge([file, file], output=tmp_path / "both.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


CASES = ["loha", "loha dense", "loha core", "lokr whole", "lokr pair", "lokr core"]


def case(name: str) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    kind, _, detail = name.partition(" ")
    if kind == "loha":
        return loha(5 if detail == "dense" else 3, core=detail == "core")
    return lokr(detail)


@pytest.mark.parametrize("name", CASES)
def test_its_singular_values_are_those_of_the_product(tmp_path: Path, name: str) -> None:
    parts, update = case(name)
    file = saved(tmp_path / "lora.safetensors", parts)
    inspection = compressor.inspect(file)
    assert inspection.adapter is not None
    (module,) = inspection.adapter.modules
    values = torch.linalg.svdvals(update.double().flatten(1))
    assert module.norm == pytest.approx(float(values.norm()), rel=1e-5)
    shares = values.square().cumsum(0) / values.square().sum()
    assert module.energy_90 == int((shares < 0.9).sum()) + 1
    assert module.rank >= int((values > 1e-5 * values[0]).sum())


@pytest.mark.parametrize("name", CASES)
def test_it_is_resized_as_the_product(tmp_path: Path, name: str) -> None:
    parts, update = case(name)
    file, small = saved(tmp_path / "lora.safetensors", parts), tmp_path / "small.safetensors"
    compressor.compress(file, output=small, rank=1)
    if not any(key.endswith("lora_down.weight") for key in tensors_in(small)):
        # A pair of rank one takes more numbers than the few that a Kronecker product has.
        assert name.startswith("lokr")
        before, after = tensors_in(file), tensors_in(small)
        assert all(torch.equal(before[key], after[key]) for key in before)
        return
    expected = truncated(update.flatten(1), 1)
    torch.testing.assert_close(kohya_updates(small)[PLACE], expected, rtol=0, atol=1e-5 * float(update.norm()))


@pytest.mark.parametrize("name", CASES)
def test_in_other_names_it_is_a_pair_of_its_full_rank(tmp_path: Path, name: str) -> None:
    parts, update = case(name)
    file = saved(tmp_path / "lora.safetensors", parts)
    compressor.export(file, to="diffusers", output=tmp_path / "pairs.safetensors")
    compressor.export(tmp_path / "pairs.safetensors", to="kohya", output=tmp_path / "back.safetensors")
    ours = kohya_updates(tmp_path / "back.safetensors")[PLACE]
    torch.testing.assert_close(ours, update.double().flatten(1), rtol=0, atol=1e-5 * float(update.norm()))
