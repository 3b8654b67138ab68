"""GGUF files: the tensors and settings of the model for readers that are not ours, and clear words for all others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compressor import BadInput, compress, export, restore
from compressor.cli.run import run
from compressor.errors import CompressorError
from compressor.exporting.gguf import gguf_artifact, gguf_file, require_equal
from compressor.exporting.gguf_architectures import ARCHITECTURES, gguf_model
from compressor.exporting.gguf_blocks import BLOCK_TYPES, block_type_of
from compressor.exporting.gguf_tokenizer import write_tokenizer
from compressor.model import open_runnable
from tests.exporting.conftest import tiny_llama

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64}
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def settings_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    read = gguf.GGUFReader(path).tensors
    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in read}


def saved(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


def model_of(kind: str) -> Any:
    """A tiny random model of an architecture, whose norms are not all one."""
    torch.manual_seed(0)
    family = kind.removesuffix("ForCausalLM")
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    more = {"query_pre_attn_scalar": 8, "sliding_window": 8} if family in ("Gemma2", "Gemma3") else {}
    more |= {"attention_bias": True} if family == "Llama" else {"head_dim": 8}
    model = getattr(transformers, kind)(config(**SIZES, **more, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.slow
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True) if family == "llama" else model_of("Qwen2ForCausalLM")
    folder = saved(model, tmp_path / "dense")
    (tmp_path / "read").mkdir()
    exported = export(folder, to="gguf", output=tmp_path / "read" / "model.gguf")
    assert exported.tensor_types == {"F32": len(tensors_of(Path(exported.output)))}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "read", gguf_file="model.gguf").eval()
    tokens = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert torch.equal(read(tokens).logits, model(tokens).logits)


def test_pairs_are_dense_in_it(small_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.gguf"
    assert run(["export", str(small_llama), "--to", "gguf", "-o", str(path)]) == 0
    assert "as F32; equal to the model's" in " ".join(capsys.readouterr().out.split())
    dense = transformers.AutoModelForCausalLM.from_pretrained(restore(small_llama, output=tmp_path / "dense").output)
    found, state = tensors_of(path), dense.state_dict()
    assert np.array_equal(found["blk.0.ffn_down.weight"], state["model.layers.0.mlp.down_proj.weight"].numpy())
    # A head has eight rows; llama.cpp wants those of the first and second half in turn.
    order = [8 * head + half + place for head in range(4) for place in range(4) for half in (0, 4)]
    queries = state["model.layers.0.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(found["blk.0.attn_q.weight"], queries[order])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_has_its_place(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    folder = saved(model, tmp_path / "dense")
    name = ARCHITECTURES[kind].name
    path = Path(export(folder, to="gguf", output=tmp_path / "model.gguf").output)
    found, settings = tensors_of(path), settings_of(path)
    distinct = {each.data_ptr(): each for each in model.state_dict().values()}
    assert sum(each.size for each in found.values()) == sum(each.numel() for each in distinct.values())
    norm = model.model.norm.weight.detach() + (1.0 if "Gemma" in kind else 0.0)
    assert np.array_equal(found["output_norm.weight"], norm.numpy())
    assert settings["general.architecture"] == name
    config = model.config
    assert settings[f"{name}.context_length"] == 64
    assert settings[f"{name}.block_count"] == 2
    assert settings[f"{name}.attention.head_count"] == 4
    assert settings[f"{name}.attention.head_count_kv"] == 2
    assert settings[f"{name}.attention.key_length"] == 8
    assert settings[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert settings[f"{name}.rope.freq_base"] == rope["rope_theta"]
    assert settings.get(f"{name}.attention.sliding_window") == (8 if ARCHITECTURES[kind].sliding else None)
    assert settings["tokenizer.ggml.model"] == "none"


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_a_tensor_keeps_its_16_bits(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    folder = saved(model, tmp_path / "dense")
    exported = export(folder, to="gguf", output=tmp_path / "model.gguf")
    assert exported.tensor_types == {name: 9, "F32": 3}
    found = tensors_of(Path(exported.output))
    assert np.array_equal(found["token_embd.weight"], model.model.embed_tokens.weight.detach().float().numpy())
    assert settings_of(Path(exported.output))["general.file_type"] == int(gguf.LlamaFileType[f"MOSTLY_{name}"])


def test_the_frequencies_of_llama_3(tmp_path: Path) -> None:
    model = tiny_llama(rope_parameters=LLAMA_3_ROPE, max_position_embeddings=64)
    path = Path(export(saved(model, tmp_path / "dense"), to="gguf", output=tmp_path / "model.gguf").output)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 8, 2) / 8)
    scaled = torch.tensor(tensors_of(path)["rope_freqs.weight"])
    assert torch.allclose(plain / scaled, model.model.rotary_emb.inv_freq)
    assert len(set(scaled.tolist())) > 1


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("GPT2LMHeadModel", {}, "is GPT2LMHeadModel; GGUF is written of Llama, Mistral"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "its activation is gelu, there silu"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaled as dynamic"),
        ("Qwen2ForCausalLM", {"rope_parameters": LLAMA_3_ROPE}, "scaled as llama3"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 256}, "not divided by the root"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 2}, "not every 2th block"),
        ("LlamaForCausalLM", {"rope_parameters": 3}, "transformers cannot read"),
    ],
)
def test_what_llama_cpp_computes_otherwise(kind: str, changes: dict[str, Any], words: str) -> None:
    given = {**SIZES, "architectures": [kind], "model_type": kind.removesuffix("ForCausalLM").lower(), "head_dim": 8}
    given |= {"query_pre_attn_scalar": 8} if kind.startswith("Gemma2") else {}
    with pytest.raises(BadInput, match=words):
        gguf_model({**given, **changes}, Path("folder"))


def test_a_window_is_named(caplog: pytest.LogCaptureFixture) -> None:
    given = {**SIZES, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    gguf_model({**given, "sliding_window": 16}, Path("folder"))
    assert "a window of the last 16" in caplog.text
    caplog.clear()
    gguf_model({**given, "sliding_window": 64}, Path("folder"))
    assert not caplog.text


def test_a_file_and_a_strange_tensor_are_refused(small_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no transformers folder"):
        gguf_file(open_runnable(small_llama / "model.safetensors"))
    model = tiny_llama()
    model.model.layers[0].mlp.register_parameter("strange", torch.nn.Parameter(torch.rand(3)))
    with pytest.raises(BadInput, match=r"mlp\.strange"):
        gguf_file(open_runnable(saved(model, tmp_path / "strange")))


def test_another_file_is_noticed(tmp_path: Path) -> None:
    first, other = (gguf_file(open_runnable(saved(tiny_llama(), tmp_path / name))) for name in ("first", "other"))
    artifact = gguf_artifact(first)
    assert artifact.write is not None
    artifact.write(tmp_path / "first.gguf")
    require_equal(other, tmp_path / "first.gguf")
    bigger = saved(tiny_llama(rms_norm_eps=1e-5), tmp_path / "bigger")
    weights = transformers.LlamaForCausalLM.from_pretrained(bigger)
    with torch.no_grad():
        weights.model.norm.weight[3] += 1e-7
    with pytest.raises(CompressorError, match=r"output_norm.weight has other values"):
        require_equal(gguf_file(open_runnable(saved(weights, tmp_path / "changed"))), tmp_path / "first.gguf")
    with pytest.raises(CompressorError, match=r"has other tensors: output\.weight"):
        require_equal(replace(first, tensors=first.tensors[1:]), tmp_path / "first.gguf")


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_blocks_hold_the_same_integers_and_scales(kind: Any) -> None:
    random = np.random.default_rng(0)
    least, most = -(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1
    integers = random.integers(least, most, (3, 96), np.int16, endpoint=True)
    integers[0, :2] = least, most
    scales = random.standard_normal((3, 3)).astype(np.float16)
    packed = kind.packed(integers, scales)
    found = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(found, integers * np.repeat(scales, 32, axis=1).astype(np.float32))
    assert block_type_of(least, most) == kind
    assert block_type_of(least - 1, most) != kind


def test_integers_that_no_type_holds() -> None:
    assert block_type_of(-129, 0) is None
    assert block_type_of(0, 128) is None


def test_a_missing_extra_is_named(small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    known = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BadInput, match=r"needs gguf.*compressor\[gguf\]"):
        export(small_llama, to="gguf", output=tmp_path / "llama.gguf")


# As the tokenizer of Llama 3 splits text, with numbers of up to three digits.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(folder: Path, splits: list[Any], **model: Any) -> Path:
    """A tokenizer of a few tokens, of which one is joined and one is special."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["cc"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 3)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ messages }}"}))
    return folder


