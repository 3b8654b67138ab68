"""Outputs are complete or absent, whatever ends the run that writes them, and nothing is left beside them."""

from __future__ import annotations

import errno
import itertools
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from compressor.errors import BadInput
from compressor.io import (
    SafetensorsWriter,
    TensorInfo,
    check_output,
    open_checkpoint,
    staged_file,
    staged_folder,
    staging,
    write_json,
    write_state_dict_file,
)
from compressor.report.html import write_page

W = TensorInfo("w", (1000,), torch.float32)


def put_safetensors(path: Path, value: float = 1.0) -> None:
    with SafetensorsWriter(path, [W], {}) as writer:
        writer.write("w", torch.full((1000,), value))


def write_safetensors(path: Path) -> None:
    with staged_file(path, overwrite=True) as staged:
        put_safetensors(staged)


def write_torch(path: Path) -> None:
    with staged_file(path, overwrite=True) as staged:
        write_state_dict_file(staged, {"w": torch.ones(1000)})


def write_document(path: Path) -> None:
    with staged_file(path, overwrite=True) as staged:
        write_json(staged, {"w": [1.0] * 1000})


def write_folder(path: Path, value: float = 1.0, *, overwrite: bool = True) -> None:
    with staged_folder(path, overwrite=overwrite) as folder:
        put_safetensors(folder / "model.safetensors", value)


FILE_WRITERS = [write_safetensors, write_torch, write_document]
WRITERS = [*FILE_WRITERS, write_folder]


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    """Everything at a path: of a folder its files by name, of a file its bytes, None where nothing is."""
    if path.is_dir():
        return {str(entry.relative_to(path)): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}
    return path.read_bytes() if path.exists() else None


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that the kernel has been given."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system that is not Linux, as far as the staging knows."""
    monkeypatch.setattr(platform, "system", lambda: "another")
    staging._system_call.cache_clear()
    yield
    staging._system_call.cache_clear()


@pytest.fixture(params=["with renameat2", "without"])
def either_system(request: pytest.FixtureRequest) -> str:
    if request.param == "without":
        request.getfixturevalue("no_renameat2")
    return str(request.param)


# A process that is killed


FILE_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"})


def kill_this_process_before(number: int) -> None:
    """Have this process killed before its file operation of that number."""
    count = itertools.count(1)

    def operation() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            operation()
            return function(*arguments)

        return called

    os.fsync, os.pwrite = counted(os.fsync), counted(os.pwrite)
    sys.addaudithook(lambda event, _: operation() if event in FILE_EVENTS else None)


