"""Embeddings as pairs: what is tied stays one storage, in memory, in files and in transformers folders, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, Compression, compress, inspect, plan, restore
from compressor.forms import LowRankEmbedding
from compressor.lowrank import TiedHead
from compressor.model import load_model

TOKENS = 90
LLAMA = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {key: LLAMA[key] for key in list(LLAMA)[:5]}


def tiny_model(name: str) -> Any:
    torch.manual_seed(0)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": TOKENS, "n_positions": 40}
    model: Any = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        "llama-tied": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT, max_position_embeddings=40)),
    }[name]()
    if name == "bert":
        nn.init.normal_(model.cls.predictions.bias)
    return model.eval()


# Which embedding a head is tied to, and the head.
TIED = {
    "llama": None,
    "llama-tied": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
}
MODELS = list(TIED)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(3, TOKENS, (2, 9))}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    for parameter in model.parameters():  # kernels round by how weights lie in memory, and a file's are mapped
        parameter.data = parameter.data.clone()
    result: Tensor = model.eval()(**inputs()).logits
    return result


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return [{"input_ids": torch.randint(3, 60, (4, 12))} for _ in range(8)]


def check_tied(model: Any, name: str) -> None:
    if TIED[name] is not None:
        embedding, head = (model.get_submodule(each) for each in TIED[name])
        assert isinstance(embedding, LowRankEmbedding)
        assert isinstance(head, TiedHead)
        assert head.down_weight is embedding.down.weight
        assert head.up_weight is embedding.up.weight
        assert model.get_input_embeddings() is embedding
        assert model.get_output_embeddings() is head


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "calibrated"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_holds_each_pair_once_and_loads_as_what_was_compressed_in_memory(
    name: str, calibrated: bool, tmp_path: Path
) -> None:
    dense = tiny_model(name)
    dense.save_pretrained(tmp_path / "dense")
    options: Any = {"keep": 0.5, "calibration": "none", "embeddings": True, "prefer": "size"}
    if calibrated:
        # The ranks that the weights alone give: with the moments an untrained model would keep its embeddings.
        options = {"plan": plan(dense, **options), "embeddings": True, "calibration": batches(), "effort": "balanced"}
    report = compress(tmp_path / "dense", output=tmp_path / "small", **options)
    embeddings = [layer for layer in report.plan.layers if layer.kind == "embedding"]
    assert any(layer.rank is not None and layer.form == "plain" for layer in embeddings)
    in_memory: Any = compress(dense, **options).model
    expected = logits(in_memory)
    assert not torch.equal(logits(dense), expected)
    check_tied(in_memory, name)

    loaded, information = type(dense).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for model in (loaded, in_memory):
        check_tied(model, name)
        assert torch.equal(logits(model), expected)
        orders = sum(order.numel() for key, order in model.named_buffers() if key.endswith("order"))
        assert model.num_parameters() + orders == report.parameters.after
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == report.parameters.after
    dense_numbers = sum(layer.parameters_before for layer in report.plan.layers)
    # A number of an order is 32 bits wide, and counts as two of 16 in a plan.
    assert report.parameters.before - report.parameters.after == dense_numbers - (report.plan.eligible_after - orders)

    # Tying again, as resizing and other tools do, changes nothing.
    loaded.tie_weights()
    check_tied(loaded, name)
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in again.items()} == {key: each.shape for key, each in stored.items()}
    reloaded = type(dense).from_pretrained(tmp_path / "again")
    check_tied(reloaded, name)
    assert torch.equal(logits(reloaded), expected)

    # What transformers saved has lost our metadata, so that its kinds of layers are told by their shapes.
    for folder in ("small", "again"):
        restore(tmp_path / folder, output=tmp_path / f"{folder}-restored")
        restored, information = type(dense).from_pretrained(tmp_path / f"{folder}-restored", output_loading_info=True)
        assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(restored), expected, rtol=1e-4, atol=1e-5)
        assert restored.num_parameters() == dense.num_parameters()
        if TIED[name] is not None:
            embedding, head = (restored.get_submodule(each) for each in TIED[name])
            assert head.weight is embedding.weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_generation(name: str, tmp_path: Path) -> None:
    dense = tiny_model(name)
    dense.save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense", output=tmp_path / "small", keep=0.5, calibration="none", embeddings=True, prefer="size"
    )
    restore(tmp_path / "small", output=tmp_path / "restored")
    small, restored = (type(dense).from_pretrained(tmp_path / each) for each in ("small", "restored"))
    made = small.generate(**inputs(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert made.shape == (2, 15)
    assert torch.equal(made, restored.generate(**inputs(), max_new_tokens=6, min_new_tokens=6, do_sample=False))


def test_the_base_model_and_shards_load_too(tmp_path: Path) -> None:
    dense = tiny_model("llama-tied")
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense",
        output=tmp_path / "small",
        keep=0.5,
        calibration="none",
        embeddings=True,
        max_shard_size="10KB",
        prefer="size",
    )
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    check_tied(whole, "llama-tied")
    base = transformers.AutoModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = whole.model(**inputs()).last_hidden_state
        assert torch.equal(base.eval()(**inputs()).last_hidden_state, expected)


def test_a_compressed_model_in_memory_saves_what_is_tied_once(tmp_path: Path) -> None:
    small: Any = compress(tiny_model("bert"), keep=0.5, embeddings=True, prefer="size").model
    small.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "bert.embeddings.word_embeddings.down.weight" in stored
    assert not any("decoder" in key for key in stored)


def test_a_loader_that_does_not_know_the_format_stops(tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path / "dense")
    # Only the embedding is a pair, so that it alone has to stop the loader.
    compress(
        tmp_path / "dense",
        output=tmp_path / "small",
        keep=0.5,
        calibration="none",
        embeddings=True,
        include=["*embed_tokens"],
        prefer="size",
    )
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert list(config.pop("quantization_config")["layers"]) == ["model.embed_tokens"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


class Tagger(nn.Module):
    """A plain module with a tied head that has a bias, and an embedding of another kind beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, 24, padding_idx=0)
        self.places = nn.Embedding(16, 24, max_norm=1.0)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, TOKENS)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[-1]))
        result: Tensor = self.head(torch.tanh(self.mix(self.words(tokens) + places)))
        return result


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().eval()