def written(folder: Path, size: int, path: Path) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path, "llama")
    write_tokenizer(writer, folder, size=size)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.close()
    return {name.removeprefix("tokenizer.ggml."): value for name, value in settings_of(path).items()}


def test_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Split

    splits = [Split(Regex(LLAMA_3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    found = written(byte_level(tmp_path / "t", splits, ignore_merges=True), 6, tmp_path / "t.gguf")
    kinds = gguf.TokenType
    assert (found["model"], found["pre"]) == ("gpt2", "llama-bpe")
    assert found["tokens"] == ["a", "b", "ab", "<s>", "cc", "[PAD5]"]
    assert found["token_type"] == [kinds.NORMAL] * 3 + [kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED]
    assert found["merges"] == ["a b"]
    assert (found["bos_token_id"], found["add_bos_token"]) == (3, True)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    with pytest.raises(BadInput, match="token 4, and the embedding has 4 rows"):
        written(tmp_path / "t", 4, tmp_path / "small.gguf")


def test_the_splits_that_llama_cpp_has(tmp_path: Path) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    bytes_alone = ByteLevel(add_prefix_space=False)
    cases: dict[str, list[Any]] = {
        "gpt-2": [bytes_alone],
        "smollm": [Digits(individual_digits=True), bytes_alone],
        "qwen2": [
            Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    for name, splits in cases.items():
        assert written(byte_level(tmp_path / name, splits), 6, tmp_path / f"{name}.gguf")["pre"] == name
    refused: dict[str, list[Any]] = {
        "spaces": [ByteLevel(add_prefix_space=True)],
        "digits": [Digits(individual_digits=False), bytes_alone],
        "pattern": [Split(Regex("x+"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
        "nothing": [ByteLevel(add_prefix_space=False, use_regex=False)],
        "llama": [Split(Regex(LLAMA_3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
    }
    for name, splits in refused.items():
        with pytest.raises(BadInput, match=r"llama\.cpp"):
            written(byte_level(tmp_path / name, splits), 6, tmp_path / "refused.gguf")


def test_a_tokenizer_without_merges_splits_as_it_likes(tmp_path: Path) -> None:
    cards = Path(__file__).parents[2] / "model_cards" / "stdlib-llama"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cards / name, tmp_path)
    found = written(tmp_path, 257, tmp_path / "t.gguf")
    assert (found["pre"], found["merges"], found["add_bos_token"]) == ("gpt-2", ["none none"], False)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"without tokenizer\.json"):
        written(tmp_path, 257, tmp_path / "t.gguf")


def test_a_tokenizer_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat and the dog sat on the log\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    reader = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = reader.vocab_size()
    added = {str(size - 1): {"content": "<turn>", "special": True}, str(size + 9): {"content": "far", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "tokenizer_class": "GemmaTokenizer"})
    )
    found = written(tmp_path, size + 2, tmp_path / "t.gguf")
    assert (found["model"], found["add_space_prefix"]) == ("llama", False)
    assert found["tokens"][: size - 1] == [reader.id_to_piece(number) for number in range(size - 1)]
    assert found["tokens"][size - 1 :] == ["<turn>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    kinds = gguf.TokenType
    assert found["token_type"][:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    assert found["token_type"][-3:] == [kinds.CONTROL, kinds.UNUSED, kinds.UNUSED]
    assert found["scores"][: size - 1] == [reader.get_score(number) for number in range(size - 1)]
    with pytest.raises(BadInput, match="and the embedding has 3 rows"):
        written(tmp_path, 3, tmp_path / "t.gguf")


def test_a_file_is_named_by_its_ending(small_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(small_llama), "--to", "gguf", "-o", str(tmp_path / "small.bin")]) == 2
    assert "a GGUF model is one file; name it with .gguf" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0"), (5, "Q5_0")])
def test_quantized_layers_are_the_same_integers(bits: int, kind: str, tmp_path: Path) -> None:
    folder = saved(tiny_llama(hidden_size=64, intermediate_size=96), tmp_path / "dense")
    compress(folder, output=tmp_path / "small", bits=bits, calibration="none", embeddings=True)
    exported = export(tmp_path / "small", to="gguf", output=tmp_path / "model.gguf")
    assert exported.tensor_types is not None
    assert exported.tensor_types[kind] >= 8  # of the nine layers one may have no such form
    found = {each.name: each for each in gguf.GGUFReader(exported.output).tensors}
    assert found["blk.0.attn_q.weight"].tensor_type.name == kind
    restored = transformers.AutoModelForCausalLM.from_pretrained(
        restore(tmp_path / "small", output=tmp_path / "restored").output
    )
    down = restored.model.layers[0].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(tensors_of(Path(exported.output))["blk.0.ffn_down.weight"], down)
    assert exported.bytes.after < 1.3 * exported.bytes.before


def test_groups_that_no_block_has_are_rounded_to_16_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tiny_llama(hidden_size=64, intermediate_size=112), tmp_path / "dense")  # groups of 28 inputs
    compress(folder, output=tmp_path / "small", bits=4, calibration="none")
    exported = export(tmp_path / "small", to="gguf", output=tmp_path / "model.gguf")
    assert exported.tensor_types is not None
    assert exported.tensor_types["F16"] >= 1
    rounded = exported.tensor_types["F16"]
    assert f"{rounded} quantized layers, such as model.layers.0.mlp.down_proj, are rounded to F16" in caplog.text
