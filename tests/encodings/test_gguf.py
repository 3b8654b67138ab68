"""GGUF files are read as the folders of transformers that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor import BadInput, compress, restore
from compressor.encodings import read_checkpoint
from compressor.model import open_model, open_runnable
from tests.encodings import stored

IDS = torch.tensor([[5, 9, 33, 7, 12, 60]])
# Where each block of 256 numbers has its half-precision scales, in bytes from its start.
K_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def model(*, tied: bool = True) -> Any:
    torch.manual_seed(2)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    return stored.llama(**sizes, tie_word_embeddings=tied).eval()


def blocks(kind: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Random blocks of a kind that the library does not write."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = np.random.default_rng(3).integers(0, 256, (shape[0], shape[1] // numbers, size), dtype=np.uint8)
    for place in K_SCALES[kind]:
        rows[:, :, place : place + 2] = np.frombuffer(np.float16(0.003).tobytes(), dtype=np.uint8)
    return rows.reshape(shape[0], -1)


def write(path: Path, kind: str, *, tied: bool = True) -> Path:
    """A llama as llama.cpp's `convert_hf_to_gguf.py` writes it, its matrices of one kind."""
    dense = model(tied=tied)
    config, writer = dense.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in dense.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.float()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows = values.shape[0]
                values = values.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(rows, -1)
        there = names.get_name(name, (".weight", ".bias"))
        if values.dim() == 1 or kind == "F32":
            writer.add_tensor(there, values.numpy())
        elif kind in K_SCALES:
            of_kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(there, blocks(kind, tuple(values.shape)), raw_dtype=of_kind)
        else:
            of_kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(there, gguf.quants.quantize(values.numpy(), of_kind), raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_SCALES]


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_is_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path / "model.gguf", kind))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    assert set(checkpoint.tensors) == set(expected) - {"lm_head.weight"}
    for name in checkpoint.tensors:
        read = checkpoint.read(name)
        assert (read.dtype, tuple(read.shape)) == (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
        torch.testing.assert_close(read, expected[name].to(read.dtype), rtol=2**-7, atol=1e-6)
    halves = {"F32": torch.float32, "F16": torch.float16}
    assert {info.dtype for info in checkpoint.tensors.values()} == {halves.get(kind, torch.bfloat16)}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_what_the_original_does(tmp_path: Path, *, tied: bool) -> None:
    opened = open_runnable(write(tmp_path / "model.gguf", "F32", tied=tied))
    expected = model(tied=tied)(IDS).logits
    assert torch.equal(opened.module(IDS).logits, expected)
    torch.testing.assert_close(open_model(tmp_path / "model.gguf").streamed(IDS).logits, expected)


@torch.no_grad()
def test_it_becomes_a_folder_of_transformers(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "Q4_1")
    before = path.read_bytes()
    compress(path, output=tmp_path / "small", keep=0.4, bits=(4, 8), calibration="none", prefer="size")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 9)
    restore(tmp_path / "small", output=tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(small(IDS).logits, dense(IDS).logits, rtol=0.05, atol=0.02)
    assert path.read_bytes() == before
    compressor.inspect(path)
    tokens = {"input_ids": torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))}
    found = compressor.evaluate(path, data=tokens)
    assert found.compressed > 1.0


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Gemma2", "Gemma3Text"])
@torch.no_grad()
def test_what_we_export_is_read_again(architecture: str, tmp_path: Path) -> None:
    own = {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 2}
    config = getattr(transformers, f"{architecture}Config")(**stored.SIZES | own)
    named = architecture.removesuffix("Text")
    dense = getattr(transformers, f"{named}ForCausalLM")(config)
    stored.dense_folder(tmp_path / "dense", dense, torch.float32)
    compressor.export(tmp_path / "dense", to="gguf", output=tmp_path / "model.gguf")
    again = open_runnable(tmp_path / "model.gguf").module
    torch.testing.assert_close(again(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_configuration_is_made_of_the_metadata(tmp_path: Path) -> None:
    opened = read_checkpoint(write(tmp_path / "model.gguf", "F16"))
    assert opened.folder is not None
    config = json.loads((opened.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == 2
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize("length", [5, 40, 600, -4096])
def test_a_file_that_ends_early_is_refused(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "model.gguf", "Q8_0").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:length])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"^short\.gguf: is a GGUF file that is truncated or damaged; "):
        compress("short.gguf", output="small", keep=0.5)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("version", [b"\1\0\0\0", b"\0\0\0\1"])
def test_another_version_is_named(version: bytes, tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf", "Q8_0").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[:4] + version + whole[8:])
    with pytest.raises(BadInput, match="is a GGUF file of version 1, which is not read"):
        read_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("heads", [0, 3])
def test_metadata_of_no_model_are_refused_in_plain_words(
    heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "model.gguf", "Q8_0"), "r+")
    field = reader.fields["llama.attention.head_count"]
    field.parts[field.data[0]][0] = heads
    reader.data.flush()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BadInput, match=r"^model\.gguf: is a GGUF file that is damaged: its metadata describe no llama; "
    ):
        read_checkpoint("model.gguf")


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_more_blocks_than_tensors_are_refused(architecture: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_block_count(2**31)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match="2147483648 blocks by its metadata, and 1 tensors"):
        read_checkpoint(tmp_path / "model.gguf")


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv6")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match="rwkv6, an architecture that is not read"):
        compress(tmp_path / "model.gguf", output=tmp_path / "small", keep=0.5)
