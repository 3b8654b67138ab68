"""Architectures of transformers, compressed: exact on disk, in memory and when saved again; tied where they were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor import Compression, compress, restore
from compressor.forms import MARKERS
from compressor.planning import PlanningSettings
from tests.lowrank.architectures import ARCHITECTURES, Architecture

pytestmark = pytest.mark.slow


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's only weight file, read by the official library."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def unlike(folder: Path, other: Path) -> set[str]:
    """Names of the tensors that are not in both folders with the same values."""
    ours, theirs = stored(folder), stored(other)
    return {name for name in ours.keys() | theirs.keys() if not torch.equal(*_both(name, ours, theirs))}


def _both(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    nothing = torch.tensor(math.nan)
    return ours.get(name, nothing), theirs.get(name, nothing)


@dataclass(frozen=True)
class Compressed:
    """An architecture that was compressed, once in memory and once in a folder, and what its folder loads as."""

    architecture: Architecture
    inputs: dict[str, Tensor]
    dense: Any
    in_memory: Any
    loaded: Any
    loading: dict[str, Any]
    report: Compression
    root: Path

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        for parameter in model.parameters():  # where it lies decides which kernel multiplies a few rows
            parameter.data = parameter.data.clone()
        result: Tensor = model.eval()(**self.inputs).logits
        return result

    def dense_tensors(self) -> dict[str, Tensor]:
        """What the dense folder stores, each matrix of experts by itself."""
        return self.architecture.apart(stored(self.root / "dense"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    architecture, root = ARCHITECTURES[request.param], tmp_path_factory.mktemp(request.param)
    dense = architecture.dense()
    dense.save_pretrained(root / "dense")
    asked: Any = {"keep": 0.6, "calibration": "none", "prefer": "size"}
    asked["planning_settings"] = PlanningSettings(uniform_widths=())  # what int8 and int4 would lose takes its time
    report = compress(root / "dense", output=root / "small", **asked)
    loaded, loading = architecture.load(root / "small", output_loading_info=True)
    in_memory = compress(dense, **asked).model
    return Compressed(architecture, architecture.inputs(), dense, in_memory, loaded, loading, report, root)


def test_it_loads_as_what_was_compressed_in_memory(small: Compressed) -> None:
    assert not any(small.loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = small.logits(small.in_memory)
    assert torch.equal(small.logits(small.loaded), expected)
    assert not torch.allclose(small.logits(small.dense), expected, rtol=1e-4)
    ours, theirs = small.loaded.state_dict(), small.in_memory.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_layers_are_named_as_in_the_file_and_ranks_as_in_the_model(small: Compressed) -> None:
    dense, factorized = (
        small.dense_tensors(),
        {p.name: p for p in small.report.plan.layers if p.rank is not None},
    )
    assert small.architecture.a_layer in factorized
    assert {f"{name}.weight" for name in factorized} <= dense.keys()
    layers = small.loaded.config.quantization_config.spec.layers
    assert sorted(layer.rank for layer in layers.values()) == sorted(p.rank for p in factorized.values())
    for name, said in layers.items():
        layer = small.loaded.get_submodule(name)
        assert layer.weight.shape == MARKERS[said.kind]
        assert layer.rank == said.rank == layer.down.weight.shape[0]
    if small.architecture.renamed:
        assert layers.keys() != factorized.keys()


def test_it_holds_exactly_as_many_numbers_as_its_ranks_say(small: Compressed) -> None:
    dense, after = small.dense_tensors(), stored(small.root / "small")
    expected = sum(tensor.numel() for tensor in dense.values())
    for plan in small.report.plan.layers:
        weight = dense[f"{plan.name}.weight"]
        if plan.rank is None:
            continue
        (d_out, d_in), rank = plan.shape, plan.rank
        assert d_out * d_in == weight.numel()
        if plan.form == "spatial":
            filters, channels, height, width = weight.shape
            pair = rank * (filters * width + channels * height)
        else:
            pair = rank * (d_out + d_in) - (rank**2 - d_out if plan.form == "pivoted" else 0)
        assert plan.parameters == pair + (d_out if plan.form == "pivoted" else 0)  # whose order has 32 bits a row
        expected += pair - weight.numel()
    assert sum(tensor.numel() for tensor in after.values()) == expected == small.report.parameters.after
    eligible = sum(math.prod(plan.shape) for plan in small.report.plan.layers)
    assert small.report.plan.eligible_after <= 0.6 * eligible


def test_saved_again_it_is_the_same(small: Compressed) -> None:
    small.loaded.save_pretrained(small.root / "again")
    assert not unlike(small.root / "small", small.root / "again")
    again = small.architecture.load(small.root / "again")
    assert torch.equal(small.logits(again), small.logits(small.loaded))
    small.in_memory.save_pretrained(small.root / "from-memory")
    assert not unlike(small.root / "small", small.root / "from-memory")
    from_memory = small.architecture.load(small.root / "from-memory")
    assert torch.equal(small.logits(from_memory), small.logits(small.loaded))


def product(tensors: dict[str, Tensor], name: str, transposed: bool) -> Tensor:
    """The dense weight that the tensors of a layer stand for, by the formulas of the file format."""
    down, up = tensors[f"{name}.down.weight"].double(), tensors[f"{name}.up.weight"].double()
    if f"{name}.order" in tensors:
        rows = torch.cat([down, up @ down])
        return rows[tensors[f"{name}.order"].long()].T if transposed else rows[tensors[f"{name}.order"].long()]
    if down.dim() == 2:
        return (up @ down).T if transposed else up @ down
    if down.dim() == 4 and up.shape[-1] > 1:  # a spatial pair: its kernels are columns and rows
        return torch.einsum("rchx,orxw->ochw", down, up)
    return torch.einsum("rc...,or->oc...", down, up.flatten(1))


def test_its_layers_are_the_products_of_their_factors(small: Compressed) -> None:
    """What is loaded computes what the dense architecture does with the products, and `restore` writes these."""
    whole, after = stored(small.root / "dense"), stored(small.root / "small")
    dense, fused = small.dense_tensors(), small.architecture.fused
    for plan in small.report.plan.layers:
        if plan.rank is None:
            continue
        matrix = product(after, plan.name, plan.kind == "transposed linear")
        assert matrix.shape == dense[f"{plan.name}.weight"].shape
        dense[f"{plan.name}.weight"] = matrix.float().contiguous()
    if fused is not None:
        dense = {
            name: fused.together(name, tensor, dense) if fused.parts(name, tensor) else dense[name]
            for name, tensor in whole.items()
        }
    products = small.root / "products"
    small.dense.config.save_pretrained(products)
    save_file(dense, products / "model.safetensors", {"format": "pt"})
    expected = small.architecture.load(products)
    torch.testing.assert_close(small.logits(small.loaded), small.logits(expected), rtol=1e-4, atol=1e-5)

    restore(small.root / "small", output=small.root / "restored")
    assert stored(small.root / "restored").keys() == dense.keys()
    for name, tensor in stored(small.root / "restored").items():
        torch.testing.assert_close(tensor, dense[name], rtol=0, atol=0)
    restored, loading = small.architecture.load(small.root / "restored", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(small.logits(restored), small.logits(expected))


def test_dequantized_it_is_the_dense_model_that_restore_writes(small: Compressed) -> None:
    dequantized = small.architecture.load(small.root / "small").dequantize()
    assert not hasattr(dequantized.config, "quantization_config")
    assert {name: type(module) for name, module in dequantized.named_modules()} == {
        name: type(module) for name, module in small.dense.named_modules()
    }
    torch.testing.assert_close(small.logits(dequantized), small.logits(small.loaded), rtol=1e-4, atol=1e-5)
    dequantized.save_pretrained(small.root / "dequantized")
    restore(small.root / "small", output=small.root / "restored-to-compare")
    assert not unlike(small.root / "dequantized", small.root / "restored-to-compare")


def tied(model: Any) -> set[frozenset[str]]:
    """The names of every parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def test_what_was_tied_stays_tied(small: Compressed) -> None:
    groups = tied(small.dense)
    assert any(group.issuperset(small.architecture.tied or ()) for group in groups) == bool(small.architecture.tied)
    assert tied(small.loaded) == tied(small.in_memory) == groups
    names = stored(small.root / "small").keys()
    assert all(len(group & names) == 1 for group in groups)
    factors = {f"{layer}.{factor}.weight" for layer in _layers(groups) for factor in ("down", "up")}
    assert not factors & names


def _layers(groups: set[frozenset[str]]) -> set[str]:
    return {name.removesuffix(".weight") for group in groups for name in group}
