"""What people reported of other tools that extract, resize, or merge adapters, rebuilt small: what happens here.

Each test is one situation. Those that have a room of their own are tested there: REPORTS names the test of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import BadInput, compress, restore
from compressor.cli.run import run

torch.set_num_threads(1)

TOKENS = 60
LLAMA: dict[str, Any] = {
    **{"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def low_rank(like: Tensor, rank: int, *, size: float = 0.2, seed: int = 1) -> Tensor:
    """A change of some rank, of a size relative to that of what it is added to."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = len(like), like[0].numel()
    change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    change *= size * like.float().norm() / change.norm()
    return (like.float() + change.reshape(like.shape)).to(like.dtype)


def matrices(dtype: torch.dtype = torch.float32, *, size: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (48, 32), "second": (32, 48), "third": (40, 40)}
    return {
        f"{name}.weight": torch.randn(size * rows, size * columns, generator=generator).to(dtype)
        for name, (rows, columns) in shapes.items()
    }


def files(folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> tuple[Path, Path]:
    start, end = folder / "base.safetensors", folder / "tuned.safetensors"
    save_file(base, start)
    save_file(tuned, end)
    return start, end


def folders(folder: Path, base: Any, change: Callable[[Any], None]) -> tuple[Path, Path, Any]:
    """A base and a fine-tune of it in folders, and the fine-tune."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        change(tuned)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", tuned


def in_linear_layers(rank: int) -> Callable[[Any], None]:
    """A change of low rank in every linear layer of the blocks."""

    def change(model: Any) -> None:
        for place, weight in enumerate(each for name, each in model.named_parameters() if "proj" in name):
            weight.copy_(low_rank(weight, rank, seed=place))

    return change


@torch.no_grad()
def logits(model: Any, tokens: int = TOKENS) -> Tensor:
    inputs = torch.randint(3, tokens, (2, 7), generator=torch.Generator().manual_seed(2))
    found = model.eval()(input_ids=inputs).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_number_that_is_none_is_named_before_any_work(
    side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = matrices()
    tuned = {name: low_rank(weight, 2) for name, weight in base.items()}
    # The last tensor of all: the others were read, and nothing was decomposed.
    (base if side == "base" else tuned)["third.weight"][3, 5] = float("nan")
    start, end = files(tmp_path, base, tuned)
    output = tmp_path / "pairs.safetensors"
    assert run([str(end), "--base", str(start), "--keep", "0.5", "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{side}.safetensors: tensor third.weight: holds 1 NaN" in said
    assert not output.exists()


def test_repeated_singular_values_are_no_obstacle(tmp_path: Path) -> None:
    base, generator = matrices(), torch.Generator().manual_seed(3)
    tuned = dict(base)
    for name, weight in base.items():
        turned = torch.linalg.qr(torch.randn(len(weight), 8, generator=generator)).Q
        tuned[name] = weight + turned @ torch.linalg.qr(torch.randn(weight.shape[1], 8, generator=generator)).Q.T
    start, end = files(tmp_path, base, tuned)
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors", tolerance=1e-3)
    assert {layer.rank for layer in report.plan.layers} == {8}
    pairs = load_file(tmp_path / "pairs.safetensors")
    for name, weight in tuned.items():
        layer = name.removesuffix(".weight")
        change = pairs[f"{layer}.up.weight"].double() @ pairs[f"{layer}.down.weight"].double()
        torch.testing.assert_close(base[name] + change, weight.double(), rtol=0, atol=1e-5)


def test_a_layer_that_did_not_change_is_left_out_and_counted(tmp_path: Path) -> None:
    base = matrices()
    tuned = {**base, "first.weight": low_rank(base["first.weight"], 2)}
    start, end = files(tmp_path, base, tuned)
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors")
    assert [(layer.name, layer.rank) for layer in report.plan.layers] == [("first", 2)]
    assert report.fine_tune is not None
    assert report.fine_tune.unchanged == 2
    assert {(layer.name, layer.skip) for layer in report.skipped} == {
        ("second", "as in the base"),
        ("third", "as in the base"),
    }
    names = set(load_file(tmp_path / "pairs.safetensors"))
    assert not any(name.startswith(("second", "third")) for name in names)


def test_the_base_itself_is_no_fine_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, end = files(tmp_path, matrices(), matrices())
    assert run([str(end), "--base", str(start), "-o", str(tmp_path / "pairs.safetensors")]) == 2
    assert "does not differ from its base" in capsys.readouterr().err


def add_tokens(model: Any) -> None:
    in_linear_layers(2)(model)
    model.resize_token_embeddings(TOKENS + 3, mean_resizing=False)


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_stored_in_full(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    base, end, tuned = folders(tmp_path, model, add_tokens)
    report = compress(end, base=base, output=tmp_path / "pairs.safetensors", tolerance=1e-3)
    assert report.fine_tune is not None
    assert report.fine_tune.vocabulary is not None
    assert (report.fine_tune.vocabulary.before, report.fine_tune.vocabulary.after) == (TOKENS, TOKENS + 3)
    embeddings = ("model.embed_tokens.weight",) if tied else ("lm_head.weight", "model.embed_tokens.weight")
    assert tuple(sorted(report.fine_tune.in_full)) == embeddings
    assert {layer.rank for layer in report.plan.layers} == {2}
    restore(tmp_path / "pairs.safetensors", base=base, output=tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.vocab_size == TOKENS + 3
    torch.testing.assert_close(logits(again, TOKENS + 3), logits(tuned, TOKENS + 3), rtol=0, atol=1e-5)
    for asked in (["evaluate", "--data", "any"], ["export", "--to", "lora", "-o", str(tmp_path / "adapter")]):
        assert run([*asked, str(tmp_path / "pairs.safetensors"), "--base", str(base)]) == 2
        assert "pairs.safetensors: has 3 more tokens than its base" in capsys.readouterr().err


def test_an_adapter_with_added_tokens_says_how_to_load_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    base, end, tuned = folders(tmp_path, model, add_tokens)
    compress(end, base=base, output=tmp_path / "adapter", tolerance=1e-3)
    assert "base.resize_token_embeddings(63)" in (tmp_path / "adapter" / "README.md").read_text()
    start = transformers.AutoModelForCausalLM.from_pretrained(base)
    start.resize_token_embeddings(TOKENS + 3, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(start, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, TOKENS + 3), logits(tuned, TOKENS + 3), rtol=0, atol=1e-5)


def test_a_module_with_added_tokens_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    _, _, tuned = folders(tmp_path, model, add_tokens)
    small = compress(tuned, base=model, tolerance=1e-3).model
    torch.testing.assert_close(logits(small, TOKENS + 3), logits(tuned, TOKENS + 3), rtol=0, atol=1e-5)


def test_a_smaller_vocabulary_is_refused_before_any_work(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    base, end, _ = folders(tmp_path, model, add_tokens)
    with pytest.raises(BadInput, match=r"is 60 x 32, and in its base 63 x 32; save the fine-tune with the vocabulary"):
        compress(base, base=end, output=tmp_path / "adapter", keep=0.5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_differences_that_rounding_explains_are_named(
    stored: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of weights that were rounded alone, and of weights that moved by far less than the spacing of their dtype."""
    exact, generator = matrices(size=4), torch.Generator().manual_seed(4)
    base = {name: weight.to(stored) for name, weight in exact.items()}
    moved = {
        name: weight * (1 + 2.0**-12 * torch.randn(weight.shape, generator=generator)) for name, weight in exact.items()
    }
    tuned = {name: (exact if stored == torch.float32 else moved)[name].to(torch.bfloat16) for name in exact}
    assert all((tuned[name] != base[name]).any() for name in exact)
    tuned["first.weight"] = low_rank(exact["first.weight"], 2, size=0.1).to(torch.bfloat16)
    start, end = files(tmp_path, base, tuned)
    assert run([str(end), "--base", str(start), "--keep", "0.3", "-o", str(tmp_path / "pairs.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "the difference of second and 1 more is no more than rounding" in " ".join(said.split())
    report = compress(end, base=start, output=tmp_path / "again.safetensors", keep=0.3)
    assert report.fine_tune is not None
    assert report.fine_tune.only_rounding == ("second", "third")
    shares = report.fine_tune.rounding_shares
    assert shares["first"] < 0.2
    assert min(shares["second"], shares["third"]) > 0.95
