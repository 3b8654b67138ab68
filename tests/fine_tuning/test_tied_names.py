"""Tied tensors are stored under whichever of their names a writer chose; nothing that is done may depend on it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from compressor import BadInput, compress, export, merge, restore

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> Any:
    config = transformers.LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
        tie_word_embeddings=True,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def bart() -> Any:
    layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **layers, **SIZES)
    return transformers.BartForConditionalGeneration(config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=60, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"llama": llama, "bart": bart, "t5": t5}


def _under_the_last_name(model: Any, folder: Path) -> None:
    """The one name that `save_pretrained` does not store, and nothing in the file that says what it is tied to."""
    save_file(_stored_last(model), folder / "model.safetensors", metadata={"format": "pt"})


def _stored_last(model: Any) -> dict[str, torch.Tensor]:
    names: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        names[tensor.data_ptr()] = name
    return {name: model.state_dict()[name].contiguous() for name in names.values()}


def _by_save_model(model: Any, folder: Path) -> None:
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _by_torch(model: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _by_transformers(model: Any, folder: Path) -> None:
    pass


def _twice(model: Any, folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Writer = Callable[[Any, Path], None]


def saved(model: Any, folder: Path, write: Writer) -> Path:
    model.save_pretrained(folder)
    write(model, folder)
    return folder


def tuned_from(base: Any, seed: int = 1) -> Any:
    """A copy with all embeddings changed, which are tied, and one matrix of the first layer."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embedding = tuned.get_input_embeddings().weight
        embedding.add_(0.1 * torch.randn(embedding.shape, generator=generator))
        matrix = next(p for name, p in tuned.named_parameters() if name.endswith(("q_proj.weight", ".q.weight")))
        matrix.add_(0.1 * torch.randn(len(matrix), 2, generator=generator) @ torch.randn(2, matrix.shape[1]))
    return tuned


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inputs = {"input_ids": torch.arange(3, 20)[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(5, 15)[None]
    result = model.eval()(**inputs).logits
    assert isinstance(result, torch.Tensor)
    return result


WRITERS = {
    "base by transformers": (_by_transformers, _under_the_last_name),
    "base under the last name": (_under_the_last_name, _by_transformers),
    "base by save_model": (_by_save_model, _by_transformers),
    "both by save_model": (_by_save_model, _by_save_model),
    "base by torch": (_by_torch, _under_the_last_name),
    "tuned stored twice": (_under_the_last_name, _twice),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("writers", WRITERS)
@pytest.mark.parametrize("name", MODELS)
def test_base_and_difference_are_the_fine_tune(name: str, writers: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS[name]()
    tuned = tuned_from(base)
    for_base, for_tuned = WRITERS[writers]
    start, end = saved(base, tmp_path / "base", for_base), saved(tuned, tmp_path / "tuned", for_tuned)
    expected = logits(type(base).from_pretrained(end))
    torch.testing.assert_close(expected, logits(tuned))

    pairs = tmp_path / "pairs.safetensors"
    compress(end, base=start, output=pairs, tolerance=1e-4)
    export(pairs, to="dense", base=start, output=tmp_path / "dense")
    torch.testing.assert_close(logits(type(base).from_pretrained(tmp_path / "dense")), expected, rtol=0, atol=2e-5)

    peft = pytest.importorskip("peft")
    compress(end, base=start, output=tmp_path / "adapter", tolerance=1e-4)
    export(pairs, to="lora", base=start, output=tmp_path / "again")
    for adapter in ("adapter", "again"):
        loaded = peft.PeftModel.from_pretrained(type(base).from_pretrained(start), tmp_path / adapter)
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sums_of_fine_tunes_are_the_same_whatever_was_stored(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS[name]()
    parts = [tuned_from(base, seed) for seed in (1, 2)]
    sums = {}
    for case, writers in {
        "alike": (_by_transformers, _by_transformers, _by_transformers),
        "mixed": (_under_the_last_name, _by_transformers, _by_save_model),
    }.items():
        folders = [
            saved(model, tmp_path / case / str(number), write)
            for number, (model, write) in enumerate(zip((base, *parts), writers, strict=True))
        ]
        merge(folders[1:], base=folders[0], output=tmp_path / case / "sum", mode="sum")
        merged = type(base).from_pretrained(tmp_path / case / "sum")
        embeddings = [model.get_input_embeddings().weight for model in (base, *parts)]
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        torch.testing.assert_close(
            merged.get_input_embeddings().weight, embeddings[1] + embeddings[2] - embeddings[0], rtol=0, atol=1e-6
        )
        sums[case] = logits(merged)
    torch.testing.assert_close(sums["mixed"], sums["alike"])


class _Tied(nn.Module):
    """Two layers that share a weight, as autoencoders and weight-tied networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.own = (nn.Linear(32, 32) for _ in range(3))
        self.last.weight = self.first.weight


def test_a_layer_that_a_file_notes_as_tied_stays_so(tmp_path: Path) -> None:
    """What `save_model` notes in the metadata is all that tells a stranger's file of ties."""
    torch.manual_seed(0)
    model = _Tied()
    save_model(model, str(tmp_path / "model.safetensors"))
    report = compress(tmp_path / "model.safetensors", output=tmp_path / "small.safetensors", keep=0.9)
    assert [layer.name for layer in report.plan.layers] == ["own"]
    assert "first.weight" in load_file(tmp_path / "small.safetensors")
    restore(tmp_path / "small.safetensors", output=tmp_path / "again.safetensors")
    again = _Tied()
    load_model(again, tmp_path / "again.safetensors")
    assert again.first.weight is again.last.weight
    torch.testing.assert_close(again.last.weight, model.last.weight)
    restore(tmp_path / "small.safetensors", output=tmp_path / "again.pt")
    again.load_state_dict(torch.load(tmp_path / "again.pt"))


def test_ties_that_a_file_notes_are_followed_in_differences_and_sums(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tuned = _Tied(), _Tied()
    save_model(base, str(tmp_path / "base.safetensors"))
    # As torch writes it: both names, of one tensor.
    torch.save({name: tuned.state_dict()[name] for name in reversed(tuned.state_dict())}, tmp_path / "tuned.pt")
    compress(tmp_path / "tuned.pt", base=tmp_path / "base.safetensors", output=tmp_path / "d.safetensors", keep=0.5)
    export(
        tmp_path / "d.safetensors", to="dense", base=tmp_path / "base.safetensors", output=tmp_path / "e.safetensors"
    )
    merge(
        [tmp_path / "base.safetensors", tmp_path / "tuned.pt"],
        base=tmp_path / "base.safetensors",
        output=tmp_path / "sum.safetensors",
        mode="sum",
    )
    for file in ("e", "sum"):
        again = _Tied()
        load_model(again, tmp_path / f"{file}.safetensors")
        torch.testing.assert_close(again.last.weight, tuned.last.weight)
    with safe_open(tmp_path / "sum.safetensors", "pt") as opened:
        assert opened.metadata()["last.weight"] == "first.weight"


def test_a_tie_that_only_one_of_both_has_is_refused(tmp_path: Path) -> None:
    """A fine-tune whose head was untied: no tensor of the base stands for its head alone."""
    torch.manual_seed(0)
    base = llama()
    saved(base, tmp_path / "base", _by_transformers)
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    for one, other in (("tuned", "base"), ("base", "tuned")):
        with pytest.raises(BadInput, match=r"(one|two) tensors? in it, and (one|two) in its base"):
            compress(tmp_path / one, base=tmp_path / other, output=tmp_path / "out", tolerance=0.1)
