"""What is recorded is whole and computed once; what is damaged is computed again; what is of another run is refused."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Timer

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.engine.journal import Fingerprint, Journal, digest_of
from compressor.errors import BadInput
from compressor.io import temporary_workspace
from compressor.io.workspace import is_temporary

FINGERPRINT = Fingerprint({"the model": "abc"}, {"`keep`": "0.6"})


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def opened(folder: Path, fingerprint: Fingerprint = FINGERPRINT) -> Journal:
    return Journal.open(folder, fingerprint, option="work_dir")


class Made:
    """Something to compute, and how often it was."""

    def __init__(self) -> None:
        self.times = 0

    def tensors(self) -> Mapping[str, Tensor]:
        self.times += 1
        return {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.full((2,), float(self.times), dtype=torch.bfloat16)}

    def value(self) -> list[float]:
        self.times += 1
        return [0.1, float("inf"), float(self.times)]


def test_units_are_computed_once_whatever_ends_the_process(work: Path) -> None:
    made = Made()
    for _ in range(3):
        journal = opened(work)
        found = journal.tensors("layer/with any * name", made.tensors)
        assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3).T)
        assert found["b"].tolist() == [1.0, 1.0]
        assert journal.value("loss", made.value) == [0.1, float("inf"), 2.0]
        journal.close()
    assert made.times == 2


def test_a_temporary_journal_keeps_nothing_that_is_computed_once_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    journal, made = Journal(), Made()
    for times in (1, 2):
        assert journal.tensors("layer", made.tensors)["b"][0] == times
    assert not list(tmp_path.iterdir())
    journal.write("state", {"a": torch.ones(3)})
    assert journal.holds("state")
    assert journal.read("state")["a"].tolist() == [1.0, 1.0, 1.0]
    assert not journal.kept
    assert list(tmp_path.iterdir())
    del journal
    gc.collect()
    assert not list(tmp_path.iterdir())


def units(work: Path) -> list[Path]:
    return sorted((work / "units").iterdir())


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_off, flip, Path.unlink])
def test_a_damaged_unit_is_computed_again(work: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    made = Made()
    journal = opened(work)
    journal.tensors("layer", made.tensors)
    journal.close()
    assert callable(damage)
    damage(units(work)[0])
    journal = opened(work)
    assert journal.tensors("layer", made.tensors)["b"].tolist() == [2.0, 2.0]
    assert "layer is damaged" in caplog.text
    journal.close()
    assert opened(work).read("layer")["b"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("kept", range(0, 400, 23))
def test_a_line_that_was_cut_off_is_as_if_it_had_not_been_written(work: Path, kept: int) -> None:
    made = Made()
    journal = opened(work)
    journal.tensors("layer", made.tensors)
    journal.value("loss", made.value)
    journal.close()
    log = work / "journal.jsonl"
    content = log.read_bytes()
    log.write_bytes(content[: min(kept, len(content) - 1)])
    journal = opened(work)
    journal.tensors("layer", made.tensors)
    journal.value("loss", made.value)
    journal.close()
    times = made.times
    journal = opened(work)
    journal.tensors("layer", made.tensors)
    journal.value("loss", made.value)
    assert made.times == times > 2
    assert len(journal) == 2


def test_a_damaged_line_is_left_out(work: Path) -> None:
    journal, made = opened(work), Made()
    journal.value("one", lambda: 17)
    journal.value("two", lambda: 18)
    journal.close()
    log = work / "journal.jsonl"
    log.write_bytes(log.read_bytes().replace(b"17", b"19"))
    journal = opened(work)
    assert journal.value("one", lambda: 20) == 20
    assert journal.value("two", made.value) == 18


def test_what_a_dead_run_left_is_removed(work: Path) -> None:
    journal = opened(work)
    journal.write("kept", {"a": torch.ones(1)})
    journal.write("dropped", {"a": torch.ones(1)})
    journal.drop("dropped")
    journal.close()
    (work / "units" / f"{'a' * 32}.partial").write_bytes(b"1")
    (work / "units" / f"{'b' * 32}.safetensors").write_bytes(b"1")
    (work / "units" / ".tmpAb12Cd").write_bytes(b"1")  # safetensors writes beside the file first
    journal = opened(work)
    assert len(units(work)) == 1
    assert journal.holds("kept")
    assert not journal.holds("dropped")


def test_a_unit_that_fails_leaves_nothing(work: Path) -> None:
    journal = opened(work)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.file("shard", fail)
    assert not units(work)
    assert not journal.holds("shard")
    assert journal.file("shard", lambda path: path.write_bytes(b"whole")).read_bytes() == b"whole"


def test_it_is_emptied_when_all_is_done(work: Path) -> None:
    journal = opened(work)
    journal.write("state", {"a": torch.ones(1)})
    journal.remove()
    assert not work.exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Fingerprint({"the model": "xyz"}, {"`keep`": "0.6"}), "the model changed"),
        (Fingerprint({"the model": "abc"}, {"`keep`": "0.7"}), "`keep` was 0.6"),
        (Fingerprint({"the model": "xyz"}, {"`keep`": "0.7"}), "the model changed, `keep` was 0.6"),
    ],
)
def test_another_run_is_refused_by_what_differs(work: Path, other: Fingerprint, said: str) -> None:
    journal = opened(work)
    journal.expect(Fingerprint({"the calibration data": "1"}))
    journal.close()
    with pytest.raises(BadInput, match="belongs to another run: " + said) as refused:
        opened(work, other)
    assert refused.value.option == "work_dir"
    journal = opened(work)
    with pytest.raises(BadInput, match="the calibration data changed"):
        journal.expect(Fingerprint({"the calibration data": "2"}))


def test_two_runs_do_not_share_a_folder(work: Path) -> None:
    journal = opened(work)
    with pytest.raises(BadInput, match="used by another run"):
        opened(work)
    journal.close()
    opened(work).close()


def test_another_process_is_waited_for_with_patience(work: Path) -> None:
    first = opened(work)
    with pytest.raises(BadInput, match="is used by another run"):
        Journal.open(work, FINGERPRINT, option="work_dir", patience=0.2)
    timer = Timer(0.3, first.close)
    timer.start()
    Journal.open(work, FINGERPRINT, option="work_dir", patience=60.0).close()
    timer.join()


def test_journals_of_other_processes_lie_in_a_folder_of_this_one_and_go_with_it(work: Path) -> None:
    journal = opened(work)
    folder = journal.part("a").folder("slices")
    assert folder == journal.part("a").folder("slices") != journal.folder("slices")
    other = opened(folder / "0")
    other.write("x", {"x": torch.arange(3)})
    journal.take("x", other)
    journal.take("z", other)
    assert torch.equal(journal.read("x")["x"], torch.arange(3))
    assert not other.holds("x")
    assert not journal.holds("z")
    other.close()
    journal.close()
    again = opened(work)
    assert torch.equal(again.read("x")["x"], torch.arange(3))
    again.close()
    (folder / "0" / "mine.txt").touch()
    with pytest.raises(BadInput, match=r"holds jobs/mine\.txt, which is no work of a run"):
        opened(work)
    (folder / "0" / "mine.txt").unlink()
    (folder / "mine.txt").touch()
    with pytest.raises(BadInput, match=r"holds jobs/mine\.txt, which is no work of a run"):
        opened(work)
    (folder / "mine.txt").unlink()
    again = opened(work)
    again.remove()
    assert not work.exists()


def test_the_folder_of_a_temporary_journal_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    journal = Journal()
    other = opened(journal.folder("slices") / "0")
    other.write("x", {"x": torch.arange(3)})
    journal.take("x", other)
    assert torch.equal(journal.read("x")["x"], torch.arange(3))
    other.close()
    del journal
    assert not list(tmp_path.iterdir())


def test_another_process_reads_the_units_there_are_and_keeps_its_own(work: Path, tmp_path: Path) -> None:
    journal, made = opened(work), Made()
    part = journal.part("outputs")
    for name in ("shared", "replaced", "damaged"):
        part.write(name, {"a": torch.ones(2)})
    journal.write("of another part", {"a": torch.ones(2)})
    journal.close()
    damaged = journal.part("outputs").units().path("damaged")
    damaged.write_bytes(b"")
    units = pickle.loads(pickle.dumps(opened(work).part("outputs").units()))
    assert units.names == {"shared", "replaced"}
    assert units.are_seen
    other = opened(tmp_path / "other")
    both = other.part("outputs").beside(units)
    assert both.holds("shared")
    assert torch.equal(both.tensors("shared", made.tensors)["a"], torch.ones(2))
    both.write("replaced", {"a": torch.zeros(2)})
    assert torch.equal(both.read("replaced")["a"], torch.zeros(2))
    both.drop("shared")  # which is not its own
    assert not both.holds("damaged")
    assert not both.part("any").holds("shared")
    assert made.times == 0
    other.close()
    again = opened(tmp_path / "other").part("outputs")
    assert (again.holds("replaced"), again.holds("shared")) == (True, False)
    assert torch.equal(load_file(units.path("replaced"))["a"], torch.ones(2))
    units.path("shared").unlink()
    assert not units.are_seen


def test_all_but_a_part_is_removed(work: Path) -> None:
    journal = opened(work)
    for name in ("kept/a", "other/a", "keptness"):
        journal.write(name, {"a": torch.ones(2)})
    journal.value("kept/value", lambda: 1)
    journal.value("value", lambda: 2)
    journal.keep_only("kept")
    assert len(journal) == 2
    assert (journal.holds("kept/a"), journal.knows("kept/value")) == (True, True)
    assert len(list((work / "units").iterdir())) == 1


def test_a_journal_that_goes_with_its_object_goes_with_the_last_part(work: Path) -> None:
    journal = opened(work)
    journal.write("a", {"a": torch.ones(2)})
    journal.go_with_object()
    part = journal.part("any")
    del journal
    gc.collect()
    assert work.exists()
    del part
    gc.collect()
    assert not work.exists()


def test_what_is_not_ours_is_left_alone(work: Path) -> None:
    work.mkdir()
    (work / "thesis.tex").write_text("...")
    with pytest.raises(BadInput, match=r"holds thesis\.tex"):
        opened(work)
    with pytest.raises(BadInput, match="not a folder"):
        opened(work / "thesis.tex")
    assert sorted(each.name for each in work.iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize("name", ["units/thesis.tex", "units/model.safetensors", "units/a/b", "journal.jsonl", "lock"])
def test_what_is_only_named_like_ours_is_left_alone(work: Path, name: str) -> None:
    path = work / name
    path.parent.mkdir(parents=True)
    path.write_text('{"of": "another program"}\n{"cut')
    with pytest.raises(BadInput, match="which is no work of a run"):
        opened(work)
    assert path.read_text() == '{"of": "another program"}\n{"cut'
    assert [each for each in work.rglob("*") if each.is_file()] == [path]


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files, which writing meets as it meets the end of a disk."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_is_full_is_told_in_a_line_and_leaves_what_was_done(work: Path) -> None:
    journal = opened(work)
    journal.write("small", {"a": torch.ones(10)})
    with pytest.raises(BadInput, match=r"cannot keep the work: a file is too large for .*`work_dir`"):
        journal.write("large", {"a": torch.ones(10_000)})
    journal.close()
    journal = opened(work)
    assert journal.holds("small")
    assert not journal.holds("large")
    assert len(units(work)) == 1


def test_a_folder_that_may_not_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        with pytest.raises(BadInput, match="cannot keep the work"):
            opened(Path("/proc/work"))
        return
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="may not be written to"):
        opened(tmp_path / "work")


def test_what_a_killed_process_left_in_the_temporary_folder_is_removed_by_the_next_run(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for begin in (lambda: opened(work).close(), lambda: Journal().write("state", {})):
        child = os.fork()
        if child == 0:  # nothing here starts a thread
            left = Journal()
            left.write("state", {"a": torch.ones(3)})
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert list(tmp_path.glob("compressor-*"))
        begin()
        gc.collect()
        assert not list(tmp_path.glob("compressor-*"))


def test_digests_tell_names_shapes_dtypes_and_numbers_apart() -> None:
    x = torch.arange(6.0)
    found = [
        digest_of(each)
        for each in (
            {"a": x},
            {"b": x},
            {"a": x.reshape(2, 3)},
            {"a": x.int()},
            {"a": x + 1},
            {"a": x, "b": x},
            {"a": x[:0]},
            {"a": x.bfloat16()},
        )
    ]
    assert len(set(found)) == len(found)
    assert digest_of({"a": x.reshape(2, 3).T.contiguous()}) == digest_of({"a": x.reshape(2, 3).T})


def test_a_unit_of_a_run_before_is_replaced(work: Path) -> None:
    journal = opened(work)
    journal.write("state", {"a": torch.zeros(1)})
    journal.close()
    journal = opened(work)
    journal.write("state", {"a": torch.ones(1)})
    journal.close()
    journal = opened(work)
    assert journal.read("state")["a"] == 1
    journal.drop("state")
    journal.value("loss", lambda: 1.5)
    journal.drop("loss")
    assert not journal.knows("loss")
    journal.close()
    assert len(opened(work)) == 0


def test_parts_have_names_of_their_own(work: Path) -> None:
    journal, made = opened(work), Made()
    for name in ("one", "two"):
        part = journal.part(name)
        part.tensors("layer", made.tensors)
        part.value("loss", made.value)
        part.part("more").write("state", {"a": torch.ones(1)})
    assert made.times == 4
    assert len(journal) == 6
    assert journal.part("two").read("layer")["b"].tolist() == [3.0, 3.0]
    assert not journal.holds("layer")
    del part
    journal.part("one").drop("layer")
    journal.close()
    journal = opened(work)
    assert not journal.part("one").holds("layer")
    assert journal.part("one").part("more").holds("state")
    assert journal.part("two").value("loss", made.value)[-1] == 4.0


def test_the_parts_of_a_temporary_journal_are_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    journal = Journal()
    one, two = journal.part("one"), journal.part("one")
    one.write("state", {"a": torch.ones(1)})
    assert not two.holds("state")
    assert not journal.holds("state")
    del one
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_of_temporary_files_goes(work: Path) -> None:
    first = opened(work)
    left = temporary_workspace(work)
    left.new("units").mkdir()
    first.close()
    os.close(left._descriptor)
    again = opened(work)
    assert not left.path.exists()
    beside = again.temporary()
    beside.write("layer", {"b": torch.ones(2)})
    assert beside.read("layer")["b"].tolist() == [1.0, 1.0]
    assert not beside.kept
    assert any(is_temporary(path) for path in work.iterdir())
    again.remove()
    assert not work.exists()
