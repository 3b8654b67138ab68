"""A plan of an adapter is edited and applied like one of a model: a rank for each module, by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.errors import BadInput
from tests.adapters.adapters_of import MODULES, kohya_file, kohya_updates, peft_folder, tensors_in, truncated


def test_applying_a_plan_writes_what_its_budget_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors", dtype=torch.float32)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(compressor.plan(file, keep=0.5).to_dict()))
    compressor.compress(file, output=tmp_path / "budget.safetensors", keep=0.5)
    applied = compressor.compress(file, output=tmp_path / "plan.safetensors", plan=plan)
    assert applied.plan.budget.kind == "plan"
    assert (tmp_path / "budget.safetensors").read_bytes() == (tmp_path / "plan.safetensors").read_bytes()


def test_edited_ranks_are_those_of_the_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors", dtype=torch.float32)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(compressor.plan(file, rank=5).to_dict()))
    document = json.loads(plan.read_text())
    ranks: list[int | None] = [1, 3, None, 8]
    for layer, rank in zip(document["layers"], ranks, strict=False):
        layer["rank"] = rank
    document["layers"] = document["layers"][: len(ranks)]  # what is not named keeps its rank
    plan.write_text(json.dumps(document))
    predicted = compressor.plan(file, plan=plan)
    small = compressor.compress(file, output=tmp_path / "small.safetensors", plan=plan)
    assert [layer.rank for layer in small.plan.layers] == [1, 3, 8, 8, 8]
    assert [layer.error for layer in predicted.layers] == pytest.approx([layer.error for layer in small.plan.layers])
    before, after = kohya_updates(file), kohya_updates(tmp_path / "small.safetensors")
    for (name, update), layer in zip(before.items(), small.plan.layers, strict=True):
        assert len(tensors_in(tmp_path / "small.safetensors")[f"{name}.lora_down.weight"]) == layer.rank
        expected = truncated(update, layer.rank or 0)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6 * float(update.norm()))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"name": "somewhere.else"}, "names somewhere.else, which this adapter does not change"),
        ({"rank": 9}, "rank 9 of .* is above the 8 that it has"),
        ({"shape": [3, 4]}, "is 3 x 4, the adapter's 32 x 24"),
        ({"bits": 4, "group_size": None, "zero_points": False}, "form 'plain@4.*' does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, edit: dict[str, Any], words: str) -> None:
    folder, plan = peft_folder(tmp_path / "lora"), tmp_path / "plan.json"
    plan.write_text(json.dumps(compressor.plan(folder, rank=5).to_dict()))
    document = json.loads(plan.read_text())
    assert len(document["layers"]) == len(MODULES)
    document["layers"][0] |= edit
    plan.write_text(json.dumps(document))
    with pytest.raises(BadInput, match=words):
        compressor.compress(folder, output=tmp_path / "out", plan=plan)
    document["layers"][0] = document["layers"][1]
    plan.write_text(json.dumps(document))
    with pytest.raises(BadInput, match="twice"):
        compressor.compress(folder, output=tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()
