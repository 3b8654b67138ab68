"""Compressing for speed: with a device that charges for arithmetic, and a timer that counts what a model stores."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import BadInput, Plan, PlanningSettings, QualityGateNotMet, TimingSettings, compress, plan
from compressor.cli.run import run
from compressor.evaluation import count_parameters
from compressor.network import Kind
from tests.lowrank.architectures import ARCHITECTURES
from tests.planning.profiles import Charges, charging

Captured = pytest.CaptureFixture[str]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))


def by_size(model: nn.Module, call: Callable[[], Any], _: torch.device) -> float:
    """Two nanoseconds for each stored number, what the device charges for an example."""
    call()
    return 2e-9 * count_parameters(model)


def never(*_: Any) -> float:
    raise AssertionError("something was timed")


def timing(timer: Callable[..., float] = by_size, **settings: Any) -> TimingSettings:
    return TimingSettings(**{"profile": charging(), "timer": timer, "batch": (1,), **settings})


def test_a_module_is_made_faster_at_the_batch_sizes_that_are_asked_for() -> None:
    model = network()
    report = compress(model, keep=0.5, prefer="speed", batch=(2, 5), timing_settings=timing())
    assert report.model is not None
    ratio = count_parameters(report.model) / count_parameters(model)
    assert [each.workload for each in report.latency] == ["batch 2", "batch 5"]
    assert [each.ratio for each in report.latency] == pytest.approx([ratio, ratio])
    assert [each.latency.batch_size for each in report.latency] == [2, 5]
    layers = {layer.name: layer for layer in report.plan.layers}
    assert all(layer.latency is not None for layer in layers.values())
    for layer in layers.values():
        assert layer.latency is not None
        assert [each.workload for each in layer.latency] == ["batch 2", "batch 5"]
        if layer.rank is not None:
            for each in layer.latency:
                assert each.predicted.chosen <= 0.97 * each.predicted.dense
                assert each.measured is not None
                assert each.measured.dense == 2e-9 * count_parameters(model.get_submodule(layer.name))
    document = json.loads(json.dumps(report.to_dict()))
    assert [each["workload"] for each in document["latency"]] == ["batch 2", "batch 5"]
    assert document["layers"][1]["latency"][0]["measured"]["dense"] > 0


def test_the_result_shows_the_time_of_each_layer_and_of_the_model_once() -> None:
    data = (torch.randn(8, 24), torch.arange(8))
    report = compress(network(), keep=0.5, prefer="speed", data=data, timing_settings=timing())
    page = str(report)
    assert page.count("latency, batch 1") == 1
    assert f"{report.latency[0].ratio:.2f} x the time" in page
    assert "predicted for stopwatch" in " ".join(page.split())  # its line may break anywhere
    layer = next(each for each in report.plan.layers if each.rank is not None)
    assert layer.latency is not None
    [of_layer] = layer.latency
    assert of_layer.measured is not None
    predicted, measured = (each.chosen / each.dense for each in (of_layer.predicted, of_layer.measured))
    assert f"{predicted:.2f}x ({measured:.2f}x)" in page
    [change] = report.verdict.latency
    assert (change.workload, change.predicted_on) == ("batch 1", None)


def test_by_size_nothing_is_timed_and_nothing_said_of_time() -> None:
    report = compress(network(), keep=0.5, prefer="size", timing_settings=timing(never))
    assert report.latency == ()
    assert "latency" not in report.to_dict()
    assert all(layer.latency is None for layer in report.plan.layers)
    assert "pivoted" in {layer.form for layer in report.plan.layers}  # which is smaller, and slower


def test_a_module_is_made_faster_where_nothing_is_said_of_it() -> None:
    said, unsaid = (compress(network(), keep=0.5, timing_settings=timing(), prefer=each) for each in ("speed", None))
    assert unsaid.latency
    assert unsaid.plan == said.plan


def test_the_same_profile_gives_the_same_plan() -> None:
    first, second = (compress(network(), keep=0.5, prefer="speed", timing_settings=timing()) for _ in range(2))
    assert first.plan == second.plan
    assert first.model is not None
    assert second.model is not None
    for (name, one), other in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def square(model: nn.Module, call: Callable[[], Any], device: torch.device, *, factor: float) -> float:
    """As `by_size`, but pairs in the place of square layers take longer by a factor."""
    slow = not isinstance(model, nn.Linear | nn.Sequential) and model.in_features == model.out_features
    return by_size(model, call, device) * (factor if slow else 1)


def test_a_layer_whose_pairs_are_measured_slower_at_every_rank_stays_dense() -> None:
    settings = timing(partial(square, factor=99.0))
    report = compress(network(), keep=0.7, prefer="speed", timing_settings=settings)
    layers = {layer.name: layer for layer in report.plan.layers}
    assert layers["2"].rank is None
    assert layers["2"].reason.endswith("on stopwatch, as was measured")
    assert layers["4"].rank is not None
    assert report.plan.eligible_after <= 0.7 * report.plan.eligible_before
    at_once = compress(
        network(), keep=0.7, prefer="speed", timing_settings=replace(settings, most_corrections=0)
    ).plan.layers
    assert at_once[1].reason == "its pairs were measured to be slower on stopwatch"


def test_a_layer_whose_pair_is_measured_slower_gets_one_that_is_faster() -> None:
    fast, slow = (
        {layer.name: layer for layer in compress(network(), keep=0.6, prefer="speed", timing_settings=each).plan.layers}
        for each in (timing(), timing(partial(square, factor=2.5)))
    )
    assert fast["2"].rank is not None
    assert slow["2"].rank is not None
    assert slow["2"].rank < fast["2"].rank
    assert slow["2"].latency is not None
    [latency] = slow["2"].latency
    assert latency.measured is not None
    assert latency.measured.chosen < latency.measured.dense


def whole_models(ratio: Callable[[float], float]) -> Callable[..., float]:
    """A timer by which a whole model of a share of the numbers takes `ratio` of the time, and layers go by size."""
    full = count_parameters(network())

    def timer(model: nn.Module, call: Callable[[], Any], device: torch.device) -> float:
        seconds = by_size(model, call, device)
        share = count_parameters(model) / full
        if not isinstance(model, nn.Sequential):
            return seconds
        return 2e-9 * full * (ratio(share) if share < 1 else 1.0)

    return timer


def test_a_model_that_would_be_slower_than_dense_is_refused_before_any_factor_is_computed() -> None:
    steps: list[str] = []
    with pytest.raises(QualityGateNotMet, match=r"1\.20x the time of the dense one \(batch 1\).*`prefer='size'`"):
        compress(
            network(),
            keep=0.5,
            prefer="speed",
            timing_settings=timing(whole_models(lambda _: 1.2)),
            progress=lambda step, *_: steps.append(step),
        )
    assert "factorize" not in steps


def test_a_model_that_is_slower_within_the_margin_passes() -> None:
    settings = timing(whole_models(lambda _: 1.02))
    assert compress(network(), keep=0.5, prefer="speed", timing_settings=settings).latency[0].ratio == pytest.approx(
        1.02
    )
    with pytest.raises(QualityGateNotMet):
        compress(network(), keep=0.5, prefer="speed", timing_settings=replace(settings, margin=0.01))


def test_a_finished_model_that_is_slower_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_file(network().state_dict(), source)
    full, whole = count_parameters(network()), 0

    def timer(model: nn.Module, call: Callable[[], Any], device: torch.device) -> float:
        nonlocal whole
        seconds = by_size(model, call, device)
        if isinstance(model, nn.Sequential) and count_parameters(model) < full:
            whole += 1
            return seconds if whole == 1 else 9.0  # once before the work, then after it
        return seconds

    settings = timing(timer, warm_ups=0, fewest_repeats=1, enough_seconds=0.0)
    with pytest.raises(QualityGateNotMet, match="the compressed model takes"):
        compress(source, keep=0.5, prefer="speed", factory=network, timing_settings=settings)
    assert whole == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_latency_is_met_with_the_least_loss() -> None:
    report = compress(network(), max_latency="0.6x", timing_settings=timing())
    assert report.plan.budget.to_dict() == {"kind": "max-latency", "value": 0.6}
    assert all(0.5 < each.ratio <= 0.63 for each in report.latency)
    loose = compress(network(), max_latency=0.8, timing_settings=timing())
    assert loose.plan.eligible_after > report.plan.eligible_after


def test_a_missed_latency_corrects_the_limit_once_by_what_was_measured() -> None:
    # A quarter of what is predicted to be saved is not.
    measured = whole_models(lambda share: 0.25 + 0.75 * share)
    exact, corrected = (
        compress(network(), max_latency=0.8, timing_settings=timing(timer))
        for timer in (whole_models(lambda share: share), measured)
    )
    assert corrected.plan.eligible_after < exact.plan.eligible_after
    assert all(each.ratio <= 0.83 for each in corrected.latency)


@pytest.mark.parametrize(("limit", "share"), [(0.8, 0.9), (0.8, 0.83), (0.5, 0.52)])
def test_a_model_that_takes_more_in_the_end_than_its_plan_did_is_refused(limit: float, share: float) -> None:
    full, whole = count_parameters(network()), 0

    def timer(model: nn.Module, call: Callable[[], Any], device: torch.device) -> float:
        nonlocal whole
        compressed = isinstance(model, nn.Sequential) and count_parameters(model) < full
        whole += compressed
        return 2e-9 * full * share if compressed and whole > 2 else by_size(model, call, device)

    settings = timing(timer, warm_ups=0, fewest_repeats=1, enough_seconds=0.0)
    with pytest.raises(QualityGateNotMet, match=rf"{share:.2f}x the time .*, more than `max_latency` {limit:g}"):
        compress(network(), max_latency=limit, timing_settings=settings)
    assert whole == 3  # to learn the rest of the model, to correct the limit, and at the end


def test_a_search_by_drop_may_begin_with_a_size_that_is_slower_than_dense() -> None:
    data = (torch.randn(64, 24), torch.randint(0, 48, (64,)))
    timer = whole_models(lambda share: share if share < 0.3 or share == 1 else 1.2)
    report = compress(network(), max_drop=1.0, data=data, timing_settings=timing(timer))
    assert report.plan.search is not None
    assert report.plan.search.trials[0].keep > 0.3
    assert all(each.ratio < 0.3 for each in report.latency)
    with pytest.raises(QualityGateNotMet, match=r"1\.20x the time of the dense one"):
        compress(
            network(),
            max_drop=1.0,
            data=data,
            planning_settings=PlanningSettings(most_trials=1),
            timing_settings=timing(timer),
        )


def test_a_latency_that_the_fastest_plan_was_measured_to_reach_is_not_refused() -> None:
    # Hardly faster than dense, and all at once much faster.
    timer = whole_models(lambda share: 0.6 if share < 0.3 else 0.99)
    report = compress(network(), max_latency=0.8, timing_settings=timing(timer))
    assert [each.ratio for each in report.latency] == pytest.approx([0.6])


def test_what_the_rest_of_a_model_takes_is_part_of_the_least_latency() -> None:
    def timer(model: nn.Module, call: Callable[[], Any], device: torch.device) -> float:
        return by_size(model, call, device) + (1.0 if isinstance(model, nn.Sequential) else 0.0)

    with pytest.raises(BadInput, match=r"`max_latency` 0\.5 is below .* allow at least 0\.9\d\dx") as refused:
        compress(network(), max_latency=0.5, timing_settings=timing(timer))
    assert refused.value.option == "max_latency"


def test_a_size_and_a_latency_are_both_kept() -> None:
    report = compress(network(), keep=0.7, max_latency=0.5, timing_settings=timing())
    assert report.plan.budget.to_dict() == {"kind": "keep", "value": 0.7, "max_latency": 0.5}
    assert report.plan.eligible_after <= 0.7 * report.plan.eligible_before
    assert all(each.ratio <= 0.53 for each in report.latency)


def test_calibration_and_latency_go_together() -> None:
    batches = list(torch.randn(8, 16, 24, generator=torch.Generator().manual_seed(1)))
    report = compress(network(), max_latency=0.6, calibration=batches, effort="fast", timing_settings=timing())
    assert report.plan.calibration is not None
    assert all(each.ratio <= 0.63 for each in report.latency)
    assert all(layer.latency for layer in report.plan.layers)


def test_a_workload_that_takes_too_long_is_predicted_alone(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"batch": (1, 1000), "longest_forward": 1e-3}
    with caplog.at_level(logging.WARNING):
        report = compress(network(), max_latency=0.6, timing_settings=timing(**batch))
    assert "batch 1000: a forward would take 0.017 seconds, so its latency is predicted" in caplog.text
    assert [each.workload for each in report.latency] == ["batch 1"]
    [layer, *_] = report.plan.layers
    assert layer.latency is not None
    assert [each.workload for each in layer.latency] == ["batch 1", "batch 1000"]


def test_a_model_of_which_there_is_no_room_for_a_copy_is_not_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "model.safetensors"
    save_file(network().state_dict(), source)
    with caplog.at_level(logging.WARNING):
        report = compress(
            source, keep=0.5, prefer="speed", factory=network, timing_settings=timing(never, most_memory=1000)
        )
    assert "more than is free" in caplog.text
    assert report.latency == ()
    assert report.plan.device == "stopwatch"


def test_for_another_device_nothing_is_timed_and_the_layers_alone_count(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = compress(
            network(), max_latency=0.5, target_device=charging(), timing_settings=TimingSettings(timer=never)
        )
    assert "planned for stopwatch by its constants alone" in caplog.text
    assert report.latency == ()
    latencies = [layer.latency for layer in report.plan.layers]
    for workload in range(2):
        dense, chosen = (
            sum(getattr(each[workload].predicted, which) for each in latencies if each) for which in ("dense", "chosen")
        )
        assert chosen <= 0.5 * dense * (1 + 1e-9)
    assert all(each.measured is None for latency in latencies for each in latency or ())
    assert "predicted for its layers on stopwatch" in str(report.verdict)
    assert report.plan.device == report.plan.to_dict()["device"] == "stopwatch"


def test_where_no_layer_would_be_faster_the_gate_is_not_met_and_what_would_do_is_named() -> None:
    with pytest.raises(QualityGateNotMet, match=r"no layer would be smaller and faster on stopwatch.*`prefer='size'`"):
        compress(network(), keep=0.5, target_device=charging(kernel=1.0))


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"'abacus'.*h100"):
        compress(network(), keep=0.5, target_device="abacus")


def test_what_cannot_be_run_is_compressed_for_its_size_and_the_output_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "model.safetensors"
    save_file(network().state_dict(), source)
    with caplog.at_level(logging.WARNING):
        report = compress(source, keep=0.5, prefer="speed", timing_settings=timing(never))
    assert "compressed for its size" in caplog.text
    assert report.latency == ()
    with pytest.raises(BadInput, match="running it needs its architecture"):
        compress(source, max_latency=0.5, overwrite=True)


def test_a_mixture_of_experts_is_compressed_for_its_size(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = compress(
            ARCHITECTURES["mixtral"].dense(),
            keep=0.5,
            calibration="none",
            prefer="speed",
            timing_settings=timing(never),
        )
    assert "depends on the tokens" in caplog.text
    assert report.plan.factorized


def test_a_model_that_generates_has_two_workloads_for_each_batch_size() -> None:
    report = compress(
        ARCHITECTURES["llama"].dense(), keep=0.8, calibration="none", prefer="speed", batch=2, timing_settings=timing()
    )
    [layer, *_] = report.plan.layers
    assert layer.latency is not None
    decode, prefill = layer.latency
    assert [decode.workload, prefill.workload] == ["decode, batch 2", "prefill, batch 2"]
    assert prefill.predicted.dense == pytest.approx(64 * decode.predicted.dense)
    assert [each.workload for each in report.latency] == ["decode, batch 2", "prefill, batch 2"]


@pytest.mark.parametrize("asked", [{"prefer": "size"}, {"prefer": "speed"}], ids=str)
def test_ranks_are_multiples_where_that_is_asked_for(asked: dict[str, Any]) -> None:
    report = compress(network(), keep=0.5, rank_multiple=5, timing_settings=timing(), **asked)
    ranks = [layer.rank for layer in report.plan.layers if layer.rank is not None]
    assert ranks
    assert all(rank % 5 == 0 for rank in ranks)


@dataclass(frozen=True)
class Aligned(Charges):
    """A device that likes multiples of sixteen, and of four in narrow layers."""

    def rank_multiple(self, kind: Kind, dtype: torch.dtype, *, width: int | None = None) -> int:
        return 16 if width is None or width >= 64 else 4


def test_the_device_chooses_the_multiple_for_each_layer() -> None:
    aligned = Aligned(**{each.name: getattr(charging(), each.name) for each in fields(Charges)})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 24))
    report = compress(model, keep=0.57, prefer="speed", target_device=aligned)
    ranks = {layer.name: layer.rank for layer in report.plan.layers}
    assert ranks["0"] in (16, 32)
    assert ranks["4"] is not None
    assert ranks["4"] % 16 != 0
    assert ranks["4"] % 4 == 0
    free = compress(model, keep=0.57, prefer="speed", target_device=aligned, rank_multiple=1)
    assert any((layer.rank or 0) % 4 for layer in free.plan.layers)


def test_a_plan_is_made_without_the_work_and_applied_as_it_is() -> None:
    made = plan(network(), keep=0.5, prefer="speed", timing_settings=timing())
    assert all(layer.latency for layer in made.layers)
    applied = compress(network(), plan=made, timing_settings=timing(never))
    assert [layer.rank for layer in applied.plan.layers] == [layer.rank for layer in made.layers]
    assert isinstance(applied.plan, Plan)
    assert all(layer.latency is None for layer in applied.plan.layers)


def test_a_drop_and_speed_go_together() -> None:
    data = (torch.randn(60, 24, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5)
    report = compress(
        network(),
        max_drop=1.0,
        data=data,
        prefer="speed",
        timing_settings=timing(),
        planning_settings=PlanningSettings(most_trials=2),
    )
    assert report.plan.search is not None
    assert report.latency
    assert all(each.ratio < 1 for each in report.latency)


IDENTITY = """
from torch import nn

