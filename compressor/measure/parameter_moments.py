"""Second moments of the loss gradient of a parameter that a module uses in code of its own.

If a matrix is applied to x and receives g, the gradient on one prediction is a sum of g x^T, and its second moment is
the Fisher information F of the matrix. With independent targets for the predictions, the gradients G of whole batches
give both partial traces of F, E[G G^T] and E[G^T G]. If F is a Kronecker product, as `Moments` assumes too, it is the
product of the two divided by their trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class ParameterMoments:
    """The Fisher information of a parameter as a Kronecker product of `inputs` and `gradients`, in float64.

    For a `d_out x d_in` matrix a change D costs `1/2 tr(S_g D S_x D^T)` of loss per prediction, to second order. The
    numbers of samples say from how many independent vectors, about, each factor was estimated.
    """

    inputs: Tensor
    gradients: Tensor
    input_samples: int
    gradient_samples: int


class ParameterCollector:
    """Accumulates the gradients of parameters over backward passes, and leaves none behind.

    `parameters` maps layer names to a module and the name of its parameter. On exit, gradients and `requires_grad` are
    as they were before.
    """

    def __init__(self, parameters: Mapping[str, tuple[nn.Module, str]]) -> None:
        self._parameters = {name: module._parameters[own] for name, (module, own) in parameters.items()}
        self._sums: dict[str, list[Tensor]] = {}
        self._batches: dict[str, Tensor] = {}
        self._before: list[tuple[Tensor, bool, Tensor | None]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for name, parameter in self._parameters.items():
            assert parameter is not None
            self._before.append((parameter, parameter.requires_grad, parameter.grad))
            parameter.grad = None
            parameter.requires_grad_(True)
            handle = parameter.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, wanted, gradient in self._before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        self._handles, self._before = [], []

    def moments(self, predictions: int) -> dict[str, ParameterMoments]:
        """The moments of every parameter that a gradient reached, over a total number of predictions.

        Raises `BadInput` for gradients that are not finite.
        """
        found = {}
        for name in [each for each in self._parameters if each in self._sums]:
            gradients, inputs = self._sums[name]
            trace = float(gradients.trace())  # no entry of either product is larger
            if not math.isfinite(trace):
                raise BadInput(
                    f"the gradients of {name} are not finite on the calibration data",
                    remedy="use the model in a wider dtype, or leave the layer out with `exclude`",
                )
            if trace <= 0:
                continue
            batches = float(self._batches[name])
            scale = (predictions * trace) ** 0.5
            found[name] = ParameterMoments(
                inputs=inputs / scale,
                gradients=gradients / scale,
                input_samples=max(2, round(batches * _effective(gradients))),
                gradient_samples=max(2, round(batches * _effective(inputs))),
            )
        return found

    def state(self) -> dict[str, Tensor]:
        """What was gathered so far, by names for a file."""
        found = {f"{name}/{place}": each for name, sums in self._sums.items() for place, each in enumerate(sums)}
        return found | {f"{name}/batches": count for name, count in self._batches.items()}

    def taken(self) -> dict[str, Tensor]:
        """What was gathered so far, which begins anew; that of several runs may be added up by names."""
        state = self.state()
        self._sums, self._batches = {}, {}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was gathered before."""
        self._batches = {key.removesuffix("/batches"): state[key] for key in state if key.endswith("/batches")}
        self._sums = {name: [state[f"{name}/0"], state[f"{name}/1"]] for name in self._batches}

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.flatten(1).float()
            parameter.grad = None
            products = [in_float64(gradient @ gradient.T), in_float64(gradient.T @ gradient)]
            before = self._sums.get(name, [torch.zeros_like(each) for each in products])
            self._sums[name] = [a + b for a, b in zip(before, products, strict=True)]
            # What a batch says nothing of is not counted, and whether it does is left on the device until the end.
            reached = (products[0].trace() != 0).double()
            self._batches[name] = self._batches[name] + reached if name in self._batches else reached

        return hook


def _effective(moment: Tensor) -> float:
    """The participation ratio of a moment: how many independent vectors it is worth."""
    return float(moment.trace()) ** 2 / float(moment.square().sum())