def kinds(report: Compression) -> dict[str, int | None]:
    return {layer.name: layer.rank for layer in report.plan.layers}


@pytest.mark.parametrize("both_names", [True, False])
def test_a_state_dict_keeps_and_restores_what_is_tied(both_names: bool, tmp_path: Path) -> None:
    dense = tagger()
    if both_names:
        torch.save(dense.state_dict(), tmp_path / "model.pt")
    else:
        save_file(
            {key: each for key, each in dense.state_dict().items() if key != "head.weight"},
            tmp_path / "model.safetensors",
        )
    [source] = tmp_path.iterdir()
    report = compress(source, factory=tagger, keep=0.5, embeddings=True)
    assert kinds(report)["words"] is not None
    assert not any(key.startswith("head.") and key != "head.bias" for key in load_file(str(report.output)))
    tokens = torch.randint(0, TOKENS, (3, 10))
    loaded: Any = load_model(str(report.output), tagger).eval()
    assert loaded.head.down_weight is loaded.words.down.weight
    in_memory: Any = compress(dense, keep=0.5, calibration="none", embeddings=True, prefer="size").model
    assert torch.equal(loaded(tokens), in_memory(tokens))
    restored = restore(str(report.output), output=tmp_path / "restored.pt")
    dense.load_state_dict(torch.load(restored.output, weights_only=True), strict=both_names)
    torch.testing.assert_close(dense(tokens), in_memory(tokens), rtol=1e-4, atol=1e-5)


def test_a_padding_token_stays_zero_also_in_training() -> None:
    small: Any = compress(tagger(), keep=0.5, embeddings=True, prefer="size").model
    assert small.words.padding_idx == 0
    assert torch.count_nonzero(small.words(torch.tensor([0]))) == 0
    small.words(torch.tensor([[0, 1]])).square().sum().backward()
    assert torch.count_nonzero(small.words.down.weight.grad[0]) == 0
    assert torch.count_nonzero(small.words.down.weight.grad[1]) > 0


def test_what_an_embedding_is_left_out_for_is_said() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return 3 * super().forward(tokens)

    class Model(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled(30, 20)
            self.twice = nn.Embedding(30, 20)
            self.again = nn.Embedding(30, 20)
            self.again.weight = self.twice.weight

    skips = {each.layer.name: each.layer.skip for each in inspect(Model(), embeddings=True).layers}
    assert skips["words"] is None
    assert "max_norm" in str(skips["places"])
    assert "Scaled" in str(skips["scaled"])
    assert "again" in str(skips["twice"])
    asked_for = {each.layer.name: each.layer.skip for each in inspect(Model()).layers}
    assert asked_for["words"] == "an embedding; `embeddings=True` includes it"


def test_a_tied_head_that_is_stored_apart_is_left_alone(tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skips = {each.layer.name: each.layer.skip for each in inspect(tmp_path, embeddings=True).layers}
    assert "stored separately" in str(skips["model.embed_tokens"])


def test_only_the_flag_includes_embeddings_and_plans_say_so(tmp_path: Path) -> None:
    dense = tagger()
    assert set(kinds(compress(dense, keep=0.5, calibration="none", prefer="size"))) == {"mix"}
    chosen = plan(dense, keep=0.5, calibration="none", embeddings=True, form="pivoted", prefer="size")
    forms = {layer.name: layer.form for layer in chosen.layers}
    assert forms["words"] == "plain"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(chosen.to_dict()))
    assert kinds(compress(dense, plan=path, embeddings=True)) == kinds(compress(dense, plan=chosen, embeddings=True))
    with pytest.raises(BadInput, match="`embeddings`"):
        compress(dense, plan=path)
    document = chosen.to_dict()
    for layer in document["layers"]:
        layer["form"] = "pivoted"
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput, match="'pivoted' does not exist for words"):
        compress(dense, plan=path, embeddings=True)
