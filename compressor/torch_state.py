"""PyTorch's process-wide state: neutral while a verb works, and the caller's where the caller's code runs."""

from __future__ import annotations

import copy
import functools
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

AnyModel = TypeVar("AnyModel")

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Defaults:
    """The caller's default device and dtype."""

    device: torch.device
    dtype: torch.dtype


_caller: ContextVar[_Defaults | None] = ContextVar("caller", default=None)


@contextmanager
def neutral_torch_state() -> Iterator[None]:
    """Set what the caller may have changed to PyTorch's own defaults, and then restore it.

    These are the default device and dtype, the precision of matrix products, autocast, inference mode and gradients.
    Compiled code runs eagerly, because it would not see the hooks that layers are watched with. The random number
    generators end as they began.
    """
    if _caller.get() is not None:  # one verb calls another
        yield
        return
    token = _caller.set(_current_defaults())
    try:
        with ExitStack() as stack:
            stack.enter_context(_same_random_numbers())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in _autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(_defaults(_Defaults(CPU, torch.float32)))
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            if "torch._dynamo" in sys.modules:  # without it nothing is compiled, and to import it takes a second
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        _caller.reset(token)


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, which Apple's do not."""
    if device.type in {"cpu", "cuda", "meta"}:
        return True
    try:
        torch.eye(2, dtype=torch.float64, device=device) @ torch.ones(2, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Where what is on a device is computed in float64: there, or on the CPU."""
    return device if has_float64(device) else CPU


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its device if that has float64, and else on the CPU."""
    return tensor.to(float64_device(tensor.device)).to(torch.float64)


def sum_in_float64(rows: Tensor) -> Tensor:
    """The sum of some rows in float64, likewise."""
    return rows.sum(0, dtype=torch.float64) if has_float64(rows.device) else in_float64(rows).sum(0)


def brought_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor on a device; one in float64 where that is computed with. Nothing waits for a copy from pinned memory."""
    where = float64_device(device) if tensor.dtype == torch.float64 else device
    return tensor.to(where, non_blocking=where.type == "cuda" and tensor.is_pinned())


def synchronize(device: torch.device) -> None:
    """Wait until all that was launched on a device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def all_answers(flags: Sequence[Tensor]) -> list[bool]:
    """The values of boolean numbers, for which every device is waited for once."""
    found: dict[int, bool] = {}
    for device in dict.fromkeys(flag.device for flag in flags):
        places = [place for place, flag in enumerate(flags) if flag.device == device]
        found |= dict(zip(places, torch.stack([flags[place] for place in places]).tolist(), strict=True))
    return [found[place] for place in range(len(flags))]


@contextmanager
def caller_defaults() -> Iterator[None]:
    """Run the caller's own code with the caller's default device and dtype."""
    with _defaults(_caller.get() or _current_defaults()):
        yield


def called_as_by_the_caller(call: Callable[[], Any], device: torch.device | None) -> Callable[[], Any]:
    """A call of a model on `device` as the caller would make it.

    The default dtype is the caller's. Where the caller set a default device, it is that of the model.
    """
    defaults = _caller.get()
    if defaults is None or defaults == _Defaults(CPU, torch.float32):
        return call
    own = defaults if defaults.device == CPU or device is None else _Defaults(device, defaults.dtype)

    def run() -> Any:
        with _defaults(own):
            return call()

    return run


def _current_defaults() -> _Defaults:
    return _Defaults(torch.get_default_device(), torch.get_default_dtype())


@contextmanager
def _defaults(defaults: _Defaults) -> Iterator[None]:
    """Set the default device and dtype while the block runs."""
    dtype = torch.get_default_dtype()
    # A default device costs time in every operation, so it is only set where there is another.
    same = torch.get_default_device() == defaults.device
    torch.set_default_dtype(defaults.dtype)
    try:
        with nullcontext() if same else defaults.device:
            yield
    finally:
        torch.set_default_dtype(dtype)


def _autocast_devices() -> list[str]:
    """The device types on which autocast is on."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", "cuda", *(() if accelerator is None else (accelerator.type,))}
    return [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restore the state of the global generators of Python, NumPy and PyTorch."""
    python, legacy = random.getstate(), np.random.get_state()
    kind = (torch.accelerator.current_accelerator() or torch.device("cuda")).type
    module = torch.get_device_module(kind)
    # One that is not in use yet is not started for this. Apple's has no numbers of its own for each device.
    devices = range(module.device_count()) if kind != "mps" and module.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def uncompiled(model: AnyModel) -> AnyModel | nn.Module:
    """The module that `torch.compile` wrapped, with none compiled inside it; anything else as it is.

    Where compiled modules lie inside, it is a copy that shares the parameters and buffers.
    """
    if not isinstance(model, nn.Module) or "torch._dynamo" not in sys.modules:
        return model
    from torch._dynamo.eval_frame import OptimizedModule

    if not any(isinstance(module, OptimizedModule) for module in model.modules()):
        return model
    logger.warning("%s is compiled: the plain module is used; compile what is returned anew", type(model).__name__)
    found: nn.Module = model
    while isinstance(found, OptimizedModule):
        found = found._orig_mod
    inner = [module for module in found.modules() if isinstance(module, OptimizedModule)]
    if not inner:
        return found
    same: dict[int, Any] = {id(tensor): tensor for tensor in chain(found.parameters(), found.buffers())}
    for module in reversed(inner):  # those inside others first
        same[id(module)] = copy.deepcopy(module._orig_mod, same)
    return copy.deepcopy(found, same)


@contextmanager
def scratch_buffers(*models: nn.Module) -> Iterator[None]:
    """Let the models work on copies of their buffers, such as counters and running statistics."""
    buffers = {
        module: dict(module._buffers) for model in models for module in model.modules() if len(module._buffers) > 0
    }
    copies: dict[int, Tensor] = {}
    for module, own in buffers.items():
        for name, buffer in own.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        yield
    finally:
        for module, own in buffers.items():
            module._buffers.clear()
            module._buffers.update(own)


@contextmanager
def same_attributes(*models: nn.Module) -> Iterator[None]:
    """Restore numbers, words and tensors that forwards leave in plain attributes, and the training flags."""
    attributes = {module: _plain_attributes(module) for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, plain in attributes.items():
            for name in _plain_attributes(module).keys() - plain.keys():
                delattr(module, name)
            vars(module).update(plain)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str, Tensor, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
