"""Moments over slices of the examples, formed by workers: the same bytes as in this process, whoever dies."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest
import torch
from torch import Tensor

import compressor
from compressor.calibration import (
    Calibration,
    CalibrationData,
    CalibrationSettings,
    calibrate,
    compensate,
    recalibrate,
)
from compressor.calibration.examples import Chunk
from compressor.engine import Engine, Fingerprint, InProcess, Journal, ProcessPool, Run
from compressor.engine.calls import carried_out, packed, unpacked
from compressor.factorize import Metric
from compressor.model import Model, open_model
from compressor.model.opened import LayerSelection
from tests.calibration.tiny_models import CPU, batch_of, inputs_for, planned, transformer
from tests.engine.runs import files_of
from tests.test_frozen_outputs import factory, network, weight_file

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Elsewhere:
    """An engine of workers whose jobs and results travel as bytes, all in this process; `told` are their items.

    Before it does a job it may `change` the item, or raise.
    """

    change: Callable[[Any], Any] = lambda item: item
    told: list[Any] = field(default_factory=list)
    here: int = 1
    workers: int = 2

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        for item in items:
            self.told.append(item)
            yield unpacked(carried_out(packed(job, self.change(item))))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was opened."""


def opened(name: str, folder: Path, *, embeddings: bool = False) -> Model:
    """A model from files: a transformers folder, or a classifier of a factory."""
    select = LayerSelection(embeddings=embeddings)
    if name == "convolutions":
        return open_model(weight_file(folder, name), factory=factory(folder, name), select=select)
    transformer(name).save_pretrained(folder / name)
    return open_model(folder / name, select=select)


def data_for(name: str, batches: int = 11) -> CalibrationData:
    torch.manual_seed(1)
    if name == "convolutions":
        fit = [{"inputs": torch.randn(3, 3, 8, 8)} for _ in range(batches)]
    else:
        fit = [inputs_for(name, 2, padded=name == "llama") for _ in range(batches)]
    return CalibrationData(tuple(map(batch_of, fit)), (batch_of(fit[0]),), labeled=False)


def calibrated(
    subject: Model,
    data: CalibrationData,
    settings: CalibrationSettings,
    *,
    engine: Engine | None = None,
    journal: Journal | None = None,
) -> Calibration:
    run = Run(CPU, seed=3, engine=engine or InProcess(), journal=Journal() if journal is None else journal)
    layers = [layer for layer in subject.layers if layer.eligible]
    return calibrate(subject.streamed, layers, data, run=run, settings=settings, files=subject.files)


def numbers(calibration: Calibration) -> dict[str, Tensor]:
    """All that calibration found, by names."""
    cache, found = calibration.cache, {}
    for name in calibration.metrics:
        metric = cache.moments.read(f"metric/{name}")
        found |= {f"{name}/{key}": each for key, each in metric.items()}
        found[f"{name}/uses"] = torch.tensor(calibration.uses[name])
    last = calibration.segments.count - (calibration.segments.head is None)
    for segment in range(last):
        for chunk in calibration.data.chunks("fit", "holdout"):
            outputs = cache.dense(chunk.part, segment).read(chunk.batch)
            found |= {f"{segment}/{chunk}/{place}": each for place, each in enumerate(outputs)}
        if segment < calibration.segments.count - 1:
            found |= {f"{segment}/boundary/{place}": each for place, each in enumerate(cache.boundary(segment))}
    return found


def assert_same(found: Calibration, expected: Calibration) -> None:
    one, other = numbers(found), numbers(expected)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


CASES = {
    "every batch backward": CalibrationSettings(),
    "some batches backward": CalibrationSettings(gradient_every=4),
    "two slices": CalibrationSettings(gradient_every=2, slices=2),
    "a head of many classes": CalibrationSettings(gradient_every=2, most_classes=30),
    "the whole model": CalibrationSettings(by_segment=False, gradient_every=2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "convolutions"])
