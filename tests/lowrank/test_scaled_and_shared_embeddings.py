"""Embeddings that scale what they look up (Gemma's), and that are shared in several places (T5's), as pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor import BadInput, compress, export, inspect, plan, restore
from compressor.forms import LowRankEmbedding
from compressor.lowrank import TiedHead
from compressor.network import embedding_scale, only_scales, same_table
from tests.lowrank.quantized import quantized

TOKENS = 90
_DECODER = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# The embedding in the model, the other places that it has, and its scale.
MODELS = {
    "gemma": ("model.embed_tokens", (), 32**0.5),
    "gemma2": ("model.embed_tokens", (), 32**0.5),
    "t5": ("shared", ("encoder.embed_tokens", "decoder.embed_tokens"), 1.0),
    "bart": ("model.shared", ("model.encoder.embed_tokens", "model.decoder.embed_tokens"), 32**0.5),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    built: Any = {
        "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_DECODER)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_DECODER)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**_T5, pad_token_id=0, decoder_start_token_id=0, tie_word_embeddings=True)
        ),
        "bart": lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(**_BART, scale_embedding=True)
        ),
    }[name]()
    # As large as they are after training: the heads are tied to them.
    nn.init.normal_(built.get_input_embeddings().weight, std=0.3)
    return built.to(dtype).eval()


def inputs(name: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, TOKENS, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :5]} if name in ("t5", "bart") else {})


@torch.no_grad()
def logits(built: Any, name: str) -> Tensor:
    found: Tensor = built.eval()(**inputs(name)).logits
    return found


def at_full_rank(folder: Path, name: str) -> Any:
    """A plan that makes a pair of full rank of the embedding alone."""
    made = plan(folder, keep=0.5, calibration="none", embeddings=True, prefer="size")
    embedding = MODELS[name][0]
    layers = [
        replace(each, rank=32, form="plain") if each.name == embedding else replace(each, rank=None)
        for each in made.layers
    ]
    assert embedding in {each.name for each in made.layers}
    return replace(made, layers=tuple(layers))


def load(name: str, folder: Path) -> Any:
    found, told = type(model(name)).from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return found


@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_the_logits_are_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    dense = model(name)
    dense.save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense", output=tmp_path / "small", plan=at_full_rank(tmp_path / "dense", name), embeddings=True
    )
    small = load(name, tmp_path / "small")
    where, places, scale = MODELS[name]
    embedding = small.get_submodule(where)
    assert isinstance(embedding, LowRankEmbedding)
    assert embedding.scale == pytest.approx(scale)
    assert all(small.get_submodule(place).embedding is embedding for place in places)
    assert isinstance(small.lm_head, TiedHead)
    assert small.lm_head.down_weight is embedding.down.weight
    torch.testing.assert_close(logits(small, name), logits(dense, name), rtol=1e-4, atol=1e-4)
    stored = [each for each in load_file(tmp_path / "small" / "model.safetensors") if each.endswith("down.weight")]
    assert stored == [f"{where}.down.weight"]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_compressed_in_memory_is_what_a_folder_loads_as_and_both_save(name: str, tmp_path: Path) -> None:
    dense = model(name)
    dense.save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"keep": 0.6, "calibration": "none", "prefer": "size", "embeddings": True}
    compress(tmp_path / "dense", output=tmp_path / "small", **options)
    in_memory = compress(dense, **options).model
    loaded = load(name, tmp_path / "small")
    expected = logits(loaded, name)
    torch.testing.assert_close(logits(in_memory, name), expected)
    for number, each in enumerate((in_memory, loaded)):
        each.save_pretrained(tmp_path / str(number))
        torch.testing.assert_close(logits(load(name, tmp_path / str(number)), name), expected)
    # The given model still has its own modules.
    assert type(dense.get_input_embeddings()) is not LowRankEmbedding
    restore(tmp_path / "small", output=tmp_path / "restored")
    torch.testing.assert_close(logits(load(name, tmp_path / "restored"), name), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(loaded.dequantize(), name), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_quantized_they_scale_and_are_shared_too(name: str, tmp_path: Path) -> None:
    model(name).save_pretrained(tmp_path / "dense")
    where = MODELS[name][0]
    quantized(tmp_path / "dense", {where: ("dense@8", 0)}, tmp_path / "small")
    restore(tmp_path / "small", output=tmp_path / "restored")
    small, dense = (load(name, tmp_path / each) for each in ("small", "restored"))
    torch.testing.assert_close(logits(small, name), logits(dense, name), rtol=1e-4, atol=1e-4)


def test_a_table_in_several_places_is_not_exported_with_the_code_of_its_layers(tmp_path: Path) -> None:
    model("t5").save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense", output=tmp_path / "small", keep=0.6, calibration="none", prefer="size", embeddings=True
    )
    with pytest.raises(BadInput, match="has shared in other places too"):
        export(tmp_path / "small", to="hf-remote", output=tmp_path / "remote")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_calibration_counts_the_scale_and_every_place(name: str, tmp_path: Path) -> None:
    dense = model(name)
    dense.save_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(3)
    # A token in a hundred is seen: only some rows matter.
    tokens = torch.randint(3, 20, (24, 9), generator=generator)
    data = {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :5]} if name == "t5" else {})
    shared = {"keep": 0.5, "prefer": "size", "embeddings": True, "include": [MODELS[name][0]], "bits": 16}
    losses = {}
    asked: dict[str, Any]
    for kind, asked in (("none", {"calibration": "none"}), ("data", {"calibration": [data], "effort": "fast"})):
        compress(tmp_path / "dense", output=tmp_path / kind, **shared, **asked)
        with torch.no_grad():
            found = load(name, tmp_path / kind)(**data).logits.log_softmax(-1)
            own = dense(**data).logits.softmax(-1)
        losses[kind] = float(-(own * found).sum(-1).mean())
    assert losses["data"] < losses["none"]


def test_the_gradient_at_the_rows_is_the_scale_times_that_at_the_outputs() -> None:
    from compressor.measure.token_frequencies import EmbeddingCollector

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    torch.manual_seed(0)
    embedding, head = Scaled(7, 4), nn.Linear(4, 7)
    tokens = torch.tensor([[1, 2, 3]])
    collector = EmbeddingCollector({"table": (embedding, None)})
    with collector:
        run = collector.watched(lambda: (head(embedding(tokens)),), ())
        made = run()[0]
        made.square().sum().backward()
    moments = collector.moments()["table"]
    assert moments is not None
    rows = embedding.weight[tokens].detach().requires_grad_()
    [gradient] = torch.autograd.grad(head(3 * rows).square().sum(), rows)
    expected = (gradient[0].T @ gradient[0] / 3).double()
    torch.testing.assert_close(moments.gradients, expected, rtol=1e-5, atol=1e-5)


class Normalized(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


class Shifted(nn.Embedding):
    embed_scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale + 1


def test_only_a_scale_is_known_by_what_it_does() -> None:
    gemma = model("gemma").model.embed_tokens
    assert only_scales(gemma)
    assert embedding_scale(gemma) == pytest.approx(32**0.5)
    assert not only_scales(Normalized(5, 4))
    assert not only_scales(Shifted(5, 4))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Normalized(30, 20), Shifted(30, 20)

    skips = {each.layer.name: str(each.layer.skip) for each in inspect(Both(), embeddings=True).layers}
    assert "Normalized does more than look rows up and scale them" in skips["one"]
    assert "Shifted does more" in skips["two"]


def test_tables_of_which_one_does_something_else_are_not_joined() -> None:
    built = model("t5")
    assert set(same_table(built).values()) == {"shared"}
    built.decoder.embed_tokens.register_forward_hook(lambda *_: None)
    assert same_table(built) == {"encoder.embed_tokens": "shared"}
    built.encoder.embed_tokens.padding_idx = 5
    assert same_table(built) == {}
