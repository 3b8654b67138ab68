"""A fine-tune in other names than its base: base and difference together compute what it computes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from compressor import BadInput, compress, restore
from compressor.cli.run import run
from compressor.fine_tuning.correspondence import Correspondence

torch.set_num_threads(1)

TOKENS = 60
TEXT: dict[str, Any] = {
    **{"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {**SMALL, "image_size": 28, "patch_size": 14}


def gemma() -> tuple[Any, Any]:
    """In its file all names of the language model are behind `language_model.`; embedding and head are tied."""
    vision = transformers.SiglipVisionConfig(**IMAGES)
    config = transformers.Gemma3Config(
        text_config=TEXT | {"query_pre_attn_scalar": 8}, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config), transformers.Gemma3ForCausalLM(config.text_config)


def llava() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**IMAGES)
    )
    return transformers.LlavaForConditionalGeneration(config), transformers.LlamaForCausalLM(config.text_config)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    inputs = torch.randint(8, TOKENS, (2, 7), generator=torch.Generator().manual_seed(2))
    found = model.eval()(input_ids=inputs).logits
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def fine_tuned(model: Any) -> Any:
    """Changes of rank two in the linear layers of the language model, and a norm that changed."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "vision" in name:
            continue
        if "_proj" in name and "layers" in name:
            change = torch.randn(len(weight), 2, generator=generator)
            change = change @ torch.randn(2, weight.shape[1], generator=generator)
            weight.add_(0.2 * weight.norm() / change.norm() * change)
        elif name.endswith("layers.0.input_layernorm.weight"):
            weight.add_(0.1)
    return tuned


@dataclass(frozen=True)
class Pair:
    """A model with images and the language model in it, as folders, and fine-tunes of both."""

    folder: Path
    whole: Any
    text: Any

    def of(self, name: str) -> Any:
        return self.whole if name == "whole" else self.text

    def tuned(self, name: str) -> Any:
        """The fine-tune, saved beside its base."""
        model = fine_tuned(self.of(name))
        model.save_pretrained(self.folder / f"{name}-tuned")
        return model


