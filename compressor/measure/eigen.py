"""Eigenvalues of symmetric matrices, on the device of the matrix where that can compute them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric `n x n` matrix, ascending, and its eigenvectors as columns, on its device.

    Raises `torch.linalg.LinAlgError` where the CPU does not find them either.
    """
    values, vectors = _robust(torch.linalg.eigh, matrix)
    return values.to(matrix.device), vectors.to(matrix.device)


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric `n x n` matrix, ascending, on its device.

    Raises `torch.linalg.LinAlgError` where the CPU does not find them either.
    """
    values: Tensor = _robust(torch.linalg.eigvalsh, matrix)
    return values.to(matrix.device)


def _robust(decompose: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    """On the CPU where the device fails, which is said once: cuSOLVER does not converge for what LAPACK takes."""
    try:
        return decompose(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.device.type == "cpu":
            raise
        _say_once(matrix.device.type)
        return decompose(matrix.cpu())


@functools.cache
def _say_once(device: str) -> None:
    logger.warning("%s does not find the eigenvalues of some matrices: the CPU does", device)
