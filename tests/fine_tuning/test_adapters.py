"""LoRA adapters of fine-tunes: PEFT loads them as they are, and base and adapter together are the fine-tune."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import BadInput, QualityGateNotMet, TrainingRecipe, compress, export, plan
from compressor.cli.run import run
from compressor.fine_tuning.adapter import lora_names, saved_by_peft
from compressor.recipe import find_recipe

peft = pytest.importorskip("peft")
torch.set_num_threads(1)

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SPECIAL = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def models() -> dict[str, Any]:
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, n_positions=32)
    resnet = transformers.ResNetConfig(
        num_channels=1, num_labels=5, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    return {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SPECIAL)),
        # tied embeddings, transposed linear layers, biases
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        # file names that are not module names, a parameter beside submodules
        "vit": transformers.ViTForImageClassification(
            transformers.ViTConfig(**TEXT, num_channels=1, num_labels=5, image_size=8, patch_size=4)
        ),
        # convolutions, buffers
        "resnet": transformers.ResNetForImageClassification(resnet),
        # a head with a bias beside the module that is tied
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, vocab_size=60)),
    }


def tuned_from(base: Any, rank: int, *, everything: bool = True) -> Any:
    """A copy with a change of low rank in every matrix, and with `everything` any change in all other tensors."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, tensor in tuned.state_dict().items():
            embedding = any(part in name for part in ("emb", "wte", "wpe", "lm_head"))
            if tensor.dim() >= 2 and not embedding:
                change = 0.05 * random(tensor.shape[0], rank) @ random(rank, tensor[0].numel())
                tensor.add_(change.reshape(tensor.shape))
            elif everything and tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return tuned


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    if "pixel_values" in model.main_input_name:
        result = model.eval()(pixel_values=torch.rand(2, 1, 8, 8, generator=generator)).logits
    else:
        result = model.eval()(input_ids=torch.randint(3, 60, (2, 7), generator=generator)).logits
    assert isinstance(result, torch.Tensor)
    return result


def with_adapter(base: Path, adapter: Path, kind: Any) -> Any:
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of all of it (`all`), and one of its linear layers alone (`linear`)."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    base = models()["llama"]
    base.save_pretrained(folder / "base")
    tuned_from(base, 3).save_pretrained(folder / "all")
    tuned_from(base, 3, everything=False).save_pretrained(folder / "linear")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", models())
def test_base_and_adapter_are_the_fine_tune(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = models()[name]
    tuned = tuned_from(base, 2)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", tolerance=0.01)
    expected = logits(tuned)
    loaded = with_adapter(tmp_path / "base", tmp_path / "adapter", type(base))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-6)
    assert (logits(base) - expected).abs().max() > 0.05
    # The changes are of rank 2, and are found to be; small matrices are smaller whole.
    assert {layer.rank for layer in report.plan.layers} <= {2, None}
    assert sum(layer.rank == 2 for layer in report.plan.layers) >= 2
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert report.bytes.after == weights.stat().st_size < report.bytes.before
    assert report.parameters.after == sum(tensor.numel() for tensor in load_file(weights).values())
    if name == "resnet":  # its classifier's bias has changed, and its convolutions have none to merge one into
        with pytest.raises(RuntimeError, match="no bias"):
            loaded.merge_and_unload()
    else:
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_layers_of_which_the_model_reads_more_than_peft_has(tmp_path: Path) -> None:
    """Code that reads the stride of a convolution fails on PEFT's layers, so these are saved whole."""
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(image_size=8, depth_multiplier=0.25, num_channels=1, num_labels=5)
    base = transformers.MobileNetV2ForImageClassification(config)
    tuned = tuned_from(base, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", tolerance=0.01)
    loaded = with_adapter(tmp_path / "base", tmp_path / "adapter", type(base))
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-5, atol=1e-5)
    assert any("reads more of it" in str(layer.skip) for layer in report.skipped)