def test_slices_elsewhere_give_the_numbers_of_those_in_process(name: str, case: str, tmp_path: Path) -> None:
    data, engine, settings = data_for(name), Elsewhere(), CASES[case]
    expected = calibrated(opened(name, tmp_path), data, settings)
    found = calibrated(opened(name, tmp_path), data, settings, engine=engine)
    assert [each.place for each in engine.told] == list(range(settings.slices))
    assert expected.metrics
    assert_same(found, expected)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "convolutions"])
def test_a_compressed_model_is_calibrated_again_in_slices_elsewhere_as_in_process(name: str, tmp_path: Path) -> None:
    data, engine, settings = data_for(name, 4), Elsewhere(), CalibrationSettings(gradient_every=2)
    dense = calibrated(opened(name, tmp_path), data, settings)
    ranks = [planned(layer, 3) for layer in dense.layers.values()]
    expected = recalibrate(dense, compensate(dense, ranks).modules)
    there = calibrated(opened(name, tmp_path), data, settings, engine=engine)
    modules = compensate(there, ranks).modules
    again = recalibrate(there, modules)
    assert [each.place for each in engine.told if hasattr(each, "place")] == [0, 1, 2, 3] * 2
    assert again.metrics.keys() == expected.metrics.keys() == dense.metrics.keys() != set()
    assert again.uses == expected.uses
    changed = False
    for each, metric in expected.metrics.items():
        found, before = again.metrics[each], dense.metrics[each]
        assert isinstance(metric, Metric)
        assert isinstance(found, Metric)
        assert isinstance(before, Metric)
        assert torch.equal(found.inputs, metric.inputs)
        assert torch.equal(found.gradients, metric.gradients)
        changed |= not torch.equal(found.inputs, before.inputs)
    assert changed
    # Modules that nobody can send are run here.
    told = len(engine.told)
    recalibrate(there, {place: modules[place] for place in modules}, "here")
    assert len(engine.told) == told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_slices_elsewhere_watch_embeddings_as_in_process(name: str, tmp_path: Path) -> None:
    data, engine = data_for(name), Elsewhere()
    expected = calibrated(opened(name, tmp_path, embeddings=True), data, CalibrationSettings())
    found = calibrated(opened(name, tmp_path, embeddings=True), data, CalibrationSettings(), engine=engine)
    assert len(engine.told) == 8
    assert any(layer.kind == "embedding" for layer in found.layers.values() if layer.name in found.metrics)
    assert_same(found, expected)


def test_more_threads_in_this_process_give_the_numbers_of_workers_to_rounding(tmp_path: Path) -> None:
    data, settings = data_for("convolutions"), CalibrationSettings()
    torch.set_num_threads(2)
    try:
        expected = numbers(calibrated(opened("convolutions", tmp_path), data, settings))
    finally:
        torch.set_num_threads(1)
    found = numbers(calibrated(opened("convolutions", tmp_path), data, settings, engine=Elsewhere()))
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        # Activations and products are computed in float32, and gradients are sums of hundreds of them.
        assert float((found[name] - each).abs().max()) <= 1e-4 * float(each.abs().max()), name


def test_the_slices_are_all_fit_batches_in_order_whatever_runs_them() -> None:
    data = data_for("llama", batches=11)
    slices = data.slices(4, backward_every=3)
    assert [chunk for each in slices for chunk in each.chunks] == data.chunks("fit")
    assert [len(each.chunks) for each in slices] == [2, 3, 3, 3]
    assert [chunk for each in slices for chunk in each.backward] == [Chunk("fit", batch) for batch in (0, 3, 6, 9)]
    assert [len(each.chunks) for each in data.slices(99, backward_every=1)] == [1] * 11


@pytest.mark.slow
def test_workers_that_do_not_see_the_folder_leave_the_slices_to_this_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, settings = data_for("llama"), CalibrationSettings()
    engine = Elsewhere(lambda item: replace(item, folder=tmp_path / "on another machine"))
    expected = calibrated(opened("llama", tmp_path), data, settings)
    with caplog.at_level(logging.WARNING):
        assert_same(calibrated(opened("llama", tmp_path), data, settings, engine=engine), expected)
    assert "the moments are taken in this process: not all workers see" in caplog.text


