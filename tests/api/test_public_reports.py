"""What people reported of other tools that extract, resize, or merge adapters, rebuilt small: what happens here.

Each test is one situation. Those that have a room of their own are tested there: REPORTS names the test of each.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, restore
from compressor.cli.run import run
from compressor.evaluation import process_memory

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


def test_tied_embeddings_that_the_model_scales(tmp_path: Path) -> None:
    """Gemma 2: what its embedding and its head share has changed with everything else."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**LLAMA, head_dim=8, num_key_value_heads=4, query_pre_attn_scalar=8)

    def change(model: Any) -> None:
        in_linear_layers(2)(model)
        model.model.embed_tokens.weight.add_(0.01 * torch.randn(TOKENS, 32))
        model.model.norm.weight.add_(0.1)

    base, end, tuned = folders(tmp_path, transformers.Gemma2ForCausalLM(config), change)
    compress(end, base=base, output=tmp_path / "adapter", tolerance=1e-3)
    start = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(start, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=1e-5)
    compress(end, base=base, output=tmp_path / "pairs.safetensors", tolerance=1e-3)
    restore(tmp_path / "pairs.safetensors", base=base, output=tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(tuned), rtol=0, atol=1e-5)


def test_an_adapter_has_every_key_that_peft_expects(tmp_path: Path) -> None:
    """The head changed too: its pair is there, and nothing is missing or unexpected."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def change(model: Any) -> None:
        in_linear_layers(3)(model)
        model.lm_head.weight.copy_(low_rank(model.lm_head.weight, 3, seed=99))

    base, end, tuned = folders(tmp_path, transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), change)
    compress(end, base=base, output=tmp_path / "adapter", tolerance=1e-3)
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_A.weight" in stored
    expected = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], expected[name].to(stored[name])) for name in stored)
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=1e-5)


def test_the_text_part_of_a_model_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved by itself, its names lack `language_model.`: the pairs have the names of the base, which is loaded."""
    text = matrices()
    base = {f"model.language_model.{name}": weight for name, weight in text.items()} | {
        "model.visual.weight": -text["first.weight"]
    }
    tuned = {f"model.{name}": low_rank(weight, 2) for name, weight in text.items()}
    start, end = files(tmp_path, base, tuned)
    asked = [str(end), "--base", str(start), "--tolerance", "0.001", "-o", str(tmp_path / "pairs.safetensors")]
    assert run(asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "'model.' is 'model.language_model.' in the base; 1 in the base alone, which stay as they are" in said
    restore(tmp_path / "pairs.safetensors", base=start, output=tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert torch.equal(again["model.visual.weight"], base["model.visual.weight"])
    for name in text:
        torch.testing.assert_close(again[f"model.language_model.{name}"], tuned[f"model.{name}"], rtol=0, atol=1e-5)


def test_a_tensor_that_the_base_lacks_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = matrices()
    tuned = {name: low_rank(weight, 2) for name, weight in base.items()} | {"score.weight": torch.ones(3, 3)}
    start, end = files(tmp_path, base, tuned)
    assert run([str(end), "--base", str(start), "-o", str(tmp_path / "pairs.safetensors")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the base lacks score.weight" in said
    assert not (tmp_path / "pairs.safetensors").exists()


def test_pairs_of_full_rank_are_the_fine_tune(tmp_path: Path) -> None:
    base, generator = matrices(), torch.Generator().manual_seed(5)
    tuned = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in base.items()}
    start, end = files(tmp_path, base, tuned)
    compress(end, base=start, output=tmp_path / "pairs.safetensors", keep=1.0)
    restore(tmp_path / "pairs.safetensors", base=start, output=tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, weight in tuned.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6)


def test_a_base_that_is_none_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing of the base is in the weights, a pair stands for whole weights."""
    base, generator = matrices(), torch.Generator().manual_seed(6)
    start, end = files(
        tmp_path, base, {name: torch.randn(each.shape, generator=generator) for name, each in base.items()}
    )
    assert run([str(end), "--base", str(start), "--keep", "0.4", "-o", str(tmp_path / "pairs.safetensors")]) == 0
    assert "matrices have next to nothing of the base in them" in " ".join(capsys.readouterr().out.split())


def test_a_convolution_at_rank_one_takes_no_square_of_its_inputs(tmp_path: Path) -> None:
    """3 x 3 kernels of many channels: a full SVD would have right singular vectors of 2.7 GB."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(32, 2048, 3, 3, generator=generator)
    start, end = files(tmp_path, {"conv.weight": weight}, {"conv.weight": low_rank(weight, 1)})
    before = process_memory()
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors", tolerance=1e-3)
    [layer] = report.plan.layers
    assert layer.rank == 1
    assert process_memory() - before < 5e8
    pairs = load_file(tmp_path / "pairs.safetensors")
    assert sorted(each.numel() for each in pairs.values() if each.numel()) == [32, 2048 * 9]


def test_the_same_difference_gives_the_same_bytes(tmp_path: Path) -> None:
    base = matrices()
    start, end = files(tmp_path, base, {name: low_rank(weight, 20) for name, weight in base.items()})
    for name in ("one", "two"):
        compress(end, base=start, output=tmp_path / f"{name}.safetensors", keep=0.3)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_llama_cpp_refuses_of_an_adapter_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))

    def change(model: Any) -> None:
        in_linear_layers(2)(model)
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape))

    base, end, _ = folders(tmp_path, model, change)
    asked = [str(end), "--base", str(base), "--tolerance", "0.001"]
    assert run([*asked, "-o", str(tmp_path / "whole")]) == 0
    assert "llama.cpp refuses modules_to_save (1 of them)" in " ".join(capsys.readouterr().out.split())
    assert run([*asked, "--exclude", "lm_head", "-o", str(tmp_path / "excluded")]) == 0
    report = compress(end, base=base, output=tmp_path / "again", keep=0.4)
    assert report.fine_tune is not None
    names = set(load_file(tmp_path / "again" / "adapter_model.safetensors"))
    pairs_alone = all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    assert (report.fine_tune.llama_cpp_obstacles == ()) == pairs_alone


