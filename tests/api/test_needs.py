"""What a run says that it will need, against what it takes, and when it is refused."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from compressor import CalibrationSettings, compress
from compressor.api.needs import (
    CalibrationSize,
    Footprint,
    Held,
    ModelSize,
    NeedsSettings,
    Places,
    SizesInWorkers,
    SlicesInWorkers,
    calibration_bytes,
    evaluation_bytes,
    memory_bytes,
    output_bytes,
    require_available,
    temporary_bytes,
)
from compressor.api.workload import first_run
from compressor.calibration import CalibrationData, RefinementSettings
from compressor.cli.run import run
from compressor.data import Batch
from compressor.engine import Engine, InProcess, ProcessPool, Run
from compressor.errors import BadInput
from compressor.evaluation.cost import measure_peak_memory
from compressor.network import Layer
from compressor.planning import Budget
from compressor.results import Amount, Needs
from tests.calibration.tiny_models import batch_of, eligible, inputs_for, transformer

GIGABYTE = 10**9
ENOUGH = Amount(GIGABYTE, 100 * GIGABYTE, "cpu")


def needs(**given: Amount) -> Needs:
    nothing = Amount(0, 100 * GIGABYTE, "/nowhere")
    return Needs(**{"memory": ENOUGH, "temporary": nothing, "output": nothing, **given})


SHORT = {
    "memory": (
        {"memory": Amount(12 * GIGABYTE, 5 * GIGABYTE, "cpu")},
        r"^about 12 GB are needed of memory \(cpu\), and there are 5 GB; use a machine",
    ),
    "memory, calibrated": (
        {"memory": Amount(12 * GIGABYTE, 5 * GIGABYTE, "cpu"), "temporary": Amount(9, 99, "/tmp")},
        r"there are 5 GB; ask for `effort='fast'` or for fewer examples \(`calibration_samples`\), or use a machine",
    ),
    "temporary files": (
        {"temporary": Amount(20 * GIGABYTE, 3 * GIGABYTE, "/scratch")},
        r"^/scratch: about 20 GB are needed for temporary files, and there are 3 GB; set TMPDIR or `work_dir` to",
    ),
    "output": (
        {"output": Amount(5 * GIGABYTE, GIGABYTE, "/models")},
        r"^/models: about 5 GB are needed for the output, and there are 1 GB; free some space, or choose an output",
    ),
}


@pytest.mark.parametrize("what", SHORT)
def test_what_will_not_do_is_refused_by_name(what: str) -> None:
    given, message = SHORT[what]
    with pytest.raises(BadInput, match=message) as refused:
        require_available(needs(**given))
    assert refused.value.exit_status == 2
    assert "\n" not in str(refused.value)


def test_files_on_one_disk_share_its_space(tmp_path: Path) -> None:
    each = Amount(3 * GIGABYTE, 4 * GIGABYTE, str(tmp_path))
    require_available(needs(temporary=each))
    require_available(needs(output=each))
    with pytest.raises(BadInput, match="about 6 GB are needed for temporary files and the output, and there are 4 GB"):
        require_available(needs(temporary=each, output=replace(each, place=str(tmp_path / "not" / "yet"))))
    require_available(needs(temporary=each, output=replace(each, place="/proc")))


def test_an_estimate_within_its_margin_or_negligible_is_no_reason_to_refuse() -> None:
    settings = NeedsSettings(margin=0.25, negligible=1000)
    require_available(needs(temporary=Amount(4000, 3000, "/tmp")), settings)
    with pytest.raises(BadInput):
        require_available(needs(temporary=Amount(4000, 2999, "/tmp")), settings)
    require_available(needs(temporary=Amount(1000, 0, "/tmp")), settings)
    require_available(needs(temporary=Amount(10**15, None, "/tmp")), settings)


def linear(number: int, d_out: int, d_in: int) -> Layer:
    name = f"blocks.{number}"
    return Layer(name, name, f"{name}.weight", None, "linear", (d_out, d_in), (d_out, d_in))


def sized(blocks: int, *, kept: float = 0.5) -> ModelSize:
    layers = [[linear(number, 32, 64)] for number in range(blocks)]
    return ModelSize(dense=4 * 32 * 64 * blocks + 1000, itemsize=4, blocks=layers, kept=kept)


def calibrated(samples: int, settings: CalibrationSettings | None = None) -> CalibrationSize:
    given = settings or CalibrationSettings.of("fast")
    return CalibrationSize(3 * samples // 4, samples // 4, 16, Footprint(4096, 3 * 4096, 40960), given)


def test_disk_is_linear_in_blocks_and_examples_and_memory_beyond_the_model_does_not_grow_with_either() -> None:
    disk = [[temporary_bytes(sized(blocks), calibrated(samples)) for samples in (32, 64, 128)] for blocks in (2, 4, 8)]
    for fixed in (*disk, *zip(*disk, strict=True)):
        assert fixed[2] - fixed[1] == 2 * (fixed[1] - fixed[0]) > 0
    beyond = {
        memory_bytes(sized(blocks, kept=0.0), calibrated(samples), Held(sized(blocks).streamed))
        for blocks in (2, 4, 8)
        for samples in (32, 64, 128)
    }
    assert len(beyond) == 1


def test_the_factors_of_every_candidate_that_waits_are_on_disk() -> None:
    one, three = (temporary_bytes(sized(4), replace(calibrated(64), candidates=count)) for count in (1, 3))
    assert three - one == 2 * sized(4).factors > 0


def test_blocks_that_are_fitted_together_take_memory_for_each_of_their_weights_and_the_states_before_them() -> None:
    alone = calibrated(64, CalibrationSettings.of("best"))
    together = replace(alone, texts=480)
    two, four, eight = (calibration_bytes(sized(blocks), together) for blocks in (2, 4, 8))
    assert four - two == 2 * (24 * 32 * 64 + 16 * 4096)
    assert eight - four == 2 * (four - two)
    on_disk = temporary_bytes(sized(4), together) - temporary_bytes(sized(4), alone)
    assert on_disk == (alone.fit + 480) * alone.footprint.state


def test_slices_that_workers_take_need_sums_on_disk_and_a_model_and_moments_each_in_memory() -> None:
    model, alone = sized(4, kept=0.0), calibrated(64)
    sliced = replace(alone, slices=SlicesInWorkers(kept=5, at_once=3))
    triangles = 4 * (32 * 32 + 64 * 64) // 2
    assert temporary_bytes(model, sliced) - temporary_bytes(model, alone) == 5 * 8 * triangles
    held = Held(model.streamed)
    beside = memory_bytes(model, alone, held) - model.streamed
    assert memory_bytes(model, sliced, held) == model.streamed + 3 * (model.streamed + beside)


def test_sizes_that_workers_plan_need_a_model_each_and_what_a_size_leaves_on_disk() -> None:
    model = sized(4)
    alone = replace(calibrated(64), settings=CalibrationSettings(recalibration_rounds=0))
    three, held = replace(alone, sizes=SizesInWorkers(3, 2)), Held(model.streamed)
    states = 64 * alone.footprint.state
    assert temporary_bytes(model, three) - temporary_bytes(model, alone) == 3 * (states + 3 * model.factors)
    beside = memory_bytes(model, alone, held) - model.streamed
    assert memory_bytes(model, three, held) == model.streamed + 2 * (model.streamed + max(beside, model.factors))


@pytest.mark.parametrize(
    ("engine", "device", "at_once", "expected"),
    [
        (InProcess(), "cpu", 1, SizesInWorkers()),
        (ProcessPool(4), "cpu", 4, SizesInWorkers(4, 4)),
        (ProcessPool(4), "cuda", 4, SizesInWorkers(4, 1)),
    ],
)
def test_sizes_are_planned_in_workers_where_several_are_tried_at_a_time(
    engine: Engine, device: str, at_once: int, *, expected: SizesInWorkers
) -> None:
    assert SizesInWorkers.of(at_once, Run(torch.device(device), engine=engine)) == expected


@pytest.mark.parametrize(
    ("engine", "device", "batches", "expected"),
    [
        (InProcess(), "cpu", 9, None),
        (ProcessPool(4), "cpu", 1, None),
        (ProcessPool(4), "cpu", 9, SlicesInWorkers(6, 4)),
        (ProcessPool(9), "cpu", 9, SlicesInWorkers(8, 8)),
        (ProcessPool(4), "cpu", 3, SlicesInWorkers(3, 3)),
        (ProcessPool(4), "cuda", 9, SlicesInWorkers(6, 1)),
    ],
)
def test_the_slices_are_those_of_the_batches_where_there_are_workers(
    engine: Engine, device: str, *, batches: int, expected: SlicesInWorkers | None
) -> None:
    batch = Batch({"x": torch.zeros(2, 3)}, torch.empty(0))
    data = CalibrationData((batch,) * batches, (batch,), labeled=False)
    run = Run(torch.device(device), engine=engine)
    assert SlicesInWorkers.of(data, CalibrationSettings(), run) == expected


def test_what_an_interrupted_run_and_its_workers_left_is_not_needed_again(tmp_path: Path) -> None:
    for folder, size in (("units", 10), ("jobs/a/0/units", 5)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.safetensors").write_bytes(bytes(size))
    assert Places.now(torch.device("cpu"), tmp_path, None).kept == 15


def test_layers_that_are_worked_on_at_a_time_need_memory_together_but_no_more_than_they_may_have() -> None:
    one, two = (memory_bytes(sized(4), None, Held(jobs=jobs)) for jobs in (1, 2))
    assert two == 2 * one > 0
    assert memory_bytes(sized(4), None, Held(jobs=3, jobs_memory=round(1.5 * one))) == round(1.5 * one)
    assert memory_bytes(sized(4), None, Held(jobs=3, jobs_memory=1)) == one


def test_a_batch_that_is_measured_takes_what_was_said_and_adds_to_the_models() -> None:
    model, texts = transformer("llama").eval(), inputs_for("llama", 64)
    examples, layers = batch_of(texts), eligible(model)
    first = first_run(model, layers, CalibrationData((examples,), (), labeled=False), device=torch.device("cpu"))
    assert first is not None
    assert first.blocks
    said = evaluation_bytes(first.footprint, 64)
    assert said == pytest.approx(64 * evaluation_bytes(first.footprint, 1))
    weights = sum(each.nbytes for each in model.parameters())
    assert 1 / 1.3 < said / (measure_peak_memory(model, examples.inputs, device="cpu") - weights) < 1.3


def test_what_is_not_given_back_yet_is_needed_in_any_case() -> None:
    for calibration in (None, calibrated(64)):
        nothing, some = (memory_bytes(sized(4), calibration, Held(freed=freed)) for freed in (0, 1000))
        assert some - nothing == 1000


def test_the_output_is_what_the_request_leaves() -> None:
    model = sized(4, kept=1.0)
    assert output_bytes(model) == model.dense
    assert output_bytes(model.kept_by(Budget("keep", 0.25), None)) == 1000 + 4 * 32 * 64
    assert output_bytes(model.kept_by(Budget("max-size", 20_000), None)) == 20_000
    assert output_bytes(model.kept_by(Budget("tolerance", 0.1), None)) == model.dense


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def network(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 48), nn.Sequential(*(Block() for _ in range(blocks))), nn.Linear(48, 5))


@pytest.mark.parametrize("effort", ["fast", pytest.param("best", marks=pytest.mark.slow)])
def test_temporary_files_are_as_large_as_was_said(effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0

    def note(*_: object) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))

    batches = list(torch.randn(16, 32, 4, 8, generator=torch.Generator().manual_seed(1)))
    settings = replace(CalibrationSettings.of(effort), refinement=RefinementSettings(passes=1, steps=2))
    settings = replace(settings, trust_factor=1.0)  # a round of recalibration where there is one
    made = compress(
        network(4), keep=0.5, calibration=batches, calibration_settings=settings, progress=note, prefer="size", bits=16
    )
    assert made.needs is not None
    headers = 500 * 100  # what safetensors writes beside the tensors of a file
    assert most - headers <= made.needs.temporary.needed <= 1.5 * most


def test_a_small_model_is_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0))
    batches = list(torch.randn(4, 4, 8))
    small = compress(network(2), keep=0.5, calibration=batches, effort="fast", prefer="size", bits=16)
    assert small.needs is not None
    assert small.needs.temporary.available == 0 < small.needs.temporary.needed


def huge_file(path: Path) -> Path:
    """A file of a matrix that no machine has the memory for, all zeros and nearly none of it on the disk."""
    side = 10**6
    header = json.dumps({"layer.weight": {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side**2]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + 4 * side**2)
    return path


def test_the_command_refuses_in_a_line_before_it_reads_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        path = huge_file(tmp_path / "huge.safetensors")
    except OSError:
        pytest.skip("files with holes cannot be as large here")
    assert run([str(path), "--keep", "0.5", "--output", str(tmp_path / "small.safetensors"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: about 80 TB are needed of memory (cpu), and there are ")
    assert said.count("\n") == 1


def test_a_dry_run_says_what_the_run_will_take(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(model), "--keep", "0.5", "--dry-run", "--quiet"]) == 0
    page = capsys.readouterr().out
    table = page[page.index("to write it") : page.index("output  nothing")].splitlines()
    assert table[0].split() == ["to", "write", "it", "needed", "available"]
    assert [row.split("  ")[0] for row in table[2:-1]] == ["time", "memory", "weight files"]
    assert max(map(len, table)) <= 80
    assert run([str(model), "--keep", "0.5", "--dry-run", "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["needs"]
    assert 0 < said["seconds"] <= said["most_seconds"]
    assert said["temporary"]["needed"] == 0 < said["output"]["needed"] < model.stat().st_size
    assert said["output"]["place"] == str(model.parent)
    assert not list(model.parent.glob("*compressed*"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{number}.weight": torch.randn(48, 32, generator=generator) for number in range(4)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path
