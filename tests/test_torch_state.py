"""What the caller set in PyTorch changes no result, and the caller's modules and generators stay as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.torch_state import caller_defaults, neutral_torch_state, uncompiled
from tests.calibration.tiny_models import TWO_PASSES

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

WIDTH = 16


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta device": lambda: torch.device("meta"),
    "meta as default device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5)
    )


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 8, generator=generator) for _ in range(6)]


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def small() -> compressor.Compression:
    return compressor.compress(
        network(), keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
    )


@pytest.mark.parametrize("name", AMBIENT)
def test_a_calibrated_result_is_the_same_bits_whatever_the_caller_set(name: str, small: compressor.Compression) -> None:
    model, data = network(), batches()
    with AMBIENT[name]():
        found = compressor.compress(
            model, keep=0.5, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16
        )
    assert found.plan == small.plan
    assert found.plan.calibration is not None
    assert found.plan.calibration.refined
    assert found.model is not None
    assert small.model is not None
    assert bits(found.model) == bits(small.model)


@pytest.mark.parametrize("name", AMBIENT)
def test_every_verb_gives_the_same_whatever_the_caller_set(name: str, tmp_path: Path) -> None:
    model, other = network(), network()
    data = tmp_path / "data.npz"
    numpy.savez(data, x=torch.cat(batches()).numpy(), y=numpy.arange(48) % 5)

    def found(folder: Path) -> list[Any]:
        folder.mkdir()
        small = compressor.compress(model, keep=0.5, prefer="size")
        assert small.model is not None
        for source, file in ((model, "a.pt"), (other, "b.pt"), (small.model, "small.pt")):
            torch.save(source.state_dict(), folder / file)
        parts = [folder / "a.pt", folder / "b.pt"]
        compressor.merge(parts, output=folder / "sum.safetensors", mode="sum", factory=network, base=parts[0])
        compressor.restore(folder / "small.pt", output=folder / "dense.safetensors", factory=network)
        measured = compressor.evaluate(small.model, baseline=model, data=data)
        return [
            (measured.baseline, measured.compressed, measured.baseline_loss, measured.compressed_loss),
            small.plan,
            bits(small.model),
            compressor.plan(model, keep=0.5, prefer="size"),
            compressor.inspect(model).to_dict(),
            compressor.diagnose(model, data=data).to_dict(),
            (folder / "sum.safetensors").read_bytes(),
            (folder / "dense.safetensors").read_bytes(),
        ]

    plain = found(tmp_path / "plain")
    with AMBIENT[name]():
        assert found(tmp_path / "ambient") == plain


@pytest.mark.parametrize("name", ["plain", *AMBIENT])
def test_what_the_caller_set_is_set_again_afterwards(name: str) -> None:
    def state() -> list[Any]:
        return [
            torch.get_default_device(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(numpy.random.get_state()),
        ]

    model = network()
    data = [torch.randn(8, 8), torch.randn(8, 8)]
    with AMBIENT.get(name, nullcontext)():
        before = state()
        for failing in (False, True):
            with pytest.raises(ZeroDivisionError) if failing else nullcontext():
                compressor.compress(
                    model,
                    keep=0.5,
                    calibration=random_batches(data, failing=failing),
                    calibration_settings=TWO_PASSES,
                    prefer="size",
                    bits=16,
                )
            assert state() == before


def random_batches(data: list[Tensor], *, failing: bool) -> Iterator[Tensor]:
    for each in data:
        random.random()
        numpy.random.rand()
        torch.rand(1, device="cpu")
        yield each
    if failing:
        raise ZeroDivisionError


def test_the_callers_code_runs_with_the_callers_defaults() -> None:
    with default_dtype(torch.float64), torch.device("meta"), neutral_torch_state():
        assert (torch.get_default_dtype(), torch.empty(0).device.type) == (torch.float32, "cpu")
        with caller_defaults():
            assert (torch.get_default_dtype(), torch.empty(0).device.type) == (torch.float64, "meta")


class Stateful(nn.Module):
    """Makes tensors without naming a dtype or a device, as the code of a float64 simulation does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, WIDTH)
        self.recurrent = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), WIDTH)
        for _ in range(2):
            state = torch.tanh(self.linear(x) + self.recurrent(state))
        return state


def test_a_forward_that_relies_on_the_default_dtype_and_device_is_calibrated() -> None:
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        model = Stateful()
        data = [each.double() for each in batches()]
        small = compressor.compress(
            model, keep=0.5, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16
        ).model
        assert small is not None
        assert small(data[0]).dtype == torch.float64
        with torch.device("meta"):
            again = compressor.compress(
                model, keep=0.5, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16
            ).model
    assert again is not None
    assert bits(again) == bits(small)