def test_a_model_that_a_function_of_this_process_builds_is_calibrated_here(tmp_path: Path) -> None:
    path = weight_file(tmp_path, "convolutions")
    subject, engine = open_model(path, factory=lambda: network("convolutions")), Elsewhere()
    assert subject.files is None
    assert calibrated(subject, data_for("convolutions"), CalibrationSettings(), engine=engine).metrics
    assert engine.told == []


def test_workers_in_another_folder_see_a_work_folder_of_a_relative_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    journal = Journal.open(Path("work"), Fingerprint(), option="work_dir")
    seen: list[bool] = []

    def look(item: Any) -> Any:
        with monkeypatch.context() as there:
            there.chdir(tmp_path / "elsewhere")
            seen.append(item.folder.is_dir() and item.files.source.is_file())
        return item

    subject = opened("convolutions", Path())
    calibrated(subject, data_for("convolutions", 2), CalibrationSettings(), engine=Elsewhere(look), journal=journal)
    assert seen == [True, True]
    journal.close()


class Interrupted(Exception):  # noqa: N818 - it is no error
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_slices_that_are_done(tmp_path: Path) -> None:
    data, settings = data_for("llama"), CalibrationSettings(gradient_every=2)
    expected = calibrated(opened("llama", tmp_path), data, settings)
    work = tmp_path / "work"

    def interrupt(item: Any) -> Any:
        if item.place == 3:
            raise Interrupted
        return item

    first = Journal.open(work, Fingerprint(), option="work_dir")
    with pytest.raises(Interrupted):
        calibrated(opened("llama", tmp_path), data, settings, engine=Elsewhere(interrupt), journal=first)
    first.close()
    assert not list(work.glob("jobs/*/*"))  # the first three are added up
    again, engine = Journal.open(work, Fingerprint(), option="work_dir"), Elsewhere()
    assert_same(calibrated(opened("llama", tmp_path), data, settings, engine=engine, journal=again), expected)
    assert [item.place for item in engine.told] == [3, 4, 5, 6, 7]
    assert not list(work.glob("jobs/*/*"))
    again.close()
    # What is done is not formed again.
    whole, engine = Journal.open(work, Fingerprint(), option="work_dir"), Elsewhere()
    assert_same(calibrated(opened("llama", tmp_path), data, settings, engine=engine, journal=whole), expected)
    assert engine.told == []
    whole.remove()
    assert not work.exists()


