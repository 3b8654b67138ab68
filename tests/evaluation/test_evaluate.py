"""The side by side as a whole."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from compressor.data import Preprocessing, Sample, open_data
from compressor.errors import BadInput
from compressor.evaluation import compare, measure_quality


@pytest.fixture
def digits_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def test_a_model_beside_itself_drops_nothing(digits_model):
    data = open_data("builtin:digits", sample=Sample(limit=70))
    evaluation = compare(digits_model, copy.deepcopy(digits_model), data, device="cpu")
    assert evaluation.drop == 0
    assert evaluation.baseline == evaluation.compressed == measure_quality(digits_model, data).value
    assert evaluation.baseline_cost == evaluation.compressed_cost
    assert evaluation.count == 70
    assert [timing.batch_size for timing in evaluation.latency] == [1, 32]


def test_a_smaller_model_costs_less(digits_model):
    small = copy.deepcopy(digits_model)
    small[1] = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 32))
    evaluation = compare(
        digits_model, small, open_data("builtin:digits", sample=Sample(limit=5)), device="cpu", timing=None
    )
    before, after = evaluation.baseline_cost, evaluation.compressed_cost
    assert before is not None
    assert (before.macs, after.macs) == (64 * 32 + 320, 4 * (64 + 32) + 320)
    assert before.parameters - after.parameters == 64 * 32 - 4 * (64 + 32)
    assert before.bytes - after.bytes == 4 * (before.parameters - after.parameters)
    assert after.peak_memory_bytes < before.peak_memory_bytes
    assert evaluation.latency == ()


def test_the_document_is_strict_json_with_the_documented_keys(digits_model):
    document = compare(
        digits_model, digits_model, open_data("builtin:digits", sample=Sample(limit=40)), device="cpu"
    ).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {"metric", "baseline", "compressed", "drop", "loss", "count", "macs", "latency"} <= set(document)
    assert {"parameters", "bytes", "peak_memory_bytes", "device"} <= set(document)
    assert set(document["macs"]) == {"before", "after"}
    assert set(document["latency"]) == {"batch_1", "batch_32"}
    assert document["latency"]["batch_1"]["ratio"] > 0


def test_infinity_is_said_in_json_too(lookup, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcabcabc")
    data = open_data(path, Preprocessing(tokenizer=tokenizer, sequence_length=3))
    good, bad = lookup(torch.zeros(12, 12)), lookup(torch.full((12, 12), math.nan))
    worse, better = (compare(*pair, data, device="cpu", timing=None) for pair in ((good, bad), (bad, good)))
    assert (worse.compressed, worse.drop) == (math.inf, math.inf)
    document = worse.to_dict()
    json.dumps(document, allow_nan=False)
    assert (document["compressed"], document["drop"], document["loss"]["compressed"]) == ("infinity",) * 3
    assert better.to_dict()["drop"] == "-infinity"


def test_a_model_alone_is_measured_without_a_drop(digits_model):
    evaluation = compare(None, digits_model, open_data("builtin:digits", sample=Sample(limit=40)), device="cpu")
    assert (evaluation.baseline, evaluation.drop, evaluation.baseline_cost) == (None, None, None)
    document = evaluation.to_dict()
    assert document["macs"] == {"before": None, "after": 64 * 32 + 320}
    assert document["latency"]["batch_1"]["ratio"] is None


def test_a_single_example_is_timed_once(digits_model):
    evaluation = compare(digits_model, digits_model, open_data("builtin:digits", sample=Sample(limit=1)), device="cpu")
    assert [timing.batch_size for timing in evaluation.latency] == [1]


def test_language_models_side_by_side(llama, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc def\n" * 20)
    data = open_data(path, Preprocessing(tokenizer=tokenizer, sequence_length=16), batch_size=2)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    evaluation = compare(llama, other, data, device="cpu", timing=None)
    assert evaluation.compressed == pytest.approx(12, rel=1e-6)
    assert evaluation.baseline is not None
    assert evaluation.drop == evaluation.compressed - evaluation.baseline


def test_both_models_are_left_as_they_were_found(digits_model):
    baseline, compressed = digits_model.train(), copy.deepcopy(digits_model).eval()
    shared = nn.Sequential(baseline[0], compressed[1], baseline[2], compressed[3])
    compare(baseline, shared, open_data("builtin:digits", sample=Sample(limit=40)), device="cpu")
    assert all(module.training for module in baseline)
    assert [module.training for module in shared] == [True, False, True, False]


def test_an_impossible_device_is_bad_input(digits_model):
    with pytest.raises(BadInput, match="no device"):
        compare(digits_model, digits_model, open_data("builtin:digits", sample=Sample(limit=4)), device="tpu")
