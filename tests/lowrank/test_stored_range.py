"""Every number that is written is finite: factors are balanced for float16, and what overflows is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, export, merge, restore
from compressor.factorize import FactorPair, SpatialPair, balanced, truncated_svd
from compressor.planning import Budget, LayerPlan, Plan

LIMIT = torch.finfo(torch.float16).max


def halves(deviation: float, d_out: int = 64, d_in: int = 64, *, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (torch.randn(d_out, d_in) * deviation).clamp(-LIMIT, LIMIT).half()


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"{name}.up.weight"].double().flatten(1) @ tensors[f"{name}.down.weight"].double().flatten(1)


@pytest.mark.parametrize("deviation", [1e-4, 1.0, 15000.0])
@pytest.mark.parametrize("form", ["plain", "auto"])
def test_float16_weights_of_any_size_lose_only_what_truncation_takes(
    deviation: float, form: str, tmp_path: Path
) -> None:
    weight = halves(deviation)
    save_file({"fc.weight": weight}, tmp_path / "m.safetensors")
    result = compress(tmp_path / "m.safetensors", keep=0.6, form=form, output=tmp_path / "s.safetensors")
    assert all(bool(each.isfinite().all()) for each in load_file(tmp_path / "s.safetensors").values())
    [layer] = result.plan.layers
    assert layer.rank is not None
    exact = truncated_svd(weight, layer.rank).product()
    truncated = float((exact - weight.double()).norm() / weight.double().norm())
    assert layer.error == pytest.approx(truncated, rel=2e-3)
    restored = restore(tmp_path / "s.safetensors", output=tmp_path / "d.safetensors")
    dense = load_file(restored.output)["fc.weight"].double()
    assert float((dense - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_balancing_changes_no_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1e39, 1.0, 1e-9, 0], dtype=torch.float64)
    pair = FactorPair(torch.randn(9, 4).double(), torch.randn(4, 12).double() * sizes[:, None])
    even = balanced(pair, dtype)
    assert torch.equal(even.product(), pair.product())
    assert float(even.down.abs().max()) < 1e21
    for column, row in zip(even.up.T[:3], even.down[:3], strict=True):
        assert 0.2 < float(column.abs().max() / row.abs().max()) < 5
    kernel = SpatialPair(torch.randn(5, 3, 3).double(), 1e39 * torch.randn(3, 4, 3).double())
    assert torch.equal(balanced(kernel, dtype).product(), kernel.product())


def test_factors_that_their_dtype_holds_well_stay_as_they_are() -> None:
    pair = truncated_svd(torch.randn(8, 6), 3)
    assert balanced(pair, torch.float32) is pair


def test_a_product_or_sum_beyond_the_range_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    half = {"0.weight": halves(20000.0), "0.bias": torch.zeros(64).half()}
    for name in ("a", "b"):
        save_file(half, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInput, match=r"0\.weight.*range of float16"):
        merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], mode="sum", output=tmp_path / "sum.safetensors")
    pair = {
        "fc.weight": torch.empty(0).half(),
        "fc.down.weight": torch.full((2, 8), 300.0).half(),
        "fc.up.weight": torch.full((8, 2), 300.0).half(),
    }
    save_file(pair, tmp_path / "pair.safetensors")
    for write in (
        lambda: restore(tmp_path / "pair.safetensors", output=tmp_path / "dense.safetensors"),
        lambda: restore(tmp_path / "pair.safetensors", output=tmp_path / "dense.pt"),
        lambda: export(tmp_path / "pair.safetensors", to="dense", output=tmp_path / "dense2.safetensors"),
    ):
        with pytest.raises(BadInput, match=r"fc\.weight.*range of float16"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "pair.safetensors"]


def test_a_pivoted_row_beyond_the_range_is_refused_by_the_name_of_its_layer(tmp_path: Path) -> None:
    """Rows of a truncated matrix can exceed those of the matrix, and a pivoted pair stores them as they are."""
    torch.manual_seed(0)
    signs = torch.where(torch.randn(64, 1) * torch.randn(1, 64) > 0, 1.0, -1.0)
    weight = (signs * (LIMIT - 60000 * (torch.rand(64, 64) < 0.3))).half()
    save_file({"deep.fc.weight": weight}, tmp_path / "m.safetensors")
    small = tmp_path / "s.safetensors"

    def planned(form: str) -> Plan:
        return Plan("m", None, Budget("plan"), (LayerPlan("deep.fc", (64, 64), "linear", 8, form, 0, 0.0, ""),))

    with pytest.raises(BadInput, match=r"deep\.fc\.down\.weight.*range of float16.*`exclude`"):
        compress(tmp_path / "m.safetensors", plan=planned("pivoted"), output=small)
    assert not small.exists()
    compress(tmp_path / "m.safetensors", plan=planned("plain"), output=small)
    assert all(bool(each.isfinite().all()) for each in load_file(small).values())


def test_a_difference_larger_than_either_model_survives_its_file_of_pairs(tmp_path: Path) -> None:
    base, outer = halves(100.0), torch.outer(torch.linspace(-1, 1, 64), torch.ones(64))
    for name, tensor in (("base", base.float() - 30000 * outer), ("tuned", base.float() + 40000 * outer)):
        save_file({"fc.weight": tensor.half()}, tmp_path / f"{name}.safetensors")
    start, pairs, dense = (tmp_path / f"{name}.safetensors" for name in ("base", "pairs", "dense"))
    compress(tmp_path / "tuned.safetensors", base=start, tolerance=0.01, output=pairs)
    assert all(bool(each.isfinite().all()) for each in load_file(pairs).values())
    export(pairs, to="dense", base=start, output=dense)
    tuned, found = (load_file(path)["fc.weight"].double() for path in (tmp_path / "tuned.safetensors", dense))
    assert float((found - tuned).norm() / tuned.norm()) < 0.02


def test_buffers_that_are_not_finite_are_copied_and_weights_are_refused(tmp_path: Path) -> None:
    mask = torch.full((4,), -torch.inf).half()
    save_file({"fc.weight": halves(1.0), "mask": mask}, tmp_path / "m.safetensors")
    compress(tmp_path / "m.safetensors", keep=0.5, output=tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("mask"), mask)
        assert json.loads(file.metadata()["compressor"])["layers"]
    network = nn.Sequential(nn.Linear(8, 8))
    network[0].weight.data[3, 3] = torch.nan
    with pytest.raises(BadInput, match=r"0\.weight: holds 1 NaN"):
        compress(network, keep=0.5, prefer="size")
