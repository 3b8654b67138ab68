"""Opening folders, indices, modules and wrong files; what a checkpoint says about itself."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.errors import BadInput
from compressor.io import TensorInfo, open_checkpoint, refuse_fp8, require_finite


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Write shards and return the index that fits them."""
    for name, tensors in shards.items():
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": 0}, "weight_map": weight_map}


def put_index(folder: Path, index: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps(index))
    return folder / name


TWO_SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.zeros(2), "b": torch.ones(3)},
    "model-00002-of-00002.safetensors": {"c": torch.arange(4)},
}


@pytest.mark.parametrize("max_shard_size", ["50GB", "5KB"])
def test_what_transformers_saves_is_read_as_it_was(tmp_path: Path, max_shard_size: str) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    del expected["lm_head.weight"]  # tied, so safetensors does not hold it twice
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert (checkpoint.form, checkpoint.folder, checkpoint.source) == ("folder", tmp_path, tmp_path)
    assert set(checkpoint.files) == set(tmp_path.glob("*.safetensors"))
    assert (len(checkpoint.files) > 1) == (max_shard_size == "5KB")
    assert checkpoint.weight_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert checkpoint.config is not None
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.metadata == {"format": "pt"}


def test_an_index_is_a_file_with_shards_of_either_kind(tmp_path: Path) -> None:
    put_index(tmp_path, sharded(tmp_path, TWO_SHARDS))
    torch_shards = {name.replace("safetensors", "bin"): tensors for name, tensors in TWO_SHARDS.items()}
    index = sharded(tmp_path, torch_shards)
    put_index(tmp_path, index, "pytorch_model.bin.index.json")
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        checkpoint = open_checkpoint(str(tmp_path / name))
        assert (checkpoint.form, checkpoint.folder) == ("file", None)
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert torch.equal(checkpoint.read("c"), torch.arange(4))
        assert len(checkpoint.files) == 2
    assert open_checkpoint(tmp_path).files[0].suffix == ".safetensors"


def test_sharded_torch_files_lose_wrapper_prefixes_together(tmp_path: Path) -> None:
    index = sharded(tmp_path, {"x.bin": {"module.a": torch.zeros(1)}, "y.bin": {"module.b": torch.ones(1)}})
    checkpoint = open_checkpoint(put_index(tmp_path, index, "pytorch_model.bin.index.json"))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert torch.equal(checkpoint.read("b"), torch.ones(1))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = put_index(tmp_path, sharded(tmp_path, TWO_SHARDS))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    for model in (index, tmp_path):
        with pytest.raises(BadInput, match=r"model-00002-of-00002\.safetensors.*missing"):
            open_checkpoint(model)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    first, second = TWO_SHARDS
    for change, says in [
        ({"b": second}, f"'b' into {second}, but it is in {first}"),
        ({"d": first}, f"'d' into {first}, but it is in no shard"),
        ({"b": None}, f"does not list it, but tensor 'b' is in {first}"),
    ]:
        index = sharded(tmp_path, TWO_SHARDS)
        index["weight_map"] |= change
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file}
        with pytest.raises(BadInput) as caught:
            open_checkpoint(put_index(tmp_path, index))
        assert says in str(caught.value)
    twice = {
        first: {"a": torch.zeros(2), "b": torch.zeros(1)},
        second: {"a": torch.zeros(2), "c": torch.zeros(1)},
    }
    with pytest.raises(BadInput, match=f"lists it in {second}, but tensor 'a' is in {first}"):
        open_checkpoint(put_index(tmp_path, sharded(tmp_path, twice)))


@pytest.mark.parametrize(
    "file_name",
    ["../secret.safetensors", "/etc/passwd", "a/../../b", "", ".", "\0", "\ud800", 3, None, ["a"]],
)
def test_an_index_may_name_files_of_its_own_folder_only(tmp_path: Path, file_name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(BadInput, match="no file of this folder"):
        open_checkpoint(put_index(folder, {"weight_map": {"a": file_name}}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"weight_map": {}}', '{"weight_map": []}', "{}", "[" * 100_000, "\udcff"]
)
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match=r"index\.json"):
        open_checkpoint(tmp_path)


names = st.sampled_from(["a", "b", "c", "d"]) | st.text(max_size=4)
places = st.sampled_from([*TWO_SHARDS, "model.safetensors.index.json", "x" * 300, "..", "sub/x"]) | st.text(max_size=5)


