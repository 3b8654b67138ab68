"""The main job through the Python interface: what is promised of every run, on small models made here."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import compressor
from compressor import BadInput, QualityGateNotMet, TrainingRecipe, compress, evaluate, inspect, plan, restore
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan
from compressor.report.html import report_page
from tests.calibration.tiny_models import transformer


def build() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return build()


@pytest.fixture
def file(model: nn.Module, tmp_path: Path) -> Path:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_keep_counts_the_numbers_in_the_file(file: Path, keep: float) -> None:
    report = compress(file, keep=keep)
    assert report.output is not None
    tensors = load_file(report.output)
    biases = 96 + 80 + 10
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert report.parameters.after == stored
    # The order of a pivoted pair takes 32 bits a row, as two numbers of 16 bits do.
    order = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".order"))
    assert report.plan.eligible_after == stored - biases + order <= keep * report.plan.eligible_before
    assert report.bytes.after == Path(report.output).stat().st_size


def test_numbers_of_a_dtype_that_cannot_be_converted_are_copied_byte_for_byte(tmp_path: Path) -> None:
    scales = torch.arange(64, dtype=torch.uint8).view(torch.float8_e8m0fnu).reshape(8, 8)
    torch.save({"scales.weight": scales, "even.weight": torch.ones(32, 32)}, tmp_path / "model.pt")
    report = compress(tmp_path / "model.pt", keep=0.5)
    assert [layer.name for layer in report.plan.layers] == ["even"]
    assert report.output is not None
    stored = compressor.open_checkpoint(report.output).read("scales.weight")
    assert torch.equal(stored.view(torch.uint8), scales.view(torch.uint8))


def pitch_network() -> nn.Sequential:
    """Convolutions of lines, as networks have them that listen to a wave."""
    return nn.Sequential(
        nn.Conv2d(1, 8, (64, 1), (4, 1)), nn.ReLU(), nn.Conv2d(8, 16, (32, 1)), nn.ReLU(), nn.Conv2d(16, 16, (16, 1))
    )


def test_convolutions_of_lines_are_compressed_and_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = pitch_network().eval()
    with torch.no_grad():
        for index in (2, 4):
            weight = network[index].weight
            low = torch.randn(weight.shape[0], 3) @ torch.randn(3, weight[0].numel())
            weight.copy_(low.reshape(weight.shape) / weight[0].numel() ** 0.5)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    report = compress(tmp_path / "model.safetensors", tolerance=0.001)
    assert [layer.rank for layer in report.plan.layers] == [3, 3]
    assert report.parameters.after < 0.4 * report.parameters.before
    wave = torch.randn(2, 1, 400, 1)
    assert report.output is not None
    with torch.no_grad():
        torch.testing.assert_close(load_model(report.output, pitch_network)(wave), network(wave), rtol=0, atol=1e-3)


def test_a_share_that_is_missed_by_much_is_said(tmp_path: Path) -> None:
    tensors = {"norms": torch.rand(3, 40, 40), "body.weight": torch.randn(20, 20)}
    save_file(tensors, tmp_path / "model.safetensors")
    [warning] = compress(tmp_path / "model.safetensors", keep=0.5, dry_run=True).warnings
    assert warning.startswith("0.5 was asked for and ")
    assert "have only 7.7% of them; left out are norms (a table or a matrix" in warning
    save_file({**tensors, "norms": torch.rand(3, 4, 4)}, tmp_path / "model.safetensors")
    assert compress(tmp_path / "model.safetensors", keep=0.5, dry_run=True).warnings == ()


@pytest.mark.parametrize("size", [25_000, 40_000, 55_000])  # near the whole a step to dense is larger than a rank
def test_max_size_bounds_the_file_and_is_nearly_used(file: Path, size: int) -> None:
    report = compress(file, max_size=size)
    assert report.output is not None
    largest_rank = 4 * (96 + 80)
    assert size - largest_rank < Path(report.output).stat().st_size <= size


def test_max_size_takes_text_with_a_unit(file: Path) -> None:
    assert compress(file, max_size="40kB", dry_run=True).bytes.after <= 40_000


def test_a_size_that_cannot_be_reached_says_which_can(file: Path) -> None:
    with pytest.raises(BadInput, match=r"at least (\d+) bytes") as caught:
        compress(file, max_size=3_000)
    smallest = int(str(caught.value).split("at least ")[1].split(" ")[0])
    assert compress(file, max_size=smallest).bytes.after <= smallest
    with pytest.raises(BadInput, match=r"at least 0\.\d+"):
        compress(file, keep=0.001, output=file.with_name("other.safetensors"))


def test_compressed_and_restored_checkpoints_compute_the_same(model: nn.Sequential, file: Path, tmp_path: Path) -> None:
    report = compress(file, keep=0.5)
    in_memory = compress(model, keep=0.5, prefer="size").model
    assert report.output is not None
    assert in_memory is not None
    for name in ("back.safetensors", "back.pt"):
        restoration = restore(report.output, output=tmp_path / name)
        state = load_file(tmp_path / name) if name.endswith("s") else torch.load(tmp_path / name, weights_only=True)
        dense = build()
        dense.load_state_dict(state, strict=True)
        x = torch.randn(9, 64)
        torch.testing.assert_close(dense(x), in_memory(x), rtol=1e-5, atol=1e-6)
        assert restoration.layers == tuple(p.name for p in report.plan.layers if p.rank is not None)


def test_the_same_input_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    first = compress(file, keep=0.5, output=tmp_path / "first.safetensors")
    second = compress(file, keep=0.5, output=tmp_path / "second.safetensors")
    assert Path(str(first.output)).read_bytes() == Path(str(second.output)).read_bytes()


def test_a_dry_run_and_a_plan_write_nothing(file: Path) -> None:
    before = snapshot(file.parent)
    dry = compress(file, keep=0.5, dry_run=True)
    planned = plan(file, keep=0.5)
    assert snapshot(file.parent) == before
    assert dry.output is None
    assert dry.plan == planned
    written = compress(file, keep=0.5).plan
    assert [(p.name, p.rank, p.form) for p in written.layers] == [(p.name, p.rank, p.form) for p in planned.layers]
    assert [p.error for p in written.layers] == pytest.approx([p.error for p in planned.layers], rel=1e-4)


def test_an_edited_plan_is_applied(file: Path, tmp_path: Path) -> None:
    document = plan(file, keep=0.5).to_dict()
    document["layers"][0]["rank"], document["layers"][0]["form"] = 5, "plain"
    document["layers"][1]["rank"] = None
    (tmp_path / "plan.json").write_text(json.dumps(document))
    report = compress(file, plan=tmp_path / "plan.json")
    tensors = load_file(str(report.output))
    assert tensors["1.down.weight"].shape == (5, 64)
    assert tensors["3.weight"].shape == (80, 96)
    assert report.plan.budget.kind == "plan"


def test_half_precision_is_computed_in_full_and_written_back_in_half(model: nn.Sequential, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        path = tmp_path / f"{dtype}.safetensors"
        save_file(half, path)
        report = compress(path, keep=0.6)
        tensors = load_file(str(report.output))
        assert {t.dtype for name, t in tensors.items() if not name.endswith("order")} == {dtype}
        restore(str(report.output), output=tmp_path / f"{dtype}-back.safetensors")
        back = load_file(tmp_path / f"{dtype}-back.safetensors")
        for layer in report.plan.layers:
            weight = half[f"{layer.name}.weight"].double()
            measured = float((back[f"{layer.name}.weight"].double() - weight).norm() / weight.norm())
            # The error is that of the stored numbers; bringing them back rounds the product once more.
            assert abs(measured - layer.error) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("tolerance", [0.01, 0.02, 0.1])
def test_a_tolerance_holds_for_what_is_stored_in_half_precision(tolerance: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(256, 256)).Q for _ in range(2))
    spectrum = 0.9 ** torch.arange(256)
    save_file({"a.weight": (left * spectrum @ right).to(torch.bfloat16)}, tmp_path / "half.safetensors")
    [layer] = compress(tmp_path / "half.safetensors", tolerance=tolerance).plan.layers
    assert layer.rank is not None
    assert layer.error <= tolerance


@pytest.mark.slow
def test_documents_have_the_promised_keys(file: Path) -> None:
    report = compress(file, keep=0.5, data="builtin:digits", factory=build)
    document = json.loads(json.dumps(report.to_dict()))
    promised = "schema_version source output parameters bytes eligible layers evaluation seconds peak_memory_bytes"
    assert set(promised.split()) <= document.keys()
    assert set(document["parameters"]) == set(document["bytes"]) == {"before", "after"}
    assert set(document["eligible"]) == {"before", "after", "kept"}
    for layer in document["layers"]:
        assert set(layer) == {"name", "shape", "kind", "rank", "form", "parameters", "error", "reason"}
    assert {"metric", "baseline", "compressed", "drop"} <= document["evaluation"].keys()
    assert document["evaluation"]["metric"] == "accuracy"
    assert document["seconds"] > 0
    assert document["peak_memory_bytes"] > 10**6


def test_what_a_file_says_of_itself(file: Path) -> None:
    report = compress(file, keep=0.5, recipe=TrainingRecipe(optimizer="adamw", sources={"optimizer": "a test"}))
    record = json.loads(compressor.open_checkpoint(str(report.output)).metadata["compressor"])
    assert record["digest"] == compressor.open_checkpoint(file).digest()
    assert record["source"] == "model.safetensors"
    assert record["recipe"]["optimizer"] == "adamw"
    assert {name: entry["rank"] for name, entry in record["layers"].items()} == {
        layer.name: layer.rank for layer in report.plan.layers if layer.rank is not None
    }


def test_torch_files_with_wrappers_and_optimizer_state(model: nn.Sequential, tmp_path: Path) -> None:
    wrapped = OrderedDict((f"module.{name}", tensor) for name, tensor in model.state_dict().items())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": wrapped, "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    report = compress(tmp_path / "last.ckpt", keep=0.5)
    assert report.output == str(tmp_path / "last-compressed.safetensors")
    restore(report.output, output=tmp_path / "back.pth")
    build().load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)


def test_tied_names_of_a_torch_file_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 20)
            self.body = nn.Linear(20, 20)
            self.head = nn.Linear(20, 30, bias=False)
            self.head.weight = self.words.weight

    torch.save(Tied().state_dict(), tmp_path / "tied.pt")
    report = compress(tmp_path / "tied.pt", keep=0.5)
    assert [layer.name for layer in report.plan.layers] == ["body"]
    for name in ("back.pt", "back.safetensors"):
        restore(str(report.output), output=tmp_path / name)
    Tied().load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)
    Tied().load_state_dict(load_file(tmp_path / "back.safetensors"), strict=True)


def test_a_module_is_left_as_it_is(model: nn.Sequential) -> None:
    model.train()
    model[1].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = compress(model, keep=0.5, prefer="size")
    assert report.model is not None
    assert report.model is not model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model[1], nn.Linear)
    assert not model[1].weight.requires_grad
    assert report.model.training
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in shared for parameter in report.model.parameters())
    assert sum(t.numel() for t in report.model.state_dict().values()) == report.parameters.after


def test_evaluate_alone_and_beside_a_baseline(model: nn.Sequential, file: Path) -> None:
    report = compress(file, keep=0.9, data="builtin:digits", factory=build)
    alone = evaluate(str(report.output), data="builtin:digits", factory=build)
    beside = evaluate(str(report.output), data="builtin:digits", factory=build, baseline=file)
    in_memory = evaluate(model, data="builtin:digits")
    assert report.evaluation is not None
    assert alone.baseline is None
    assert alone.compressed == beside.compressed == report.evaluation.compressed
    assert beside.baseline == report.evaluation.baseline == in_memory.compressed
    assert beside.drop == pytest.approx(beside.baseline - beside.compressed)


def test_inspection_reports_every_matrix(file: Path) -> None:
    recipe = TrainingRecipe(
        optimizer="sgd", learning_rate=0.1, weight_decay=0.05, momentum=0.0, schedule="constant", batch_size=1,
        steps=5000, sequence_length=1,
    )  # fmt: skip
    found = inspect(file, recipe=recipe)
    first = found.layers[0]
    assert (first.layer.name, first.uses) == ("1", 1)
    assert first.ranks is not None
    assert first.ranks.full == 64
    assert first.window is not None
    assert first.window.steps == 460  # the smallest n with 0.995^n <= 0.1
    assert (first.window.rank_bound, first.window.vacuous) == (460, True)
    assert first.initialization is not None
    assert first.initialization.above_edge == 64
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_safe_to_remove_is_a_quality_gate(tmp_path: Path) -> None:
    save_file({"a.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    with pytest.raises(QualityGateNotMet, match="does not make these weight files worthwhile smaller"):
        compress(tmp_path / "model.safetensors")
    assert set(snapshot(tmp_path)) == {"model.safetensors"}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_what_saves_less_than_a_twentieth_is_refused_where_nothing_was_asked_and_what_is_suggested_works(
    tmp_path: Path, share: float
) -> None:
    """One layer that the default makes smaller beside more and more that it leaves."""
    torch.manual_seed(0)
    low_rank, rest = torch.randn(64, 3) @ torch.randn(3, 64), round(64 / share)
    tensors = {"a.weight": low_rank, "b.weight": torch.linalg.qr(torch.randn(rest, rest))[0].contiguous()}
    save_file(tensors if share < 1 else {"b.weight": tensors["b.weight"]}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    if share == 0.5:
        assert Path(str(compress(tmp_path / "model.safetensors").output)).stat().st_size <= 0.95 * size
        return
    with pytest.raises(QualityGateNotMet, match="safely") as refused:
        compress(tmp_path / "model.safetensors")
    suggested = re.search(r"`keep=([\d.]+)`", str(refused.value))
    assert suggested is not None
    report = compress(tmp_path / "model.safetensors", keep=float(suggested[1]))
    assert Path(str(report.output)).stat().st_size <= 0.95 * size


def test_a_size_near_the_whole_is_given_where_it_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    report = compress(tmp_path / "model.safetensors", keep=0.97)
    assert report.plan.eligible_after <= 0.97 * report.plan.eligible_before
    assert report.plan.layers[0].rank is not None


def test_a_given_plan_is_obeyed_where_the_tensors_grow_and_that_is_said() -> None:
    model = nn.Linear(40, 40)
    given = Plan("m", None, Budget("plan"), (LayerPlan("", (40, 40), "linear", 39, "plain", 0, math.nan, ""),))
    report = compress(model, plan=given)
    assert report.bytes.after > report.bytes.before
    assert any("grow from" in words for words in report.warnings)


def test_outputs_respect_the_umask_and_the_input_is_never_touched(file: Path) -> None:
    before = file.read_bytes(), file.stat().st_mtime_ns
    previous = os.umask(0o027)
    try:
        report = compress(file, keep=0.5)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(Path(str(report.output)).stat().st_mode) == 0o640
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_pivoted_pairs_of_every_rank_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    for rank in (1, 3, 6):
        document = plan(tmp_path / "m.safetensors", keep=0.9).to_dict()
        document["layers"][0] |= {"rank": rank, "form": "pivoted"}
        (tmp_path / "plan.json").write_text(json.dumps(document))
        small = compress(tmp_path / "m.safetensors", plan=tmp_path / "plan.json", overwrite=True)
        restore(str(small.output), output=tmp_path / "back.safetensors", overwrite=True)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(load_file(tmp_path / "back.safetensors")["a.weight"], truncated, atol=1e-5, rtol=0)


def test_a_fine_tuned_model_is_not_cut_by_what_is_left_of_a_random_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    falling = torch.randn(64, 64) * torch.exp(-torch.arange(64) / 8)
    save_file({"a.weight": falling}, tmp_path / "model.safetensors")
    recipe = {
        "optimizer": "sgd", "momentum": 0, "learning_rate": 0.01, "weight_decay": 1e-4, "schedule": "constant",
        "steps": 100, "batch_size": 8,
    }  # fmt: skip
    for change in ({"base_model": "somebody/base"}, {}, {"weight_decay": 0.0}):
        report = compress(tmp_path / "model.safetensors", recipe=TrainingRecipe(**recipe | change), dry_run=True)
        assert report.plan.budget.kind == "tolerance"
        assert all(layer.error <= 0.05 for layer in report.plan.layers)


def test_tied_biases_become_two(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.small = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)
            self.b.bias = self.a.bias
            self.small.bias = self.a.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.small(self.b(self.a(x)))

    torch.manual_seed(0)
    tied = Tied()
    in_memory = compress(tied, keep=0.5, exclude=["small"], prefer="size").model
    assert in_memory is not None
    torch.save(tied.state_dict(), tmp_path / "tied.pt")
    report = compress(tmp_path / "tied.pt", keep=0.5, exclude=["small"])
    restore(str(report.output), output=tmp_path / "back.safetensors")
    dense = Tied()
    dense.load_state_dict(load_file(tmp_path / "back.safetensors"), strict=True)
    x = torch.randn(4, 30)
    torch.testing.assert_close(dense(x), in_memory(x), rtol=1e-5, atol=1e-5)


def test_a_transformer_encoder_still_runs_on_its_fast_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model = nn.Sequential(nn.Linear(16, 16), encoder)
    small = compress(model, keep=0.5, prefer="size").model
    assert small is not None
    with torch.no_grad():
        assert torch.isfinite(small.eval()(torch.randn(2, 5, 16))).all()


def test_a_folder_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(BadInput, match="gptq"):
        compress(tmp_path, keep=0.5, prefer="size")


def test_another_models_config_beside_a_file_is_not_used_and_in_a_folder_is_refused(tmp_path: Path) -> None:
    import transformers

    save_file({"a.weight": torch.randn(20, 20)}, tmp_path / "model.safetensors")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    assert compress(tmp_path / "model.safetensors", keep=0.5, dry_run=True).plan.layers[0].name == "a"
    with pytest.raises(BadInput, match="does not belong"):
        compress(tmp_path, keep=0.5, prefer="size")


def test_names_that_the_factors_would_take_are_left_alone(tmp_path: Path) -> None:
    shape = torch.randn(20, 20)
    tensors = {"a.weight": shape, "a.down.weight": shape.clone(), "b.weight": shape.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    report = compress(tmp_path / "model.safetensors", keep=0.5)
    assert {layer.name for layer in report.plan.layers} == {"a.down", "b"}
    assert [layer.name for layer in report.skipped] == ["a"]


def nan(state: dict[str, torch.Tensor]) -> None:
    state["3.weight"][2, 2] = float("nan")


def infinite(state: dict[str, torch.Tensor]) -> None:
    state["3.weight"][0, 0] = float("inf")


def eight_bit(state: dict[str, torch.Tensor]) -> None:
    state["3.weight"] = state["3.weight"].to(torch.float8_e4m3fn)


def nan_in_what_is_passed_through(state: dict[str, torch.Tensor]) -> None:
    state["3.bias"][1] = float("nan")


def vectors(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        if name.endswith("weight"):
            del state[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, "3.weight"),
        (nan_in_what_is_passed_through, "3.bias"),
        (infinite, "3.weight"),
        (eight_bit, "FP8"),
        (vectors, "no layer of this model is eligible"),
    ],
)
def test_weights_that_cannot_be_factorized_leave_nothing_behind(file: Path, damage: Any, message: str) -> None:
    state = load_file(file)
    damage(state)
    save_file(state, file)
    with pytest.raises(BadInput, match=message):
        compress(file, keep=0.5)
    assert set(snapshot(file.parent)) == {"model.safetensors"}


def request_errors() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"keep": 0.5, "tolerance": 0.1}, "two budgets"),
        ({"keep": 0.5, "plan": "plan.json"}, "two budgets"),
        ({"max_drop": 0.1, "plan": "plan.json", "data": "builtin:digits"}, "two budgets"),
        ({"form": "plain", "plan": "plan.json"}, "contradict"),
        ({"keep": 1.5}, "out of range"),
        ({"max_size": "7 parsecs"}, "not a size"),
        ({"keep": 0.5, "include": ["nothing"]}, "matches no layer"),
        ({"keep": 0.5, "exclude": ["*"]}, "no layer of this model is eligible"),
        ({"keep": 0.5, "data": "builtin:digits"}, "architecture"),
        ({"keep": 0.5, "data": "builtin:unknown", "factory": build}, "builtin:unknown"),
        ({"keep": 0.5, "data": "builtin:digits", "factory": lambda: nn.Linear(64, 10)}, "no layer|no single|fit"),
        ({"keep": 0.5, "device": "cuda:99"}, "cuda"),
        ({"keep": 0.5, "recipe": "missing.yaml"}, "missing.yaml"),
        ({"keep": 0.5, "plan": None, "output": "no/such/folder/x.safetensors"}, "folder"),
        ({"keep": 0.5, "output": "x.gguf"}, "safetensors"),
    ]


@pytest.mark.parametrize(("request_", "message"), request_errors())
def test_bad_requests_are_one_line_and_leave_nothing_behind(file: Path, request_: dict[str, Any], message: str) -> None:
    before = snapshot(file.parent)
    with pytest.raises(BadInput, match=message) as caught:
        compress(file, **request_)
    assert "\n" not in str(caught.value)
    assert snapshot(file.parent) == before


def test_an_existing_output_is_kept_unless_asked(file: Path) -> None:
    existing = file.with_name("model-compressed.safetensors")
    existing.write_bytes(b"precious")
    with pytest.raises(BadInput, match="`overwrite`"):
        compress(file, keep=0.5)
    assert existing.read_bytes() == b"precious"
    compress(file, keep=0.5, overwrite=True)
    assert compressor.open_checkpoint(existing).tensors


def test_an_evaluation_that_fails_leaves_the_old_output(file: Path) -> None:
    existing = file.with_name("model-compressed.safetensors")
    existing.write_bytes(b"precious")
    with pytest.raises(BadInput):
        compress(file, keep=0.5, overwrite=True, data="builtin:digits", factory=lambda: nn.Linear(64, 10))
    assert existing.read_bytes() == b"precious"
    assert set(snapshot(file.parent)) == {"model-compressed.safetensors", "model.safetensors"}


def test_a_dense_model_is_not_restored(file: Path) -> None:
    with pytest.raises(BadInput, match="no low-rank layer"):
        restore(file)


def test_progress_reports_every_layer(file: Path) -> None:
    told: list[tuple[str, int, int]] = []
    compress(file, keep=0.5, progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "measure"] == [("measure", i, 3) for i in (1, 2, 3)]
    assert told[-1][1] == told[-1][2]


def test_importing_the_package_is_light() -> None:
    import subprocess
    import sys

    heavy = "import sys, compressor; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "file", "module"])
def test_attention_without_data_is_said_before_the_work_and_in_every_result(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformer("llama").save_pretrained(tmp_path / "llama")
    model: Any = {
        "folder": tmp_path / "llama",
        "file": tmp_path / "alone.safetensors",
        "module": nn.TransformerEncoderLayer(16, 2, 32),
    }[form]
    if form == "file":
        save_file(load_file(tmp_path / "llama" / "model.safetensors"), model)
    said_before: list[str] = []

    def note(*_: object) -> None:
        said_before[:] = said_before or caplog.messages

    result = compress(model, keep=0.6, calibration="none", progress=note, prefer="size")
    [before] = [message for message in said_before if "attention layers" in message]
    assert "`calibration=FILE`" in before
    assert "builtin:stdlib" in before
    [words] = [words for words in result.warnings if "compressed without calibration data and not evaluated" in words]
    assert words in result.to_dict()["warnings"]
    assert words in report_page(result)
    if form == "folder":
        assert words in (Path(str(result.output)) / "README.md").read_text()


@pytest.mark.slow
def test_nothing_is_said_without_attention_or_with_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convolutional = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    assert compress(convolutional, keep=0.6, prefer="size").warnings == ()
    texts = [{"input_ids": torch.randint(3, 40, (8, 8))} for _ in range(2)]
    assert (
        compress(transformer("llama"), keep=0.6, calibration=texts, effort="balanced", prefer="size", bits=16).warnings
        == ()
    )
    assert not any("attention" in message for message in caplog.messages)


@pytest.mark.parametrize("request_", [{"keep": 1.0}, {"tolerance": 1e-6}])
def test_a_request_that_leaves_every_layer_dense_writes_nothing(tmp_path: Path, request_: dict[str, Any]) -> None:
    torch.manual_seed(0)
    save_file(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(QualityGateNotMet, match="every layer would stay dense"):
        compress(tmp_path / "m.safetensors", output=tmp_path / "small.safetensors", **request_)
    assert not (tmp_path / "small.safetensors").exists()
