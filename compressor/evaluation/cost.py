"""The cost of storing and running a model: parameters, bytes, multiply-accumulates, memory, and latency."""

from __future__ import annotations

import resource
import statistics
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from compressor.forms.quantized_layers import QuantizedWeight
from compressor.free_memory import numbers_in
from compressor.freed_memory import freed_memory
from compressor.latency import DeviceProfile
from compressor.model import evaluation_mode, resolve_device
from compressor.model.inference import forward_call
from compressor.torch_state import synchronize

# Runs a call of a model on a device, and says how many seconds that took.
Timer = Callable[[nn.Module, Callable[[], Any], torch.device], float]


def forward_seconds(model: nn.Module, call: Callable[[], Any], device: torch.device) -> float:
    """The seconds of a call, with all that it launches.

    With a single thread on a CPU by its own clock, which stands still while other processes run; else by that of the
    wall.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize(device)
    began = clock()
    call()
    synchronize(device)
    return clock() - began


@dataclass(frozen=True)
class TimingSettings:
    """How a forward pass is timed, and how much slower than asked for it may be.

    It is repeated until it took long enough, between the fewest and the most repeats.

    Example:
        >>> compressor.evaluate("small/", data="test.jsonl", timing_settings=compressor.TimingSettings(most_repeats=10))
    """

    batch: tuple[int, ...] = (1, 32)
    """Batch sizes that are timed; `batch`, if given, takes precedence."""

    warm_ups: int = 3
    """Forwards of each model before the timing, which allocate memory and choose kernels."""

    fewest_repeats: int = 7
    """Timed forwards of each model at least: a median of fewer is not steady."""

    most_repeats: int = 100
    """Timed forwards of each model at most."""

    enough_seconds: float = 3.0
    """Seconds of timing after which, from the fewest repeats on, no further repeat is begun."""

    layer_seconds: float = 4.0
    """Seconds in which single layers are timed beside their pairs, all together, where speed is asked for."""

    gate_seconds: float = 1.0
    """Seconds of timing for each workload, where what a whole model takes decides whether it is good enough."""

    most_corrections: int = 3
    """How often a layer whose pair was measured to be slower than dense gets another pair, before it stays dense."""

    most_memory: int | None = None
    """Bytes that a model and its compressed copy may take together to be timed; None for what is free."""

    longest_forward: float = 2.0
    """Predicted seconds of a forward beyond which a whole model is not timed before and after it is compressed."""

    probed_ratio: float = 0.5
    """Predicted latency of the plan by which is found out how much of the model's time its layers take."""

    margin: float = 0.03
    """Share by which a measured ratio to the dense model may exceed the one that is allowed."""

    profile: DeviceProfile | None = None
    """What is known of the device at hand, in place of what is measured and kept in a file."""

    timer: Timer = forward_seconds
    """What times a call of a model on a device."""


TIMING = TimingSettings()


@dataclass(frozen=True)
class Cost:
    """The cost of one model: stored numbers and their bytes, and multiply-accumulates and peak memory of a run.

    `macs` is of one example, `peak_memory_bytes` of one batch (see `count_macs` and `measure_peak_memory`); both are
    None where the model was not run on inputs that are known.
    """

    parameters: int
    bytes: int
    macs: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Latency:
    """Time of one forward on one batch, in seconds; without a baseline its time and the ratio are None.

    `baseline_seconds` and `compressed_seconds` are medians; `ratio` is the median of compressed over baseline
    pair by pair, so that a change in the machine's load cancels: below 1 is faster.
    """

    batch_size: int
    baseline_seconds: float | None
    compressed_seconds: float
    ratio: float | None
    repeats: int


