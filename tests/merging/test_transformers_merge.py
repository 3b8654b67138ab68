"""Model folders: fine-tunes of one base added up, loading in transformers, and refused where they do not match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressor import BadInput, compress, merge
from compressor.lowrank import LowRankSpec

pytestmark = pytest.mark.slow

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60, "n_positions": 32, "bos_token_id": 1}


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"eos_token_id": 2} | changes))


def fine_tuned(base: Any, seed: int) -> Any:
    """The base with a change of rank two in every matrix."""
    tuned = model("llama" if base.config.model_type == "llama" else "gpt2")
    tuned.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.ndim == 2:
            parameter.data += 0.05 * torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1])
    return tuned


@pytest.fixture
def folders(tmp_path: Path) -> Any:
    def save(**models: Any) -> list[Path]:
        for name, each in models.items():
            each.save_pretrained(tmp_path / name)
        return [tmp_path / name for name in models]

    return save


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_each_fine_tune_changed_is_added_to_the_base(name: str, folders: Any, tmp_path: Path) -> None:
    base = model(name)
    tuned = [fine_tuned(base, seed) for seed in (1, 2)]
    *parts, start = folders(a=tuned[0], b=tuned[1], base=base)
    (parts[0] / "README.md").write_text("how A alone was trained")
    merging = merge(parts, base=start, output=tmp_path / "out", mode="sum", max_shard_size="40KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    first, second, before = (each.state_dict() for each in (*tuned, base))
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, first[key] + second[key] - before[key], atol=1e-5, rtol=1e-5)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not (tmp_path / "out" / "README.md").exists()
    # Measured on what was trained on top of the base, which is of rank two.
    assert {layer.random for layer in merging.layers} == {2 / 32, 2 / 48} if name == "llama" else {2 / 32, 2 / 128}
    assert any("fine-tunes" in warning for warning in merging.warnings)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compressed_fine_tunes_merge_into_a_folder_that_loads(name: str, folders: Any, tmp_path: Path) -> None:
    base = model(name)
    paths = folders(a=fine_tuned(base, 1), b=fine_tuned(base, 2), base=base)
    for path in paths:
        compress(path, output=path.with_name(f"small-{path.name}"), keep=0.15, calibration="none", prefer="size")
    small = [path.with_name(f"small-{path.name}") for path in paths]
    merge(small[:2], base=small[2], output=tmp_path / "out", mode="sum")
    loaded, *parts = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "out", *small)
    )
    layer = "model.layers.0.mlp.up_proj" if name == "llama" else "transformer.h.0.mlp.c_fc"
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, first, second, before = (each.get_submodule(layer)(x) for each in (loaded, *parts))
    torch.testing.assert_close(found, first + second - before, atol=1e-4, rtol=1e-4)


def test_compressed_folders_keep_their_pairs(folders: Any, tmp_path: Path) -> None:
    base = model("llama")
    paths = folders(a=fine_tuned(base, 1), base=base)
    small = [path.with_name(f"small-{path.name}") for path in paths]
    for path, output in zip(paths, small, strict=True):
        compress(path, output=output, keep=0.1, calibration="none", prefer="size")
    merge([small[0], small[0]], base=small[1], output=tmp_path / "out", mode="sum")
    merged, *before = (
        LowRankSpec.from_dict(json.loads((path / "config.json").read_text())["quantization_config"]).layers
        for path in (tmp_path / "out", *small)
    )
    assert merged
    assert all(layer.rank == 2 * before[0][name].rank + before[1][name].rank for name, layer in merged.items())


def refused(match: str, parts: list[Path], output: Path, **named: Any) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        merge(parts, output=output, **named)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_folders_that_do_not_match_are_refused_in_one_line(folders: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = model("llama")
    a, b, start = folders(a=fine_tuned(base, 1), b=fine_tuned(base, 2), base=base)
    refused("normalization", [a, b], out, mode="sum")
    refused("concat is for feed-forward", [a, b], out, mode="concat")
    (heads,) = folders(heads=model("llama", num_attention_heads=2))
    refused("num_attention_heads|head_dim", [a, heads], out, mode="sum", base=start)
    (words,) = folders(words=model("llama", vocab_size=64))
    refused("vocab_size is 60 .* and 64", [a, words], out, mode="sum", base=start)
    (other,) = folders(other=model("gpt2"))
    refused("config.json", [a, other], out, mode="sum", base=start)
    for folder, order in ((a, {"x": 0, "y": 1}), (b, {"y": 0, "x": 1})):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": order}}))
    refused("different vocabularies", [a, b], out, mode="sum", base=start)
    refused("a folder and a file", [a, b / "model.safetensors"], out, mode="sum", base=start)