@pytest.mark.slow
def test_each_pair_is_the_best_of_its_rank(llama: Path, tmp_path: Path) -> None:
    report = compress(llama / "all", base=llama / "base", output=tmp_path / "adapter", keep=0.1)
    assert report.plan.eligible_after <= 0.1 * report.plan.eligible_before
    old, new = (load_file(llama / which / "model.safetensors") for which in ("base", "all"))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    ranks = set()
    for layer in report.plan.layers:
        assert layer.rank is not None
        change = (new[f"{layer.name}.weight"].double() - old[f"{layer.name}.weight"].double()).numpy()
        down, up = (stored[f"base_model.model.{layer.name}.lora_{side}.weight"].double() for side in "AB")
        values = np.linalg.svd(change, compute_uv=False)
        best = np.sqrt((values[layer.rank :] ** 2).sum())
        assert np.linalg.norm(change - (up @ down).numpy()) == pytest.approx(best, rel=1e-4)
        assert layer.error == pytest.approx(best / np.linalg.norm(change), rel=1e-4)
        assert tuple(down.shape) == (layer.rank, change.shape[1])
        ranks.add(layer.rank)
    assert config["r"] == config["lora_alpha"] == max(ranks)
    assert config["rank_pattern"] == config["alpha_pattern"]
    # What PEFT makes of the patterns: every rank, and a scale of one.
    loaded = with_adapter(llama / "base", tmp_path / "adapter", transformers.LlamaForCausalLM)
    for layer in report.plan.layers:
        module = loaded.base_model.model.get_submodule(layer.name)
        assert (module.r["default"], module.scaling["default"]) == (layer.rank, 1.0)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_rank_bound_is_for_adapters_without_weight_decay(decay: float, tmp_path: Path) -> None:
    """W_T = p W_0 + rank 3: with decay the difference to all of W_0 is of full rank, and is not cut to the bound's."""
    torch.manual_seed(0)
    base = models()["vit"]
    recipe = TrainingRecipe(
        optimizer="sgd", learning_rate=0.1, momentum=0.0, weight_decay=decay, batch_size=1, steps=3, schedule="constant"
    )
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.classifier.weight.mul_((1 - 0.1 * decay) ** 3)
        tuned.classifier.weight.add_(0.01 * torch.randn(5, 3) @ torch.randn(3, 32))
        tuned.vit.layers[0].attention.q_proj.weight.add_(0.01 * torch.randn(32, 1) @ torch.randn(1, 32))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", recipe=recipe)
    assert report.plan.budget.kind == ("tolerance" if decay else "window-rule")
    card = " ".join((tmp_path / "adapter" / "README.md").read_text().split())
    assert f"exp(-K) = {0.729 if decay else 1} of the base is left; fitted: " in card
    assert "; used: 1, as an adapter adds to all of it." in card
    ranks = {layer.name: layer.rank for layer in report.plan.layers}
    assert (ranks["classifier"] is None) == (decay > 0)  # 5 x 32: a pair of rank 4 is no smaller
    both = with_adapter(tmp_path / "base", tmp_path / "adapter", type(base)).merge_and_unload().state_dict()
    first, last = base.state_dict(), tuned.state_dict()
    for name in ("classifier.weight", "vit.layers.0.attention.q_proj.weight"):
        error = (both[name] - last[name]).double().norm() / (last[name] - first[name]).double().norm()
        assert error <= (0.05 if decay else 0.1)


def test_what_vllm_takes(llama: Path, tmp_path: Path) -> None:
    for_vllm = compress(llama / "linear", base=llama / "base", output=tmp_path / "a", tolerance=0.01).fine_tune
    assert for_vllm is not None
    assert (for_vllm.vllm_obstacles, for_vllm.max_lora_rank, for_vllm.in_full) == ((), 8, ())
    for_peft = compress(llama / "all", base=llama / "base", output=tmp_path / "b", tolerance=0.01).fine_tune
    assert for_peft is not None
    assert for_peft.vllm_obstacles == ("modules_to_save (5 of them)",)
    assert "model.norm.weight" in for_peft.in_full


def test_changed_biases_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = models()["vit"]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.vit.layers[0].attention.q_proj.weight.add_(0.1)
        tuned.vit.layers[0].mlp.fc1.bias.add_(0.5)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", tolerance=0.1)
    assert report.parameters.after < 500
    loaded = with_adapter(tmp_path / "base", tmp_path / "adapter", type(base))
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=1e-6)


def test_modules_whose_names_end_alike(tmp_path: Path) -> None:
    """PEFT saves each module whose name ends as the one that it is told: `norm` is `input_layernorm` too."""
    torch.manual_seed(0)
    base = transformers.LlamaModel(transformers.LlamaConfig(**TEXT | {"num_hidden_layers": 2}, **SPECIAL))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.norm.weight.add_(torch.rand(32))
        for number, layer in enumerate(tuned.layers, start=1):
            layer.self_attn.q_proj.weight.add_(0.05 * torch.randn(32, number) @ torch.randn(number, 32))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", tolerance=1e-3)
    loaded = with_adapter(tmp_path / "base", tmp_path / "adapter", transformers.LlamaModel).eval()
    inputs = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        for model in (loaded, loaded.merge_and_unload()):
            torch.testing.assert_close(
                model(inputs).last_hidden_state, tuned.eval()(inputs).last_hidden_state, rtol=0, atol=2e-5
            )