def test_calibration_batches_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"), pytest.raises(compressor.BadInput, match="meta device"):
        compressor.compress(
            network(), keep=0.5, calibration=(torch.randn(8, 8) for _ in range(4)), prefer="size", bits=16
        )


class Remembering(nn.Module):
    """Counts its forwards, and follows the mean of its inputs, in evaluation mode too."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full((WIDTH,), 0.5))
        self.calls, self.last = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls += 1
        self.seen = x.detach()
        return x / (1 + self.mean.abs())


def remembering() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDTH), Remembering(), nn.Linear(WIDTH, WIDTH), Remembering(), nn.ReLU())
    model.append(nn.Linear(WIDTH, 5))
    model[2].requires_grad_(False)
    model[0].eval()
    model[0].weight.grad = torch.ones(WIDTH, 8)
    return model


def whole_state(model: nn.Module) -> dict[str, Any]:
    plain = {
        f"{place}.{name}": value
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | Tensor)
    }
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trained = {
        name: (id(each), each.requires_grad, None if each.grad is None else each.grad.clone())
        for name, each in model.named_parameters()
    }
    return {"plain": plain, "tensors": tensors, "trained": trained, "buffers": dict(model.named_buffers())}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_no_verb_changes_the_callers_module(tmp_path: Path) -> None:
    model, data = remembering(), tmp_path / "data.npz"
    numpy.savez(data, x=torch.cat(batches()).numpy(), y=numpy.arange(48) % 5)
    before = whole_state(model)
    for verb in (
        lambda: compressor.compress(
            model, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, data=data, prefer="size", bits=16
        ),
        lambda: compressor.compress(
            model,
            max_drop=1.0,
            calibration=batches(),
            calibration_settings=TWO_PASSES,
            data=data,
            prefer="size",
            bits=16,
        ),
        lambda: compressor.plan(
            model, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
        ),
        lambda: compressor.inspect(model),
        lambda: compressor.evaluate(model, data=data),
        lambda: compressor.diagnose(model, data=data),
    ):
        verb()
        assert_same(before, whole_state(model))


def test_the_compressed_modules_buffers_are_the_originals() -> None:
    model = remembering()
    small = compressor.compress(
        model, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
    ).model
    assert small is not None
    own = dict(small.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(own[name], buffer)


def test_a_module_that_changes_its_buffers_is_calibrated_as_the_same_function_throughout() -> None:
    """Keeping everything loses nothing: the dense model does not drift away from itself."""

    class Frozen(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            moved = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x / (1 + moved.abs())

    drifting, still = remembering(), remembering()
    for place in (1, 3):
        still[place] = Frozen()  # type: ignore[index]
    losses = []
    for model in (drifting, still):
        calibration = compressor.compress(
            model, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
        ).plan.calibration
        assert calibration is not None
        losses.append(calibration.holdout_loss)
    assert losses[0] == losses[1]


def test_a_compiled_module_is_compressed_as_the_module_that_was_compiled(
    small: compressor.Compression, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = torch.compile(network())
    found = compressor.compress(
        compiled, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
    )
    assert found.plan == small.plan
    assert found.model is not None
    assert small.model is not None
    assert bits(found.model) == bits(small.model)
    assert "compile what is returned anew" in caplog.text


def test_compiled_parts_of_a_module_are_compressed(small: compressor.Compression) -> None:
    model = network()
    model[2] = torch.compile(model[2])  # type: ignore[index]
    before = dict(model.named_modules())
    found = compressor.compress(
        model, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
    )
    assert dict(model.named_modules()) == before
    assert found.plan == small.plan
    assert found.model is not None
    assert small.model is not None
    assert bits(found.model) == bits(small.model)
    model.compile()
    again = compressor.compress(
        model, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16
    )
    assert again.plan == small.plan


def test_a_module_that_is_not_compiled_is_itself() -> None:
    model = network()
    assert uncompiled(model) is model
    assert uncompiled("folder") == "folder"


def test_the_precision_of_matrix_products_is_the_highest_and_then_the_callers() -> None:
    before = torch.get_float32_matmul_precision()
    seen = []
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    try:
        torch.set_float32_matmul_precision("medium")
        compressor.compress(model, keep=0.5, calibration=[torch.randn(8, 32)] * 2, prefer="size", bits=16)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
