"""Outputs appear whole or not at all, with the umask's permissions, and never at the input's expense."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from compressor.checkpoint import (
    SafetensorsWriter,
    Shard,
    ShardedWriter,
    TensorInfo,
    atomic_file,
    check_output,
    open_checkpoint,
    output_folder,
    parse_size,
    plan_shards,
    safetensors_size,
    shard_index,
    write_json,
    write_state_dict_file,
)
from compressor.errors import BadInput, CompressorError

W = TensorInfo("w", (1000,), torch.float32)


def write_safetensors(path: Path) -> None:
    with SafetensorsWriter(path, [W], {}) as writer:
        writer.write("w", torch.ones(1000))


def write_torch(path: Path) -> None:
    write_state_dict_file(path, {"w": torch.ones(1000)})


def write_document(path: Path) -> None:
    write_json(path, {"w": [1.0] * 1000})


def write_folder(path: Path) -> None:
    with output_folder(path, copy_from=None, overwrite=True) as folder:
        write_safetensors(folder / "model.safetensors")


WRITERS = [write_safetensors, write_torch, write_document, write_folder]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", WRITERS)
def test_outputs_have_the_permissions_of_the_umask(tmp_path: Path, umask: int, write: Callable[[Path], None]) -> None:
    write(tmp_path / "out")
    everything = [tmp_path / "out", *(tmp_path / "out").glob("*")]
    for path in everything:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", [write_safetensors, write_torch, write_document])
def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    write(tmp_path / "out")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", ["missing/out", "file/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, write: Callable[[Path], None], place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / place)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [write_safetensors, write_torch, write_document])
def test_a_file_does_not_replace_a_folder(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB, where mounting one is allowed."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if not mount or not unmount or subprocess.run([mount, *size], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run([unmount, str(disk)], check=True)


def fill_safetensors(path: Path) -> None:
    with SafetensorsWriter(path, [TensorInfo("w", (100_000,), torch.float32)], {}) as writer:
        writer.write("w", torch.ones(100_000))


def fill_torch(path: Path) -> None:
    write_state_dict_file(path, {"w": torch.ones(100_000)})


def fill_document(path: Path) -> None:
    write_json(path, {"w": "1" * 100_000})


def fill_folder(path: Path) -> None:
    (path.parent.parent / "source").mkdir()
    (path.parent.parent / "source" / "tokenizer.json").write_bytes(bytes(100_000))
    with output_folder(path, copy_from=path.parent.parent / "source", overwrite=True):
        pass


FILLERS = [fill_safetensors, fill_torch, fill_document, fill_folder]


@pytest.mark.parametrize("fill", FILLERS)
def test_a_full_disk_is_bad_input_and_leaves_nothing(tiny_disk: Path, fill: Callable[[Path], None]) -> None:
    with pytest.raises(BadInput, match="No space left on device") as caught:
        fill(tiny_disk / "out")
    assert str(tiny_disk / "out") in str(caught.value)
    assert not list(tiny_disk.iterdir())


def test_a_disk_that_fills_during_a_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("before")
    pwrite, written = os.pwrite, []

    def nearly_full(descriptor: int, block: memoryview, offset: int) -> int:
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(pwrite(descriptor, block[:500], offset))
        return written[-1]

    monkeypatch.setattr(os, "pwrite", nearly_full)
    with pytest.raises(BadInput, match="No space left"):
        write_safetensors(tmp_path / "out")
    assert len(written) == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "before"


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "whole")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, block, offset: pwrite(fd, block[:77], offset))
    write_safetensors(tmp_path / "pieces")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_errors_of_other_files_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path / "elsewhere").read_bytes()
    assert not list(tmp_path.iterdir())


infos = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(
    lambda sizes: [TensorInfo(f"t{i}", (size,), torch.float32) for i, size in enumerate(sizes)]
)


@settings(deadline=None)  # the machine may be busy
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
    with pytest.raises(CompressorError, match="not announced"), ShardedWriter(tmp_path, shards, {}) as writer:
        writer.write("c", torch.zeros(10))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    for name in (
        "config.json",
        "tokenizer.json",
        "README.md",
        "merges.txt",
        "training_args.bin",
        "trainer_state.json",
    ):
        (folder / name).write_text("{}")
    for name in (
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "optimizer.bin"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"),
        *("tf_model.h5", "flax_model.msgpack", "model.gguf", "model.onnx", "other.safetensors"),
    ):
        (folder / name).write_text("x")
    for name in ("checkpoint-500", ".git", "1_Pooling", "1_Pooling/.cache", "1_Pooling/words", "2_Dense", "onnx"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'{{"of": "{name}"}}')
    save_file({"w": torch.ones(4)}, folder / "2_Dense" / "model.safetensors")
    (folder / "onnx" / "model.onnx").write_text("x")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "gone.json").symlink_to("nowhere")
    (folder / "latest.json").symlink_to("config.json")
    (folder / "secret.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_everything_but_weights_and_training_state(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(model_folder)
    with (
        caplog.at_level(logging.WARNING),
        output_folder(tmp_path / "out", copy_from=model_folder, overwrite=False) as folder,
    ):
        assert not (tmp_path / "out").exists()
        (folder / "config.json").write_text('{"changed": true}')
    kept = {
        "config.json",
        "tokenizer.json",
        "README.md",
        "merges.txt",
        "training_args.bin",
        "trainer_state.json",
        "latest.json",
        "1_Pooling/config.json",
        "1_Pooling/words/config.json",
    }
    written = contents(tmp_path / "out")
    assert written.keys() == kept
    assert all(written[name] == before[name] for name in kept - {"config.json"})
    assert not any(entry.is_symlink() for entry in (tmp_path / "out").rglob("*"))
    for name in ("secret.json", "gone.json", "again", ".git", "1_Pooling/.cache", "checkpoint-500", "2_Dense", "onnx"):
        assert name in caplog.text
    assert contents(model_folder) == before


def test_a_model_with_subfolders_is_replaced_by_one_with_the_same_and_no_more(
    tmp_path: Path, model_folder: Path
) -> None:
    (model_folder / "model.safetensors.index.json").unlink()
    source = open_checkpoint(model_folder)

    def write_again() -> None:
        check_output(tmp_path / "out", source=source, form="folder", overwrite=True)
        with output_folder(tmp_path / "out", copy_from=model_folder, overwrite=True) as folder:
            write_safetensors(folder / "model.safetensors")

    write_again()
    first = contents(tmp_path / "out")
    write_again()
    assert contents(tmp_path / "out") == first
    (tmp_path / "out" / "1_Pooling" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="subfolders"):
        write_again()
    # Nor when it comes after the check.
    with pytest.raises(BadInput, match="subfolders"), output_folder(tmp_path / "out", copy_from=None, overwrite=True):
        pass
    assert (tmp_path / "out" / "1_Pooling" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_a_companion_that_cannot_be_read_is_bad_input_and_leaves_nothing(
    tmp_path: Path, model_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable, opened = model_folder / name, Path.open

    def refused(self: Path, *given: Any, **named: Any) -> Any:
        # Permissions do not stop the superuser.
        if self == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    with (
        pytest.raises(BadInput, match=f"{name}: may not be read"),
        output_folder(tmp_path / "out", copy_from=model_folder, overwrite=False),
    ):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "secret"}


def test_files_of_a_hugging_face_cache_are_copied_through_their_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "123", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("../../blobs/abc"))
    with output_folder(tmp_path / "out", copy_from=snapshot, overwrite=False):
        pass
    assert contents(tmp_path / "out") == {"config.json": b"{}"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), BadInput("no", remedy="none")])
def test_a_folder_that_is_not_finished_leaves_the_old_one(
    tmp_path: Path, model_folder: Path, error: BaseException
) -> None:
    write_folder(tmp_path / "out")
    before = contents(tmp_path / "out")

    def write_half() -> None:
        with output_folder(tmp_path / "out", copy_from=model_folder, overwrite=True) as folder:
            (folder / "half").write_text("")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert contents(tmp_path / "out") == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "model", "secret"}


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    (tmp_path / "out" / "stale.json").write_text("{}")
    with output_folder(tmp_path / "out", copy_from=None, overwrite=True) as folder:
        write_safetensors(folder / "model.safetensors")
        assert (tmp_path / "out" / "stale.json").exists()
    assert list(contents(tmp_path / "out")) == ["model.safetensors"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out")
    (tmp_path / "out" / "old.json").write_text("{}")
    before = contents(tmp_path / "out")
    rename, calls = Path.rename, []

    def fails_the_second_time(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_the_second_time)
    with pytest.raises(OSError, match="Input/output"):
        write_folder(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_made_by_somebody_else_meanwhile_is_kept(tmp_path: Path) -> None:
    def write_too_late() -> None:
        with output_folder(tmp_path / "out", copy_from=None, overwrite=False):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(BadInput, match="somebody else"):
        write_too_late()
    assert contents(tmp_path) == {"out/theirs": b""}


def test_a_linked_output_folder_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    write_folder(tmp_path / "out")
    assert list(contents(tmp_path / "target")) == ["precious"]
    assert list(contents(tmp_path / "out")) == ["model.safetensors"]
    assert not (tmp_path / "out").is_symlink()


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    check_output(tmp_path / "out", source=None, form="file", overwrite=False)
    (tmp_path / "out").write_text("x")
    with pytest.raises(BadInput, match=r"already exists.*`overwrite`"):
        check_output(tmp_path / "out", source=None, form="file", overwrite=False)
    check_output(tmp_path / "out", source=None, form="file", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="already exists"):
        check_output(tmp_path / "link", source=None, form="file", overwrite=False)
    assert (tmp_path / "out").read_text() == "x"


def test_overwriting_keeps_the_kind_and_never_takes_more_than_a_model(tmp_path: Path) -> None:
    def refuse(path: Path, form: str, says: str) -> None:
        with pytest.raises(BadInput, match=says):
            check_output(path, source=None, form=form, overwrite=True)  # type: ignore[arg-type]

    (tmp_path / "file").write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    refuse(tmp_path / "file", "folder", "is a file, and a folder")
    refuse(folder, "file", "is a folder, and a file")
    check_output(folder, source=None, form="folder", overwrite=True)
    (folder / "thesis.txt").write_text("")
    refuse(folder, "folder", "no weights")
    (folder / "model.safetensors").write_text("")
    check_output(folder, source=None, form="folder", overwrite=True)
    (folder / ".git").mkdir()
    refuse(folder, "folder", "subfolders")
    refuse(Path("/"), "folder", "subfolders")


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
            check_output(output, source=source, form="folder", overwrite=True)
    check_output(Path("out.safetensors"), source=from_file, form="file", overwrite=False)
    check_output(tmp_path / "model-compressed", source=from_folder, form="folder", overwrite=False)


def test_the_shards_of_an_index_are_inputs_too(tmp_path: Path) -> None:
    infos = [TensorInfo(name, (10,), torch.float32) for name in "ab"]
    with ShardedWriter(tmp_path, plan_shards(infos, 40), {}) as writer:
        for name in "ab":
            writer.write(name, torch.zeros(10))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BadInput, match="is the input itself"):
        check_output(checkpoint.files[1], source=checkpoint, form="file", overwrite=True)


@pytest.mark.parametrize("place", ["missing/out", "file/out", "/proc/out", "x" * 300])
def test_an_unwritable_place_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        check_output(tmp_path / place, source=None, form="file", overwrite=False)


def test_small_sizes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=81_200)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(BadInput, match=r"needs 123\.4 kB, and the disk has 81\.2 kB free"):
        check_output(tmp_path / "o", source=None, form="file", overwrite=False, needed_bytes=123_400)


def test_too_little_space_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"needs 1,000,000,000,000\.0 MB, and the disk has [\d,.]+ MB free"):
        check_output(tmp_path / "o", source=None, form="file", overwrite=False, needed_bytes=10**18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40MB", 40_000_000),
        ("40 mb", 40_000_000),
        ("1.5GiB", 3 * 2**29),
        ("0.1MB", 100_000),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("3MiB", 3 * 2**20),
        ("5GB", 5 * 10**9),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("17", 17),
        ("17B", 17),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "0.1B", "1e3", "1,5GB", "5XB", "5 M B", "nan", "inf", "٣MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput, match="not a size"):
        parse_size(text)


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_bad_input(text: str) -> None:
    try:
        assert parse_size(text) > 0
    except BadInput:
        return


def test_written_json_is_what_was_given(tmp_path: Path) -> None:
    document = {"ranks": {"é": 3}, "none": None}
    write_json(tmp_path / "config.json", document)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == document
