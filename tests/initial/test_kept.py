"""What a run keeps of its start: written, found from its checkpoints, and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import BadInput
from compressor.initial import find_kept, is_record, keep_initial, read_kept, record


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(3))


def test_the_state_of_any_module_is_kept_tied_tensors_once(tmp_path: Path) -> None:
    model = Tied()
    kept = keep_initial(model, tmp_path / "run", seeds=[1, 2])
    initial = read_kept(kept)
    assert initial.draws is None
    assert torch.equal(initial.read("embedding.weight"), model.embedding.weight)
    assert initial.read("head.weight") is None
    assert initial.read("steps") is None
    assert kept.stat().st_size < 300


def test_it_is_found_from_a_file_from_a_folder_and_from_the_folder_above(tmp_path: Path) -> None:
    assert find_kept(tmp_path / "run") is None
    kept = keep_initial(Tied(), tmp_path / "run")
    (tmp_path / "run" / "checkpoint-5").mkdir()
    for model in ("run", "run/model.pt", "run/checkpoint-5", "run/checkpoint-5/model.safetensors"):
        assert find_kept(tmp_path / model) == kept
    assert find_kept(tmp_path) is None


def test_what_an_earlier_run_kept_otherwise_is_gone(tmp_path: Path) -> None:
    draws = tmp_path / "initial" / "draws.json"
    draws.parent.mkdir()
    draws.write_text("{}")
    assert find_kept(tmp_path) == draws
    assert keep_initial(Tied(), tmp_path) == find_kept(tmp_path) != draws
    assert not draws.exists()


@pytest.mark.parametrize("document", ["{}", '{"seed": 1, "torch": "2", "registers": [[-1, "float32"]]}', "[1]"])
def test_a_document_that_is_no_record_is_refused(document: str, tmp_path: Path) -> None:
    (tmp_path / "draws.json").write_text(document)
    with pytest.raises(BadInput, match=r"draws\.json"):
        read_kept(tmp_path / "draws.json")


def test_a_record_that_draws_more_than_the_model_has_is_refused(tmp_path: Path) -> None:
    draws = record(lambda: nn.Linear(300, 400), 3).draws
    path = tmp_path / "draws.json"
    path.write_text(json.dumps(draws.to_dict()))
    assert read_kept(path, 120_400).seed == 3
    with pytest.raises(BadInput, match="more numbers than the model"):
        read_kept(path, 100)


def test_the_index_of_a_sharded_checkpoint_is_no_record(tmp_path: Path) -> None:
    for name, expected in (("draws.json", True), ("model.safetensors.index.json", False), ("model.pt", False)):
        (tmp_path / name).write_text("{}")
        assert is_record(tmp_path / name) == expected
    assert not is_record(tmp_path / "missing.json")
