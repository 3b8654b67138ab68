"""Running a model as a measurement needs it: on one device, in evaluation mode, and then left as found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.forms import InitialLayer
from compressor.model.streaming import blocks_of, device_of
from compressor.torch_state import called_as_by_the_caller, same_attributes, scratch_buffers


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device that a name stands for here, an accelerator with its number.

    "auto" is the current CUDA device where there is one, else the CPU. "cuda" and "cuda:N" are CUDA devices; another
    accelerator that PyTorch has here goes by its name, such as "mps", "xpu" or "xpu:1". Raises `BadInput` for any other
    name, and for a device that this machine does not have.
    """
    name = str(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    asked = re.fullmatch(r"([a-z]+)(?::(\d+))?", "cuda" if name == "auto" else name)
    other = _other_accelerator()
    if asked is None or asked[1] not in {"cuda", other}:
        names = "auto, cpu, cuda or cuda:N" if other is None else f"auto, cpu, {other} or {other}:N"
        raise BadInput(f"there is no device {name!r}", option="device", remedy=f"use {names}")
    kind = asked[1]
    if kind == "cuda" and not torch.cuda.is_available():
        what = f"the device {name!r} needs CUDA, which is not available here"
        raise BadInput(what, option="device", remedy="use auto or cpu")
    if kind == "cuda":
        count, current = torch.cuda.device_count(), torch.cuda.current_device()
    else:
        count, current = torch.accelerator.device_count(), torch.accelerator.current_device_index()
    number = int(asked[2]) if asked[2] else current
    if number >= count:
        raise BadInput(
            f"there is no device {name!r}",
            option="device",
            remedy=f"use {kind}:0 to {kind}:{count - 1}, auto or cpu",
        )
    return torch.device(kind, number)


def _other_accelerator() -> str | None:
    """The kind of the accelerator of this machine, None where it is CUDA or there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "cuda" else found.type


@contextmanager
def on_device(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Hold `models` on `device` while the block runs; then they are back in the memory where they were.

    Whatever asks for them there meanwhile, such as `evaluation_mode`, moves nothing. A model that is spread over
    several devices stays where it is. Of one that is streamed, the blocks come to the device when they are read.
    """
    moved = [model for model in models if _home(model) not in {None, device}]
    with _blocks_on(device, *moved), _same_tensors(*moved):
        for model in moved:
            _move(model, device)
        yield


@contextmanager
def evaluation_mode(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Hold `models` on `device`, in evaluation mode and without gradients; then put back what was changed.

    That includes buffers and attributes that a forward changes. A model that is spread over several devices stays where
    it is.
    """
    with same_attributes(*models), on_device(device, *models), scratch_buffers(*models), torch.no_grad():
        for model in models:
            model.eval()
        yield


@contextmanager
def _same_tensors(*models: nn.Module) -> Iterator[None]:
    """Restore parameters and buffers of models that move: the same tensors in the same memory, which may be shared."""
    modules = {module for model in models for module in model.modules()}
    owners = {module: (dict(module._parameters), dict(module._buffers)) for module in modules}
    values = [(parameter, parameter.data, parameter.grad) for model in models for parameter in model.parameters()]
    # Recurrent layers keep a list of their weights beside.
    lists = [(module, module._flat_weights) for module in modules if isinstance(module, nn.RNNBase)]
    try:
        yield
    finally:
        for module, (parameters, buffers) in owners.items():
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for parameter, data, grad in values:
            parameter.data, parameter.grad = data, grad
        for recurrent, weights in lists:
            recurrent._flat_weights = weights


@contextmanager
def _blocks_on(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Read the blocks of streamed models onto a device; none of them is in memory before and after."""
    streamed = [blocks for blocks in map(blocks_of, models) if blocks is not None]
    before = [blocks.device for blocks in streamed]
    for blocks in streamed:
        blocks.come_to(device)
    try:
        yield
    finally:
        for blocks, home in zip(streamed, before, strict=True):
            blocks.come_to(home)


def _move(model: nn.Module, device: torch.device) -> None:
    """Move what a model has in memory."""
    if blocks_of(model) is None:
        model.to(device)
    else:
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]


def _home(model: nn.Module) -> torch.device | None:
    """The device of all of a model's tensors, None where there are several or none."""
    blocks = blocks_of(model)
    if blocks is not None:
        return blocks.device
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point numbers of a model, in which it takes its inputs; None where it has none.

    A layer that is formed from its start and its factors has that of its weight: its factors may be integers, of which
    only the scales, in 16 bits, are floating-point numbers.
    """
    for module in model.modules():
        own = [module.weight] if isinstance(module, InitialLayer) else module.parameters(recurse=False)
        for tensor in own:
            if tensor.is_floating_point():
                return tensor.dtype
    return None


def forward_call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Return a call of `model` on `inputs`, already on its device and, if they are floats, in its dtype.

    A transformers model takes its inputs by keyword, a single one under the model's own `main_input_name`; any other
    module takes one by position, or several by keyword. Raises `BadInput` for keywords that such a module does not
    have.
    """
    device, dtype = device_of(model), dtype_of(model)
    placed = {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    main_input = getattr(model, "main_input_name", None)
    if main_input is None:
        if len(placed) == 1:
            tensor = next(iter(placed.values()))
            return called_as_by_the_caller(partial(model, tensor), device)
        if not placed.keys() <= signature(model.forward).parameters.keys():
            raise BadInput(
                f"{type(model).__name__} does not take what this data has: {', '.join(placed)}",
                remedy="use a model whose forward takes these by name, or data with one input",
            )
    if len(placed) == 1:
        placed = {str(main_input): next(iter(placed.values()))}
    return called_as_by_the_caller(partial(model, **placed), device)


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits that `model` gives for `inputs`, on the model's device.

    Raises `BadInput` when the output is neither a tensor nor something with `logits`.
    """
    output = forward_call(model, inputs)()
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise BadInput(
            f"{type(model).__name__} returns {type(output).__name__}, which has no logits",
            remedy="pass a model with a classification or language-modeling head",
        )
    return logits
