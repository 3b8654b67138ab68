"""What goes to a worker and comes back."""

from __future__ import annotations

import pickle

import pytest
import torch

from compressor.engine.calls import carried_out, packed, unpacked
from compressor.errors import CompressorError
from compressor.io.tensors import TensorInMemory
from compressor.version import VERSION


class StubbornError(Exception):
    """One that pickling makes another of."""

    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}")


def refuse(number: int) -> None:
    raise StubbornError(number)


def squared(number: float) -> float:
    return number**2


def read(tensor: TensorInMemory) -> torch.Tensor:
    return tensor.read()


def test_a_call_gives_what_the_job_does() -> None:
    assert unpacked(carried_out(packed(squared, 3.0))) == 9.0


def test_an_error_that_cannot_be_pickled_arrives_as_one_line() -> None:
    with pytest.raises(CompressorError, match="StubbornError: number 3"):
        unpacked(carried_out(packed(refuse, 3)))


def test_a_worker_of_another_version_is_refused() -> None:
    call = pickle.dumps(("0.0.0", b""))
    with pytest.raises(CompressorError, match=f"a worker has version {VERSION} of compressor instead of 0.0.0"):
        unpacked(carried_out(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_of_a_part_of_a_tensor_only_its_own_values_are_sent(dtype: torch.dtype) -> None:
    part = torch.nn.Parameter(torch.arange(100_000, dtype=torch.float64).to(dtype)).view(10, -1)[3, :16]
    call = packed(read, TensorInMemory(part))
    assert len(call) < 4_000
    assert torch.equal(unpacked(carried_out(call)), part.detach())