@pytest.mark.parametrize(
    ("written", "damaged", "begins_at"), [("inputs-0", False, 2), ("sums-0", False, 3), ("inputs-0", True, 0)]
)
def test_a_run_that_dies_while_it_adds_a_slice_goes_on_there_or_anew_where_sums_are_damaged(
    tmp_path: Path, written: str, *, damaged: bool, begins_at: int
) -> None:
    data, settings = data_for("convolutions"), CalibrationSettings(gradient_every=2)
    expected = calibrated(opened("convolutions", tmp_path), data, settings)
    work = tmp_path / "work"
    first, engine = _DiesAfter.open(work, Fingerprint(), option="work_dir"), Elsewhere()
    first.left = [f"slices/3/{written}"]
    with pytest.raises(Interrupted):
        calibrated(opened("convolutions", tmp_path), data, settings, engine=engine, journal=first)
    first.close()
    assert [path.name for path in work.glob("jobs/*/*")] == ["2"]
    if damaged:
        for path in work.glob("units/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
    again, engine = Journal.open(work, Fingerprint(), option="work_dir"), Elsewhere()
    assert_same(calibrated(opened("convolutions", tmp_path), data, settings, engine=engine, journal=again), expected)
    assert [item.place for item in engine.told] == list(range(begins_at, 8))
    assert not list(work.glob("jobs/*/*"))
    again.remove()
    assert not work.exists()


class _DiesAfter(Journal):
    """A journal whose process ends once the units that are `left` are written."""

    left: Sequence[str] = ()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().write(name, tensors)
        if name in self.left:
            raise Interrupted


@dataclass
class Ahead(Elsewhere):
    """The same with workers that are done with all that they have before anyone asks, and then `look`."""

    look: Callable[[], object] = lambda: None

    def map(self, job: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        done = deque[R]()
        for result in super().map(job, items):
            done.append(result)
            self.look()
            if len(done) > self.workers:
                yield done.popleft()
        yield from done


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_sums_of_one_slice_more_than_there_are_workers_lie_on_disk(tmp_path: Path, workers: int) -> None:
    data, settings = data_for("convolutions"), CalibrationSettings(gradient_every=2)
    expected = calibrated(opened("convolutions", tmp_path), data, settings)
    journal, kept, totals = Journal.open(tmp_path / "work", Fingerprint(), option="work_dir"), [], []

    def look() -> None:
        kept.append(len(list(tmp_path.glob("work/jobs/*/*"))))
        text = (tmp_path / "work" / "journal.jsonl").read_text()
        written, dropped = (text.count(f'{what}": "calibration/slices/') for what in ("unit", "dropped"))
        totals.append(written - dropped)

    engine = Ahead(workers=workers, look=look)
    found = calibrated(opened("convolutions", tmp_path), data, settings, engine=engine, journal=journal)
    assert_same(found, expected)
    assert max(kept) == workers + 1
    assert set(totals) == {0, 2 * found.segments.count}  # of inputs and of what is run backward
    look()
    assert (kept[-1], totals[-1]) == (0, 0)
    journal.remove()


DYING = """
import os, signal
from multiprocessing import parent_process
from pathlib import Path
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))

class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = torch.nn.Sequential(Block(), Block(), Block()), torch.nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        mark = Path(__file__).with_name("dies")
        if parent_process() is not None and mark.exists() and self.calls == int(mark.read_text()):
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.head(self.blocks(x))
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2, most_deaths=4) as pool:
        yield pool


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_this_one(pool: ProcessPool, tmp_path: Path) -> None:
    data, settings = data_for("llama"), CalibrationSettings(gradient_every=4)
    expected = calibrated(opened("llama", tmp_path), data, settings)
    assert_same(calibrated(opened("llama", tmp_path), data, settings, engine=pool), expected)


@pytest.mark.slow
@pytest.mark.parametrize("call", [20, 27], ids=["forward", "backward"])
def test_a_worker_that_dies_is_replaced(pool: ProcessPool, tmp_path: Path, call: int) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    build = f"{tmp_path / 'dying.py'}:Classifier"
    namespace: dict[str, Any] = {"__file__": str(tmp_path / "dying.py")}
    exec(DYING, namespace)
    torch.manual_seed(0)
    path = tmp_path / "classifier.pt"
    torch.save(namespace["Classifier"]().state_dict(), path)
    fit = tuple(batch_of({"x": torch.randn(5, 8)}) for _ in range(24))
    data, settings = CalibrationData(fit, fit[:1], labeled=False), CalibrationSettings(gradient_every=2)
    expected = calibrated(open_model(path, factory=build), data, settings)
    (tmp_path / "dies").write_text(str(call))
    assert_same(calibrated(open_model(path, factory=build), data, settings, engine=pool), expected)
    assert not (tmp_path / "dies").exists()


@pytest.mark.slow
def test_a_killed_run_with_workers_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    source = opened("llama", tmp_path).checkpoint.source
    torch.manual_seed(0)
    given = [inputs_for("llama", 2) for _ in range(8)]

    def run(engine: str | None, progress: Any = None) -> dict[str, bytes]:
        compressor.compress(
            source, keep=0.6, calibration=given, prefer="size", bits=16, effort="fast", output=tmp_path / "small",
            overwrite=True, engine=engine, work_dir=tmp_path / "work", progress=progress,
        )  # fmt: skip
        return files_of(tmp_path / "small")

    def interrupt(step: str, done: int, _: int) -> None:
        if step == "run" and done == 2:
            raise Interrupted

    expected = run(None)
    with pytest.raises(Interrupted):
        run("processes:2", interrupt)
    assert list((tmp_path / "work").glob("jobs/*/*"))
    assert run("processes:2") == expected
