"""One budget over all modules: it is held, and no exchange of ranks between modules would lose less."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compressor
from compressor.errors import BadInput, QualityGateNotMet
from tests.adapters.adapters_of import kohya_file, kohya_updates, tensors_in


def spectra_of(file: Path) -> dict[str, torch.Tensor]:
    return {name: torch.linalg.svdvals(update)[:8] for name, update in kohya_updates(file).items()}


@given(keep=st.floats(0.13, 1.0), seed=st.integers(0, 2**31))
def test_keep_is_held_and_is_the_best_by_one_threshold(
    keep: float, seed: int, *, tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(seed)
    file = kohya_file(tmp_path_factory.mktemp("lora") / "lora.safetensors", dtype=torch.float32)
    plan = compressor.plan(file, keep=keep)
    numbers = sum(each.numel() for name, each in tensors_in(file).items() if "lora_" in name.rpartition(".lora_")[1])
    assert plan.eligible_before == numbers
    assert plan.eligible_after <= keep * numbers
    # A singular value that is kept is worth more, for each number that it takes, than any that is dropped and follows.
    spectra = spectra_of(file).values()
    kept, dropped = [], []
    for layer, values in zip(plan.layers, spectra, strict=True):
        gains = values.square() / sum(layer.shape)
        assert layer.rank is not None
        kept += gains[1 : layer.rank].tolist()
        dropped += gains[layer.rank : layer.rank + 1].tolist()
    assert min(kept, default=math.inf) >= max(dropped, default=0.0) * (1 - 1e-6)
    # And the next one would be too much.
    if dropped:
        best = max(range(len(plan.layers)), key=lambda at: _next_gain(plan.layers[at], list(spectra)[at]))
        assert plan.eligible_after + sum(plan.layers[best].shape) > keep * numbers


def _next_gain(layer: compressor.LayerPlan, values: torch.Tensor) -> float:
    rank = layer.rank or 0
    return float(values[rank]) ** 2 / sum(layer.shape) if rank < len(values) else 0.0


@given(energy=st.floats(0.05, 0.999), seed=st.integers(0, 2**31))
def test_energy_is_that_of_every_module(energy: float, seed: int, *, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.manual_seed(seed)
    file = kohya_file(tmp_path_factory.mktemp("lora") / "lora.safetensors", dtype=torch.float32)
    plan = compressor.plan(file, energy=energy)
    for layer, values in zip(plan.layers, spectra_of(file).values(), strict=True):
        shares = values.square().cumsum(0) / values.square().sum()
        assert layer.rank is not None
        assert shares[layer.rank - 1] >= energy * (1 - 1e-6)
        assert layer.rank == 1 or shares[layer.rank - 2] <= energy * (1 + 1e-6)
    same = compressor.plan(file, tolerance=math.sqrt(1 - energy))
    assert [layer.rank for layer in same.layers] == [layer.rank for layer in plan.layers]


@pytest.mark.parametrize("size", [3_000, 4_500, 6_500])
def test_the_file_is_as_large_as_it_may_be(tmp_path: Path, size: int) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors")
    small = compressor.compress(file, output=tmp_path / "small.safetensors", max_size=size)
    written = (tmp_path / "small.safetensors").stat().st_size
    assert written == small.bytes.after <= size
    # A rank more in the largest module would not fit.
    assert written + 2 * max(sum(layer.shape) for layer in small.plan.layers) > size


def test_a_size_that_no_rank_holds_is_not_met(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "lora.safetensors")
    with pytest.raises(QualityGateNotMet, match="even at rank one"):
        compressor.compress(file, output=tmp_path / "small.safetensors", max_size=1000)
    assert not (tmp_path / "small.safetensors").exists()


@pytest.mark.parametrize("options", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 4, "keep": 0.5}])
def test_budgets_out_of_range_are_refused(tmp_path: Path, options: dict[str, float]) -> None:
    file = kohya_file(tmp_path / "lora.safetensors")
    with pytest.raises(BadInput):
        compressor.compress(file, **options)


def test_without_a_budget_the_loss_is_that_of_a_model_that_nothing_is_known_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors")
    small = compressor.compress(file, output=tmp_path / "small.safetensors")
    assert all(layer.error <= 0.05 for layer in small.plan.layers)
    compressor.compress(file, output=tmp_path / "one.safetensors", rank=1)
    with pytest.raises(QualityGateNotMet, match="every module keeps its rank"):
        compressor.compress(tmp_path / "one.safetensors", output=tmp_path / "smaller.safetensors")


def test_ranks_that_differ_keep_the_scale_of_files_without_alpha(tmp_path: Path) -> None:
    """A file without alpha means a scale of one, whatever the ranks are."""
    torch.manual_seed(0)
    for alpha in (None, 3.0):
        file, small = tmp_path / "lora.safetensors", tmp_path / "small.safetensors"
        kohya_file(file, alpha=alpha, dtype=torch.float32)
        plan = compressor.compress(file, output=small, keep=0.4, overwrite=True).plan
        assert len({layer.rank for layer in plan.layers}) > 1
        before, after = kohya_updates(file), kohya_updates(small)
        for layer, name in zip(plan.layers, before, strict=True):
            error = float((after[name] - before[name]).norm() / before[name].norm())
            assert error == pytest.approx(layer.error, rel=1e-4, abs=1e-6)