def in_a_child(action: Callable[[], None]) -> int:
    """The process id of a child that does it and ends."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def was_killed(action: Callable[[], None], number: int) -> bool:
    """Do something in a child that is killed before a file operation of it; False where it has no so many."""

    def until_killed() -> None:
        kill_this_process_before(number)
        action()

    _, status = os.waitpid(in_a_child(until_killed), 0)
    return os.WIFSIGNALED(status)


def folder_of(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with staged_folder(path, overwrite=True) as folder:
            put_safetensors(folder / "model.safetensors", value)
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(str(value))
            write_json(folder / "compression.json", {"of": value})

    return write


def file_of(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with staged_file(path, overwrite=True) as staged:
            put_safetensors(staged, value)

    return write


def report_of(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_page(f"<p>{value}</p>" * 1000, path, overwrite=True)

    return write


@pytest.mark.slow
@pytest.mark.usefixtures("quick_sync")
@pytest.mark.parametrize("write_of", [folder_of, file_of, report_of])
def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new_output(
    tmp_path: Path,
    either_system: str,
    write_of: Callable[[float], Callable[[Path], None]],
) -> None:
    old, new, path = write_of(1.0), write_of(2.0), tmp_path / "out.html"
    new(path)
    after = contents(path)
    old(path)
    before = contents(path)
    assert before != after
    found = set()
    for number in itertools.count(1):
        if not was_killed(lambda: new(path), number):
            break
        if contents(path) is None and either_system == "without":
            # Only where two folders cannot be exchanged, and only until the next run looks.
            check_output(path, sources=[], form="folder" if write_of is folder_of else "file", overwrite=True)
        now = contents(path)
        assert now in (before, after), number
        found.add(now == after)
        old(path)
        assert names(tmp_path) == ["out.html"], number
        assert contents(path) == before
    assert number > 10
    assert found == {False, True}
    assert contents(path) == after


@pytest.mark.slow
@pytest.mark.usefixtures("quick_sync")
@pytest.mark.parametrize("write_of", [folder_of, file_of])
def test_a_kill_leaves_nothing_or_a_complete_output_where_there_was_none(
    tmp_path: Path, write_of: Callable[[float], Callable[[Path], None]]
) -> None:
    path, write = tmp_path / "out", write_of(1.0)
    write(path)
    complete = contents(path)
    for number in itertools.count(1):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not was_killed(lambda: write(path), number):
            break
        assert contents(path) in (None, complete), number
    assert names(tmp_path) == ["out"]


def test_a_model_opens_again_though_a_kill_has_left_nothing_at_its_path(tmp_path: Path, no_renameat2: None) -> None:
    def killed_between_the_renames() -> None:
        rename = os.rename

        def rename_and_die(source: Path, target: Path) -> None:
            rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = rename_and_die  # type: ignore[assignment]
        write_folder(tmp_path / "out", 2.0)

    write_folder(tmp_path / "out", 1.0)
    os.waitpid(in_a_child(killed_between_the_renames), 0)
    assert contents(tmp_path / "out") is None
    assert open_checkpoint(tmp_path / "out").read("w")[0] == 2.0
    assert names(tmp_path) == ["out"]


class Waiting:
    """A child that has got into a block of `staged_folder` and stays there until it is killed."""

    def __init__(self, path: Path) -> None:
        inside, reached = os.pipe()

        def wait() -> None:
            with staged_folder(path, overwrite=True) as folder:
                (folder / "half").write_text("")
                os.write(reached, b"x")
                signal.pause()

        self._child = in_a_child(wait)
        os.close(reached)
        assert os.read(inside, 1) == b"x"
        os.close(inside)

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)


def test_what_a_killed_run_left_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    living = Waiting(tmp_path / "living")
    [workspace] = names(tmp_path)
    write_folder(tmp_path / "out")
    check_output(tmp_path / "other", sources=[], form="folder", overwrite=False)
    assert names(tmp_path) == [workspace, "out"]
    assert next((tmp_path / workspace).rglob("half"))
    living.kill()
    assert names(tmp_path) == [workspace, "out"]
    check_output(tmp_path / "other", sources=[], form="folder", overwrite=False)
    assert names(tmp_path) == ["out"]


def test_hidden_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.0123456789abcdef.partial", "compressor-calibration-mine", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.0123456789ab.partial").write_text("a file")
    (tmp_path / ".link.0123456789ab.partial").symlink_to(".git")
    before = names(tmp_path)
    write_folder(tmp_path / "out")
    assert names(tmp_path) == sorted([*before, "out"])


def test_a_signal_between_the_two_renames_restores_the_old_folder(
    tmp_path: Path, no_renameat2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "out", 1.0)
    before = contents(tmp_path / "out")
    rename = os.rename

    def interrupted(source: Any, target: Any, **more: Any) -> None:
        rename(source, target, **more)
        if "old" in Path(target).parts:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", 2.0)
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_a_failed_exchange_puts_the_old_folder_back(
    tmp_path: Path, no_renameat2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "out", 1.0)
    before = contents(tmp_path / "out")
    rename = os.rename

    def fails_for_the_new_one(source: Any, target: Any, **more: Any) -> None:
        if "new" in Path(source).parts:
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", fails_for_the_new_one)
    with pytest.raises(BadInput, match="Input/output"):
        write_folder(tmp_path / "out", 2.0)
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


# Runs at the same time


def folder_with(path: Path, value: float, meanwhile: Callable[[], None]) -> None:
    with staged_folder(path, overwrite=False) as folder:
        put_safetensors(folder / "model.safetensors", value)
        meanwhile()


def file_with(path: Path, value: float, meanwhile: Callable[[], None]) -> None:
    with staged_file(path, overwrite=False) as staged:
        put_safetensors(staged, value)
        meanwhile()


@pytest.mark.parametrize("write", [folder_with, file_with])
def test_of_two_runs_that_create_one_output_the_first_wins_and_the_second_is_told(
    tmp_path: Path, either_system: str, write: Callable[[Path, float, Callable[[], None]], None]
) -> None:
    path = tmp_path / "out"
    first: list[object] = []

    def meanwhile() -> None:
        write(path, 1.0, lambda: None)
        first.append(contents(path))

    with pytest.raises(BadInput, match=r"created by another process.*`overwrite`"):
        write(path, 2.0, meanwhile)
    assert [contents(path)] == first
    assert names(tmp_path) == ["out"]


def test_a_file_system_without_links_takes_files_too(
    tmp_path: Path, no_renameat2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    file_with(tmp_path / "out", 1.0, lambda: None)
    before = contents(tmp_path / "out")
    with pytest.raises(BadInput, match="another process"):
        file_with(tmp_path / "out", 2.0, lambda: None)
    assert contents(tmp_path / "out") == before


def test_a_folder_made_by_somebody_else_meanwhile_is_kept(tmp_path: Path, either_system: str) -> None:
    def make() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(BadInput, match="another process"):
        folder_with(tmp_path / "out", 1.0, make)
    assert contents(tmp_path) == {"out/theirs": b""}


# What is replaced


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), BadInput("no", remedy="none")])
def test_a_folder_that_is_not_finished_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    write_folder(tmp_path / "out")
    before = contents(tmp_path / "out")

    def write_half() -> None:
        with staged_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "half").write_text("")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_files_that_we_wrote_are_replaced_by_a_folder_that_has_none_of_them(tmp_path: Path, either_system: str) -> None:
    with staged_folder(tmp_path / "out", overwrite=False) as folder:
        put_safetensors(folder / "model.safetensors")
        write_json(folder / "compression.json", {"layers": []})
        for name in ("tokenizer.json", "1_Pooling/config.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
    with staged_folder(tmp_path / "out", overwrite=True) as folder:
        put_safetensors(folder / "model.safetensors", 2.0)
        assert (tmp_path / "out" / "tokenizer.json").exists()
    written = contents(tmp_path / "out")
    assert isinstance(written, dict)
    assert list(written) == ["model.safetensors"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["thesis.tex", "notes/thesis.tex", ".git/HEAD", "precious.safetensors", "1_Pooling/x"])
def test_what_is_no_part_of_the_model_is_named_and_never_deleted(tmp_path: Path, either_system: str, name: str) -> None:
    folder_of(1.0)(tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("precious")
    before = contents(tmp_path / "out")
    named = name if name.startswith("1_") else name.partition("/")[0]
    with pytest.raises(BadInput, match=rf"also holds {named}, which would be lost; move that elsewhere"):
        check_output(tmp_path / "out", sources=[], form="folder", overwrite=True)
    # Nor when it comes after the check.
    with pytest.raises(BadInput, match=f"also holds {named}"):
        folder_of(2.0)(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_a_linked_output_folder_is_replaced_and_its_target_left_alone(tmp_path: Path, either_system: str) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    write_folder(tmp_path / "out")
    assert names(tmp_path / "target") == ["precious"]
    assert names(tmp_path / "out") == ["model.safetensors"]
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("write", FILE_WRITERS)
def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    write(tmp_path / "out")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("write", FILE_WRITERS)
def test_a_file_does_not_replace_a_folder(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# What the system says


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
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", ["missing/out", "file/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, write: Callable[[Path], None], place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / place)
    assert names(tmp_path) == ["file"]


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
    with (
        staged_file(path, overwrite=True) as staged,
        SafetensorsWriter(staged, [TensorInfo("w", (100_000,), torch.float32)], {}) as writer,
    ):
        writer.write("w", torch.ones(100_000))


def fill_torch(path: Path) -> None:
    with staged_file(path, overwrite=True) as staged:
        write_state_dict_file(staged, {"w": torch.ones(100_000)})


def fill_document(path: Path) -> None:
    with staged_file(path, overwrite=True) as staged:
        write_json(staged, {"w": "1" * 100_000})


def fill_folder(path: Path) -> None:
    with staged_folder(path, overwrite=True) as folder:
        (folder / "tokenizer.json").write_bytes(bytes(100_000))


@pytest.mark.parametrize("fill", [fill_safetensors, fill_torch, fill_document, fill_folder])
def test_a_full_disk_is_bad_input_and_leaves_nothing(tiny_disk: Path, fill: Callable[[Path], None]) -> None:
    with pytest.raises(BadInput) as caught:
        fill(tiny_disk / "out")
    said = str(caught.value)
    assert said.startswith(f"{tiny_disk / 'out'}: cannot be written: {tiny_disk} is full (No space left on device); ")
    assert ".partial" not in said
    assert not list(tiny_disk.iterdir())


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "{folder} is full (No space left on device); free some space there, or choose"),
        (errno.EDQUOT, "{folder} is full (Disk quota exceeded); free some space there, or choose"),
        (errno.EFBIG, "a file is too large for {folder} (File too large); raise 'ulimit -f'"),
        (errno.EIO, "the disk of {folder} fails (Input/output error); check the disk"),
        (errno.EMFILE, "too many files are open (Too many open files); allow more of them, for example with 'ulimit"),
    ],
)
def test_what_the_system_refuses_is_said_of_the_folder_with_a_remedy(tmp_path: Path, number: int, says: str) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "out", overwrite=True) as folder:
            raise OSError(number, os.strerror(number), str(folder / "model.safetensors"))

    with pytest.raises(BadInput) as caught:
        fail()
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: cannot be written: {says.format(folder=tmp_path)}")
    assert ".partial" not in str(caught.value)
    assert not names(tmp_path)


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
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "before"


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "whole")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, block, offset: pwrite(fd, block[:77], offset))
    write_safetensors(tmp_path / "pieces")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_errors_of_other_files_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "out", overwrite=False):
        (tmp_path / "elsewhere").read_bytes()
    assert not names(tmp_path)
