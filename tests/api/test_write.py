"""The one writer: a model stands in its place with all that belongs to it, or nothing does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compressor
from compressor import BadInput, QualityGateNotMet, compress
from compressor.api.write import written
from compressor.cli.run import run
from compressor.io import Artifact, Target, TensorInfo, open_checkpoint
from compressor.io.output import Container

WEIGHT = torch.arange(12.0).reshape(3, 4)
INFOS = [TensorInfo("w", (3, 4), torch.float32)]


def tensors() -> Iterator[tuple[str, Tensor]]:
    yield "w", WEIGHT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"w": torch.zeros(3, 4)}, folder / "model.safetensors")
    for name, text in {"README.md": "# The card\n", "vocab.txt": "a", "config.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_has_the_companions_the_documents_and_the_card(source: Path, tmp_path: Path) -> None:
    noted: list[str] = []

    def observed() -> Iterator[tuple[str, Tensor]]:
        yield from tensors()
        noted.append("the tensors are written")

    artifact = Artifact(
        form="folder",
        infos=INFOS,
        tensors=observed,
        metadata={},
        companions_of=open_checkpoint(source),
        left_out=("vocab.txt",),
        documents=lambda: {"config.json": {"noted": noted}, "code.py": "pass\n"},
    )
    target = Target(tmp_path / "out", "folder", ())
    with written(artifact, target) as made:
        assert isinstance(made.model, Path)
        assert torch.equal(load_file(made.model / "model.safetensors")["w"], WEIGHT)
        assert not target.path.exists()
        made.write_card(lambda original: original + "More.\n")
    assert names(target.path) == {"model.safetensors", "config.json", "code.py", "README.md"}
    assert json.loads((target.path / "config.json").read_text()) == {"noted": ["the tensors are written"]}
    assert (target.path / "README.md").read_text() == "# The card\nMore.\n"
    assert (made.bytes, made.not_copied) == (artifact.bytes, artifact.not_copied)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_an_error_in_the_block_leaves_nothing_behind(tmp_path: Path, form: Container) -> None:
    artifact = Artifact(form, INFOS, tensors, {})
    (tmp_path / "folder").mkdir()
    target = Target(tmp_path / "folder" / "out", form, ())

    def refuse(model: object) -> None:
        assert isinstance(model, Path)
        assert model.exists()
        raise QualityGateNotMet("it lost too much")

    with pytest.raises(QualityGateNotMet), written(artifact, target) as made:
        refuse(made.model)
    assert names(tmp_path / "folder") == set()


def test_a_file_has_no_card_and_may_be_of_another_kind(tmp_path: Path) -> None:
    artifact = Artifact("file", INFOS, tensors, {}, write=lambda path: torch.save(dict(tensors()), path))
    with written(artifact, Target(tmp_path / "out.pt", "file", ())) as made:
        made.write_card(lambda _: "no card of a file")
    assert names(tmp_path) == {"out.pt"}
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], WEIGHT)
    assert made.bytes == (tmp_path / "out.pt").stat().st_size


def test_without_a_target_a_module_is_built_or_nothing_is_made() -> None:
    def never() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("the tensors of what is not written were computed")

    layer = nn.Linear(4, 3)
    with written(Artifact("module", INFOS, never, {}, module=lambda: layer), None) as made:
        assert (made.model, made.bytes) == (layer, 48)
    with written(Artifact("file", INFOS, never, {}), None) as made:
        made.write_card(lambda _: "no card of nothing")
        assert made.model is None


def test_a_target_that_is_taken_in_the_meantime_stops_before_the_tensors(source: Path) -> None:
    def never() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("the tensors of what cannot be written were computed")

    with (
        pytest.raises(BadInput, match="already exists"),
        written(Artifact("folder", INFOS, never, {}), Target(source, "folder", ())),
    ):
        pass


@pytest.mark.parametrize("container", ["folder", "file"])
def test_what_was_compressed_says_how_to_do_it_again(container: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(24, 16), "b.weight": torch.randn(16, 16)}
    (tmp_path / "dense").mkdir()
    save_file(weights, tmp_path / "dense" / "model.safetensors")
    dense = tmp_path / "dense" if container == "folder" else tmp_path / "dense" / "model.safetensors"
    small, again = (tmp_path / (name + dense.suffix) for name in ("small", "again"))
    report = compress(dense, output=small, keep=0.6, exclude="b*", max_shard_size="1MB", prefer="size")
    said = small / "options.yaml"
    if container == "folder":
        assert said.read_text().splitlines()[0] == f"# {report.command}"
        assert yaml.safe_load(said.read_text()) == {
            "keep": 0.6,
            "prefer": "size",
            "exclude": ["b*"],
            "max_shard_size": "1MB",
        }
    else:
        record = json.loads(open_checkpoint(small).metadata["compressor"])
        said = tmp_path / "options.json"
        said.write_text(json.dumps(record["options"]))
    assert report.bytes.after == open_checkpoint(small).weight_bytes
    assert run([str(dense), "--config", str(said), "-o", str(again), "-q"]) == 0
    pairs = [(small, again)]
    if container == "folder":  # the card names the folder
        pairs = [(file, again / file.name) for file in small.iterdir() if file.name != "README.md"]
    assert all(first.read_bytes() == second.read_bytes() for first, second in pairs)


@pytest.mark.parametrize("writes", ["staged_folder", "copy_companions", "SafetensorsWriter", "ShardedWriter"])
def test_models_are_written_in_one_place(writes: str) -> None:
    package = Path(compressor.__file__).parent
    calls = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.parent.name not in ("io", "archiving") and f"{writes}(" in path.read_text(encoding="utf-8")
    }
    calls.discard("api/archive.py")  # an archive is no model
    assert calls == {"api/write.py"}
