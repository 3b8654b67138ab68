"""The benchmark of latency: what it times is checked first, tables show what was measured, and failures are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from compressor.latency import SHIPPED

pytestmark = pytest.mark.slow

MODULES = ("latency", "latency_layers", "latency_models", "latency_networks", "latency_timing", "latency_variants")
CPU = torch.device("cpu")


class SteppingClock:
    """A clock that is one second later at each look."""

    name = "steps"

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1
        return self.now

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import latency  # type: ignore[import-not-found]

    yield latency
    for name in MODULES:
        sys.modules.pop(name, None)


def once(latency: ModuleType) -> Any:
    return latency.Repeats(warm_ups=1, fewest=2, most=2, enough=0.0, least=0.0)


def tiny(latency: ModuleType) -> list[Any]:
    """The networks of the table, small."""
    module = sys.modules["latency_networks"]
    llama = module.Network(
        "tiny Llama",
        lambda: module.llama(64, 128, 1),
        (module.tokens("prefill", 8, use_cache=False), module.decode(4)),
    )
    resnet = module.Network(
        "tiny ResNet",
        lambda: module.resnet(embedding_size=16, hidden_sizes=[32], depths=[1], layer_type="basic", image_size=16),
        (module.images(3, 16),),
    )
    return [llama, resnet]


def test_layers_and_networks_of_every_form_are_measured_and_shown(latency: ModuleType) -> None:
    layers, models = sys.modules["latency_layers"], sys.modules["latency_models"]
    networks = tiny(latency)
    timing = latency.LayerTiming(CPU, SteppingClock(), once(latency), SHIPPED["cpu"])
    cases = [*layers.linear_cases([(64, 32)], [3]), *layers.convolution_cases(networks[1], [2])]
    document: dict[str, Any] = {
        "layers": [
            row
            for case in cases
            for dtype in (torch.float32, torch.bfloat16)
            for row in layers.measured_layer(case, dtype, 0.5, timing=timing)
        ]
    }
    assert {row["form"] for row in document["layers"]} == {"plain", "pivoted", "channel", "spatial"}
    at = latency.ModelTiming(CPU, SteppingClock(), once(latency), SHIPPED["cpu"], batches=(1, 2))
    document["models"] = [row for each in networks for row in models.measured_network(each, torch.float32, at)]
    assert {(row["workload"], row["batch"]) for row in document["models"]} == {
        (workload, batch) for workload in ("prefill", "decode", "forward") for batch in (1, 2)
    }
    for row in document["models"]:
        assert {"plain", "pivoted"} <= row["variants"].keys()
        assert ("speed" in row["variants"]) == (row["refused"] is None)
        assert 0 < row["variants"]["plain"]["kept"] <= 0.5
    json.dumps(document)
    shown = latency.printed(document | {"models": document["models"][1:]})  # not all of them at every batch
    for cell in ("| 64 x 32 | f32 |", "| 3 x 3 |", "| tiny Llama, decode, f32 |", "| all |"):
        assert cell in shown
    compiled = [row for row in document["models"] if row.pop("ideal")]  # which says nothing of a compiled one
    assert "| tiny ResNet, forward, f32 | plain |" in latency.compiled_table({"compiled": compiled})


@pytest.fixture
def variant(latency: ModuleType) -> tuple[nn.Module, Any]:
    variants = sys.modules["latency_variants"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    layers = variants.eligible_layers(model)
    return model, variants.in_one_form(model, layers, ["pivoted"], keep=0.5, profile=SHIPPED["cpu"])


def run(module: nn.Module) -> Any:
    return module(torch.ones(2, 32))


def dense_again(model: nn.Module, low_rank: Any) -> None:
    low_rank[0] = model.get_submodule("0")


def more_bytes(model: nn.Module, low_rank: Any) -> None:
    low_rank.register_parameter("further", nn.Parameter(torch.zeros(1)))


def other_outputs(model: nn.Module, low_rank: Any) -> None:
    low_rank[0].register_forward_hook(lambda module, inputs, outputs: outputs + 1)


def other_shape(model: nn.Module, low_rank: Any) -> None:
    low_rank[0].up.weight = nn.Parameter(torch.zeros(1, low_rank[0].rank))


def not_called(model: nn.Module, low_rank: Any) -> None:
    low_rank.forward = lambda inputs: low_rank[2](low_rank[1](torch.zeros(2, 48)))


def test_low_rank_layers_as_they_are_stated_pass(latency: ModuleType, variant: tuple[nn.Module, Any]) -> None:
    model, changed = variant
    assert {each.form for each in changed.placed} == {"pivoted"}
    sys.modules["latency_variants"].check(changed, model, run)


@pytest.mark.parametrize("change", [dense_again, more_bytes, other_outputs, other_shape, not_called])
def test_what_is_not_as_stated_is_not_timed(latency: ModuleType, variant: tuple[nn.Module, Any], change: Any) -> None:
    model, changed = variant
    change(model, changed.module)
    variants = sys.modules["latency_variants"]
    with pytest.raises(variants.NotAsStatedError):
        variants.check(changed, model, run)


def test_a_repeat_runs_every_call_and_the_next_in_the_other_order(latency: ModuleType) -> None:
    ran: list[str] = []
    clock = SteppingClock()
    calls = [lambda name=name: ran.append(name) for name in "abc"]
    repeats = latency.Repeats(warm_ups=1, fewest=2, most=2, enough=0.0, least=0.0)
    timed = sys.modules["latency_timing"].timed_in_turn(calls, clock, repeats)
    assert "".join(ran) == "abc" + "abc" + "cba"
    assert timed.ratio(2).median == 1


def test_a_slow_network_and_wrong_predictions_are_reported(latency: ModuleType) -> None:
    row = {"network": "net", "workload": "forward", "dtype": "float32", "batch": 32, "refused": None, "ideal": 0.55}
    ratio = {"low": 1.0, "median": 1.1, "high": 1.2}
    speed = {"ratio": ratio, "of_ideal": 0.9, "dense_layers": 3, "above_ideal": {"launches": 0.3, "bytes": -0.1}}
    layer = {"kind": "linear", "ratio": ratio, "predicted_ratio": 0.5}
    slow, far, wrong = latency.shortfalls({"models": [row | {"variants": {"speed": speed}}], "layers": [layer]})
    assert "1.10 of dense" in slow
    assert "launches 0.30" in slow
    assert "bytes" not in slow
    assert "50% of the ideal speed-up, with 3 layers left dense" in far
    assert "0% of the predictions" in wrong
    close = {"kind": "linear", "ratio": ratio, "predicted_ratio": 1.0}
    assert latency.shortfalls({"layers": [close]}) == []


def test_what_is_measured_again_replaces_the_same_networks(latency: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "latency-cpu.json"
    first, second = ({"network": name, "batch": 1} for name in ("Llama, hidden 1024", "digits-vit"))
    latency.keep_rows(path, {"models": [first], "layers": [{"kind": "linear"}]}, {"threads": 1})
    latency.keep_rows(path, {"models": [second]}, {"threads": 1})
    latency.keep_rows(path, {"models": [first | {"batch": 2}]}, {"threads": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "models": [second, first | {"batch": 2}],
        "layers": [{"kind": "linear"}],
        "threads": 1,
    }
