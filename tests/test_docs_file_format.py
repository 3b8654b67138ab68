"""docs/file-format.md is enough to read what is written: a reader made by it gives the dense weights of every form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import compressor
from compressor.forms import FORMS
from compressor.lowrank import METADATA_KEY, LowRankSpec
from tests import format_reader, page_models
from tests.format_reader import Compressed
from tests.lowrank.quantized import Forms, quantized
from tests.lowrank.started import KINDS, Kinds, opened, rewriting_of, trained, write

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")


class EveryKind(nn.Module):
    """A layer of every kind, with rows of 32 numbers or more."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.words.weight
        self.square, self.tall = nn.Linear(32, 32), nn.Linear(32, 48)
        self.turned = Conv1D(48, 32)
        self.channel, self.spatial = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3)
        self.grouped, self.back = nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 3)
        self.rnn = nn.RNN(32, 32)


PAIRS: dict[str, Forms] = {
    "pairs": {
        "words": ("plain", 4),
        "square": ("pivoted", 5),
        "tall": ("plain", 4),
        "turned": ("plain", 3),
        "channel": ("channel", 4),
        "spatial": ("spatial", 6),
        "grouped": ("grouped", 2),
        "back": ("channel", 4),
        "rnn.weight_ih_l0": ("plain", 4),
        "rnn.weight_hh_l0": ("pivoted", 4),
    },
    "others": {"square": ("plain", 31), "turned": ("pivoted", 3)},
    "quantized pairs": {
        "words": ("plain@4", 8),
        "square": ("pivoted@3", 5),
        "tall": ("plain@4g8", 16),
        "turned": ("plain@5", 3),
        "channel": ("channel@6", 4),
        "spatial": ("spatial@8", 6),
        "grouped": ("grouped@4", 2),
        "back": ("channel@5", 4),
        "rnn.weight_ih_l0": ("plain@7", 4),
    },
    "integers": {
        "words": ("dense@4g8", 0),
        "square": ("dense@3g16z", 0),
        "tall": ("dense@5", 0),
        "turned": ("dense@6g8", 0),
        "channel": ("dense@3", 0),
        "spatial": ("dense@4g24z", 0),
        "grouped": ("dense@2", 0),
        "back": ("dense@7", 0),
        "rnn.weight_ih_l0": ("dense@8", 0),
    },
    "corrections": {
        "words": ("dense@3", 2),
        "square": ("dense@2g8", 2),
        "turned": ("dense@3", 2),
        "channel": ("dense@2", 2),
        "grouped": ("dense@2", 1),
        "back": ("dense@3", 2),
    },
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(EveryKind().state_dict(), tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


def restored(path: Path, **others: Any) -> dict[str, Any]:
    output = path.with_name("restored" + path.suffix)
    compressor.restore(path, output=output, **others)
    files = sorted(output.glob("*.safetensors")) if output.is_dir() else [output]
    return {name: each.to(torch.float64).numpy() for file in files for name, each in load_file(file).items()}


def alike(ours: Any, theirs: Any, digits: float = 1e-6) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=digits, atol=digits * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("forms", PAIRS)
def test_every_form_is_read(forms: str, dense: Path, tmp_path: Path) -> None:
    quantized(dense, PAIRS[forms], tmp_path / "small.safetensors", factory=EveryKind)
    ours = Compressed.of(tmp_path / "small.safetensors").changes()
    assert len(ours) == len(PAIRS[forms])
    theirs = restored(tmp_path / "small.safetensors")
    for name, weight in ours.items():
        alike(weight, theirs[name])


def test_all_forms_are_among_them() -> None:
    written = {form.partition("@")[0] for forms in PAIRS.values() for form, _ in forms.values()}
    own = {name.partition("@")[0] for name in FORMS if not name.startswith("initial+")}
    assert (own | {"dense"}) - {"diagonal"} == written
    assert all(f"`{form}`" in PAGE for form in written)


@pytest.mark.slow
def test_what_training_wrote_is_added_to_what_the_seed_draws(tmp_path: Path) -> None:
    model, initial = trained(Kinds)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    write(rewriting_of(opened(tmp_path / "dense.pt", initial, Kinds), KINDS), tmp_path / "small.safetensors")
    ours = Compressed.of(tmp_path / "small.safetensors").from_initial()
    assert len(ours) == len(KINDS)
    for name, weight in model.state_dict().items():
        if name in ours:
            alike(ours[name], weight.to(torch.float64).numpy(), 1e-5)


@pytest.mark.slow
def test_a_change_is_added_to_its_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"fc1.weight": torch.randn(48, 32), "fc2.weight": torch.randn(32, 48)}
    base = {name: each.to(torch.bfloat16) for name, each in base.items()}
    tuned = {
        name: (each + 0.1 * torch.randn(len(each), 2) @ torch.randn(2, each.shape[1])).to(each)
        for name, each in base.items()
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for bits in ("16", "4"):
        change = tmp_path / f"change-{bits}.safetensors"
        asked: dict[str, Any] = {"keep": 0.3} if bits == "16" else {"bits": bits}
        compressor.compress(tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors", output=change, **asked)
        read = Compressed.of(change)
        assert "base" in read.said
        ours = read.changes()
        theirs = restored(change, base=tmp_path / "base.safetensors")
        (tmp_path / "restored.safetensors").unlink()
        assert len(ours) == 2
        for name, own in ours.items():
            share = read.said["layers"][name.removesuffix(".weight")].get("share", 1.0)
            whole = torch.from_numpy(share * base[name].double().numpy() + own)
            alike(whole.to(torch.bfloat16).double().numpy(), theirs[name], 2**-8)


@pytest.mark.slow
def test_a_folder_of_compressed_tensors_is_read(tmp_path: Path) -> None:
    page_models.llama().save_pretrained(tmp_path / "model")
    quantized(tmp_path / "model", {"*_proj": ("dense@8g8", 0)}, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    [group] = config["config_groups"].values()
    file = Compressed.of(tmp_path / "small" / "model.safetensors")
    theirs = restored(tmp_path / "small")
    assert len(group["targets"]) == 7
    for target in group["targets"]:
        name = f"{target}.weight"
        alike(file.floats(name, group["weights"]["num_bits"]), theirs[name])


def test_the_page_is_of_the_present_version(tmp_path: Path) -> None:
    [said] = re.findall(r"^Version (\d+)\.", PAGE, re.MULTILINE)
    newer = int(said) + 1
    with pytest.raises(ValueError, match=f"format {newer}"):
        LowRankSpec.from_dict({"format_version": newer, "layers": {}})
    assert LowRankSpec.from_dict({"format_version": int(said), "layers": {}}).layers == {}
    record = json.dumps({"format_version": newer, "layers": {}})
    save_arrays({"a": np.zeros(1, np.float32)}, tmp_path / "newer.safetensors", {METADATA_KEY: record})
    with pytest.raises(ValueError, match="not known"):
        Compressed.of(tmp_path / "newer.safetensors")


def test_the_reader_knows_nothing_but_the_page() -> None:
    source = Path(format_reader.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (compressor|torch)\b", source, re.MULTILINE)
