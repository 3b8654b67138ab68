"""Eigenvalues of symmetric matrices. What happens where a device fails is tested in `tests/standin/test_devices.py`."""

from __future__ import annotations

import pytest
import torch

from compressor.measure.eigen import eigh, eigvalsh


def test_they_are_those_of_the_matrix():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    values, vectors = eigh(matrix)
    torch.testing.assert_close(values, torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(matrix @ vectors, vectors * values)
    torch.testing.assert_close(eigvalsh(matrix), values)


@pytest.mark.parametrize("decompose", [eigh, eigvalsh])
def test_what_the_cpu_does_not_find_is_an_error(decompose):
    with pytest.raises(torch.linalg.LinAlgError):
        decompose(torch.full((3, 3), torch.nan))
