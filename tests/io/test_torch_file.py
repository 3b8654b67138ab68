"""Torch checkpoints against torch.load itself, and against files that would run code."""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from compressor.errors import BadInput
from compressor.io import open_checkpoint, torch_file, write_state_dict_file
from compressor.io.tensors import TensorOnDisk
from compressor.io.torch_file import LEGACY_MAGIC


def saved(path: Path, document: object, **options: Any) -> Path:
    torch.save(document, path, **options)
    return path


def state_dict_with_every_kind_of_view() -> dict[str, torch.Tensor]:
    matrix = torch.randn(6, 4)
    return {
        "whole": matrix,
        "transposed": matrix.t(),
        "rows": matrix[2:5],
        "corner": matrix[1:4, 1:3],
        "every.second": matrix[::2, ::2],
        "expanded": matrix[0, :1].expand(5),
        "one": matrix[3:4, 2:3],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "half": torch.randn(3).bfloat16(),
        "eight": torch.randn(3).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex128),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "th", "ckpt"])
def test_values_are_those_of_torch_load(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path = tmp_path / f"m.{suffix}"
    tensors = state_dict_with_every_kind_of_view()
    if legacy:
        del tensors["eight"]  # torch itself cannot read back what it writes
    saved(path, tensors, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) | set(checkpoint.aliases) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float() if name == "eight" else read, tensor.float() if name == "eight" else tensor)
        assert read.is_contiguous()
    assert checkpoint.weight_bytes == path.stat().st_size


def test_values_of_a_zip_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    stored = torch_file.read_torch_file(saved(tmp_path / "m.pt", {"w": torch.randn(2, 3)})).tensors
    assert isinstance(stored["w"], TensorOnDisk)