@dataclass(frozen=True)
class TimedWorkload:
    """A model timed beside the dense one in a workload, such as `decode, batch 1`."""

    workload: str
    latency: Latency

    @property
    def ratio(self) -> float:
        """Its time over that of the dense model."""
        assert self.latency.ratio is not None
        return self.latency.ratio

    def to_dict(self) -> dict[str, Any]:
        return {"workload": self.workload, **asdict(self.latency)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """What `to_dict` made a document of."""
        known = dict(document)
        return cls(known.pop("workload"), Latency(**known))


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield each tensor that a checkpoint of `model` must hold, tied ones once.

    These are the parameters and the persistent buffers: running statistics, the row order of a pivoted pair.
    """
    seen: set[int] = set()
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value


def count_parameters(model: nn.Module) -> int:
    """Count every number that a checkpoint of `model` must hold, tied ones once, buffers included.

    A quantized number counts as one, and its scale as none.
    """
    quantized = [each for each in model.modules() if isinstance(each, QuantizedWeight)]
    packed = {id(tensor) for each in quantized for tensor in each.buffers(recurse=False)}
    others = sum(tensor.numel() for tensor in stored_tensors(model) if id(tensor) not in packed)
    return others + sum(each.rows * each.columns for each in quantized)


def count_bytes(model: nn.Module) -> int:
    """Count the bytes of every tensor that a checkpoint of `model` must hold, without any file's header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model))


def count_macs(model: nn.Module, inputs: Mapping[str, Tensor], *, device: str | torch.device = "auto") -> int:
    """Count the multiply-accumulates of one forward pass of `model` on `inputs`, from the operators that it runs.

    Matrix products, convolutions and both products of attention count (causal attention as if it were full);
    element-wise arithmetic and the reordering of rows do not. This is half of the count of PyTorch's
    `FlopCounterMode`, with every fused kernel that it does not know (attention, experts and, on the CPU,
    recurrent layers) switched off.
    """
    with evaluation_mode(resolve_device(device), model), _unfused_kernels(), _eager_experts(model):
        call = forward_call(model, inputs)
        with FlopCounterMode(display=False, custom_mapping=MATRIX_VECTOR_PRODUCTS) as counter:
            call()
    return int(counter.get_total_flops()) // 2


def measure_peak_memory(model: nn.Module, inputs: Mapping[str, Tensor], *, device: str | torch.device = "auto") -> int:
    """Return the peak bytes of weights, inputs and activations while `model` runs once on `inputs`.

    On an accelerator, activations are measured by PyTorch's allocator, with the workspaces of kernels. The CPU's
    allocator keeps no record, so there it is the peak of the tensors that are alive between operations: exact and
    reproducible, but without the memory that a kernel uses inside.
    """
    device = resolve_device(device)
    with evaluation_mode(device, model):
        weights = _storage_bytes(chain(model.parameters(), model.buffers()))
        if device.type != "cpu":
            synchronize(device)
            torch.accelerator.reset_peak_memory_stats(device)
            before = torch.accelerator.memory_allocated(device)
            forward_call(model, inputs)()
            synchronize(device)
            return weights + torch.accelerator.max_memory_allocated(device) - before
        call = forward_call(model, inputs)
        tensors = _LiveTensors(chain(model.parameters(), model.buffers(), inputs.values()))
        with tensors:
            call()
        return weights + _storage_bytes(inputs.values()) + tensors.peak


def measure_cost(
    model: nn.Module,
    example: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    device: str | torch.device = "auto",
) -> Cost:
    """Measure what `model` costs: its multiply-accumulates on one `example`, its peak memory on a `batch`."""
    return Cost(
        parameters=count_parameters(model),
        bytes=count_bytes(model),
        macs=count_macs(model, example, device=device),
        peak_memory_bytes=measure_peak_memory(model, batch, device=device),
    )


def stored_cost(model: nn.Module) -> Cost:
    """The cost of storing `model`, where it cannot be run because its inputs are unknown."""
    return Cost(count_parameters(model), count_bytes(model), None, None)


def measure_latency(
    compressed: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    baseline: nn.Module | None = None,
    device: str | torch.device = "auto",
    timing: TimingSettings = TIMING,
) -> Latency:
    """Time forward passes on `inputs` after a warm-up; with a `baseline`, the two models in turn.

    Each repeat runs both models, one right after the other, and the next repeat in the other order.
    """
    device = resolve_device(device)
    models = [compressed] if baseline is None else [compressed, baseline]
    with evaluation_mode(device, *models):
        calls = [forward_call(model, inputs) for model in models]
        for call in calls * timing.warm_ups:
            call()
        repeats: list[list[float]] = []
        pairs = list(zip(models, calls, strict=True))
        while len(repeats) < timing.fewest_repeats or (
            len(repeats) < timing.most_repeats and sum(map(sum, repeats)) < timing.enough_seconds
        ):
            freed_memory().give_back()
            order = 1 if len(repeats) % 2 == 0 else -1
            repeats.append([timing.timer(model, call, device) for model, call in pairs[::order]][::order])
    return Latency(
        batch_size=len(next(iter(inputs.values()))),
        baseline_seconds=None if baseline is None else statistics.median(times[1] for times in repeats),
        compressed_seconds=statistics.median(times[0] for times in repeats),
        ratio=None if baseline is None else statistics.median(times[0] / times[1] for times in repeats),
        repeats=len(repeats),
    )


def _matrix_vector_flops(matrix: torch.Size, _vector: torch.Size, **_: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector_flops(_added: torch.Size, matrix: torch.Size, _vector: torch.Size, **_: Any) -> int:
    return 2 * matrix.numel()


# `FlopCounterMode` does not count products of a matrix and a vector.
MATRIX_VECTOR_PRODUCTS: dict[Any, Any] = {
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.addmv: _added_matrix_vector_flops,
}


@contextmanager
def _unfused_kernels() -> Iterator[None]:
    """Run attention and recurrent layers as plain matrix products."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            # entering these flags warns, about Intel GPUs, on machines that have none
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Run the experts of transformers' mixtures one by one."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    own = [(config, config._experts_implementation) for config in configs if hasattr(config, "_experts_implementation")]
    for config, _ in own:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in reversed(own):
            config._experts_implementation = implementation


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the memory of the tensors that operations create: bytes alive now, and the peak."""

    def __init__(self, existing: Iterator[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.followed = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.alive = 0
        self.peak = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self.followed:
            return
        self.followed.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, address, size).atexit = False

    def _release(self, address: int, size: int) -> None:
        self.followed.discard(address)
        self.alive -= size


def _storage_bytes(tensors: Any) -> int:
    """Bytes that `tensors` hold together, memory that they share counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def resident_memory(system: Path = Path("/proc")) -> int:
    """The resident size of this process now, in bytes; the largest so far where the system does not say."""
    kilobytes = numbers_in(system / "self" / "status").get("VmRSS:")
    return process_memory() if kilobytes is None else 1024 * kilobytes


def process_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
