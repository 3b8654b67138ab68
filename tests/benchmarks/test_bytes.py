"""The benchmark of bytes: sizes counted from tensors, cells that are kept, and tables of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import inspect

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bytes")
    for name in ("bytes", "initial", "initial_networks", "quality", "baselines"):
        sys.modules.pop(name, None)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    yield importlib.import_module("measuring")
    sys.modules.pop("measuring", None)


def given(benchmark: ModuleType, kept: Path) -> Any:
    """A network whose loss is what its outputs are off by, on inputs that span half of their dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    examples = torch.randn(256, 32) @ torch.randn(32, 64)

    def measure(changed: nn.Module) -> Any:
        with torch.inference_mode():
            off = float((changed(examples) - model(examples)).square().mean())
        return benchmark.Measurement(1 + off, divergence=off, error=1e-6)

    layers = tuple(each.layer for each in inspect(model).layers if each.layer.eligible)
    read = lambda positions: {"input": examples[list(positions)]}  # noqa: E731
    return benchmark.Given("digits-mlp", benchmark.Setting(model, layers, len(examples), read, measure), 0, kept)


def test_gptq_loses_less_than_rounding_to_nearest_in_as_many_bytes(benchmark: ModuleType, tmp_path: Path) -> None:
    cell = given(benchmark, tmp_path)
    assert cell.dense_bytes == 2 * (64 * 64 + 32 * 64)
    found = {name: benchmark.UNIFORM_METHODS[name](cell) for name in ("nearest 3g32", "GPTQ 3g32", "GPTQ 8")}
    # Three bits and a scale of two bytes for 32 inputs, and two numbers of eight bytes for each shape.
    expected = (64 * 64 + 32 * 64) * (3 / 8 + 2 / 32) + 2 * 16
    assert found["nearest 3g32"].stored == found["GPTQ 3g32"].stored == expected
    losses = {name: each.measured["loss_increase"] for name, each in found.items()}
    assert 0 < losses["GPTQ 8"] < losses["GPTQ 3g32"] < losses["nearest 3g32"]


def test_ours_takes_no_more_than_was_asked_for_and_loses_no_more_than_bits_alone(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    cell = given(benchmark, tmp_path)
    found = {name: benchmark.OURS[name](cell, 0.2) for name in ("ours", "bits alone")}
    assert all(each.stored <= 0.2 * cell.dense_bytes for each in found.values())
    losses = {name: each.measured["loss_increase"] for name, each in found.items()}
    assert 0 < losses["ours"] <= losses["bits alone"]


def test_bytes_of_layers_leave_out_biases_and_other_tensors(benchmark: ModuleType, tmp_path: Path) -> None:
    sizes = {
        "0.weight_packed": 100,
        "0.weight_scale": 10,
        "0.bias": 7,
        "0.up.bias": 7,
        "2.down.weight": 30,
        "20.weight": 1,
    }
    assert given(benchmark, tmp_path).stored(sizes) == 140
    assert benchmark.file_bytes((4, 8), torch.float32) == benchmark.file_bytes((4, 8), torch.bfloat16) == 64
    assert benchmark.file_bytes((4, 8), torch.int32) == 128


def test_cells_are_kept_in_order_and_fill_the_tables(benchmark: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "bytes.json"
    results = benchmark.Results(path)

    for method, share, draw, loss, stored in (
        ("GPTQ 4g128", None, 0, 0.0202, 0.26),
        ("ranks alone", 0.31, 0, 0.3, 0.31),
        ("ours", 0.25, 0, 0.02, 0.25),
        ("ours", 0.31, 1, 0.0001, 0.31),
        ("ours", 0.31, 0, 0.5, 0.31),
        ("ours", 0.31, 0, 0.0003, 0.31),  # in place of the one before
    ):
        cell = benchmark.Cell("digits-mlp", method, share, draw)
        results.put(vars(cell), {"stored": stored, "loss": 1 + loss, "loss_increase": loss, "error": 0.001})
    again = benchmark.Results(path)
    assert [(row["method"], row["share"], row["draw"]) for row in again.rows] == [
        ("ours", 0.31, 0),
        ("ours", 0.31, 1),
        ("ours", 0.25, 0),
        ("ranks alone", 0.31, 0),
        ("GPTQ 4g128", None, 0),
    ]
    assert benchmark.has(again.rows, vars(benchmark.Cell("digits-mlp", "ours", 0.31, 1)))
    assert not benchmark.has(again.rows, vars(benchmark.Cell("digits-mlp", "ours", 0.31, 2)))
    document = {"rows": again.rows}
    lines = benchmark.curves(document).splitlines()
    assert lines[2] == "| 31% | **0.0002 (0.0001 to 0.0003)** | 0.300 | 0.0202 GPTQ 4g128 | 0.0010 |"
    assert lines[3] == "| 25% | 0.0200 |  |  | 0.0010 |"
    assert benchmark.points(document).splitlines()[2] == "| GPTQ 4g128 | 26.0%: 0.0202 |"


def test_where_another_method_loses_less_by_more_than_the_draws_are_apart_it_is_listed(benchmark: ModuleType) -> None:
    def row(method: str, loss: float, draw: int, *, share: float | None = None) -> dict[str, object]:
        known = {"model": "m", "method": method, "share": share, "draw": draw, "stored": share or 0.2}
        return known | {"loss_increase": loss, "error": 0.001, "divergence": 0.002}

    def listed(*losses: float) -> list[str]:
        others = [row("GPTQ 4g128", loss, draw) for draw, loss in enumerate(losses)]
        ours = [row("ours", 0.02 + 0.01 * draw, draw, share=0.25) for draw in (0, 1)]
        found: str = benchmark.losses_to_others({"rows": [*ours, *others]})
        return found.splitlines()[2:]

    assert listed(0.016) == []  # the draws of ours are .01 apart
    assert listed(0.001, 0.02) == []  # those of the other are .019 apart
    assert listed(0.001, 0.002) == [
        "| m | 25% | 0.0250 (0.0200 to 0.0300) | 0.0015 (0.0010 to 0.0020) GPTQ 4g128"
        " | 0.0010, 0.0010 | 0.0020, 0.0020 |"
    ]


def test_what_a_peer_wrote_is_counted_from_its_files(measuring: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"a.weight": torch.zeros(3, 4, dtype=torch.float16)}, tmp_path / "one.safetensors", {"format": "pt"})
    save_file({"b.weight_packed": torch.zeros(5, dtype=torch.int32)}, tmp_path / "inner" / "two.safetensors")
    assert measuring.tensor_bytes(tmp_path) == {"a.weight": 24, "b.weight_packed": 20}


def test_losses_of_windows_are_means_over_their_predictions(measuring: ModuleType) -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            class Outputs:
                logits = torch.zeros(*input_ids.shape, 7)

            return Outputs

    windows = torch.randint(7, (20, 5), generator=torch.Generator().manual_seed(0))
    losses = measuring.window_losses(Uniform(), windows)
    assert torch.allclose(losses, torch.full((20,), 7.0, dtype=torch.float64).log())