class _Alike(nn.Module):
    """Modules whose names are the ends of others'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.block = nn.ModuleDict({"fc": nn.Linear(16, 16), "norm": nn.LayerNorm(16)})


@pytest.mark.parametrize(
    ("ranks", "targets"), [({"fc": 3}, "fc"), ({"fc": 3, "block.fc": 2}, ["block.fc", "fc"]), ({"block.fc": 2}, None)]
)
def test_names_of_pairs_are_whole(ranks: dict[str, int], targets: object) -> None:
    """Each layer gets its own pair in PEFT, and no other does."""
    names = lora_names(ranks, _Alike())
    if targets is not None:
        assert names["target_modules"] == targets
    model = peft.get_peft_model(_Alike(), peft.LoraConfig(**names))
    found = {
        name: module.r["default"] for name, module in model.base_model.model.named_modules() if hasattr(module, "r")
    }
    assert found == ranks


def test_names_that_peft_confuses_are_refused(tmp_path: Path) -> None:
    assert saved_by_peft({"block.norm"}, _Alike(), where=None) == {"block.norm"}
    assert saved_by_peft({"fc"}, _Alike(), where=None) == {"fc", "block.fc"}
    for whole, pairs in (({"fc"}, ("block.fc",)), ({"block"}, ("block.fc",)), ({"layer"}, ("fc",))):
        with pytest.raises(BadInput, match="PEFT"):
            saved_by_peft(whole, _Alike(), pairs, where=None)


def test_a_plan_of_a_difference_can_be_edited(llama: Path, tmp_path: Path) -> None:
    chosen = plan(llama / "all", base=llama / "base", keep=0.1)
    document = chosen.to_dict()
    document["layers"][0]["rank"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(document))
    edited = compress(llama / "all", base=llama / "base", output=tmp_path / "a", plan=tmp_path / "plan.json")
    assert [layer.rank for layer in edited.plan.layers[:2]] == [1, chosen.layers[1].rank]
    size = compress(llama / "all", base=llama / "base", output=tmp_path / "b", max_size=30_000).bytes.after
    assert 25_000 < size <= 30_000


def test_pairs_become_an_adapter(llama: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.safetensors"
    compress(llama / "all", base=llama / "base", output=pairs, tolerance=0.01)
    export(pairs, to="lora", base=llama / "base", output=tmp_path / "adapter")
    export(pairs, to="dense", base=llama / "base", output=tmp_path / "dense")
    tuned = transformers.LlamaForCausalLM.from_pretrained(llama / "all")
    loaded = with_adapter(llama / "base", tmp_path / "adapter", transformers.LlamaForCausalLM)
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    for model in (loaded, dense):
        torch.testing.assert_close(logits(model), logits(tuned), rtol=0, atol=2e-6)
    with pytest.raises(BadInput, match="is not the base of"):
        export(pairs, to="dense", base=llama / "linear", output=tmp_path / "other")


def test_the_outputs_name_the_base_without_its_folder(llama: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.safetensors"
    compress(llama / "linear", base=str(llama / "base"), output=pairs, tolerance=0.01)
    compress(llama / "linear", base=str(llama / "base"), output=tmp_path / "adapter", tolerance=0.01)
    export(pairs, to="lora", base=str(llama / "base"), output=tmp_path / "again")
    written = [pairs, *(tmp_path / "adapter").iterdir(), *(tmp_path / "again").iterdir()]
    assert len(written) > 6
    assert not [file for file in written if str(llama).encode() in file.read_bytes()]
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_the_command_says_what_it_wrote(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = [str(llama / "linear"), "--base", str(llama / "base"), "-o", str(tmp_path / "adapter")]
    assert run([*request, "--tolerance", "0.01"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "LoRA adapter beside" in shown
    assert "--enable-lora --max-lora-rank 8" in shown
    assert run([*request, "--tolerance", "0.01", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fine_tune"]["unchanged"] == 5


def test_what_does_not_fit_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(tuned: Path, base: Path, *options: str) -> str:
        assert run([str(tuned), "--base", str(base), "-o", str(tmp_path / "out"), *options]) == 2
        assert not (tmp_path / "out").exists()
        [line] = capsys.readouterr().err.splitlines()
        return line

    def variant(name: str, change: Any) -> Path:
        tensors = load_file(llama / "base" / "model.safetensors")
        config = json.loads((llama / "base" / "config.json").read_text())
        change(tensors, config)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def more_words(tensors: Any, config: Any) -> None:
        config["vocab_size"] = 61  # more than the fine-tune has
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    tuned = llama / "all"
    assert "does not differ from its base" in refused(llama / "base", variant("same", lambda tensors, config: None))
    assert "with the vocabulary of its base" in refused(tuned, variant("vocabulary", more_words))
    assert "the base lacks" in refused(tuned, variant("missing", lambda tensors, _: tensors.pop("model.norm.weight")))
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert "a mistral" in refused(tuned, variant("other", lambda _, config: config.update(mistral)))
    poisoned = variant("poisoned", lambda tensors, _: tensors["model.norm.weight"].fill_(torch.nan))
    assert "NaN" in refused(tuned, poisoned)
    assert "no such file or folder" in refused(tuned, tmp_path / "nowhere")
    for options in (
        ["--form", "pivoted"],
        ["--embeddings"],
        ["--prefer", "size"],
        ["--initial", "0"],
        ["--engine", "processes"],
        ["--max-shard-size", "1GB"],
    ):
        assert "is not for differences to a base" in refused(tuned, llama / "base", *options)


def test_a_difference_of_full_rank_is_not_cut_unasked(llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tuned = transformers.LlamaForCausalLM.from_pretrained(llama / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(QualityGateNotMet, match="no layer's difference can be made smaller safely"):
        compress(tmp_path / "tuned", base=llama / "base", output=tmp_path / "out")


def _python_of(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


def test_cards_load_what_they_are_of(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's, and that of the dense fine-tune: neither has results or a recipe of other weights."""
    results = "[{task: {type: y}, dataset: {type: z, name: z}, metrics: [{type: a, value: 1}]}]"
    front = f"---\nlicense: mit\nlibrary_name: transformers\nmodel-index: [{{name: x, results: {results}}}]\n---\n"
    card_of_a_model = f"{front}\n### Training hyperparameters\n\n- learning_rate: 0.25\n"
    for name in ("base", "linear"):
        shutil.copytree(llama / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(card_of_a_model)
    (tmp_path / "base" / "trainer_state.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    report = compress("linear", base="base", output="adapter", tolerance=0.01)
    compress("linear", base="base", output="pairs.safetensors", tolerance=0.01)
    export("pairs.safetensors", to="dense", base="base", output="dense")
    export("pairs.safetensors", to="lora", base="base", output="again")
    relations = {"adapter": ("peft", "adapter"), "again": ("peft", "adapter"), "dense": ("transformers", "finetune")}
    for name, relation in relations.items():
        card = ModelCard.load(tmp_path / name / "README.md")
        data = card.data.to_dict()
        assert (data["library_name"], data["base_model_relation"]) == relation
        assert data["base_model"] == "base"
        assert data.get("license") == (None if name == "again" else "mit")
        assert "model-index" not in data
        assert "0.25" not in card.text
        names: dict[str, Any] = {}
        exec(_python_of(card), names)
        tuned = transformers.LlamaForCausalLM.from_pretrained("linear")
        torch.testing.assert_close(logits(names["model"]), logits(tuned), rtol=0, atol=2e-6)
    assert find_recipe(tmp_path / "dense").learning_rate is None
    assert not (tmp_path / "dense" / "trainer_state.json").exists()
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert {"lora", "compressed"} <= set(ModelCard(text).data.tags)
    assert "--max-lora-rank 8" in text
    for layer in report.plan.layers:
        assert re.search(rf"\| `{re.escape(layer.name)}` \|[^|]*\| {layer.rank} \|", text)


def test_a_base_of_the_hub_goes_by_its_name(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "models--org--name" / "snapshots" / "0123"
    shutil.copytree(llama / "base", base)
    report = compress(llama / "linear", base=base, output=tmp_path / "adapter", tolerance=0.01)
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.revision) == ("org/name", "0123")
    assert report.fine_tune is not None
    assert report.fine_tune.base == "org/name"


def test_adapters_are_no_models(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    compress(llama / "linear", base=llama / "base", output=adapter, tolerance=0.01)
    for model in (adapter, adapter / "adapter_model.safetensors"):
        assert run([str(model), "--keep", "0.5", "-o", str(tmp_path / "out"), "--prefer", "size"]) == 2
        assert "--prefer is not for adapters" in capsys.readouterr().err
    with pytest.raises(BadInput, match="is a LoRA adapter of PEFT"):
        compress(llama / "linear", base=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_are_not_exported_again(llama: Path, tmp_path: Path) -> None:
    compress(llama / "linear", base=llama / "base", output=tmp_path / "adapter", tolerance=0.01)
    with pytest.raises(BadInput, match="`base` is not for adapters"):
        export(tmp_path / "adapter", to="dense", base=llama / "base", output=tmp_path / "out")
    with pytest.raises(BadInput, match="holds no difference to a base"):
        export(llama / "all", to="lora", base=llama / "base", output=tmp_path / "out")
