"""Encoder-decoders and models of several inputs from the shell: calibrated and measured on what their forward takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import compressor
from compressor.cli.run import run

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


EXAMPLES, TOKENS, TARGETS = 8, 6, 5
LETTERS = "abcdefgh"
PADDING, END = 0, 1
SMALLER = ("--keep", "0.7", "--prefer", "size", "--bits", "16")
ONCE = compressor.TimingSettings(warm_ups=0, fewest_repeats=1, most_repeats=1)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, 2 to 9, and 1 at the end."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": PADDING, "</s>": END, **{letter: 2 + i for i, letter in enumerate(LETTERS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=12, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=PADDING,
        pad_token_id=PADDING, eos_token_id=END,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=12, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        pad_token_id=PADDING, bos_token_id=2, eos_token_id=END, decoder_start_token_id=END, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=12, d_model=16, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=16, pad_token_id=PADDING, bos_token_id=2, eos_token_id=END, decoder_start_token_id=2,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def clip() -> Any:
    text = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": END}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


MODELS: dict[str, Callable[[], Any]] = {"t5": t5, "bart": bart, "whisper": whisper, "clip": clip}


def inputs_of(name: str, seed: int) -> dict[str, Tensor]:
    """What the forward of each takes, by its names; targets of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(2, 10, (EXAMPLES, length), generator=generator)

    labels = tokens(TARGETS)
    labels[::2, 3:] = -100
    mask = torch.ones(EXAMPLES, TOKENS, dtype=torch.int64)
    mask[::3, 4:] = 0
    text = {"input_ids": tokens(TOKENS) * mask, "attention_mask": mask}
    return {
        "t5": {**text, "labels": labels},
        "bart": {**text, "labels": labels},
        "whisper": {"input_features": torch.randn(EXAMPLES, 8, 20, generator=generator), "labels": labels},
        "clip": {**text, "pixel_values": torch.randn(EXAMPLES, 3, 8, 8, generator=generator)},
    }[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with each model, and the tokenizer or feature extractor that it reads with."""
    made = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(made[name])
        reader = transformers.WhisperFeatureExtractor(feature_size=8) if name == "whisper" else tokenizer()
        reader.save_pretrained(made[name])
    return made


def written(arrays: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".npz":
        numpy.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    else:
        save_file(arrays, path)
    return path


def result(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> Any:
    capsys.readouterr()
    assert run([str(each) for each in arguments]) == status, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.err if status else json.loads(captured.out)


@pytest.mark.parametrize(("name", "suffix"), [("t5", ".npz"), ("bart", ".safetensors"), ("whisper", ".npz")])
def test_an_encoder_decoder_is_calibrated_and_measured_on_the_inputs_of_its_forward(
    name: str, suffix: str, folders: dict[str, Path], *, tmp_path: Path
) -> None:
    calibration = written(inputs_of(name, 1), tmp_path / f"calibration{suffix}")
    data = written(inputs_of(name, 2), tmp_path / f"data{suffix}")
    found = compressor.compress(
        folders[name], output=tmp_path / "small", keep=0.7, prefer="size", bits=16, calibration=calibration,
        data=data, effort="balanced", timing_settings=ONCE,
    ).to_dict()  # fmt: skip
    assert found["calibration"]["unit"] == "nats per prediction"
    assert (found["calibration"]["examples"], found["calibration"]["holdout"]) == (6, 2)
    evaluation = found["evaluation"]
    inputs = inputs_of(name, 2)
    assert (evaluation["metric"], evaluation["task"]) == ("perplexity", "text-to-text")
    assert evaluation["count"] == int((inputs["labels"] != -100).sum())
    model = getattr(transformers, json.loads((folders[name] / "config.json").read_text())["architectures"][0])
    with torch.no_grad():
        loss = model.from_pretrained(folders[name]).eval()(**inputs).loss
    assert evaluation["loss"]["baseline"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sources_and_targets_are_tokenized_and_padding_is_not_to_be_predicted(
    name: str, folders: dict[str, Path], tmp_path: Path, *, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("abc", "cba"), ("abcdefg", "g"), ("de", "ed"), ("h", "hhhh"), ("fgh", "hgf")]
    for file, shift in (("calibration", 0), ("data", 1)):
        rows = [json.dumps({"source": source, "target": target[shift:] + "a"}) for source, target in pairs]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(rows))
    found = result(
        capsys, folders[name], *SMALLER, "--dry-run", "--json", "--effort", "balanced", "-q",
        "--calibration", tmp_path / "calibration.jsonl",
    )  # fmt: skip
    assert found["calibration"]["examples"] + found["calibration"]["holdout"] == 5
    measured = result(capsys, "evaluate", folders[name], "--data", tmp_path / "data.jsonl", "--json", "-q")
    # The letters of every target, and its end.
    assert measured["count"] == sum(len(target) - 1 + 1 + 1 for _, target in pairs)
    assert measured["metric"] == "perplexity"


def test_a_model_of_images_and_texts_is_calibrated_on_both(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(inputs_of("clip", 1), tmp_path / "pairs.npz")
    found = result(
        capsys, folders["clip"], *SMALLER, "-o", tmp_path / "small", "--json", "--calibration", data, "-q",
        "--effort", "balanced",
    )  # fmt: skip
    assert found["calibration"]["unit"] == "half the squared change of the outputs"
    assert sum(layer["rank"] is not None for layer in found["layers"]) > 4
    assert "no labels to measure by" in result(
        capsys, "evaluate", folders["clip"], "--data", data, "--json", "-q", status=2
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: {**arrays, "labels": arrays["labels"][:3]}, "one row for each example"),
        (lambda arrays: {**arrays, "melody": arrays["labels"].clone()}, "melody"),
        (lambda arrays: {**arrays, "labels": arrays["labels"] + 50}, "token id 59 is beyond"),
        (lambda arrays: {**arrays, "labels": torch.full_like(arrays["labels"], -100)}, "no label is to be predicted"),
        (lambda arrays: {**arrays, "input_features": arrays["input_features"] * torch.nan}, "NaN or Inf"),
        (lambda arrays: {**arrays, "input_features": arrays["input_features"][..., :9]}, "does not accept this data"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_a_line(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
    folders: dict[str, Path],
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = {name: array.contiguous() for name, array in change(inputs_of("whisper", 1)).items()}
    data = written(arrays, tmp_path / "data.safetensors")
    error = result(capsys, "evaluate", folders["whisper"], "--data", data, "--json", "-q", status=2)
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_sources_and_targets_are_for_encoder_decoders(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n' * 4)
    error = result(capsys, "evaluate", folders["clip"], "--data", tmp_path / "pairs.jsonl", "-q", status=2)
    assert "for encoder-decoders" in error


class Gated(torch.nn.Module):
    """Takes two inputs by names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(12, 24), torch.nn.Linear(8, 24)
        self.head = torch.nn.Linear(24, 4)

    def forward(self, signal: Tensor, control: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(signal)) * torch.sigmoid(self.right(control)))


