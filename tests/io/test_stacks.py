"""Layers in one tensor: each of them by itself, read from where it lies in a file, and all together again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.io import Stack, open_checkpoint

LAYOUTS = [
    Stack("x.fused", "x", members, 3, "weight", transposed=transposed, interleaved=interleaved)
    for members, transposed, interleaved in itertools.product([("gate", "up"), ("down",)], [False, True], [False, True])
]
BIASES = [Stack("x.fused", "x", ("gate", "up"), 3, "bias", interleaved=interleaved) for interleaved in (False, True)]


def whole(stack: Stack) -> torch.Tensor:
    shape = (3, 10) if stack.of == "bias" else (3, 7, 10) if stack.transposed else (3, 10, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stack", LAYOUTS + BIASES)
def test_a_matrix_has_the_rows_of_its_outputs(stack: Stack) -> None:
    tensor = whole(stack)
    parts = stack.views(tensor)
    assert list(parts) == stack.names()
    count = len(stack.members)
    for number, (place, member) in itertools.product(range(3), enumerate(stack.members)):
        rows = tensor[number].T if stack.transposed else tensor[number]
        each = len(rows) // count
        expected = rows[place::count] if stack.interleaved else rows[place * each : (place + 1) * each]
        assert torch.equal(parts[f"x.{number}.{member}.{stack.of}"], expected)


@pytest.mark.parametrize("stack", LAYOUTS + BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_file_each_is_read_by_itself(stack: Stack, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = whole(stack).to(dtype)
    save_file({"a": torch.ones(3), "x.fused": tensor, "z": torch.zeros(2)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    apart = checkpoint.taken_apart([stack]).stacked([stack], checkpoint)
    expected = stack.views(tensor)
    assert apart.tensors.keys() == {"a", *expected, "z"}
    for name, values in expected.items():
        read = apart.read(name)
        assert read.is_contiguous()
        assert torch.equal(read, values)
        assert apart.tensors[name].shape == tuple(values.shape)
    assert torch.equal(apart.read("x.fused"), tensor)
    assert apart.wholes["x.fused"] == checkpoint.tensors["x.fused"]
    assert apart.held_by == dict.fromkeys(expected, "x.fused")
    assert apart.weight_bytes == checkpoint.weight_bytes
    assert apart.digest() == checkpoint.digest()


@pytest.mark.parametrize("stack", LAYOUTS + BIASES)
def test_the_parts_say_the_shape_of_the_whole(stack: Stack) -> None:
    tensor = whole(stack)
    shapes = {name: tuple(view.shape) for name, view in stack.views(tensor).items()}
    assert stack.shape(shapes) == tuple(tensor.shape)
    assert stack.fits(tensor.shape)
    for name in shapes:
        assert stack.shape({other: shape for other, shape in (shapes | {"y": (3,)}).items() if other != name}) is None
    assert stack.shape({}) is None
    assert stack.shape(shapes | {next(iter(shapes)): (4,) * len(next(iter(shapes.values())))}) is None


def test_what_cannot_be_taken_apart_does_not_fit() -> None:
    gate_up = Stack("x.fused", "x", ("gate", "up"), 3)
    assert not any(map(gate_up.fits, [(3, 9, 7), (3, 10), (3, 10, 7, 1), (2, 10, 7), (3, 10, 0)]))


@pytest.mark.parametrize("stack", LAYOUTS + BIASES)
def test_a_document_is_read_as_it_was_written(stack: Stack) -> None:
    assert Stack.from_dict(stack.to_dict()) == stack


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": 3},
        {"stem": None},
        {"members": []},
        {"members": "gate"},
        {"of": "scale"},
        {"count": 0},
        {"count": 2.0},
        {"transposed": 1},
    ],
)
def test_a_document_that_says_nothing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"tensor|holds"):
        Stack.from_dict(LAYOUTS[0].to_dict() | change)
