"""The safetensors reader and writer against the official library, and against damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.errors import BadInput, CompressorError
from compressor.io import SafetensorsWriter, TensorInfo, open_checkpoint, safetensors_size, staged_file
from compressor.io.safetensors_file import DTYPES, read_safetensors


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # 0 and 1 are valid in every byte of every dtype, bool included.
    high = 2 if dtype is torch.bool else 256
    values = torch.randint(0, high, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return values.view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Comparing bytes, because NaN differs from itself and 8-bit floats cannot be compared.
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def infos_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    with SafetensorsWriter(path, infos_of(tensors), metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


@pytest.fixture
def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"{name}.weight": random_tensor(dtype, (3, 5), i) for i, (name, dtype) in enumerate(DTYPES.items())}
    return tensors | {
        "empty": torch.empty(0),
        "empty.matrix": torch.empty(3, 0, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        'héllo "quoted"\n': torch.ones(2),
    }


def test_the_official_library_writes_the_same_bytes(tmp_path: Path, every_dtype: dict[str, torch.Tensor]) -> None:
    metadata = {"format": "pt"}
    save_file(every_dtype, tmp_path / "official.safetensors", metadata=metadata)
    ours = write(tmp_path / "ours.safetensors", every_dtype, metadata)
    assert ours.read_bytes() == (tmp_path / "official.safetensors").read_bytes()


def test_every_dtype_goes_through_a_file_unchanged(tmp_path: Path, every_dtype: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path / "m.safetensors", every_dtype, {"format": "pt", "recipe": "{}"})
    official = load_file(path)
    checkpoint = open_checkpoint(path)
    assert set(official) == set(checkpoint.tensors) == set(every_dtype)
    for name, tensor in every_dtype.items():
        assert checkpoint.tensors[name] == TensorInfo(name, tuple(tensor.shape), tensor.dtype)
        assert same_bytes(checkpoint.read(name), tensor)
        assert same_bytes(official[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == checkpoint.metadata == {"format": "pt", "recipe": "{}"}


@given(
    described=st.dictionaries(
        st.text(max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    random=st.randoms(),
)
def test_any_tensors_in_any_order_come_back(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], metadata: dict[str, str], *, random: Any
) -> None:
    tensors = {name: random_tensor(dtype, tuple(shape)) for name, (dtype, shape) in described.items()}
    shuffled = dict(random.sample(list(tensors.items()), len(tensors)))
    folder = tmp_path_factory.mktemp("round-trip")
    path = write(folder / "a.safetensors", tensors, metadata)
    assert path.stat().st_size == safetensors_size(infos_of(tensors), metadata)
    assert write(folder / "b.safetensors", shuffled, metadata).read_bytes() == path.read_bytes()
    stored, read_metadata = read_safetensors(path)
    assert read_metadata == metadata
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert all(same_bytes(stored[name].read(), tensor) for name, tensor in tensors.items())
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in stored.values())


def test_opening_reads_no_values(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": torch.zeros(1000)}, {})
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(torch.full((1000,), 3.0).numpy().tobytes())
    assert torch.equal(checkpoint.read("w"), torch.full((1000,), 3.0))


def test_each_read_has_memory_of_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.safetensors", {"w": torch.zeros(4)}, {}))
    checkpoint.read("w").fill_(1)
    assert torch.equal(checkpoint.read("w"), torch.zeros(4))


def test_a_file_cut_short_after_opening_is_bad_input(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": torch.zeros(1000)}, {})
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(BadInput, match="too early"):
        checkpoint.read("w")
    path.unlink()
    with pytest.raises(BadInput, match="no such file"):
        checkpoint.read("w")


def test_every_shorter_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.safetensors", {"w": torch.zeros(5), "b": torch.zeros(1)}, {}).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(BadInput, match=r"is truncated|is empty"):
            open_checkpoint(cut)


def valid_header() -> dict[str, Any]:
    return {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }


def put(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_the_header_used_for_the_refusals_is_itself_accepted(tmp_path: Path) -> None:
    assert set(open_checkpoint(put(tmp_path / "m.safetensors", valid_header(), bytes(24))).tensors) == {
        "a",
        "b",
    }


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda h: h["b"].update(data_offsets=[8, 16]), "bytes at the end|starts at 8"),
        (lambda h: h["b"].update(shape=[2], data_offsets=[20, 24]), "starts at 20"),
        (lambda h: h["b"].update(shape=[5], data_offsets=[16, 26]), "truncated"),
        (lambda h: h["b"].update(shape=[3], data_offsets=[16, 22]), "no tensor covers"),
        (lambda h: h["b"].update(shape=[5]), "10"),
        (lambda h: h["b"].update(shape=[-4]), "shape"),
        (lambda h: h["b"].update(shape=[4.0]), "shape"),
        (lambda h: h["b"].update(shape=[True, 4]), "shape"),
        (lambda h: h["b"].update(shape=4), "shape"),
        (lambda h: h["b"].update(shape=[1] * 65 + [4]), "shape"),
        (lambda h: h["b"].update(shape=[2**40, 2**40]), "impossible"),
        (
            lambda h: h.update(c={"dtype": "F32", "shape": [0, 2**59, 2], "data_offsets": [0, 0]}),
            "impossible",
        ),
        (lambda h: h["b"].update(data_offsets=[24, 16]), "data_offsets"),
        (lambda h: h["b"].update(data_offsets=[16]), "data_offsets"),
        (lambda h: h["b"].update(data_offsets=[-8, 0]), "data_offsets"),
        (lambda h: h["b"].update(dtype="F31"), "F31.*not supported"),
        (lambda h: h["b"].update(dtype=7), "not supported"),
        (lambda h: h["b"].update(extra=1), "described by"),
        (lambda h: h.update(b=3), "described by"),
        (lambda h: h.update(__metadata__={"n": 3}), "metadata"),
        (lambda h: h.update(__metadata__=[]), "metadata"),
        (lambda h: h.update({"\ud800": h.pop("b")}), "Unicode"),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], says: str
) -> None:
    header = valid_header()
    damage(header)
    with pytest.raises(BadInput, match=says) as caught:
        open_checkpoint(put(tmp_path / "m.safetensors", header, bytes(24)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [b"{", b"{" * 100_000, b'{"a":1,"a":2}', b'{"a": \xff}', b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(BadInput, match="not a valid safetensors"):
        open_checkpoint(put(tmp_path / "m.safetensors", header, b""))


def test_a_header_without_tensors_is_an_empty_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no tensors"):
        open_checkpoint(put(tmp_path / "m.safetensors", {}, b""))


@given(header=st.binary(min_size=0, max_size=200), data=st.binary(max_size=40), framed=st.booleans())
def test_random_bytes_are_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, *, framed: bool
) -> None:
    path = tmp_path_factory.mktemp("random") / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data if framed else header + data)
    with pytest.raises(BadInput):
        open_checkpoint(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.sampled_from(["F32", "BF16", "a", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=3)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "?"]) | json_values,
        "shape": st.lists(st.integers(0, 5) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 48), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3))
def test_structured_random_headers_are_refused_or_read_whole(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]
) -> None:
    path = put(tmp_path_factory.mktemp("structured") / "m.safetensors", header, bytes(48))
    try:
        checkpoint = open_checkpoint(path)
    except BadInput:
        return
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)


@given(st.data())
def test_mutated_files_are_refused_or_agree_with_the_official_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("mutated") / "m.safetensors"
    content = bytearray(
        write(path, {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}, {"k": "v"}).read_bytes()
    )
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except BadInput:
        return
    official = load_file(path)
    assert set(official) == set(checkpoint.tensors)
    assert all(same_bytes(checkpoint.read(name), official[name]) for name in official)


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"what was there before")
    announced = [TensorInfo("a", (2,), torch.float32), TensorInfo("b", (2,), torch.float32)]

    def write_half(interruption: BaseException | None) -> None:
        with staged_file(path, overwrite=True) as staged, SafetensorsWriter(staged, announced, {}) as writer:
            writer.write("a", torch.zeros(2))
            if interruption:
                raise interruption

    with pytest.raises(KeyboardInterrupt):
        write_half(KeyboardInterrupt())
    with pytest.raises(CompressorError, match=r"1 tensors were never written \(b\)"):
        write_half(None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_bytes() == b"what was there before"


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("c", torch.zeros(2), "not announced"),
        ("a", torch.zeros(3), r"is \(3,\) torch.float32, announced was \(2,\) torch.float32"),
        ("a", torch.zeros(2, dtype=torch.float64), "torch.float64"),
    ],
)
def test_a_tensor_that_differs_from_the_announcement_is_an_error(
    tmp_path: Path, name: str, tensor: torch.Tensor, *, says: str
) -> None:
    with (
        pytest.raises(CompressorError, match=says) as caught,
        SafetensorsWriter(tmp_path / "m", [TensorInfo("a", (2,), torch.float32)], {}) as writer,
    ):
        writer.write(name, tensor)
    assert not isinstance(caught.value, BadInput)


def test_a_tensor_written_twice_is_an_error(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "m", [TensorInfo("a", (2,), torch.float32)], {}) as writer:
        writer.write("a", torch.zeros(2))
        with pytest.raises(CompressorError, match="already written"):
            writer.write("a", torch.ones(2))
    assert torch.equal(load_file(tmp_path / "m")["a"], torch.zeros(2))


@pytest.mark.parametrize(
    "infos",
    [
        [TensorInfo("a", (2,), torch.float32)] * 2,
        [TensorInfo("__metadata__", (2,), torch.float32)],
        [TensorInfo("a", (2,), torch.complex128)],
    ],
)
def test_what_the_format_cannot_hold_is_an_error(tmp_path: Path, infos: list[TensorInfo]) -> None:
    with pytest.raises(CompressorError, match="safetensors"):
        SafetensorsWriter(tmp_path / "m", infos, {})


def test_strided_and_conjugated_tensors_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "t": matrix.t(),
        "row": matrix[1:2],
        "c": torch.tensor([1 + 2j]).conj(),
        "e": matrix[0, 0].expand(3),
    }
    loaded = load_file(write(tmp_path / "m.safetensors", tensors, {}))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
