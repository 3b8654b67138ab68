"""Data that a model cannot be calibrated or measured on: one line that names what is wrong, and status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor import BadInput, compress
from compressor.cli.run import run

LETTERS = "abcdefghijklmnop"
HALF = ("--keep", "0.5", "--prefer", "size", "--effort", "fast", "--bits", "16")

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 10 tokens and 32 positions, and a tokenizer of one token per letter, of which 17."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language-model")
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(
        models.WordLevel({"?": 0, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(folder)
    return folder


def refused(arguments: list[Any], capsys: Captured) -> str:
    """The one error of a command that ends with status 2."""
    assert run([*map(str, arguments), "-q"]) == 2
    out, err = capsys.readouterr()
    [error] = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (out, error[:7]) == ("", "error: ")
    return error


def test_calibration_text_shorter_than_its_windows_is_named_with_both_lengths(
    language_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc" * 7)
    said = refused([language_model, *HALF, "--calibration", text, "--dry-run"], capsys)
    assert f"{text}: the text is 21 tokens long, less than 2 windows of 32" in said


@pytest.mark.slow
def test_calibration_windows_have_the_length_asked_for(language_model: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc" * 7)
    arguments = [str(language_model), *HALF, "--calibration", str(text), "--dry-run", "-q", "--json"]
    assert run([*arguments, "--calibration-length", "10"]) == 0
    assert '"examples": 1' in capsys.readouterr().out
    assert run([*arguments, "--calibration-length", "7"]) == 0
    out = capsys.readouterr().out
    assert '"examples": 2' in out
    assert '"sequence_length": null' in out
    said = refused([*arguments, "--calibration-length", "11"], capsys)
    assert "less than 2 windows of 11" in said
    assert "at least 2" in refused([*arguments, "--calibration-length", "1"], capsys)


def test_windows_longer_than_the_models_positions_are_named(
    language_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc" * 70)
    arguments = [language_model, *HALF, "--dry-run", "--calibration", text, "--calibration-length", "40"]
    assert "40 tokens are longer than the model's 32 positions" in refused(arguments, capsys)


@pytest.mark.parametrize("option", ["--calibration", "--data"])
def test_a_tokenizer_that_does_not_fit_is_named_with_its_token_and_the_vocabulary(
    option: str, language_model: Path, tmp_path: Path, *, capsys: Captured
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("m" + "abc" * 40)
    output = tmp_path / "out"
    said = refused([language_model, *HALF, option, text, "-o", output], capsys)
    assert f"{text}: token id 13 is beyond the model's vocabulary of 10" in said
    assert not output.exists()


@pytest.fixture
def classifier(tmp_path: Path) -> list[str]:
    code = tmp_path / "model.py"
    code.write_text("from torch import nn\n\ndef build():\n    return nn.Linear(20, 12)\n")
    torch.save(nn.Linear(20, 12).state_dict(), tmp_path / "model.pt")
    return [str(tmp_path / "model.pt"), "--model", f"{code}:build", "-o", str(tmp_path / "out.safetensors")]


def examples(path: Path, labels: list[int], features: int = 20) -> Path:
    np.savez(path, inputs=np.ones((len(labels), features), dtype=np.float32), labels=np.array(labels))
    return path


@pytest.mark.parametrize("budget", [["--keep", "0.5"], ["--max-drop", "0.5"]])
@pytest.mark.parametrize("label", [12, -1])
def test_a_label_out_of_range_is_named_with_the_number_of_classes(
    budget: list[str], label: int, classifier: list[str], *, tmp_path: Path, capsys: Captured
) -> None:
    data = examples(tmp_path / "data.npz", [0, 0, label, label])
    said = refused([*classifier, *budget, "--data", data], capsys)
    assert f"label {label} is out of the range 0 to 11 of the model's 12 classes" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_calibration_data_of_another_shape_are_named_with_it(
    classifier: list[str], tmp_path: Path, capsys: Captured
) -> None:
    data = examples(tmp_path / "data.npz", [0, 1, 2, 3], features=19)
    said = refused([*classifier, "--keep", "0.5", "--calibration", data], capsys)
    assert f"{data}: Linear does not accept this data (inputs (1, 19))" in said


@pytest.mark.parametrize("same", ["path", "link", "copy", "folder"])
def test_the_same_examples_cannot_calibrate_and_measure(
    same: str, classifier: list[str], tmp_path: Path, *, capsys: Captured
) -> None:
    data = examples(tmp_path / "data.npz", [0, 1, 2, 3])
    other = {"path": data, "link": tmp_path / "link.npz", "copy": tmp_path / "copy.npz", "folder": tmp_path}[same]
    if same == "link":
        other.symlink_to(data)
    if same == "copy":
        other.write_bytes(data.read_bytes())
    said = refused([*classifier, "--keep", "0.5", "--calibration", data, "--data", other], capsys)
    assert f"{other}: the calibration data {'overlap' if same == 'folder' else 'are'} the data to measure on" in said


def test_different_files_may_calibrate_and_measure(classifier: list[str], tmp_path: Path) -> None:
    calibration, data = examples(tmp_path / "a.npz", [0, 1, 2, 3]), examples(tmp_path / "b.npz", [0, 1, 2])
    assert run([*classifier, "--keep", "0.5", "--calibration", str(calibration), "--data", str(data), "-q"]) == 0


# What only the Python interface can be given


def nothing() -> Any:
    yield from ()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (nothing(), "yields 0 batches"),
        ([torch.ones(1, 20)], "two examples at least, and has one batch"),
        ([None] * 2, "yields NoneType"),
        ([{"x": [1.0]}] * 2, "yields dict"),
        ([([1.0], [0])] * 2, "yields tuple"),
    ],
)
def test_a_loader_that_yields_no_tensors_is_named_with_what_it_yields(batches: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        compress(nn.Linear(20, 12), keep=0.5, calibration=batches, prefer="size", bits=16)
    assert "\n" not in str(caught.value)


def test_a_length_of_windows_is_refused_for_batches() -> None:
    with pytest.raises(BadInput, match="cuts texts"):
        compress(
            nn.Linear(20, 12),
            keep=0.5,
            calibration=[torch.ones(2, 20)] * 2,
            calibration_length=8,
            prefer="size",
            bits=16,
        )


def test_the_layer_whose_activations_overflow_in_half_precision_is_named() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * 1e4)

    torch.manual_seed(0)
    model = Overflowing().half()
    batches = [100 * torch.randn(8, 20) for _ in range(2)]
    with pytest.raises(BadInput, match="activations of layer second are not finite"):
        compress(model, keep=0.5, calibration=batches, prefer="size", bits=16)


@pytest.mark.slow
def test_a_drop_in_percent_is_of_accuracy_alone(capsys: pytest.CaptureFixture[str]) -> None:
    llama = Path(__file__).parents[2] / "model_cards" / "stdlib-llama"
    words = [
        str(llama),
        "--max-drop",
        "1%",
        "--data",
        "builtin:stdlib",
        "--data-samples",
        "4",
        "--calibration",
        "none",
        "-q",
    ]
    assert run(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --max-drop 1% is of accuracy, and builtin:stdlib")
    assert err.endswith("is measured in perplexity; give it in that unit, such as 0.5\n")
