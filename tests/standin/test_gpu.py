"""What is asked of a GPU, asked of the stand-in."""

from __future__ import annotations

from tests.gpu.test_gpu import (
    pytestmark,
    test_a_model_on_the_cpu_stays_in_its_memory,
    test_eigenvectors_are_those_of_the_matrix,
    test_moments_are_as_exact_as_float32,
    test_the_constants_of_the_device_are_measured,
    test_verbs_run,
)

__all__ = [
    "pytestmark",
    "test_a_model_on_the_cpu_stays_in_its_memory",
    "test_eigenvectors_are_those_of_the_matrix",
    "test_moments_are_as_exact_as_float32",
    "test_the_constants_of_the_device_are_measured",
    "test_verbs_run",
]
