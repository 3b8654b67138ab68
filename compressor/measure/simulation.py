"""Mini-batch SGD with weight decay on random gradients: the mechanism of the memory window in isolation.

A matrix W of `width` x `width` is trained for t steps by

    W_{t+1} = (1 - lr * wd) W_t - lr * G_t,    G_t = 1/(B R) * sum_{k=1..BR} u_k v_k^T,

with B the batch size and R the uses per example: the gradient of a mean loss, of rank at most B*R (Galanti et al.
2022, arXiv:2206.05794, Section 3, with their mu*lambda = lr*wd/2). Its gradients carry no signal, so every effect
on the rank is the window's, the start's or the gradients' own anisotropy.

Entry i of u_k and v_k is normal with variance d_i^2 / sqrt(width), where d_i^2 is proportional to i^-anisotropy and
has mean 1. W_0 is `surviving_initialization` times a fresh matrix with the standard deviation 1/sqrt(3 width) of
`torch.nn.Linear`.

The random numbers are specified to the bit, so that other programs can repeat a run. Output k = 0, 1, ... of seed s is
mulberry32's (T. Ettinger 2017, public domain), a function of the 32-bit state s + (k + 1) * 0x6D2B79F5 alone. Outputs
2p and 2p + 1, divided by 2^32, are a and b in the transform of Box and Muller (1958), which gives the normals
2p = sqrt(-2 ln(a + 2^-32)) cos(2 pi b) and 2p + 1, the same with the sine. The first width^2 normals fill the fresh
matrix by rows; the next ones are u_1, v_1, u_2, v_2, ... of step 0, then of step 1, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.errors import BadInput

Matrix = npt.NDArray[np.float64]

_INCREMENT = 0x6D2B79F5
_REFERENCE_SEED = 0


@dataclass(frozen=True)
class SimulatedTraining:
    """The hyperparameters of a simulated run; `learning_rate` and `weight_decay` are `torch.optim.SGD`'s numbers.

    `surviving_initialization` is the share exp(-K) of a fresh initialization that the run starts from: 0 is a start
    from zero, 1 a fresh network. `width` is even, since normal numbers come in pairs.

    Raises `BadInput` for numbers that no such run can have.
    """

    width: int
    batch_size: int
    uses: int
    learning_rate: float
    weight_decay: float
    anisotropy: float = 0.0
    surviving_initialization: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name, possible, range_words in (
            ("width", self.width >= 2 and self.width % 2 == 0, "an even number of at least 2"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("uses", self.uses >= 1, "at least 1"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "at least 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("anisotropy", 0 <= self.anisotropy < math.inf, "at least 0"),
            ("surviving_initialization", 0 <= self.surviving_initialization <= 1, "between 0 and 1"),
            ("seed", 0 <= self.seed < 2**32, "a number of 32 bits"),
        ):
            if not possible:
                raise BadInput(f"{name} = {getattr(self, name)!r} cannot be simulated", remedy=f"pass {range_words}")

    @property
    def retention(self) -> float:
        """The share of the weights that a step retains: 1 - lr * wd."""
        return 1.0 - self.learning_rate * self.weight_decay

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self)


def simulated_weights(training: SimulatedTraining) -> Iterator[Matrix]:
    """W_0, W_1, W_2, ... without end: the weights before the first step and after each step, each width x width."""
    n = training.width
    fresh = standard_normals(training.seed, 0, n * n).reshape(n, n) / math.sqrt(3 * n)
    weights = training.surviving_initialization * fresh
    step = 0
    while True:
        yield weights
        u, v = gradient_factors(training, step)
        weights = training.retention * weights - training.learning_rate * (u.T @ v) / len(u)
        step += 1


def gradient_factors(training: SimulatedTraining, step: int) -> tuple[Matrix, Matrix]:
    """The rows u_k and v_k, each B*R x width, of the gradient G = U^T V / (B R) that enters in step `step`, from 0."""
    n, count = training.width, training.batch_size * training.uses
    normals = standard_normals(training.seed, n * n + step * 2 * count * n, 2 * count * n).reshape(count, 2, n)
    scaled = normals * (deviations(n, training.anisotropy) * n**-0.25)
    return scaled[:, 0], scaled[:, 1]


def deviations(width: int, anisotropy: float) -> Matrix:
    """d_1 >= ... >= d_width, where d_i^2 is proportional to i^-anisotropy and has mean 1."""
    variances = np.arange(1, width + 1, dtype=np.float64) ** -anisotropy
    return np.asarray(np.sqrt(variances / variances.mean()))


def remembered_strokes(training: SimulatedTraining) -> float:
    """B*R (1 + a^2) / (1 - a^2) with a = 1 - lr*wd: the effective number of equal rank-one updates in the steady state.

    Updates of weight c_j are worth (sum c_j^2)^2 / sum c_j^4 equal ones, with B*R updates of weight a^j for every
    j >= 0. Below the width they limit the rank; far above it they do not. Infinite if nothing is forgotten.
    """
    square = training.retention**2
    count = training.batch_size * training.uses
    return count * (1 + square) / (1 - square) if square < 1 else math.inf


def gaussian_spectra(width: int, anisotropy: float = 0.0) -> Matrix:
    """Spectra of matrices without low-rank structure, each divided by its Frobenius norm.

    Draws of D Z D, with Z of independent standard normals and D of `deviations`: the limit of infinitely many updates
    of this anisotropy. Shape (draws, width), singular values in descending order; narrow matrices vary more and get
    more draws, max(8, 512 // width). Draw m uses the normals from m * width^2 on, of seed 0.
    """
    n, draws = width, max(8, 512 // width)
    scale = deviations(n, anisotropy)
    normals = standard_normals(_REFERENCE_SEED, 0, draws * n * n).reshape(draws, n, n)
    spectra = np.linalg.svd(scale[:, None] * normals * scale, compute_uv=False)
    return np.asarray(spectra / np.linalg.norm(spectra, axis=1, keepdims=True))


def standard_normals(seed: int, start: int, count: int) -> Matrix:
    """The normals `start` to `start + count` of a seed, as the module's docstring specifies them; `start` is even."""
    outputs = _mulberry32(seed, start, count + count % 2)
    radius = np.sqrt(-2.0 * np.log((outputs[0::2] + 1.0) / 2**32))
    angle = 2.0 * np.pi * (outputs[1::2] / 2**32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count]


def _mulberry32(seed: int, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Outputs `start` to `start + count`: the state is a counter, so they can be had without the ones before."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    state = (np.uint64(seed) + index * np.uint64(_INCREMENT)).astype(np.uint32)
    t = (state ^ (state >> np.uint32(15))) * (state | np.uint32(1))
    t ^= t + (t ^ (t >> np.uint32(7))) * (t | np.uint32(61))
    return np.asarray(t ^ (t >> np.uint32(14)))
