"""Examples are read from a journal as they were kept there, whatever they are."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.calibration.examples import PARTS, CalibrationData
from compressor.calibration.kept_examples import digest_of_examples, keep_examples, kept_examples
from compressor.data import Batch
from compressor.engine import Fingerprint, Journal


def batch(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, (rows, 5), generator=generator)
    inputs = {"input_ids": tokens, "a/b": torch.randn(rows, 2, generator=generator).bfloat16()}
    return Batch(inputs, tokens[:, 1:])


def examples(seed: int = 0) -> CalibrationData:
    without_labels = Batch({"inputs": torch.ones(1, 3).expand(4, 3)}, torch.empty(0, dtype=torch.int64))
    return CalibrationData((batch(3, seed), without_labels), (batch(2, seed + 1),), False, "2 of 9", "random ones")


def opened(folder: Path) -> Journal:
    return Journal.open(folder, Fingerprint(), option="work_dir")


def test_examples_are_read_as_they_were_kept(tmp_path: Path) -> None:
    journal = opened(tmp_path / "work")
    assert kept_examples(journal) is None
    made = keep_examples(journal, examples)
    journal.close()
    found = keep_examples(opened(tmp_path / "work"), lambda: examples(seed=7))
    assert (found.labeled, found.unused, found.made) == (made.labeled, made.unused, made.made)
    assert found.chunks(*PARTS) == made.chunks(*PARTS)
    for chunk in made.chunks(*PARTS):
        one, other = made.read(chunk), found.read(chunk)
        assert list(one.inputs) == list(other.inputs)
        assert torch.equal(one.labels, other.labels)
        assert one.labels.dtype == other.labels.dtype
        for name, tensor in one.inputs.items():
            assert other.inputs[name].dtype == tensor.dtype
            assert torch.equal(other.inputs[name], tensor)
    assert digest_of_examples(found) == digest_of_examples(made)


def test_a_temporary_journal_keeps_none() -> None:
    journal = Journal()
    keep_examples(journal, examples)
    assert kept_examples(journal) is None


def test_the_digest_tells_examples_and_their_split() -> None:
    one = examples()
    split = CalibrationData((*one.fit, *one.holdout), (one.holdout[0],), one.labeled)
    assert len({digest_of_examples(each) for each in (one, examples(seed=2), split)}) == 3