def test_values_read_from_a_zip_are_those_that_torch_loads(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", state_dict_with_every_kind_of_view())
    loaded = torch.load(path, weights_only=True)
    stored = torch_file.read_torch_file(path).tensors
    assert list(stored) == list(loaded)
    for name, tensor in stored.items():
        assert isinstance(tensor, TensorOnDisk)
        assert tensor.read().dtype == loaded[name].dtype
        assert torch.equal(tensor.read().to(torch.complex128), loaded[name].to(torch.complex128))


def test_a_file_of_the_other_byte_order_is_loaded_by_torch(tmp_path: Path) -> None:
    other = "big" if sys.byteorder == "little" else "little"
    plain = saved(tmp_path / "plain.pt", {"w": torch.tensor([1.0, 2.0])})
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "swapped.pt", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("/byteorder"):
                content = other.encode()
            elif "/data/" in entry.filename:
                content = torch.frombuffer(bytearray(content), dtype=torch.float32).numpy().byteswap().tobytes()
            target.writestr(entry.filename, content)
    assert torch.equal(open_checkpoint(tmp_path / "swapped.pt").read("w"), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model_state", "model", "module", "net", "params"])
def test_the_model_is_found_inside_a_training_checkpoint(tmp_path: Path, key: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3)).sum().backward()
    optimizer.step()
    document = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "ema": torch.zeros(2),
        key: model.state_dict(),
    }
    checkpoint = open_checkpoint(saved(tmp_path / "m.pth", document))
    assert list(checkpoint.tensors) == ["weight", "bias"]
    nested = open_checkpoint(saved(tmp_path / "nested.pth", {"model": {"state_dict": model.state_dict(), "n": 1}}))
    assert list(nested.tensors) == ["weight", "bias"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped_where_all_names_have_them(tmp_path: Path, prefix: str) -> None:
    tensors = {f"{prefix}{name}": torch.randn(2) for name in ("a.weight", "module.b")}
    assert list(open_checkpoint(saved(tmp_path / "m.pt", tensors)).tensors) == ["a.weight", "module.b"]
    tensors["other"] = torch.randn(2)
    assert list(open_checkpoint(saved(tmp_path / "m.pt", tensors)).tensors) == list(tensors)


def test_tied_tensors_are_listed_once_under_their_first_name(tmp_path: Path) -> None:
    embedding = nn.Parameter(torch.randn(5, 3))
    path = saved(
        tmp_path / "m.pt",
        OrderedDict(embed=embedding, head=embedding, slice=embedding[:2], none=torch.empty(0)),
    )
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == ["embed", "slice", "none"]
    assert checkpoint.aliases == {"head": "embed"}
    assert torch.equal(checkpoint.read("head"), embedding)


def test_a_document_that_contains_itself_is_refused(tmp_path: Path) -> None:
    document: dict[str, Any] = {"epoch": 3}
    document["model"] = document
    with pytest.raises(BadInput, match="holds no tensors"):
        open_checkpoint(saved(tmp_path / "m.pt", document))


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_nothing_in_a_file_is_run(tmp_path: Path, options: dict[str, bool]) -> None:
    path = saved(tmp_path / "m.pt", {"weight": torch.zeros(2), "x": Attack(tmp_path / "ran")}, **options)
    with pytest.raises(BadInput, match="could run any code") as caught:
        open_checkpoint(path)
    assert "state_dict()" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused_with_the_class_it_needs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"torch\.nn\.modules\.linear\.Linear.*save `model\.state_dict\(\)`"):
        open_checkpoint(saved(tmp_path / "m.pt", nn.Linear(2, 2)))
    with pytest.raises(BadInput, match=r"fractions\.Fraction"):
        open_checkpoint(saved(tmp_path / "n.pt", {"model": {"w": torch.zeros(1)}, "args": Fraction(1, 2)}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(BadInput, match="TorchScript"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, "holds no tensors.*found: nothing"),
        ({"epoch": 3, "lr": 0.1}, "holds no tensors.*found: epoch, lr"),
        (torch.zeros(2), "one tensor without a name"),
        ([torch.zeros(2)], "holds a list"),
        ({"w": torch.eye(3).to_sparse()}, "'w' is sparse"),
        ({"w": torch.tensor([1j]).conj()}, "'w' is .*conjugated"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_refused(tmp_path: Path, document: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        open_checkpoint(saved(tmp_path / "m.pt", document))


def test_a_truncated_zip_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = saved(tmp_path / "m.pt", {"w": torch.randn(40)}).read_bytes()
    for size in range(9, len(whole), 37):
        (tmp_path / "m.pt").write_bytes(whole[:size])
        with pytest.raises(BadInput, match="truncated or damaged"):
            open_checkpoint(tmp_path / "m.pt")


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("document.xml", "<x/>")
    with pytest.raises(BadInput, match="holds no state dict"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(BadInput, match="bare pickle"):
        open_checkpoint(tmp_path / "m.bin")


ZIP_SEED, LEGACY_SEED = bytearray(), bytearray()


def seed_file(folder: Path, legacy: bool) -> bytearray:
    cache = LEGACY_SEED if legacy else ZIP_SEED
    if not cache:
        matrix = torch.arange(12.0).reshape(3, 4)
        document = {"state_dict": {"a": matrix, "t": matrix.t()[1:], "b": torch.ones(3).half()}, "step": 3}
        path = saved(folder / "seed.pt", document, _use_new_zipfile_serialization=not legacy)
        cache.extend(path.read_bytes())
    return bytearray(cache)


@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_mutated_files_are_refused_or_give_tensors_of_the_announced_size(
    tmp_path_factory: pytest.TempPathFactory, legacy: bool, changes: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    content = seed_file(folder, legacy)
    for place, value in changes:
        content[int(place * len(content))] = value
    (folder / "m.pt").write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder / "m.pt")
        for name, info in checkpoint.tensors.items():
            # A stride of zero repeats one element as often as the shape says; this is no memory test.
            if info.nbytes < 1 << 24:
                tensor = checkpoint.read(name)
                assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
    except BadInput:
        return


def test_a_view_outside_its_data_is_refused(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    path = saved(tmp_path / "m.pt", {"w": tensor})
    content = path.read_bytes()
    # The pickled size (4,), `K\x04\x85`, becomes (9,): 36 bytes where 16 are stored.
    assert content.count(b"K\x04\x85") == 1
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "n.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry).replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(BadInput, match="'w' lies outside the data stored for it"):
        open_checkpoint(tmp_path / "n.pt")


def rewritten(source: Path, target: Path, *, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A copy of a zip with some of its records, by the last part of their name, replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.rpartition("/")[2]
            new.writestr(entry.filename, records.get(name.removesuffix(".pkl"), old.read(entry)))
    return target


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_repeat_what_the_file_stores_are_bounded_by_its_bytes(tmp_path: Path, legacy: bool) -> None:
    row = torch.randn(64)
    few = saved(tmp_path / "few.pt", {"w": row.expand(100, 64)}, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(open_checkpoint(few).read("w"), row.expand(100, 64))
    many = {"a": row, "w": row.expand(10**9, 64)}
    with pytest.raises(BadInput, match=r"'w' has 256,000,000,000 bytes.*contiguous"):
        open_checkpoint(saved(tmp_path / "many.pt", many, _use_new_zipfile_serialization=not legacy))
    each_small = {f"w{i}": row[i : i + 1].expand(10**6) for i in range(8)}
    with pytest.raises(BadInput, match="stores few"):
        open_checkpoint(saved(tmp_path / "sum.pt", each_small, _use_new_zipfile_serialization=not legacy))


@pytest.mark.slow
@pytest.mark.parametrize("record", ["data", "version"])
def test_a_record_that_inflates_is_refused_before_it_is_read(tmp_path: Path, record: str) -> None:
    path = saved(tmp_path / "m.pt", {"w": torch.randn(3)})
    bomb = rewritten(path, tmp_path / "n.pt", compression=zipfile.ZIP_DEFLATED, **{record: b"]" * 2**27})
    assert bomb.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=r"has 134,217,728 bytes"):
            open_checkpoint(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_many_containers_is_refused_before_they_are_made(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "m.pt", {"w": torch.randn(3)}, _use_new_zipfile_serialization=not legacy)
    pickled = b"\x80\x02(" + b"]" * 1_600_000 + b"l."
    if legacy:
        bomb = tmp_path / "n.pt"
        bomb.write_bytes(LEGACY_MAGIC + pickled)
    else:
        bomb = rewritten(path, tmp_path / "n.pt", data=pickled)
    with pytest.raises(BadInput, match="more than 1,500,000 Python objects"):
        open_checkpoint(bomb)


def trained(steps: int = 3) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        model(torch.randn(2, 40)).sum().backward()
        optimizer.step()
    return model, optimizer


NUMBERS = 4 * (40 * 30 + 30)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_not_the_model_is_left_out_and_counted(tmp_path: Path, legacy: bool) -> None:
    model, optimizer = trained()
    document = {
        "epoch": 3,
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "state_dict_ema": copy.deepcopy(model.state_dict()),
        "optimizer": optimizer.state_dict(),
    }
    whole = open_checkpoint(saved(tmp_path / "whole.pt", document, _use_new_zipfile_serialization=not legacy))
    bare = open_checkpoint(saved(tmp_path / "bare.pt", model.state_dict(), _use_new_zipfile_serialization=not legacy))
    assert whole.tensors == bare.tensors
    assert whole.weights_at == "state_dict"
    assert [(each.key, each.kind, each.bytes) for each in whole.left_out] == [
        ("state_dict_ema", "EMA copy of the weights", NUMBERS),
        ("optimizer", "optimizer state", 2 * NUMBERS + 2 * 4),  # two moments, and the steps of two parameters
    ]
    # Weights are compared with weights: what is left is theirs, and the structure of the file.
    assert bare.weight_bytes <= whole.weight_bytes < bare.weight_bytes + NUMBERS / 2
    assert (bare.left_out, bare.weights_at) == ((), "")


def test_a_tensor_that_the_weights_share_is_not_left_out(tmp_path: Path) -> None:
    model, _ = trained()
    weights = model.state_dict()
    checkpoint = open_checkpoint(saved(tmp_path / "m.pt", {"model": weights, "ema": {"copy": weights["weight"]}}))
    assert checkpoint.left_out == ()


def test_what_is_left_out_of_a_document_that_contains_itself(tmp_path: Path) -> None:
    document: dict[str, Any] = {"model": {"state_dict": {"w": torch.zeros(3)}, "ema": {"w": torch.ones(3)}}}
    document["itself"] = document["model"]["again"] = document
    checkpoint = open_checkpoint(saved(tmp_path / "m.pt", document))
    assert checkpoint.weights_at == "model.state_dict"
    assert [each.bytes for each in checkpoint.left_out] == [12]


def test_an_average_is_taken_where_there_is_nothing_else(tmp_path: Path) -> None:
    model, optimizer = trained()
    average = {"ema": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint = open_checkpoint(saved(tmp_path / "m.pt", average))
    assert (checkpoint.weights_at, set(checkpoint.tensors)) == ("ema", {"weight", "bias"})
    assert [each.kind for each in checkpoint.left_out] == ["optimizer state"]


def test_tensors_named_for_an_optimizer_are_no_weights(tmp_path: Path) -> None:
    moments = {f"optimizer/vars/{index}": torch.ones(40, 30) for index in range(2)}
    weights = {"dense/kernel": torch.randn(40, 30)}
    save_file(weights | moments, tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", saved(tmp_path / "m.pt", weights | moments)):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.tensors) == set(weights)
        assert [(each.kind, each.bytes) for each in checkpoint.left_out] == [("optimizer state", 2 * 40 * 30 * 4)]
        assert checkpoint.weight_bytes < 1.5 * 40 * 30 * 4


def test_settings_are_read_as_what_they_hold_and_no_class_is_imported(tmp_path: Path) -> None:
    class Odd(argparse.Namespace):
        def __setstate__(self, state: object) -> None:
            raise AssertionError("the class itself is used")

    Odd.__module__, Odd.__qualname__, Odd.__name__ = "argparse", "Namespace", "Namespace"
    real, argparse.Namespace = argparse.Namespace, Odd  # type: ignore[misc]
    try:
        settings_of_run = Odd(lr=0.1, nested=Odd(wd=0.2), sizes=[3, 4], name="run")
        path = saved(tmp_path / "m.pt", {"model": {"w": torch.zeros(3)}, "args": settings_of_run})
        checkpoint = open_checkpoint(path)
    finally:
        argparse.Namespace = real  # type: ignore[misc]
    assert checkpoint.training == {
        "model": None,
        "args": {"lr": 0.1, "nested": {"wd": 0.2}, "sizes": [3, 4], "name": "run"},
    }


def test_a_written_state_dict_loads_and_keeps_its_ties(tmp_path: Path) -> None:
    tied = nn.Parameter(torch.randn(3, 2))
    big = torch.randn(1000)
    tensors = {"a": tied, "b": tied, "slice": big[:2], "t": torch.arange(6.0).reshape(2, 3).t()}
    write_state_dict_file(tmp_path / "m.pt", tensors)
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert (tmp_path / "m.pt").stat().st_size < 3000
    write_state_dict_file(tmp_path / "n.pt", tensors)
    assert (tmp_path / "m.pt").read_bytes() == (tmp_path / "n.pt").read_bytes()