@given(
    st.dictionaries(names, places | st.none(), max_size=4),
    st.none() | st.tuples(st.floats(0, 0.999), st.integers(0, 255)),
)
def test_random_and_mutated_indices_are_refused_or_agree_with_the_shards(
    tmp_path_factory: pytest.TempPathFactory,
    weight_map: dict[str, str | None],
    mutation: tuple[float, int] | None,
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = sharded(folder, TWO_SHARDS)
    if mutation is None:
        path = put_index(folder, {"weight_map": weight_map})
    else:
        path = put_index(folder, index)
        content = bytearray(path.read_bytes())
        content[int(mutation[0] * len(content))] = mutation[1]
        path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except BadInput:
        return
    expected = {name: tensor for path in checkpoint.files for name, tensor in TWO_SHARDS[path.name].items()}
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_a_folder_prefers_what_transformers_prefers(tmp_path: Path) -> None:
    save_file({"from": torch.tensor(3)}, tmp_path / "other.safetensors")
    torch.save({"from": torch.tensor(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"state": torch.tensor(9)}, tmp_path / "optimizer.pt")
    torch.save({"args": torch.tensor(9)}, tmp_path / "training_args.bin")
    assert open_checkpoint(tmp_path).read("from") == 2
    save_file({"from": torch.tensor(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).read("from") == 1
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    assert open_checkpoint(tmp_path).read("from") == 3
    save_file({"from": torch.tensor(4)}, tmp_path / "another.safetensors")
    with pytest.raises(BadInput, match=r"2 weight files \(another\.safetensors, other\.safetensors\)"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="folder without a weight file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "m.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "git lfs pull",
        ),
        ("m.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("m.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("m.pt", b"\n <HTML><body>404", "web page"),
        ("m.safetensors", b"", "is empty"),
        ("m.safetensors", b"abc", "truncated"),
        ("m.bin", b"\x94UNKNOWN\x01\x00", "neither safetensors nor a torch checkpoint"),
        ("m.safetensors", b"\xff" * 64, "neither safetensors nor a torch checkpoint"),
        ("m.json", b'{"model_type": "bert"}', "is JSON"),
        ("model.safetensors.index.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, *, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=says) as caught:
        open_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.bin")
    assert torch.equal(open_checkpoint(tmp_path / "m.bin").read("w"), torch.ones(2))
    torch.save({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match=r"torch checkpoint under a safetensors name; rename it to \.pt"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"symbolic link to .*gone, which does not exist"):
        open_checkpoint(tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="not a regular file"):
        open_checkpoint(tmp_path / "fifo")
    with pytest.raises(BadInput, match="cannot be read"):
        open_checkpoint(tmp_path / ("x" * 300))
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may read everything, so the permission bits cannot show it
    with pytest.raises(BadInput, match="may not be read"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_config_that_is_no_object_is_refused_in_a_model_folder(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        open_checkpoint(tmp_path)
    # What lies beside a file need not belong to it.
    assert open_checkpoint(tmp_path / "model.safetensors").config is None


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 1_000_000},
        {"n_layer": 10**9},
        {"text_config": {"num_hidden_layers": 10**20}},
        {"depths": [2, 2, 10**6]},
        {"encoder_layers": 6, "decoder_layers": 10**6},
        {"num_labels": 10**9},
    ],
)
def test_a_config_of_far_more_layers_than_tensors_is_refused_before_they_are_built(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10**6, **config}))
    with pytest.raises(BadInput, match=r"config\.json: \w+ is .*the weights are 1 tensors"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "model.safetensors").config is None


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_name_of_a_million_characters_is_refused_and_not_shown_in_full(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "model"
    save({"a" * 4096: torch.zeros(2, 2)}, path)
    assert "a" * 4096 in open_checkpoint(path).tensors
    save({"a." * 500_000 + "weight": torch.zeros(2, 2)}, path)
    began = time.process_time()
    with pytest.raises(BadInput, match="name of 1,000,006 characters") as caught:
        open_checkpoint(path)
    assert time.process_time() - began < 1
    assert len(str(caught.value)) < 300 + len(str(path))


def test_the_config_beside_a_file_is_found_or_absent(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").config is None
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert open_checkpoint(tmp_path / "model.safetensors").config == {"model_type": "bert"}


def test_a_snapshot_of_the_hugging_face_cache_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "123", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(2)}, blobs / "abc")
    (blobs / "def").write_text('{"model_type": "bert"}')
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abc"))
    (snapshot / "config.json").symlink_to(Path("../../blobs/def"))
    monkeypatch.chdir(snapshot.parent)
    checkpoint = open_checkpoint("123")
    assert checkpoint.config == {"model_type": "bert"}
    monkeypatch.chdir(tmp_path)
    (snapshot / "model.safetensors").unlink()
    assert torch.equal(checkpoint.read("w"), torch.ones(2))


def test_the_digest_of_one_file_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(1_500_000)}, path)  # several blocks
    assert open_checkpoint(path).digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    put_index(tmp_path, sharded(tmp_path, TWO_SHARDS))
    content = b"".join((tmp_path / name).read_bytes() for name in TWO_SHARDS)
    digest = open_checkpoint(tmp_path / "model.safetensors.index.json").digest()
    assert digest == hashlib.sha256(content).hexdigest()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_module_is_its_state_dict_with_tied_parameters_once() -> None:
    module = Tied().to(torch.bfloat16)
    checkpoint = open_checkpoint(module)
    expected = module.state_dict()
    assert set(checkpoint.tensors) == set(expected) - {"head.weight"}
    assert checkpoint.aliases == {"head.weight": "embed.weight"}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert checkpoint.tensors["embed.weight"] == TensorInfo("embed.weight", (5, 3), torch.bfloat16)
    assert checkpoint.weight_bytes == sum(info.nbytes for info in checkpoint.tensors.values())
    described = (checkpoint.form, checkpoint.source, checkpoint.folder, checkpoint.files, checkpoint.config)
    assert described == ("module", None, None, (), None)


def test_reading_from_a_module_copies_and_sees_its_present_values() -> None:
    module = nn.Linear(2, 2)
    checkpoint = open_checkpoint(module)
    digest = checkpoint.digest()
    checkpoint.read("weight").fill_(7)
    assert checkpoint.digest() == digest
    nn.init.ones_(module.weight)
    assert torch.equal(checkpoint.read("weight"), torch.ones(2, 2))
    assert checkpoint.digest() != digest


def test_a_module_without_values_is_refused() -> None:
    with pytest.raises(BadInput, match="ReLU has no parameters"):
        open_checkpoint(nn.ReLU())
    with torch.device("meta"):
        checkpoint = open_checkpoint(nn.Linear(2, 2))
    assert list(checkpoint.tensors) == ["weight", "bias"]
    with pytest.raises(BadInput, match="meta device"):
        checkpoint.read("weight")


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        open_checkpoint(nn.Linear(2, 2)).read("wieght")


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_value_that_is_not_finite_names_its_tensor(dtype: torch.dtype) -> None:
    largest = 57344.0 if dtype is torch.float8_e5m2 else 65504.0
    require_finite("w", torch.full((4, 4), largest).to(dtype))
    for value, says in [(float("nan"), "1 NaN and 0 infinite"), (float("inf"), "0 NaN and 1 infinite")]:
        tensor = torch.zeros(4, 4)
        tensor[1, 2] = value
        with pytest.raises(BadInput, match=f"layer.3.weight.*{says} values among 16"):
            require_finite("layer.3.weight", tensor.to(dtype))


@pytest.mark.parametrize("tensor", [torch.tensor([1, 2]), torch.tensor([True]), torch.empty(0)])
def test_tensors_that_cannot_be_infinite_pass(tensor: torch.Tensor) -> None:
    require_finite("w", tensor)


def test_fp8_weights_are_refused_with_and_without_scales(tmp_path: Path) -> None:
    fp8 = torch.ones(2, 2).to(torch.float8_e4m3fn)
    save_file({"a.weight": torch.ones(2), "b.weight": fp8}, tmp_path / "bare.safetensors")
    with pytest.raises(BadInput, match=r"b\.weight is FP8 \(float8_e4m3fn\) without its scales; .*dequantize"):
        refuse_fp8(open_checkpoint(tmp_path / "bare.safetensors"))
    scaled = {"b.weight": fp8, "b.weight_scale_inv": torch.ones(1)}
    save_file(scaled, tmp_path / "scaled.safetensors")
    with pytest.raises(BadInput, match=r"FP8 \(float8_e4m3fn\) scaled by b\.weight_scale_inv"):
        refuse_fp8(open_checkpoint(tmp_path / "scaled.safetensors"))
    refuse_fp8(open_checkpoint(nn.Linear(2, 2)))


def test_an_index_that_leaves_out_a_numbered_shard_is_refused(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name, tensor in zip(names, ("a", "b"), strict=True):
        save_file({tensor: torch.ones(2)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0]}}))
    with pytest.raises(BadInput, match="shard 2 of 2"):
        open_checkpoint(tmp_path)
