"""How one forward of a model uses its layers: how often, and at how many rows or on inputs of which size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.latency import LayerUse
from compressor.model.example_inputs import META, on_meta
from compressor.model.inference import evaluation_mode, forward_call
from compressor.model.opened import Model
from compressor.network import Layer, SeparateExperts


def layer_uses(
    model: Model, layers: Sequence[Layer], inputs: Mapping[str, Tensor], *, device: torch.device
) -> dict[str, LayerUse]:
    """How one forward on `inputs` uses each layer, by name; those that it does not reach are left out.

    It runs on the meta device, so that no weights are read; on `device` where a model looks at values.

    Raises:
        BadInput: the model has experts, which use their layers as the tokens ask for, or it cannot be run on these
            inputs.
    """
    module: Any = model.module if model.architecture is None else model.architecture.module
    if any(isinstance(each, SeparateExperts) for each in module.modules()):
        what = "how often its experts are used depends on the tokens"
        raise BadInput(what, where=model.name, remedy="compress it with `prefer='size'`")
    try:
        with META:
            empty = on_meta(module)
            # Inputs that are floats become those of the model, as when it is run.
            return _recorded(empty, layers, {name: each.to(META) for name, each in inputs.items()}, device=META)
    except Exception:  # whatever the code of a model raises where tensors have no values
        try:
            return _recorded(model.with_separate_experts, layers, inputs, device=device)
        except Exception as error:  # or where they have
            what = f"it cannot be run on example inputs ({type(error).__name__}: {str(error)[:120]})"
            raise BadInput(what, where=model.name, remedy="give `data` or `calibration` that it takes") from error


def scaled(use: LayerUse, count: int) -> LayerUse:
    """The use of a layer by so many examples at once, by that of one."""
    return replace(use, rows=use.rows * count, head_rows=use.head_rows * count, batch=use.batch * count)


@dataclass
class _Seen:
    """What was seen of one layer so far, in all of its calls."""

    layer: Layer
    calls: int = 0
    rows: int = 0
    head_rows: int = 0
    examples: int = 0
    sizes: tuple[tuple[int, ...], tuple[int, ...]] = field(default=((), ()))

    def called(self, input: Tensor, output: Tensor) -> None:
        self.calls += 1
        if "convolution" in self.layer.kind:
            dimensions = len(self.layer.tensor_shape) - 2
            self.examples += input.shape[0] if input.dim() == dimensions + 2 else 1
            self.sizes = tuple(input.shape[-dimensions:]), tuple(output.shape[-dimensions:])
        elif self.layer.kind == "embedding":
            self.rows += input.numel()
        else:
            self.rows += input.numel() // max(1, input.shape[-1])

    def head_called(self, input: Tensor, _: Tensor) -> None:
        self.head_rows += input.numel() // max(1, input.shape[-1])

    def use(self) -> LayerUse:
        calls = max(1, self.calls)
        return LayerUse(
            calls=calls,
            rows=-(-self.rows // calls),
            head_rows=-(-self.head_rows // calls),
            batch=-(-self.examples // calls),
            in_size=self.sizes[0],
            out_size=self.sizes[1],
            bias=self.layer.bias is not None,
        )


def _recorded(
    model: nn.Module, layers: Sequence[Layer], inputs: Mapping[str, Tensor], *, device: torch.device
) -> dict[str, LayerUse]:
    seen = {layer.name: _Seen(layer) for layer in layers}
    with ExitStack() as stack:
        for layer in layers:
            within = _and_around(model, layer.module) if layer.kind == "parameter" else [layer.module]
            for hook, places in (
                (_noting(seen[layer.name].called), [*within, *layer.places]),
                (_noting(seen[layer.name].head_called), [] if layer.head is None else [layer.head]),
            ):
                for module in {id(each): each for each in map(model.get_submodule, places)}.values():
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        with evaluation_mode(device, model):
            forward_call(model, inputs)()
    return {name: each.use() for name, each in seen.items() if each.calls or each.head_rows}


def _and_around(model: nn.Module, name: str) -> list[str]:
    """The names of a module and of those around it, any of which may multiply with its weight."""
    parts = name.split(".") if name else []
    return [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)] or [""]


def _noting(note: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
    """A hook that notes the calls of the first of its modules whose forward ends."""
    first: list[nn.Module] = []

    def hook(module: nn.Module, *called: Any) -> None:
        arguments, named, output = called
        given, made = _first_tensor((*arguments, *named.values())), _first_tensor(output)
        if given is None or made is None:
            return
        if not first:
            first.append(module)
        if module is first[0]:
            note(given, made)

    return hook


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    held = value.values() if isinstance(value, dict) else value
    return next((each for each in held if isinstance(each, Tensor)), None) if isinstance(held, tuple | list) else None
