"""What is a matrix: decided by the modules where they are known, by names and shapes where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import LlamaConfig

from compressor.errors import BadInput
from compressor.io import open_checkpoint
from compressor.io.safetensors_file import DTYPES
from compressor.network import Layer, find_layers, in_natural_order, module_architecture, transformers_architecture

ODD_DTYPES = set(DTYPES.values()) - {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def layers_of_file(folder: Path, tensors: dict[str, torch.Tensor], **patterns: list[str]) -> dict[str, Layer]:
    save_file(tensors, folder / "model.safetensors")
    return {layer.name: layer for layer in find_layers(open_checkpoint(folder / "model.safetensors"), **patterns)}


def layers_of_module(module: nn.Module) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(open_checkpoint(module), module_architecture(module))}


@pytest.mark.parametrize("dtype", sorted(ODD_DTYPES, key=str), ids=str)
def test_numbers_that_torch_hardly_computes_with_pass_through(tmp_path: Path, dtype: torch.dtype) -> None:
    odd = torch.zeros(32 * 32 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(32, 32)
    torch.save({"odd.weight": odd, "even.weight": torch.eye(32)}, tmp_path / "model.pt")
    found = {layer.name: layer for layer in find_layers(open_checkpoint(tmp_path / "model.pt"))}
    assert found["odd"].skip == f"its numbers are {str(dtype).removeprefix('torch.')}"
    assert found["even"].eligible


@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        *(((16, 8, *kernel), bias) for kernel in [(64, 1), (1, 512), (1024, 1), (33, 1, 1)] for bias in (None, 16)),
        ((16, 8, 512), 16),
        ((16, 3, 16, 16), 16),
        ((16, 3, 2, 32, 32), 16),
    ],
)
def test_kernels_of_any_length_are_convolutions(tmp_path: Path, shape: tuple[int, ...], bias: int | None) -> None:
    tensors = {"first.weight": torch.zeros(8, 3, 3, 3), "conv.weight": torch.zeros(*shape)}
    tensors |= {} if bias is None else {"conv.bias": torch.zeros(bias)}
    layer = layers_of_file(tmp_path, tensors)["conv"]
    assert (layer.kind, layer.skip) == ("convolution", None)
    assert layer.shape == (16, torch.Size(shape[1:]).numel())


@pytest.mark.parametrize("bias", [None, (4, 32)])
def test_stacks_of_matrices_are_no_convolutions(tmp_path: Path, bias: tuple[int, ...] | None) -> None:
    tensors = {"experts.weight": torch.zeros(4, 32, 64)} | ({} if bias is None else {"experts.bias": torch.zeros(bias)})
    assert "neither a matrix nor, by its shape, a convolution" in (
        layers_of_file(tmp_path, tensors)["experts"].skip or ""
    )


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 120), st.sampled_from(["w", "v"])), unique=True))
def test_names_that_differ_in_numbers_come_by_number(parts: list[tuple[str, int, str]]) -> None:
    names = [f"{letter}.{number}.{end}" for letter, number, end in parts]
    ordered = in_natural_order(sorted(names))
    assert sorted(ordered) == sorted(names)
    assert ordered == [f"{letter}.{number}.{end}" for letter, number, end in sorted(parts)]


def test_names_that_differ_in_words_stay_as_they_come(tmp_path: Path) -> None:
    names = [
        "wte",
        "h.0.b",
        "h.0.a",
        "h.10.b",
        "h.2.b",
        "h.2.a",
        "head",
        "conv2",
        "conv10",
        "conv1",
        "x",
        "x.1",
        "x.01",
    ]
    expected = [
        "wte",
        "h.0.b",
        "h.0.a",
        "h.2.b",
        "h.2.a",
        "h.10.b",
        "head",
        "conv1",
        "conv2",
        "conv10",
        "x",
        "x.1",
        "x.01",
    ]
    assert in_natural_order(names) == expected
    assert in_natural_order([]) == []
    found = layers_of_file(tmp_path, {f"layers.{index}.weight": torch.zeros(4, 4) for index in range(12)})
    assert list(found) == [f"layers.{index}" for index in range(12)]


def test_names_and_shapes_of_a_strangers_file(tmp_path: Path) -> None:
    found = layers_of_file(
        tmp_path,
        {
            "body.0.weight": torch.zeros(6, 4),
            "body.0.bias": torch.zeros(6),
            "conv.weight": torch.zeros(8, 3, 5, 5),
            "line.weight": torch.zeros(8, 3, 5),
            "volume.weight": torch.zeros(8, 3, 2, 2, 2),
            "depthwise.weight": torch.zeros(8, 1, 3, 3),
            "upsample.weight": torch.zeros(8, 3, 4, 4),
            "upsample.bias": torch.zeros(3),
            "tok_embeddings.weight": torch.zeros(20, 4),
            "rnn.weight_ih_l0": torch.zeros(12, 4),
            "norm.weight": torch.zeros(4),
            "steps": torch.zeros((), dtype=torch.int64),
            "quantized.weight": torch.zeros(4, 4, dtype=torch.int8),
        },
    )
    assert set(found) == {
        "body.0", "conv", "line", "volume", "depthwise", "upsample", "tok_embeddings", "rnn.weight_ih_l0", "quantized"
    }  # fmt: skip
    eligible = {name for name, layer in found.items() if layer.eligible}
    assert eligible == {"body.0", "conv", "line", "volume", "upsample", "rnn.weight_ih_l0"}
    assert found["body.0"].shape == (6, 4)
    assert found["body.0"].bias == "body.0.bias"
    assert found["conv"].shape == (8, 75)
    assert found["volume"].shape == (8, 24)
    assert "depthwise" in (found["depthwise"].skip or "")
    assert (found["upsample"].kind, found["upsample"].shape) == ("transposed convolution", (48, 8))
    assert (found["rnn.weight_ih_l0"].kind, found["rnn.weight_ih_l0"].shape) == ("parameter", (12, 4))
    assert found["tok_embeddings"].kind == "embedding"
    assert "int8" in (found["quantized"].skip or "")


def test_gpt2s_transposed_layers_are_told_by_their_bias_and_square_ones_by_their_company(tmp_path: Path) -> None:
    found = layers_of_file(
        tmp_path,
        {
            "h.0.attn.c_attn.weight": torch.zeros(8, 24),
            "h.0.attn.c_attn.bias": torch.zeros(24),
            "h.0.attn.c_proj.weight": torch.zeros(8, 8),
            "h.0.attn.c_proj.bias": torch.zeros(8),
            "head.weight": torch.zeros(8, 8),
            "head.bias": torch.zeros(8),
        },
    )
    assert found["h.0.attn.c_attn"].shape == (24, 8)
    assert {name: layer.kind for name, layer in found.items()} == {
        "h.0.attn.c_attn": "transposed linear",
        "h.0.attn.c_proj": "transposed linear",
        "head": "linear",
    }


def test_modules_decide_where_they_are_known() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.words.weight
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.attention = nn.MultiheadAttention(4, 2)
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.one_each = nn.Conv2d(4, 2, 3, groups=2)
            self.grouped_up = nn.ConvTranspose2d(4, 4, 3, groups=2)
            self.dense = nn.Conv2d(4, 4, 3)
            self.up = nn.ConvTranspose2d(4, 4, 3)
            self.single = nn.Conv2d(1, 4, 3)
            self.plain = nn.Linear(4, 5)

    found = layers_of_module(Model())
    assert {name: layer.kind for name, layer in found.items() if layer.eligible} == {
        "first": "linear", "attention.in_proj_weight": "parameter", "attention.out_proj": "parameter",
        "dense": "convolution", "up": "transposed convolution", "single": "convolution", "plain": "linear",
        "grouped": "grouped convolution",
    }  # fmt: skip
    assert found["first"].places == ("again",)
    assert found["up"].shape == (4 * 9, 4)
    skips = {name: layer.skip or "" for name, layer in found.items()}
    assert "embedding" in skips["words"]
    assert (found["grouped"].groups, found["grouped"].shape) == (2, (4, 18))
    assert found["grouped"].block_shape == (2, 18)
    assert "depthwise" in skips["depthwise"]
    assert "one output channel" in skips["one_each"]
    assert "transposed convolution with 2 groups" in skips["grouped_up"]


def test_parameters_are_weights_by_their_module_or_their_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 6, proj_size=3)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
            self.norm = nn.LayerNorm([3, 4])
            self.bag = nn.EmbeddingBag(5, 4)
            self.my_weight = nn.Parameter(torch.zeros(4, 5))
            self.positions = nn.Parameter(torch.zeros(4, 5))
            self.row_weight = nn.Parameter(torch.zeros(1, 5))
            self.register_buffer("weight_mask", torch.zeros(4, 5))
            self.weight_scale = nn.Parameter(torch.zeros(4, 5))

    found = layers_of_module(Model())
    assert {name for name, layer in found.items() if layer.eligible} == {
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_hr_l0", "encoder.self_attn.in_proj_weight",
        "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "my_weight",
    }  # fmt: skip
    assert {layer.kind for layer in found.values() if layer.eligible} == {"parameter"}
    assert (found["rnn.weight_hr_l0"].module, found["rnn.weight_hr_l0"].parameter) == ("rnn", "weight_hr_l0")
    assert (found["encoder.linear1"].module, found["encoder.linear1"].parameter) == ("encoder.linear1", "weight")
    assert "table or a matrix" in (found["positions"].skip or "")
    assert "buffer" in (found["weight_mask"].skip or "")
    assert "vector" in (found["row_weight"].skip or "")


def test_only_weights_of_pytorchs_names_are_believed_without_code(tmp_path: Path) -> None:
    weights = [
        "rnn.weight_ih_l0", "rnn.weight_hh_l1_reverse", "cell.weight_hh", "attention.in_proj_weight",
        "cross.k_proj_weight", "pruned.weight_orig", "rnn.weight_hr_l0_orig", "normed.weight_v",
        "old_spectral.weight_orig", "wn.parametrizations.weight.original1", "sn.parametrizations.weight_hh_l0.original",
    ]  # fmt: skip
    others = [
        "pruned.weight_mask", "rnn.weight_hr_l0_mask", "quantized.weight_scale", "quantized.weight_zero_point",
        "quantized.weight_g_idx", "quantized.weight_packed", "fp8.weight_scale_inv", "own.weight_v", "own.weight_u",
        "own.my_weight", "alone.weight_orig", "ortho.parametrizations.weight.original",
        "ortho.parametrizations.weight.0.base",
        "pair.parametrizations.weight.original0", "pair.parametrizations.weight.original1",
        "embed.weight_orig", "embed.weight_mask", "wte.parametrizations.weight.original",
    ]  # fmt: skip
    tensors = {name: torch.zeros(6, 5) for name in weights + others}
    tensors |= {
        "normed.weight_g": torch.zeros(6, 1),
        "old_spectral.weight_u": torch.zeros(6),
        "old_spectral.weight_v": torch.zeros(5),
        "wn.parametrizations.weight.original0": torch.zeros(6, 1),
    }
    for name in ("sn.parametrizations.weight_hh_l0", "wte.parametrizations.weight"):
        tensors |= {f"{name}.0._u": torch.zeros(6), f"{name}.0._v": torch.zeros(5)}
    found = layers_of_file(tmp_path, tensors)
    assert {name for name, layer in found.items() if layer.eligible} == set(weights)
    reasons = {name: found[name].skip or "" for name in others}
    assert "but is not one" in reasons["pruned.weight_mask"]
    assert "but is not one" in reasons["quantized.weight_scale"]
    assert "PyTorch's own" in reasons["own.my_weight"]
    assert "parametrization is unknown" in reasons["ortho.parametrizations.weight.original"]
    assert "parametrization is unknown" in reasons["pair.parametrizations.weight.original1"]
    assert "embedding" in reasons["embed.weight_orig"]
    assert "embedding" in reasons["wte.parametrizations.weight.original"]


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


def test_parametrizations_are_known_by_their_class() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1])
    parametrizations.orthogonal(model[2])
    parametrize.register_parametrization(model[3], "weight", Symmetric())
    parametrizations.spectral_norm(model[4])
    parametrize.register_parametrization(model[4], "weight", Symmetric())
    found = layers_of_module(model)
    assert {name for name, layer in found.items() if layer.eligible} == {
        "0.parametrizations.weight.original1",
        "1.parametrizations.weight.original",
    }
    reasons = {place: found[f"{place}.parametrizations.weight.original"].skip or "" for place in "234"}
    assert "_Orthogonal" in reasons["2"]
    assert "Symmetric" in reasons["3"]
    assert "_SpectralNorm, Symmetric" in reasons["4"]


def test_tables_of_ones_own_class_are_embeddings_by_its_name_or_theirs(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(9, 5))

    class TokenEmbedding(Table):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.words, self.mix = Table(), TokenEmbedding(), Table()
            self.token_embedding_weight = nn.Parameter(torch.zeros(9, 5))
            self.scaled = nn.Embedding(9, 5)
            prune.l1_unstructured(self.scaled, "weight", 0.3)

    found = layers_of_module(Model())
    assert {name for name, layer in found.items() if layer.eligible} == {"mix"}
    for name in ("embed", "words", "token_embedding_weight", "scaled.weight_orig"):
        assert "embedding" in (found[name].skip or "")
    bare = layers_of_file(tmp_path, Model().state_dict())
    assert not bare["embed"].eligible


def test_a_transformers_model_is_not_given_factors_that_it_cannot_load() -> None:
    import transformers

    config = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    found = layers_of_module(transformers.SiglipVisionModel(config))
    pooling = {name: layer for name, layer in found.items() if "head.attention" in name}
    assert pooling
    assert all("transformers has no" in (layer.skip or "") for layer in pooling.values())


def test_a_model_that_is_one_layer_has_the_empty_name() -> None:
    [layer] = layers_of_module(nn.Linear(5, 3)).values()
    assert (layer.name, layer.tensor, layer.bias, layer.eligible) == ("", "weight", "bias", True)


def test_transformers_names_on_disk_are_mapped_to_modules(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    architecture = transformers_architecture(tmp_path)
    assert architecture is not None
    found = [layer for layer in find_layers(open_checkpoint(tmp_path), architecture) if layer.eligible]
    modules = dict(model.named_modules())
    assert any(layer.name != layer.module for layer in found), "this architecture renames"
    state = model.state_dict()
    for layer in found:
        assert isinstance(modules[layer.module], nn.Linear | nn.Conv2d)
        torch.testing.assert_close(open_checkpoint(tmp_path).read(layer.tensor), state[f"{layer.module}.weight"])


def test_a_head_that_is_tied_to_the_embedding_is_not_touched(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found = find_layers(open_checkpoint(tmp_path), transformers_architecture(tmp_path))
    assert {layer.kind for layer in found if layer.eligible} == {"transposed linear"}
    assert {layer.name for layer in found if layer.kind == "embedding"} == {"transformer.wte", "transformer.wpe"}


def test_an_unknown_architecture_has_no_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "made-up", "architectures": ["MadeUp"]}')
    assert transformers_architecture(tmp_path) is None


def test_patterns_select_layers(tmp_path: Path) -> None:
    tensors = {f"block.{i}.{part}.weight": torch.zeros(4, 4) for i in range(2) for part in ("up", "down")}
    only = layers_of_file(tmp_path, tensors, include=["*.up"], exclude=["re:^block\\.1\\."])
    assert {name for name, layer in only.items() if layer.eligible} == {"block.0.up"}


@pytest.mark.parametrize("pattern", ["nothing*", "re:(", "re:nothing"])
def test_patterns_that_match_nothing_are_named(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(BadInput) as caught:
        layers_of_file(tmp_path, {"a.weight": torch.zeros(4, 4)}, include=[pattern])
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_too_many_modules_is_not_built(tmp_path: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    assert transformers_architecture(tmp_path) is not None
    assert transformers_architecture(tmp_path, most_modules=20) is None
    nn.Sequential(*(nn.ReLU() for _ in range(30)))  # nothing is counted any more


def test_layers_that_are_called_like_factors_are_layers(tmp_path: Path) -> None:
    tensors = {"x.down.weight": torch.ones(8, 40), "x.up.weight": torch.ones(48, 8), "x.bias": torch.ones(48)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = {layer.name: layer for layer in find_layers(open_checkpoint(tmp_path / "model.safetensors"))}
    assert found.keys() == {"x.down", "x.up"}
    assert all(layer.eligible and layer.stored is None for layer in found.values())