def build():
    return nn.Linear(16, 16, bias=False)
"""


@pytest.fixture
def identity(tmp_path: Path) -> list[str]:
    save_file({"weight": torch.eye(16)}, tmp_path / "model.safetensors")
    (tmp_path / "model.py").write_text(IDENTITY)
    return [str(tmp_path / "model.safetensors"), "--model", f"{tmp_path / 'model.py'}:build"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (
            ["--keep", "0.5", "--target-device", "h100"],
            3,
            "at any rank; ask for its size alone with --prefer size and without --target-device",
        ),
        (["--keep", "0.5", "--target-device", "abacus"], 2, "name one of"),
        (["--max-latency", "0.5", "--prefer", "size"], 2, "--max-latency and --prefer size contradict each other"),
        (["--max-latency", "2x"], 2, "--max-latency 2 is out of range"),
        (["--batch", "0"], 2, "--batch 0 is out of range"),
        (["--keep", "0.5", "--max-drop", "0.1"], 2, "pass --data"),
    ],
)
def test_at_a_shell_a_refusal_is_one_line_with_its_status(
    options: list[str], status: int, message: str, *, identity: list[str], capsys: Captured
) -> None:
    assert run([*identity, *options, "-q"]) == status
    err = capsys.readouterr().err.splitlines()[-1]
    assert message in err


def test_an_unknown_device_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no constants are known of 'abacus'"):
        compress(tmp_path / "missing", keep=0.5, target_device="abacus")


def test_a_plan_for_speed_that_loses_much_more_than_one_for_size_says_so() -> None:
    torch.manual_seed(0)
    small = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*small, nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
    batches = [(torch.randn(8, 32), torch.randint(8, (8,))) for _ in range(4)]
    launches = timing(profile=charging(kernel=3e-6))  # so that a pair of a small layer is no faster

    def warnings(most: float) -> list[str]:
        report = compress(
            model,
            keep=0.6,
            prefer="speed",
            calibration=batches,
            effort="fast",
            timing_settings=launches,
            planning_settings=PlanningSettings(most_loss_for_speed=most),
        )
        assert {each.name for each in report.plan.layers if each.rank is not None} == {"5"}
        return [words for words in report.warnings if "times what one of its size would" in words]

    [words] = warnings(1.0)
    assert "`prefer='size'`" in words
    assert warnings(1e6) == []
