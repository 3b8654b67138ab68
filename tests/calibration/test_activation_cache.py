"""What calibration leaves on disk is gone when it is done, and one seed gives one result."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor import compress
from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.examples import PARTS
from compressor.factorize import Decomposition, Metric, TiedMetric
from compressor.measure.moments import PackedSum, oas_shrinkage
from tests.calibration.tiny_models import TWO_PASSES, calibrated, inputs_for, transformer

CPU = torch.device("cpu")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_is_kept_is_found_again_until_it_is_replaced(temporary: Path) -> None:
    cache = ActivationCache(CPU)
    first, second = torch.randn(3, 4), torch.randn(5).to(torch.bfloat16)
    states = cache.dense("fit", 1)
    states.write(0, (first, second))
    found = states.read(0)
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], second)
    cache.dense("fit", 1).write(0, (first.T,))
    assert torch.equal(states.read(0)[0], first.T)
    assert torch.equal(found[0], first)  # what was read stays what it was
    del states
    assert len(list(temporary.iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del cache
    assert not list(temporary.iterdir())


@pytest.mark.usefixtures("temporary")
def test_decompositions_are_kept_by_layer_in_their_own_precision() -> None:
    kept = ActivationCache(CPU).decompositions()
    assert not kept.has("a")
    for name, dtype in (("a", torch.float32), ("b", torch.float64)):
        kept.put(name, Decomposition(np.arange(3.0)[::-1], torch.randn(3, 3, dtype=torch.float64)))
        last = Decomposition(np.array([2.0, 1.0, np.pi]), torch.randn(3, 3, dtype=dtype))
        kept.put(name, last)
        found = kept.get(name)
        np.testing.assert_array_equal(found.values, last.values)
        assert found.basis.dtype == dtype
        assert torch.equal(found.basis, last.basis)
        assert kept.has(name)


@pytest.mark.usefixtures("temporary")
def test_kinds_parts_segments_and_batches_are_kept_apart() -> None:
    cache = ActivationCache(CPU)
    kinds = [cache.dense(part, segment) for part in PARTS for segment in (1, 11)]
    kinds += [cache.compressed(part, walk, 1) for part in PARTS for walk in ("a", "b")] + [cache.gradients(0)]
    places = [(kind, batch) for kind in kinds for batch in (0, 1, 10)]
    for kind, batch in places:
        with pytest.raises(KeyError):
            kind.read(batch)
    for number, (kind, batch) in enumerate(places):
        kind.write(batch, [torch.full((1,), float(place + number)) for place in range(12)])
    cache.write_boundary(1, [torch.full((1, 1), -1.0)])
    assert [each.item() for each in cache.boundary(1)] == [-1.0]
    for number, (kind, batch) in enumerate(places):
        assert [each.item() for each in kind.read(batch)] == [place + number for place in range(12)]


@pytest.mark.usefixtures("temporary")
def test_metrics_are_read_back_as_they_were() -> None:
    metrics = ActivationCache(CPU).metrics()
    plain = Metric(torch.eye(3), torch.eye(2), torch.ones(3))
    tied = TiedMetric(Metric(torch.rand(5), torch.eye(2)), Metric(torch.rand(5), 2 * torch.eye(2)))
    names = ("a", "a/b", "c")
    for name in names:
        metrics.put(name, plain)
    metrics.put("a/b", tied)
    assert list(metrics) == list(names)
    assert len(metrics) == 3
    assert all(torch.equal(one, other) for one, other in zip(tensors(metrics["a"]), tensors(plain), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(tensors(metrics["a/b"]), tensors(tied), strict=True))
    with pytest.raises(KeyError):
        metrics["d"]


def tensors(metric: Metric | TiedMetric) -> list[torch.Tensor]:
    parts = [metric] if isinstance(metric, Metric) else [metric.lookup, metric.head]
    found = [tensor for part in parts for tensor in (part.inputs, part.gradients, part.mean)]
    return [each for each in found if each is not None]


def compressed(progress: Callable[..., None]) -> None:
    """Compress a small model in two passes over several batches."""
    data = [inputs_for("llama", 4) for _ in range(4)]
    compress(
        transformer("llama"),
        keep=0.4,
        calibration=data,
        calibration_settings=TWO_PASSES,
        progress=progress,
        prefer="size",
        bits=16,
    )


@pytest.mark.slow
def test_nothing_is_left_on_disk_after_compress(temporary: Path) -> None:
    seen: dict[str, int] = {}

    def look(stage: str, *_: int) -> None:
        seen[stage] = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())

    compressed(look)
    assert seen["calibrate"] > 0
    assert seen["compensate"] > 0
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("stage", ["calibrate", "compensate"])
def test_nothing_is_left_on_disk_after_a_failure(temporary: Path, stage: str) -> None:
    def fail(reached: str, *_: int) -> None:
        if reached == stage:
            assert list(temporary.iterdir())
            raise KeyboardInterrupt

    try:
        compressed(fail)
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("it did not get there")
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_seed_gives_one_result_whatever_ran_before() -> None:
    data = [inputs_for("llama", 4) for _ in range(4)]
    state = torch.get_rng_state()
    found = []
    for seed in (1, 2, 1):
        network = transformer("llama")
        model = compress(
            network, keep=0.4, calibration=data, calibration_settings=TWO_PASSES, seed=seed, prefer="size", bits=16
        ).model
        assert model is not None
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        torch.randn(3)  # the global generator has no part in it
    first, other, again = found
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() != other.keys() or not all(torch.equal(first[n], other[n]) for n in first)
    torch.set_rng_state(state)


@pytest.mark.slow
def test_bfloat16_stays_bfloat16() -> None:
    model = transformer("llama").to(torch.bfloat16)
    data = [inputs_for("llama", 8) for _ in range(4)]
    report = compress(model, keep=0.6, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16)
    assert report.model is not None
    assert report.plan.calibration is not None
    assert 0 < report.plan.calibration.holdout_loss < 10
    assert all(t.dtype in {torch.bfloat16, torch.int32} for t in report.model.parameters())
    with torch.no_grad():
        assert torch.isfinite(report.model(**data[0]).logits).all()


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("scale", [1.0, 1e-60])
def test_metrics_are_kept_to_the_precision_of_float32_whatever_their_scale(scale: float) -> None:
    kept = ActivationCache(CPU).metrics()
    x, g = torch.randn(5, 60, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    inputs, gradients = oas_shrinkage(scale * x.T @ x / 5, 5), oas_shrinkage(scale * g.T @ g / 40, 40)
    kept.put("a", Metric(inputs, gradients, x[0]))
    kept.put("b", Metric(inputs, gradients[0]), inputs_of="a")
    for name, metric in (("a", Metric(inputs, gradients, x[0])), ("b", Metric(inputs, gradients[0]))):
        found = kept.get(name)
        assert isinstance(found, Metric)
        for one, other in ((found.inputs, metric.inputs), (found.gradients, metric.gradients)):
            assert one.dtype == torch.float64
            assert float((one - other).norm()) <= 2**-24 * float(other.norm())
        # Of five examples in sixty dimensions, most eigenvalues are what the shrinkage left.
        torch.linalg.cholesky(found.inputs)
        assert (found.mean is None) == (metric.mean is None)
        assert found.mean is None or torch.equal(found.mean, x[0])


@pytest.mark.usefixtures("temporary")
def test_layers_that_share_their_inputs_keep_one_moment_of_them() -> None:
    calibration = calibrated(transformer("llama").eval(), [inputs_for("llama", 4)])
    read = calibration.cache.moments.read
    own = {name: any(key.startswith("inputs.") for key in read(f"metric/{name}")) for name in calibration.metrics}
    block = {name.removeprefix("model.layers.1."): kept for name, kept in own.items() if "layers.1." in name}
    shared = [name for name, kept in block.items() if not kept]
    assert len(shared) == 3  # of q, k, and v all but one, of gate and up one
    q, k = (calibration.metrics[f"model.layers.1.self_attn.{name}_proj"] for name in "qk")
    assert torch.equal(q.inputs, k.inputs)


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_sums_of_inputs_are_kept_to_the_precision_of_float32_about_their_mean(offset: float) -> None:
    cache, size = ActivationCache(CPU), 40
    vectors = {name: torch.randn(90, size, dtype=torch.float64) + offset for name in ("a", "b c")}
    sums = {frozenset({name, f"{name}.x"}): PackedSum.of(x.T @ x, x.sum(0), len(x)) for name, x in vectors.items()}
    cache.write_inputs(3, sums)
    found = cache.inputs(3)
    assert found.keys() == sums.keys()
    for names, kept in found.items():
        made = sums[names]
        assert kept.count == made.count
        assert torch.equal(kept.total, made.total)
        covariance = made.product - torch.outer(made.total, made.total) / made.count
        assert (
            float((kept.product - made.product).norm()) <= 1e-7 * float(covariance.norm()) + 1e-15 * offset**2 * 90**2
        )
    files = cache.journal.read("inputs-3").values()
    assert sum(each.nbytes for each in files) <= 2 * (4 * size * (size + 1) // 2 + 8 * size + 16)
