"""Outputs that cannot be written are refused before the work, and never at the input's expense; weights in shards."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from compressor.errors import BadInput, CompressorError
from compressor.io import (
    Naming,
    Shard,
    ShardedWriter,
    Target,
    TensorInfo,
    check_output,
    checked_target,
    copy_companions,
    open_checkpoint,
    plan_shards,
    safetensors_size,
    shard_index,
    staged_folder,
    write_json,
)

infos = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(
    lambda sizes: [TensorInfo(f"t{i}", (size,), torch.float32) for i, size in enumerate(sizes)]
)


@given(infos, st.integers(1, 400))
def test_shards_keep_the_limit_and_every_tensor_in_order(infos: list[TensorInfo], limit: int) -> None:
    shards = plan_shards(infos, limit)
    assert [info for shard in shards for info in shard.infos] == infos
    for shard in shards:
        assert len(shard.infos) == 1 or sum(info.nbytes for info in shard.infos) <= limit
    # No shard could have taken the first tensor of the next one.
    for shard, following in itertools.pairwise(shards):
        assert sum(info.nbytes for info in (*shard.infos, following.infos[0])) > limit
    assert len({shard.file_name for shard in shards}) == len(shards)


def test_one_shard_is_model_safetensors_and_several_are_numbered() -> None:
    infos = [TensorInfo(name, (10,), torch.float32) for name in "abc"]
    assert plan_shards(infos, 120) == (Shard("model.safetensors", tuple(infos)),)
    shards = plan_shards(infos, 80)
    assert [shard.file_name for shard in shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    first, second = (shard.file_name for shard in shards)
    assert shard_index(shards) == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": first, "b": first, "c": second},
    }


@pytest.mark.parametrize("limit", [100, 10**9])
def test_a_sharded_model_opens_whatever_the_order_of_writing(tmp_path: Path, limit: int) -> None:
    tensors = {f"t{i}": torch.full((i + 1, 3), float(i)) for i in range(8)}
    infos = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    shards = plan_shards(infos, limit)
    with ShardedWriter(tmp_path, shards, {"format": "pt"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert len(checkpoint.tensors) == len(tensors)
    sizes = [safetensors_size(shard.infos, {"format": "pt"}) for shard in shards]
    assert sum(sizes) == checkpoint.weight_bytes
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(shards) > 1)


def test_transformers_loads_what_the_sharded_writer_writes(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    model = BertModel(config)
    source = open_checkpoint(model)
    with ShardedWriter(tmp_path, plan_shards(list(source.tensors.values()), 2000), {"format": "pt"}) as writer:
        for name in source.tensors:
            writer.write(name, source.read(name))
    config.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_sharded_model_with_a_tensor_missing_does_not_get_an_index(tmp_path: Path) -> None:
    shards = plan_shards([TensorInfo(name, (10,), torch.float32) for name in "ab"], 40)
    with pytest.raises(CompressorError, match="never written"), ShardedWriter(tmp_path, shards, {}) as writer:
        writer.write("a", torch.zeros(10))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "again").mkdir()
    with pytest.raises(CompressorError, match="not announced"), ShardedWriter(tmp_path / "again", shards, {}) as writer:
        writer.write("c", torch.zeros(10))


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    check_output(tmp_path / "out", sources=[], form="file", overwrite=False)
    (tmp_path / "out").write_text("x")
    with pytest.raises(BadInput, match=r"already exists.*`overwrite`"):
        check_output(tmp_path / "out", sources=[], form="file", overwrite=False)
    check_output(tmp_path / "out", sources=[], form="file", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="already exists"):
        check_output(tmp_path / "link", sources=[], form="file", overwrite=False)
    assert (tmp_path / "out").read_text() == "x"


def test_overwriting_keeps_the_kind_and_never_takes_more_than_a_model(tmp_path: Path) -> None:
    def refuse(path: Path, form: str, says: str) -> None:
        with pytest.raises(BadInput, match=says):
            check_output(path, sources=[], form=form, overwrite=True)  # type: ignore[arg-type]

    (tmp_path / "file").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    refuse(tmp_path / "file", "folder", "is a file, and a folder")
    refuse(folder, "file", "is a folder, and a file")
    check_output(folder, sources=[], form="folder", overwrite=True)
    (folder / "README.md").write_text("")
    refuse(folder, "folder", "no weights")
    (folder / "model.safetensors").write_text("")
    check_output(folder, sources=[], form="folder", overwrite=True)
    (folder / "thesis.tex").write_text("")
    (folder / ".git").mkdir()
    refuse(folder, "folder", r"also holds \.git, thesis\.tex, which would be lost")
    refuse(Path("/"), "folder", "which would be lost")


def test_a_folder_of_the_same_model_is_replaced(tmp_path: Path, model_folder: Path) -> None:
    (model_folder / "model.safetensors.index.json").unlink()
    source, out = open_checkpoint(model_folder), tmp_path / "out"
    for _ in range(2):
        check_output(out, sources=[source], form="folder", overwrite=True)
        with staged_folder(out, overwrite=True) as folder:
            copy_companions(model_folder, folder)
            save_file({"w": torch.zeros(4)}, folder / "model.safetensors")
    assert (out / "1_Pooling" / "config.json").is_file()


def test_what_a_killed_run_left_in_a_folder_does_not_keep_it_from_being_replaced(tmp_path: Path) -> None:
    left = tmp_path / "out" / ".report.html.0123456789ab.partial"
    (left / "new").mkdir(parents=True)
    (left / "lock").touch()
    (left / "new" / "report.html").write_text("half")
    check_output(tmp_path / "out", sources=[], form="folder", overwrite=True)
    assert not left.exists()


def test_the_working_directory_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "out" / "1_Pooling"
    part.mkdir(parents=True)
    (tmp_path / "out" / "compression.json").write_text('{"files": ["compression.json", "1_Pooling/config.json"]}')
    for place in (tmp_path / "out", part):
        monkeypatch.chdir(place)
        with pytest.raises(BadInput, match="holds the working directory"):
            check_output(tmp_path / "out", sources=[], form="folder", overwrite=True)
    monkeypatch.chdir(tmp_path)
    check_output(tmp_path / "out", sources=[], form="folder", overwrite=True)


def test_the_input_is_out_of_reach(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model_folder / "model.safetensors"
    (model_folder / "model.safetensors.index.json").unlink()
    from_folder, from_file = open_checkpoint(model_folder), open_checkpoint(weights)
    (tmp_path / "link").symlink_to(model_folder)
    monkeypatch.chdir(model_folder)
    refused = [
        (from_folder, model_folder, "is the input itself"),
        (from_folder, tmp_path / "link", "is the input itself"),
        (from_folder, Path(), "is the input itself"),
        (from_folder, Path("out"), "inside the input folder"),
        (from_folder, tmp_path / "link" / "out", "inside the input folder"),
        (from_folder, tmp_path, "contains the input"),
        (from_folder, weights, "inside the input folder"),
        (from_file, weights, "is the input itself"),
        (from_file, Path("model.safetensors"), "is the input itself"),
        (from_file, tmp_path / "link" / "model.safetensors", "is the input itself"),
        (from_file, model_folder, "contains the input"),
        (weights, weights, "is the input itself"),
    ]
    for source, output, says in refused:
        with pytest.raises(BadInput, match=says):
            check_output(output, sources=[source], form="folder", overwrite=True)
    check_output(Path("out.safetensors"), sources=[from_file], form="file", overwrite=False)
    check_output(tmp_path / "model-compressed", sources=[from_folder], form="folder", overwrite=False)


def test_the_shards_of_an_index_are_inputs_too(tmp_path: Path) -> None:
    infos = [TensorInfo(name, (10,), torch.float32) for name in "ab"]
    with ShardedWriter(tmp_path, plan_shards(infos, 40), {}) as writer:
        for name in "ab":
            writer.write(name, torch.zeros(10))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BadInput, match="is the input itself"):
        check_output(checkpoint.files[1], sources=[checkpoint], form="file", overwrite=True)


@pytest.mark.parametrize("place", ["missing/out", "file/out", "/proc/out", "x" * 300])
def test_an_unwritable_place_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        check_output(tmp_path / place, sources=[], form="file", overwrite=False)


def test_small_sizes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=81_200)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(BadInput, match=r"needs 123\.4 kB, and the disk has 81\.2 kB free"):
        check_output(tmp_path / "o", sources=[], form="file", overwrite=False, needed_bytes=123_400)


def test_too_little_space_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"needs 1,000,000,000,000\.0 MB, and the disk has [\d,.]+ MB free"):
        check_output(tmp_path / "o", sources=[], form="file", overwrite=False, needed_bytes=10**18)
    assert not list(tmp_path.iterdir())


def test_written_json_is_what_was_given(tmp_path: Path) -> None:
    document = {"ranks": {"é": 3}, "none": None}
    write_json(tmp_path / "config.json", document)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == document


@pytest.mark.parametrize(
    ("opened", "naming", "place"),
    [
        ("a.b.safetensors", Naming("file", "-small"), "a.b-small.safetensors"),
        ("a.b.safetensors", Naming("file", "", (".onnx",)), "a.b.onnx"),
        ("a.b.safetensors", Naming("folder", "-adapter"), "a.b-adapter"),
        ("v1.0", Naming("folder", "-small"), "v1.0-small"),
        ("v1.0", Naming("file", "", (".onnx",)), "v1.0.onnx"),
        ("link", Naming("folder", "-small"), "link-small"),
    ],
)
def test_an_output_without_a_name_has_that_of_the_input_and_a_suffix(
    tmp_path: Path, opened: str, naming: Naming, *, place: str
) -> None:
    (tmp_path / "v1.0").mkdir()
    for file in ("a.b.safetensors", "v1.0/model.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / file)
    (tmp_path / "link").symlink_to("v1.0", target_is_directory=True)
    source = open_checkpoint(tmp_path / opened)
    assert naming.place(source, None) == tmp_path / place
    assert checked_target(source, None, naming, overwrite=False).path == tmp_path / place
    asked = tmp_path / f"asked{naming.endings[0]}"
    assert checked_target(source, asked, naming, overwrite=False).path == asked


def test_a_file_is_named_like_one(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    source = open_checkpoint(tmp_path / "a.safetensors")
    for naming, words in ((Naming("file", ""), "as safetensors"), (Naming("file", "", (".onnx",)), "an ONNX model is")):
        with pytest.raises(BadInput, match=words):
            checked_target(source, tmp_path / "b.txt", naming, overwrite=False)


def test_none_of_several_inputs_is_written_to(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    first, second = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")
    for output in ("a.safetensors", "b.safetensors"):
        with pytest.raises(BadInput, match="is the input itself"):
            checked_target(first, tmp_path / output, Naming("file", ""), overwrite=True, others=[second])


def test_only_a_folder_is_pushed(tmp_path: Path) -> None:
    target = Target(tmp_path / "out.safetensors", "file", ())
    assert target.pushed_to(None).push() is None
    with pytest.raises(BadInput, match="sends a model folder"):
        target.pushed_to("me/small")
