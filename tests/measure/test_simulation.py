"""The simulated training: the numbers it draws, the recursion it follows, and what that does to the rank."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import BadInput
from compressor.measure import entropy_rank, memory_window
from compressor.measure.simulation import (
    SimulatedTraining,
    deviations,
    gaussian_spectra,
    gradient_factors,
    remembered_strokes,
    simulated_weights,
    standard_normals,
)
from compressor.recipe import TrainingRecipe

TRAINING = SimulatedTraining(width=12, batch_size=2, uses=3, learning_rate=0.3, weight_decay=0.5, anisotropy=0.7)


def weights_after(training: SimulatedTraining, steps: int) -> np.ndarray:
    return next(islice(simulated_weights(training), steps, None))


def mulberry32(seed: int, count: int) -> list[int]:
    """The generator as a loop over its state, in whole numbers."""
    outputs, state, mask = [], seed, 2**32 - 1
    for _ in range(count):
        state = (state + 0x6D2B79F5) & mask
        t = ((state ^ (state >> 15)) * (state | 1)) & mask
        t ^= (t + (((t ^ (t >> 7)) * (t | 61)) & mask)) & mask
        outputs.append(t ^ (t >> 14))
    return outputs


@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 20).map(lambda pairs: 2 * pairs), count=st.integers(0, 30))
def test_normals_are_box_and_mullers_of_mulberry32_from_any_place_on(seed: int, start: int, count: int) -> None:
    outputs = mulberry32(seed, start + count + 1)
    expected = []
    for first, second in zip(outputs[start::2], outputs[start + 1 :: 2], strict=False):
        radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**32)), 2 * math.pi * second / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(standard_normals(seed, start, count), expected[:count], rtol=1e-12, atol=1e-14)


def test_the_counter_of_the_generator_wraps_as_its_state_does() -> None:
    np.testing.assert_array_equal(standard_normals(7, 2**32, 6), standard_normals(7, 0, 6))


def test_normals_have_the_moments_of_a_standard_normal_distribution() -> None:
    z = standard_normals(3, 0, 200_000)
    # Moments 1 to 4 of N(0, 1) are 0, 1, 0, 3; the variances of their estimates are those of x to x^4, over the count.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - moment) < 4 * math.sqrt(variance / z.size)
    assert abs(np.mean(z[::2] * z[1::2])) < 4 / math.sqrt(z.size / 2)


def test_a_run_is_torchs_sgd_on_the_same_gradients() -> None:
    training = replace(TRAINING, surviving_initialization=0.6)
    weights = torch.nn.Parameter(torch.from_numpy(weights_after(training, 0)).clone())
    optimizer = torch.optim.SGD([weights], lr=training.learning_rate, weight_decay=training.weight_decay)
    for step in range(40):
        u, v = gradient_factors(training, step)
        weights.grad = torch.from_numpy(sum(np.outer(*pair) for pair in zip(u, v, strict=True)) / len(u))
        optimizer.step()
    np.testing.assert_allclose(weights.detach().numpy(), weights_after(training, 40), atol=1e-13)


def test_from_zero_the_rank_grows_by_at_most_a_stroke_per_step() -> None:
    training = replace(TRAINING, batch_size=3, uses=1)
    ranks = [np.linalg.matrix_rank(weights) for weights in islice(simulated_weights(training), 6)]
    assert ranks == [0, 3, 6, 9, 12, 12]


def test_all_but_the_share_of_the_window_is_of_the_rank_that_bounds_it() -> None:
    training = SimulatedTraining(width=32, batch_size=1, uses=1, learning_rate=0.3, weight_decay=0.6)
    recipe = TrainingRecipe(optimizer="sgd", momentum=0.0, learning_rate=0.3, weight_decay=0.6, schedule="constant")
    recipe = replace(recipe, batch_size=1)
    window = memory_window(recipe, shape=(32, 32), uses=1, epsilon=0.01)
    n = window.steps
    before, after = (weights_after(training, steps) for steps in (100 - n, 100))
    remembered = after - training.retention**n * before
    assert training.retention**n <= 0.01 < training.retention ** (n - 1)
    assert np.linalg.matrix_rank(remembered) == window.rank_bound < 32
    assert np.linalg.norm(after - remembered) <= 0.01 * np.linalg.norm(before)


def test_the_start_survives_by_its_share_and_changes_nothing_else() -> None:
    fresh, none = (weights_after(replace(TRAINING, surviving_initialization=share), 9) for share in (1.0, 0.0))
    start = weights_after(replace(TRAINING, surviving_initialization=1.0), 0)
    np.testing.assert_allclose(fresh - none, TRAINING.retention**9 * start, atol=1e-14)
    assert np.all(weights_after(TRAINING, 0) == 0)
    # The standard deviation of torch's own initialization, to within three standard errors of each.
    wide = weights_after(replace(TRAINING, width=64, surviving_initialization=1.0), 0)
    torch.manual_seed(0)
    assert np.std(wide) == pytest.approx(torch.nn.Linear(64, 64).weight.std().item(), rel=3 * math.sqrt(2 / 2 / 64**2))


@pytest.mark.parametrize("training", [TRAINING, replace(TRAINING, learning_rate=0.05, weight_decay=0.2, batch_size=5)])
def test_remembered_strokes_are_the_participation_ratio_of_their_weights(training: SimulatedTraining) -> None:
    weights = np.repeat(training.retention ** np.arange(20_000.0), training.batch_size * training.uses)
    assert remembered_strokes(training) == pytest.approx(np.sum(weights**2) ** 2 / np.sum(weights**4), rel=1e-10)
    assert remembered_strokes(replace(training, weight_decay=0.0)) == math.inf


def test_anisotropy_moves_variance_to_the_first_directions_and_adds_none() -> None:
    for anisotropy in (0.0, 0.5, 2.0):
        variances = deviations(24, anisotropy) ** 2
        assert variances.sum() == pytest.approx(24)
        assert np.all(np.diff(variances) <= 0)
        np.testing.assert_allclose(variances / variances[0], np.arange(1, 25) ** -anisotropy)


@pytest.mark.parametrize("width", [8, 64])
def test_the_gaussian_reference_is_that_of_any_gaussian_matrix(width: int) -> None:
    ours = [entropy_rank(spectrum) for spectrum in gaussian_spectra(width)]
    drawn = np.random.default_rng(5).standard_normal((400, width, width))
    others = [entropy_rank(spectrum) for spectrum in np.linalg.svd(drawn, compute_uv=False)]
    assert abs(np.mean(ours) - np.mean(others)) < 4 * np.std(others) / math.sqrt(len(ours))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_few_remembered_strokes_lower_the_participation_ratio_and_plenty_do_not(batch_size: int) -> None:
    n, steps = 16, 40
    training = SimulatedTraining(n, batch_size, 1, learning_rate=0.5, weight_decay=0.5)
    energies, fourths = [], []
    for seed in range(150):
        s = np.linalg.svd(weights_after(replace(training, seed=seed), steps), compute_uv=False)
        energies.append(np.sum(s**2))
        fourths.append(np.sum(s**4))
    # By Wick's theorem, for a sum of c_j u_j v_j^T with independent normal entries of variance 1/sqrt(n):
    # E sum s^2 = n sum c^2 and E sum s^4 = (sum c^2)^2 (2n + 1) + (sum c^4) (n^2 + 2n + 3).
    weights = np.repeat(0.5 * 0.75 ** np.arange(steps), batch_size) / batch_size
    squares, fourth_powers = np.sum(weights**2), np.sum(weights**4)
    for measured, expected in (
        (energies, n * squares),
        (fourths, squares**2 * (2 * n + 1) + fourth_powers * (n**2 + 2 * n + 3)),
    ):
        assert abs(np.mean(measured) - expected) < 4 * np.std(measured) / math.sqrt(len(measured))
    # So the participation ratio of these moments depends on the strokes that are remembered, and on nothing else.
    strokes = remembered_strokes(training)
    ratio = (n * squares) ** 2 / (squares**2 * (2 * n + 1) + fourth_powers * (n**2 + 2 * n + 3))
    assert 1 / ratio == pytest.approx(2 / n + 1 / n**2 + (1 + 2 / n + 3 / n**2) / strokes)


@pytest.mark.slow
def test_at_the_sources_settings_batch_1_is_of_low_rank_for_the_first_steps_only() -> None:
    def mean_rank(training: SimulatedTraining, steps: range) -> float:
        chosen = list(islice(simulated_weights(training), steps.start, steps.stop, steps.step))
        return float(np.mean([entropy_rank(s) for s in np.linalg.svd(chosen, compute_uv=False)]))

    # B = 1, mu = lambda = 0.10 and B = 8, mu = 0.02, lambda = 0.01, where lambda is wd/2, on 8 x 8 matrices from zero.
    one = SimulatedTraining(8, 1, 1, learning_rate=0.10, weight_decay=0.20)
    eight = SimulatedTraining(8, 8, 1, learning_rate=0.02, weight_decay=0.02)
    gaussian = np.mean([entropy_rank(spectrum) for spectrum in gaussian_spectra(8)])

    def after_eight_steps(training: SimulatedTraining) -> float:
        return float(np.mean([mean_rank(replace(training, seed=seed), range(8, 9)) for seed in range(100)]))

    assert after_eight_steps(one) < 0.87 * gaussian
    assert after_eight_steps(eight) > 0.95 * gaussian
    # In the steady state: strokes that are a window of 228 steps apart have next to nothing in common.
    assert 0.95 * gaussian < mean_rank(one, range(228, 12_000, 114)) < gaussian


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 7),
        ("width", 0),
        ("batch_size", 0),
        ("uses", 0),
        ("learning_rate", -0.1),
        ("learning_rate", math.nan),
        ("weight_decay", math.inf),
        ("anisotropy", -1.0),
        ("surviving_initialization", 1.5),
        ("seed", 2**32),
    ],
)
def test_a_run_that_cannot_be_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(BadInput, match=field):
        replace(TRAINING, **{field: value})