def gated_arrays() -> dict[str, Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(EXAMPLES) % 4
    return {"signal": torch.randn(EXAMPLES, 12), "control": torch.randn(EXAMPLES, 8), "labels": labels}


def test_a_network_of_ones_own_takes_arrays_by_the_names_of_its_forward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(gated_arrays(), tmp_path / "data.npz")
    save_file(Gated().state_dict(), tmp_path / "model.safetensors")
    factory = f"{__file__}:Gated"
    found = result(
        capsys, tmp_path / "model.safetensors", "--model", factory, "--keep", "0.6", "--bits", "16",
        "--calibration", data, "--json", "--dry-run", "-q",
    )  # fmt: skip
    assert found["calibration"]["unit"] == "nats per prediction"
    measured = result(
        capsys, "evaluate", tmp_path / "model.safetensors", "--model", factory, "--data", data, "--json", "-q"
    )
    assert (measured["metric"], measured["count"]) == ("accuracy", EXAMPLES)
    assert compressor.evaluate(Gated(), data=data).count == EXAMPLES


def test_a_module_in_memory_takes_arrays_by_the_names_of_its_forward(tmp_path: Path) -> None:
    data = written(inputs_of("whisper", 1), tmp_path / "data.npz")
    torch.manual_seed(0)
    found = compressor.compress(whisper(), keep=0.7, calibration=data, effort="balanced", prefer="size", bits=16)
    assert found.plan.calibration is not None
    assert found.plan.calibration.unit == "nats per prediction"
