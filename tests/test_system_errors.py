"""What the operating system refuses is one line that names a folder and a remedy, never an internal error."""

from __future__ import annotations

import errno
import gc
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import SafetensorError

import compressor
from compressor.calibration.activation_cache import ActivationCache
from compressor.cli.run import run
from compressor.errors import BadInput
from compressor.io import open_checkpoint, staged_folder
from compressor.system_errors import explained_anywhere, temporary_space


def raised(fail: Callable[[], object]) -> Exception:
    try:
        fail()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


def fail_with(error: Exception) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [
        lambda: bytearray(1 << 62),
        lambda: torch.empty(1 << 60, dtype=torch.float32),
        fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
        fail_with(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
        fail_with(SafetensorError("Error while serializing: I/O error: Cannot allocate memory (os error 12)")),
    ],
)
def test_running_out_of_memory_is_told_as_that(fail: Callable[[], object]) -> None:
    said = explained_anywhere(raised(fail))
    assert said is not None
    assert str(said).startswith("memory is used up; ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Expected 2 tensors in Linear (28), not Linear (99999999999999999999)"),
        ValueError("out of range"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/nowhere"),
        SafetensorError("Error while deserializing header: InvalidHeader"),
    ],
)
def test_other_errors_are_not_explained_away(error: Exception) -> None:
    assert explained_anywhere(error) is None


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A limit on the size of files, which the system answers as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.usefixtures("small_files_only")
def test_temporary_files_that_do_not_fit_name_their_folder_and_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ActivationCache(torch.device("cpu"))
    with pytest.raises(BadInput) as caught:
        cache.gradients(0).write(0, [torch.zeros(100_000)])
    said = str(caught.value)
    assert said.startswith(f"temporary files cannot be kept: a file is too large for {tmp_path} (File too large); ")
    assert "TMPDIR" in said
    assert "compressor-calibration" not in said
    del cache, caught
    gc.collect()  # the error's traceback holds the cache in a circle
    assert not list(tmp_path.iterdir())


def test_a_full_temporary_disk_is_told_by_the_number_in_the_text_of_safetensors(tmp_path: Path) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(BadInput) as caught, temporary_space(tmp_path):
        raise error
    assert f"{tmp_path} is full (No space left on device); free some space there, or set TMPDIR" in str(caught.value)


def test_too_many_open_files_are_told_with_the_limit(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/dev/fd").iterdir()))

    def open_many() -> None:
        with staged_folder(tmp_path / "out", overwrite=False) as folder:
            files = [(folder / str(number)).open("w") for number in range(40)]
            assert not files

    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, before[1]))
    try:
        error = raised(open_many)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert isinstance(error, BadInput)
    assert str(error).startswith(f"{tmp_path / 'out'}: cannot be written: too many files are open")
    assert "'ulimit -n " in str(error)


def test_a_full_cache_of_the_hub_is_not_taken_for_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: fail_with(full)())
    with pytest.raises(BadInput, match=r"is full \(No space left on device\); free some space there, or set HF_HOME"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "error: memory is used up; "),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/a/b"), "error: stopped: /data/a is full (No space"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "error: stopped: too many files are open"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "error: stopped: the disk is full"),
        (RuntimeError("unable to open file </t>: Too many open files (24)"), "error: stopped: too many files are open"),
    ],
)
def test_the_command_line_never_calls_them_internal_errors(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, *, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(compressor, "inspect", fail)
    assert run(["inspect", "model.safetensors", "-q"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(says)
    assert said.count("\n") == 1


def test_a_working_directory_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["inspect", str(tmp_path / "model.safetensors")]) == 2
    assert run(["model.safetensors", "-o", "small.safetensors"]) == 2
    errors = capsys.readouterr().err
    assert "internal error" not in errors
    error = explained_anywhere(raised(Path.cwd))
    assert str(error) == "the working directory no longer exists; change into another folder"