def test_experts_alone_that_changed_are_all_there(tmp_path: Path) -> None:
    """Mixtral, one tensor an expert in the file: none of the changes is lost."""
    torch.manual_seed(0)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}

    def change(model: Any) -> None:
        for name, weight in model.named_parameters():
            if "experts" in name:  # all of a block in one parameter
                for place, expert in enumerate(weight):
                    expert.copy_(low_rank(expert, 2, seed=place))

    base, end, tuned = folders(
        tmp_path, transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, **sizes)), change
    )
    names = [name for name in load_file(base / "model.safetensors") if "experts" in name]
    assert len(names) == 2 * 4 * 3  # blocks, experts, matrices
    compress(end, base=base, output=tmp_path / "pairs.safetensors", tolerance=0.02)
    restore(tmp_path / "pairs.safetensors", base=base, output=tmp_path / "again")
    before, after, again = (load_file(each / "model.safetensors") for each in (base, end, tmp_path / "again"))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed <= set(names)
    assert {name for name in again if not torch.equal(before[name], again[name])} == changed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=2e-3)


def test_every_tensor_that_changed_is_stored_or_named(tmp_path: Path) -> None:
    """Convolutions in one dimension and transposed, depthwise, recurrent layers, and slopes of an activation."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "down": nn.Conv1d(8, 24, 5),
            "depthwise": nn.Conv1d(24, 24, 3, groups=24),
            "slopes": nn.PReLU(24),
            "recurrent": nn.LSTM(24, 24),
            "up": nn.ConvTranspose1d(24, 8, 5),
            "head": nn.Linear(24, 24),
        }
    )
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = {
        name: low_rank(each, 1) if each.dim() > 1 and "depth" not in name else each + 0.1 for name, each in base.items()
    }
    start, end = files(tmp_path, base, tuned)
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors", tolerance=1e-3)
    assert report.fine_tune is not None
    paired = {layer.name for layer in report.plan.layers if layer.rank is not None}
    assert {"down", "head"} <= paired
    skipped = {layer.name: layer.skip for layer in report.skipped}
    for name, value in tuned.items():
        layer = name.removesuffix(".weight")
        assert layer in paired or name in report.fine_tune.in_full, name
        if value.dim() > 1 and layer not in paired:
            assert skipped.get(layer) or any(each.name == layer for each in report.plan.layers), name
    restore(tmp_path / "pairs.safetensors", base=start, output=tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=2e-3)


def test_files_of_diffusion_models_are_taken_by_their_names_alone(tmp_path: Path) -> None:
    """One file of a text encoder, a U-Net, and an autoencoder that no configuration describes."""
    generator, unet = torch.Generator().manual_seed(8), "model.diffusion_model"
    text = "cond_stage_model.transformer.text_model"
    shapes = {
        f"{unet}.input_blocks.0.0.weight": (32, 4, 3, 3),
        f"{unet}.input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3),
        f"{unet}.input_blocks.1.1.proj_in.weight": (32, 32, 1, 1),
        f"{unet}.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (32, 32),
        f"{unet}.double_blocks.0.img_attn.qkv.weight": (96, 32),
        f"{text}.encoder.layers.0.self_attn.q_proj.weight": (24, 24),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (48, 24),
        "first_stage_model.encoder.conv_in.weight": (16, 3, 3, 3),
    }
    base = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    tuned = {name: each.clone() if "first" in name else low_rank(each, 1) for name, each in base.items()}
    start, end = files(tmp_path, base, tuned)
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors", keep=0.3)
    changed = {name.removesuffix(".weight") for name in tuned if "first" not in name}
    assert {layer.name for layer in report.plan.layers if layer.rank == 1} == changed
    restore(tmp_path / "pairs.safetensors", base=start, output=tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(again[name].float(), tensor.float(), rtol=0, atol=0.02)


_HERE = "tests/api/test_public_reports.py"
REPORTS: dict[str, tuple[str, ...]] = {
    "not a number, repeated singular values, no difference": (
        f"{_HERE}::test_a_number_that_is_none_is_named_before_any_work",
        f"{_HERE}::test_repeated_singular_values_are_no_obstacle",
        f"{_HERE}::test_a_layer_that_did_not_change_is_left_out_and_counted",
    ),
    "added tokens": (f"{_HERE}::test_added_tokens_are_stored_in_full",),
    "bfloat16 on both sides": (
        "tests/fine_tuning/test_rounded_differences.py::test_a_merged_adapter_comes_back_with_its_rank",
    ),
    "tied embeddings that are scaled": (f"{_HERE}::test_tied_embeddings_that_the_model_scales",),
    "a head that is missing in the adapter": (f"{_HERE}::test_an_adapter_has_every_key_that_peft_expects",),
    "a model with images, and its text part; parts of checkpoints": (
        f"{_HERE}::test_the_text_part_of_a_model_with_images",
        f"{_HERE}::test_a_tensor_that_the_base_lacks_is_named_before_any_work",
        "tests/fine_tuning/test_correspondence.py::test_an_adapter_is_for_the_model_that_is_loaded",
        "tests/fine_tuning/test_correspondence.py::test_a_part_of_a_fine_tune_in_a_folder",
    ),
    "an adapter that gives noise": (
        f"{_HERE}::test_pairs_of_full_rank_are_the_fine_tune",
        f"{_HERE}::test_a_base_that_is_none_is_noticed",
    ),
    "a difference that is rounding": (f"{_HERE}::test_differences_that_rounding_explains_are_named",),
    "memory of a convolution at rank one": (f"{_HERE}::test_a_convolution_at_rank_one_takes_no_square_of_its_inputs",),
    # Small here; benchmarks/adapters.py resizes an adapter of 3,156 modules, and says its time and memory.
    "resizing thousands of modules": ("tests/adapters/test_resize.py::test_each_update_is_the_truncated_svd",),
    "the same result twice": (f"{_HERE}::test_the_same_difference_gives_the_same_bytes",),
    "what llama.cpp refuses": (f"{_HERE}::test_what_llama_cpp_refuses_of_an_adapter_is_said",),
    "experts alone": (f"{_HERE}::test_experts_alone_that_changed_are_all_there",),
    "layers of other kinds": (f"{_HERE}::test_every_tensor_that_changed_is_stored_or_named",),
    "weights in 8-bit floats, kept configurations, latent pairs, experts in MXFP4": (
        "tests/encodings/test_float8.py::test_it_is_the_product_of_floats_and_scales",
        "tests/api/test_quantized_sources.py::test_some_layers_compressed_others_left_as_they_are",
        "tests/lowrank/test_latent_attention.py::test_each_is_measured_and_compressed_by_itself",
        "tests/encodings/test_mxfp4.py::test_it_is_what_transformers_makes_of_it",
        "tests/api/test_quantized_sources.py::test_experts_in_mxfp4",
        "tests/api/test_quantized_sources.py::test_experts_in_mxfp4_become_layers",
    ),
}


def test_each_situation_has_its_test() -> None:
    root = Path(__file__).parents[2]
    assert len(REPORTS) == 15
    for named in (each for several in REPORTS.values() for each in several):
        path, _, name = named.partition("::")
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        assert name in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}, named