@pytest.fixture(params=[gemma, llava], ids=["gemma", "llava"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    torch.manual_seed(0)
    whole, text = request.param()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    torch.testing.assert_close(logits(whole), logits(text))
    whole.save_pretrained(tmp_path / "whole")
    text.save_pretrained(tmp_path / "text")
    return Pair(tmp_path, whole, text)


@pytest.mark.parametrize(("tuned", "base"), [("text", "whole"), ("whole", "text")])
def test_an_adapter_is_for_the_model_that_is_loaded(pair: Pair, tuned: str, base: str) -> None:
    peft = pytest.importorskip("peft")
    wanted, output = pair.tuned(tuned), pair.folder / "adapter"
    report = compress(pair.folder / f"{tuned}-tuned", base=pair.folder / base, output=output, tolerance=1e-3)
    assert {layer.rank for layer in report.plan.layers} == {2}
    start = type(pair.of(base)).from_pretrained(pair.folder / base)
    loaded = peft.PeftModel.from_pretrained(start, output)
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=0, atol=1e-5)
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert f"transformers.{type(pair.of(base)).__name__}.from_pretrained" in (output / "README.md").read_text()


def test_what_only_one_of_them_has_is_said(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    outside = {
        name
        for name in load_file(pair.folder / "whole" / "model.safetensors")
        if not name.startswith("language_model.")
    }
    assert outside
    for tuned, base in (("text", "whole"), ("whole", "text")):
        pair.tuned(tuned)
        asked = [str(pair.folder / f"{tuned}-tuned"), "--base", str(pair.folder / base), "--tolerance", "0.001"]
        assert run([*asked, "--dry-run"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        fine_tune = compress(asked[0], base=asked[2], tolerance=0.001, dry_run=True).fine_tune
        assert fine_tune is not None
        found = fine_tune.correspondence
        assert found is not None
        if tuned == "text":
            assert found == Correspondence("", "language_model.", len(outside), ())
            assert f"names behind 'language_model.' in the base; {len(outside)} in the base alone" in said
        else:
            assert found == Correspondence("language_model.", "", 0, found.left_out)
            assert set(found.left_out) == outside
            assert "names without 'language_model.' in the base; left out: " in said
        known = len(load_file(pair.folder / "text" / "model.safetensors"))
        assert fine_tune.unchanged == known - 2 * 7 - 1


def test_pairs_make_the_fine_tune_inside_of_its_base(pair: Pair) -> None:
    wanted, pairs = pair.tuned("text"), pair.folder / "pairs.safetensors"
    compress(pair.folder / "text-tuned", base=pair.folder / "whole", output=pairs, tolerance=1e-3)
    restore(pairs, base=pair.folder / "whole", output=pair.folder / "again")
    again = type(pair.whole).from_pretrained(pair.folder / "again")
    torch.testing.assert_close(logits(again), logits(wanted), rtol=0, atol=1e-5)
    before, after = (load_file(pair.folder / each / "model.safetensors") for each in ("whole", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("language_model."))


def test_calibrated_ranks_are_those_of_the_language_model_in_its_base(pair: Pair) -> None:
    peft = pytest.importorskip("peft")
    wanted, output = pair.tuned("text"), pair.folder / "adapter"
    inputs = torch.randint(8, TOKENS, (16, 9), generator=torch.Generator().manual_seed(3))
    data = DataLoader([{"input_ids": each, "labels": each} for each in inputs], batch_size=4)  # type: ignore[arg-type]
    compress(
        pair.folder / "text-tuned", base=pair.folder / "whole", output=output, keep=0.2, calibration=data, effort="fast"
    )
    loaded = peft.PeftModel.from_pretrained(type(pair.whole).from_pretrained(pair.folder / "whole"), output)
    lost = [float((logits(each) - logits(wanted)).norm()) for each in (loaded, pair.whole)]
    assert lost[0] < 0.2 * lost[1]


def test_a_head_that_is_no_longer_its_embedding_is_refused(tmp_path: Path) -> None:
    """Tied in the fine-tune alone: its file has no head, and that of the base would be another."""
    torch.manual_seed(0)
    whole, _ = llava()
    whole.save_pretrained(tmp_path / "whole")
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))
    fine_tuned(tied).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    with pytest.raises(BadInput, match="are one tensor in it, and two in its base"):
        compress(tmp_path / "tied", base=tmp_path / "whole", output=tmp_path / "adapter", tolerance=1e-3)
    assert not (tmp_path / "adapter").exists()


def weights(*names: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(24, 24, generator=generator) for name in names}


def changed(tensors: dict[str, Tensor], add: str = "", remove: str = "") -> dict[str, Tensor]:
    """Each with one direction more, behind another prefix."""
    column = torch.linspace(-1, 1, 24)[:, None]
    return {add + name.removeprefix(remove): each + column @ column.T for name, each in tensors.items()}


@dataclass(frozen=True)
class Files:
    folder: Path

    def compressed(self, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> Any:
        save_file(base, self.folder / "base.safetensors")
        save_file(tuned, self.folder / "tuned.safetensors")
        return compress(
            self.folder / "tuned.safetensors",
            base=self.folder / "base.safetensors",
            output=self.folder / "pairs.safetensors",
            tolerance=1e-3,
        )

    def restored(self) -> dict[str, Tensor]:
        output = self.folder / "again.safetensors"
        restore(self.folder / "pairs.safetensors", base=self.folder / "base.safetensors", output=output)
        return load_file(output)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_what_a_part_of_a_fine_tune_lacks_is_as_in_its_base(files: Files) -> None:
    base = weights("first.weight", "second.weight", "third.weight")
    tuned = changed({"second.weight": base["second.weight"]})
    report = files.compressed(base, tuned)
    assert report.fine_tune.correspondence == Correspondence("", "", 2, ())
    assert [layer.name for layer in report.plan.layers] == ["second"]
    again = files.restored()
    torch.testing.assert_close(again["second.weight"], tuned["second.weight"], rtol=0, atol=1e-5)
    assert all(torch.equal(again[name], base[name]) for name in ("first.weight", "third.weight"))


def test_a_part_of_a_fine_tune_in_a_folder(pair: Pair) -> None:
    wanted, folder = pair.tuned("text"), pair.folder / "text-tuned"
    stored = load_file(folder / "model.safetensors")
    own = {name: each for name, each in stored.items() if "layers" in name}
    assert len(own) < len(stored)
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    for base in ("text", "whole"):
        compress(folder, base=pair.folder / base, output=pair.folder / "p.safetensors", tolerance=1e-3, overwrite=True)
        restore(pair.folder / "p.safetensors", base=pair.folder / base, output=pair.folder / f"{base}-again")
        again = type(pair.of(base)).from_pretrained(pair.folder / f"{base}-again")
        torch.testing.assert_close(logits(again), logits(wanted), rtol=0, atol=1e-5)


def test_a_prefix_stands_for_another_and_a_head_has_none(files: Files) -> None:
    inner = weights("model.language_model.0.weight", "model.language_model.1.weight")
    base = inner | weights("lm_head.weight", "model.visual.0.weight", seed=1)
    tuned = changed(inner, "model.", "model.language_model.") | changed({"lm_head.weight": base["lm_head.weight"]})
    report = files.compressed(base, tuned)
    assert report.fine_tune.correspondence == Correspondence("model.", "model.language_model.", 1, ())
    assert {layer.name for layer in report.plan.layers} == {
        *(name.removesuffix(".weight") for name in inner),
        "lm_head",
    }


def test_names_that_fit_twice_are_refused(files: Files) -> None:
    base = weights("encoder.0.weight", "encoder.1.weight", "decoder.0.weight", "decoder.1.weight")
    with pytest.raises(BadInput, match=r"fit in the base behind decoder\. and behind encoder\."):
        files.compressed(base, changed(weights("0.weight", "1.weight")))


def test_one_tensor_that_fits_nowhere_is_refused(files: Files) -> None:
    inner = weights("language_model.0.weight", "language_model.1.weight")
    tuned = changed(inner, remove="language_model.")
    with pytest.raises(BadInput, match=r"the base lacks 0\.weight and 2 more"):
        files.compressed(inner | weights("visual.weight"), tuned | weights("score.weight"))
    tuned["1.weight"] = tuned["1.weight"][:12].clone()
    with pytest.raises(BadInput, match=r"the base lacks 0\.weight and 1 more"):
        files.compressed(inner | weights("visual.weight"), tuned)


def test_a_head_that_is_missing_because_it_is_the_embedding_is_refused(files: Files) -> None:
    base = weights("embed.weight") | {"layer.weight": torch.randn(24, 12)}
    base["head.weight"] = base["embed.weight"].clone()
    tuned = changed({"embed.weight": base["embed.weight"]}) | {"layer.weight": base["layer.weight"]}
    with pytest.raises(BadInput, match=r"lacks head\.weight, which is the same as embed\.weight in its base"):
        files.compressed(base, tuned)
