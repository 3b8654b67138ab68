"""Second moments of a layer's inputs and of the loss gradient at its outputs, from a little calibration data.

Targets are sampled from the model itself, so that the gradients' moment is a factor of the true Fisher information and
not of its empirical imitation (Kunstner, Balles and Hennig, NeurIPS 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput


@dataclass(frozen=True)
class Moments:
    """`inputs` is E[x x^T] (`d_in x d_in`) and `gradients` E[g g^T] (`d_out x d_out`) of one layer, in float64.

    The expectations are over `positions`: the vectors that the layer was applied to. `uses` is how many of them there
    were for each of the model's predictions, so that `uses / 2 * tr(S_g D S_x D^T)` is the loss per prediction that a
    change D of the matrix costs to second order.
    """

    inputs: Tensor
    gradients: Tensor
    positions: int
    uses: float


@dataclass(frozen=True)
class CalibrationPass:
    """One batch: `logits` runs the model on it, `(..., classes)`; `mask` of `(batch, length)` is false on padding."""

    logits: Callable[[], Tensor]
    mask: Tensor | None = None


def collect_moments(
    layers: Mapping[str, nn.Module], passes: Iterable[CalibrationPass], *, seed: int = 0
) -> dict[str, Moments | None]:
    """Moments of every layer over all passes; None for a layer that no pass went through.

    `layers` are linear layers, transformers' `Conv1D`, or ungrouped convolutions inside one model; the model is to be
    in evaluation mode. Layers that are given the same tensor share its moment. Raises `BadInput` when there is no pass,
    or when activations or gradients are not finite, naming the layer.
    """
    collector = _Collector(layers)
    generator: torch.Generator | None = None
    predictions = 0
    with torch.enable_grad(), collector:
        for each in passes:
            collector.begin(each.mask)
            logits = kept_predictions(each.logits(), each.mask).float()
            if generator is None:
                generator = torch.Generator(logits.device).manual_seed(seed)
            targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            if not torch.isfinite(loss):
                raise BadInput(
                    "the model's own loss on the calibration data is not finite",
                    remedy="use the model in a wider dtype, or other data",
                )
            if loss.requires_grad:  # else the model reached none of the layers
                loss.backward()  # type: ignore[no-untyped-call]
            predictions += targets.numel()
    if not predictions:
        raise BadInput("the calibration data yields nothing", remedy="give data with at least one batch")
    return collector.moments(predictions)


class _Collector:
    """Hooks on the layers that add up the moments while the model runs forwards and backwards."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._inputs_seen: dict[str, int] = {}
        self._positions: dict[str, int] = {}
        # One product for all layers that see one tensor in one state as the same vectors.
        self._products: dict[tuple[int, int, Hashable], tuple[Tensor, Tensor, int]] = {}
        self._mask: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._products.clear()

    def begin(self, mask: Tensor | None) -> None:
        """Start a pass: no tensor of it has been seen yet."""
        self._mask = mask
        self._products.clear()

    def moments(self, predictions: int) -> dict[str, Moments | None]:
        """The means of what was added up."""
        found: dict[str, Moments | None] = {}
        for name in self._layers:
            if name not in self._gradients:
                found[name] = None
                continue
            positions = self._positions[name]
            inputs = self._inputs[name] / self._inputs_seen[name]
            found[name] = Moments(inputs, self._gradients[name] / positions, positions, positions / predictions)
        return found

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            x: Tensor = arguments[0] if arguments else next(iter(named.values()))
            key = (id(x), x._version, _patches(layer))
            if key not in self._products:
                vectors = self._kept(_input_vectors(layer, x.detach()), x)
                self._products[key] = (x, self._product(vectors, name, "activations"), vectors.shape[0])
            _, product, count = self._products[key]
            self._inputs[name] = self._inputs[name] + product if name in self._inputs else product
            self._inputs_seen[name] = self._inputs_seen.get(name, 0) + count
            leaf = not output.requires_grad
            if leaf:
                output.requires_grad_(True)
            output.register_hook(partial(self._backward, name, layer))  # type: ignore[no-untyped-call]
            # What follows may work in place, which a leaf does not allow.
            return output.clone() if leaf else None

        return hook

    def _backward(self, name: str, layer: nn.Module, gradient: Tensor) -> None:
        vectors = self._kept(_output_vectors(layer, gradient), gradient)
        self._positions[name] = self._positions.get(name, 0) + vectors.shape[0]
        product = self._product(vectors, name, "gradients")
        self._gradients[name] = self._gradients[name] + product if name in self._gradients else product

    def _kept(self, vectors: Tensor, tensor: Tensor) -> Tensor:
        """The vectors that are not padding."""
        mask = self._mask
        if mask is None or tensor.dim() != 3 or tensor.shape[:2] != mask.shape:
            return vectors
        return vectors[mask.flatten().to(device=vectors.device, dtype=torch.bool)]

    @staticmethod
    def _product(vectors: Tensor, name: str, what: str) -> Tensor:
        vectors = vectors.float()
        product = (vectors.T @ vectors).to(torch.float64)
        if not torch.isfinite(product).all():
            raise BadInput(
                f"the {what} of layer {name} are not finite on the calibration data",
                remedy="use the model in a wider dtype, or leave the layer out with --exclude",
            )
        return product


def kept_predictions(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits as one row per prediction, `(predictions, classes)`, without those at padding."""
    if mask is None or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits.flatten(0, -2)
    return logits[mask.to(device=logits.device, dtype=torch.bool)]


def _patches(layer: nn.Module) -> Hashable:
    """What two layers must have in common to see one input as the same vectors."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    return (layer.kernel_size, layer.stride, str(layer.padding), layer.dilation, layer.padding_mode)


def _input_vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer's matrix is applied to, one vector a row: the last dimension, or a convolution's patches."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.flatten(0, -2)
    spatial = len(layer.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
    # (batch, channels, *positions, *kernel) -> one row of channels x kernel for every position
    channels_last = x.movedim(1, 1 + spatial)
    return channels_last.flatten(0, spatial).flatten(1)


def _output_vectors(layer: nn.Module, gradient: Tensor) -> Tensor:
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return gradient.flatten(0, -2)
    if gradient.dim() == len(layer.kernel_size) + 1:
        gradient = gradient.unsqueeze(0)
    return gradient.movedim(1, -1).flatten(0, -2)


def shrunk(moment: Tensor, samples: int) -> Tensor:
    """A positive definite estimate of a second moment from `samples` vectors, whatever their number and rank.

    The estimate is pulled towards the multiple of the identity with its trace, by the share that the oracle
    approximating shrinkage of Chen, Wiesel, Eldar and Hero (IEEE Transactions on Signal Processing, 2010, equation 23)
    finds in the data: much where there are few samples for the dimensions, hardly where there are many. The identity
    for a moment that is zero.
    """
    size = moment.shape[0]
    identity = torch.eye(size, dtype=torch.float64, device=moment.device)
    trace = float(moment.trace())
    if trace <= 0:
        return identity
    scaled = moment / (trace / size)
    squares = float(scaled.square().sum())
    spread = squares - size  # of the eigenvalues about their mean, times the dimension
    weight = 1.0
    if spread > 0:
        weight = min(1.0, ((1 - 2 / size) * squares + size**2) / ((samples + 1 - 2 / size) * spread))
    # The products are formed in float32: eigenvalues below its precision are noise.
    weight = max(weight, torch.finfo(torch.float32).eps * size)
    return ((1 - weight) * scaled + weight * identity) * (trace / size)
