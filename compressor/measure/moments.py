"""Second moments of a layer's inputs and of the loss gradient at its outputs, from a little calibration data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.measure.scale import power_of_two_on_device
from compressor.measure.triangle import packed_triangle, unpacked_triangle
from compressor.torch_state import all_answers, in_float64, sum_in_float64


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer, in float64: E[x x^T] and E[x] of its inputs, E[g g^T] of the gradients at its
    outputs.

    `inputs` is `d_in x d_in`, `mean` has `d_in` numbers, `gradients` is `d_out x d_out`. The expectations are over
    vectors that the layer was applied to: those of gradients over `positions`, those of inputs over `input_positions`,
    which are more where not every pass went backward. With `uses` of them per prediction of the model, a change D of
    the matrix costs `uses / 2 * tr(S_g D S_x D^T)` of loss per prediction, to second order.

    Of a convolution with g groups all have a first dimension more, of g: these are the moments of each group
    by itself.
    """

    inputs: Tensor
    mean: Tensor
    gradients: Tensor
    positions: int
    input_positions: int


@dataclass(frozen=True)
class MomentPass:
    """One batch: `run` does a forward and a backward pass; `masks` of `(batch, length)` are false on padding.

    What runs forward without gradients, as under `torch.no_grad`, adds to the moments of the inputs alone.
    """

    run: Callable[[], None]
    masks: Sequence[Tensor] = ()


def collect_moments(
    layers: Mapping[str, nn.Module],
    passes: Iterable[MomentPass],
    stand_ins: Mapping[str, nn.Module] | None = None,
) -> dict[str, Moments | None]:
    """Compute the moments of every layer over all passes; None for a layer that no gradient reached.

    `layers` are linear layers, transformers' `Conv1D`, or convolutions, transposed ones without groups included, of one
    model in evaluation mode. If `stand_ins` run in their place (low-rank layers, say), their inputs and gradients are
    used. Layers that receive the same tensor share one moment. Raises `BadInput`, naming the layer, if activations or
    gradients are not finite.
    """
    with torch.enable_grad(), MomentCollector(layers, stand_ins or layers) as collector:
        for each in passes:
            with collector.masked(each.masks):
                each.run()
    return moments_of(layers, collector.taken())


@dataclass
class VectorSum:
    """Running sums of outer products and of vectors, in float64."""

    product: Tensor
    total: Tensor
    count: int

    def add(self, other: VectorSum) -> None:
        self.product += other.product
        self.total += other.total
        self.count += other.count


@dataclass
class PackedSum:
    """Sums of outer products, of which a triangle is kept, and of vectors, in float64.

    The sum of vectors is empty where nobody asks for it.
    """

    lower: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, product: Tensor, total: Tensor, count: int) -> Self:
        """The sums with this matrix of the products."""
        return cls(packed_triangle(product, torch.float64), total, count)

    @property
    def product(self) -> Tensor:
        """The sum of outer products as a matrix."""
        return unpacked_triangle(self.lower)

    def add(self, other: PackedSum) -> None:
        self.lower += other.lower
        self.total += other.total
        self.count += other.count


def packed(sums: VectorSum) -> PackedSum:
    """The same sums in half of the memory."""
    return PackedSum.of(sums.product, sums.total, sums.count)


# Sums of inputs, by the set of layers that share them.
InputSums = Mapping[frozenset[str], PackedSum]


@dataclass
class LayerSums:
    """What the moments of layers are the means of: sums of inputs, and of gradients by layer."""

    inputs: dict[frozenset[str], PackedSum] = field(default_factory=dict)
    gradients: dict[str, PackedSum] = field(default_factory=dict)

    def add(self, inputs: InputSums, gradients: Mapping[str, PackedSum]) -> None:
        """Add further sums, which may become these."""
        for names, each in inputs.items():
            accumulate(self.inputs, names, each)
        for name, each in gradients.items():
            accumulate(self.gradients, name, each)


class MomentCollector:
    """Hooks that add up the moments during forward and backward passes.

    `layers` and the modules that are `hooked` in their places are those of `collect_moments`; `masks` are of the
    forward at hand.
    """

    def __init__(self, layers: Mapping[str, nn.Module], hooked: Mapping[str, nn.Module]) -> None:
        self._layers, self.hooked = layers, hooked
        # Inputs by the set of layers that share them, gradients by layer.
        self._inputs: dict[frozenset[str], VectorSum] = {}
        self._gradients: dict[str, VectorSum] = {}
        # Within a pass, layers that extract the same vectors from one version of a tensor share one product.
        self._seen: dict[tuple[int, int, Hashable], tuple[Tensor, VectorSum, set[str]]] = {}
        self.masks: Sequence[Tensor] = ()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, layer in self.hooked.items():
            self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    @contextmanager
    def masked(self, masks: Sequence[Tensor]) -> Iterator[None]:
        """A forward of the model, or of a part of it, whose padding the masks say; its gradients may come later.

        Inside of one for the whole model another may run a part on other positions.
        """
        before, self.masks = self.masks, masks
        self._add_up()
        yield
        self._add_up()
        self.masks = before

    def _add_up(self) -> None:
        """Add the sums of the products so far to the totals."""
        for _, seen, names in self._seen.values():
            accumulate(self._inputs, frozenset(names), seen)
        self._seen.clear()

    def taken(self) -> LayerSums:
        """The sums so far, which begin anew."""
        found = LayerSums()
        for names in list(self._inputs):
            found.inputs[names] = packed(self._inputs.pop(names))
        for name in list(self._gradients):
            found.gradients[name] = packed(self._gradients.pop(name))
        return found

    def note_input(self, name: str, x: Tensor) -> None:
        """Add an input of a layer, which may not be run on it."""
        layer = self._layers[name]
        key = (id(x), x._version, patches(layer))
        if key not in self._seen:
            vectors = kept_vectors(input_vectors(layer, x.detach()), x, self.masks)
            self._seen[key] = (x, _summed(vectors, groups_of(layer)), set())
        self._seen[key][2].add(name)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            self.note_input(name, arguments[0] if arguments else next(iter(named.values())))
            if not torch.is_grad_enabled():
                return None
            leaf = not output.requires_grad
            if leaf:
                output.requires_grad_(True)
            output.register_hook(partial(self._backward, name, self.masks))  # type: ignore[no-untyped-call]
            # The next module may work in place, which autograd does not allow on a leaf.
            return output.clone() if leaf else None

        return hook

    def _backward(self, name: str, masks: Sequence[Tensor], gradient: Tensor) -> None:
        layer = self._layers[name]
        vectors = kept_vectors(_output_vectors(layer, gradient), gradient, masks)
        accumulate(self._gradients, name, _summed(vectors, groups_of(layer)))


def moments_of(layers: Iterable[str], sums: LayerSums) -> dict[str, Moments | None]:
    """The moments of layers, in their order; None for a layer that no gradient reached.

    Raises `BadInput` where they are not finite.
    """
    found: dict[str, Moments | None] = dict.fromkeys(layers)
    require_finite(found, sums)
    shared: dict[frozenset[str], tuple[Tensor, Tensor]] = {}
    for name in found:
        gradients = sums.gradients.get(name)
        if gradients is None or not gradients.count:
            continue
        keys = sorted((key for key in sums.inputs if name in key), key=sorted)
        count = sum(sums.inputs[key].count for key in keys)
        if len(keys) == 1:
            each = sums.inputs[keys[0]]
            if keys[0] not in shared:
                shared[keys[0]] = each.product / each.count, each.total / each.count
            inputs, mean = shared[keys[0]]
        else:  # it ran several times, and shared its inputs with other layers each time
            inputs = torch.stack([sums.inputs[key].product for key in keys]).sum(0) / count
            mean = torch.stack([sums.inputs[key].total for key in keys]).sum(0) / count
        found[name] = Moments(inputs, mean, gradients.product / gradients.count, gradients.count, count)
    return found


def require_finite(layers: Iterable[str], sums: LayerSums) -> None:
    """Raise `BadInput` for sums that are not finite, naming a layer: one question for all, for it is waited for."""
    order = list(layers)
    named = [(min(names, key=order.index), "activations", each) for names, each in sums.inputs.items()]
    named += [(name, "gradients", each) for name, each in sums.gradients.items()]
    flags = [torch.isfinite(each.lower).all() for *_, each in named]
    for (name, what, _), finite in zip(named, all_answers(flags), strict=True):
        if not finite:
            raise BadInput(
                f"the {what} of layer {name} are not finite on the calibration data",
                remedy="use the model in a wider dtype, or leave the layer out with `exclude`",
            )


def accumulate(sums: dict[Any, Any], key: Hashable, more: VectorSum | PackedSum) -> None:
    """Add to the sum of a key, which may become the one that is given."""
    if key in sums:
        sums[key].add(more)
    else:
        sums[key] = more


def _summed(vectors: Tensor, groups: int) -> VectorSum:
    centered = Centered.of(wide_enough(vectors))
    if groups == 1:
        return VectorSum(centered.second_moment(), centered.sum, vectors.shape[0])
    parts = centered.parts(groups)
    product, total = torch.stack([each.second_moment() for each in parts]), torch.stack([each.sum for each in parts])
    return VectorSum(product, total, vectors.shape[0])


def wide_enough(vectors: Tensor) -> Tensor:
    """Vectors in float32; float64 stays float64, and bfloat16, which has float32's range, bfloat16."""
    return vectors if vectors.dtype in (torch.float64, torch.bfloat16) else vectors.float()


Multiply = Callable[[Tensor, Tensor], Tensor]
"""The product of two matrices in bfloat16, summed and returned in float32."""


def _multiply_on(device: torch.device) -> Multiply | None:
    """What a device has for this product, and where it is faster than one in float32."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return partial(torch.mm, out_dtype=torch.float32)


def _in_two(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in float32 as sums of two in bfloat16, to 16 bits: twice as many as vectors in bfloat16 came with."""
    large = rows.to(torch.bfloat16)
    return large, (rows - large).to(torch.bfloat16)


@dataclass(frozen=True)
class Centered:
    """Vectors, one a row, without their mean and a common factor, for sums of their products.

    The products are computed in float32, and returned in float64, accurate relative to the covariance: for vectors with
    a large mean, float32 would round away what varies. The common factor is divided out first, so that no square
    underflows or overflows in float32.
    """

    rows: Tensor
    mean: Tensor
    total: Tensor
    scale: Tensor
    multiply: Multiply | None = None

    @classmethod
    def of(cls, x: Tensor, *, multiply: Multiply | None = None) -> Self:
        """Those of a matrix.

        Where it is in bfloat16, `multiply` takes products of such matrices with sums in float32; by default that is
        what the device has for it, if anything.
        """
        scale = power_of_two_on_device(x)
        total = sum_in_float64(x) / scale
        mean = (total / max(len(x), 1)).float()
        rows = (x / scale).float().sub_(mean.to(x.device))
        own = multiply or _multiply_on(x.device) if x.dtype == torch.bfloat16 else None
        return cls(rows, in_float64(mean), total, scale, own)

    def parts(self, count: int) -> list[Centered]:
        """As many parts of every vector, of the same length."""
        parts = zip(*(each.chunk(count, -1) for each in (self.rows, self.mean, self.total)), strict=True)
        return [replace(self, rows=rows, mean=mean, total=total) for rows, mean, total in parts]

    @property
    def sum(self) -> Tensor:
        """The sum of the rows as they were."""
        return self.total * self.scale

    def second_moment(self) -> Tensor:
        """`x^T x`."""
        if self.multiply is None:
            return self._of_all(gram(self.rows), self)
        large, small = _in_two(self.rows)
        mixed = self.multiply(large.T, small)
        return self._of_all(self.multiply(large.T, large).add_(mixed).add_(mixed.T), self)

    def product(self, other: Centered) -> Tensor:
        """`x^T y`."""
        if self.multiply is None or other.multiply is None:
            return self._of_all(self.rows.T @ other.rows, other)
        (large, small), (of_large, of_small) = _in_two(self.rows), _in_two(other.rows)
        mixed = self.multiply(large.T, of_small).add_(self.multiply(small.T, of_large))
        return self._of_all(mixed.add_(self.multiply(large.T, of_large)), other)

    def _of_all(self, product: Tensor, other: Centered) -> Tensor:
        """The product of the rows as they were from that of the centered ones."""
        found = in_float64(product)
        found.addr_(self.mean, other.total)
        found.addr_(self.total - len(self.rows) * self.mean, other.mean)
        return found.mul_(self.scale * other.scale)


def gram(x: Tensor, *, narrow: int = 192, parts: int = 8) -> Tensor:
    """`x^T x`, of which only the lower triangle is computed, in strips of rows, and mirrored.

    There are at most `parts` strips, of `narrow` rows at least: on a CPU narrower ones save no more time.
    """
    size = x.shape[1]
    if size <= narrow:
        return x.T @ x
    product = x.new_empty(size, size)
    step = max(narrow, -(-size // parts))
    for start in range(0, size, step):
        end = min(start + step, size)
        strip = x[:, start:end].T @ x[:, :end]
        product[start:end, :end] = strip
        product[:start, start:end] = strip[:, :start].T
    return product


def kept_vectors(vectors: Tensor, tensor: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Drop the rows that are padding, according to the first mask that fits the tensor they came from.

    The tensor is `(batch, length, size)`, or `(batch * length, size)` as some models flatten it; any other has no
    padding.
    """
    kept = _kept(tensor, masks)
    return vectors if kept is None else vectors.index_select(0, kept)


def with_padding(rows: Tensor, tensor: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Rows for the positions of a tensor that are not padding as a tensor of its shape, zero at padding."""
    kept = _kept(tensor, masks)
    if kept is None:
        return rows.view_as(tensor)
    return rows.new_zeros(tensor.shape[:-1].numel(), rows.shape[-1]).index_copy(0, kept, rows).view_as(tensor)


def _kept(tensor: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """The rows of a tensor that are not padding, by the first mask that fits it; None where none does."""
    for mask in masks:
        flattened = tensor.dim() == 2 and len(tensor) == mask.numel()
        if flattened or (tensor.dim() == 3 and tensor.shape[:2] == mask.shape):
            # Found on the CPU, where masks are: how many rows a mask keeps is what a device is waited for.
            return mask.flatten().nonzero().squeeze(1).to(tensor.device)
    return None


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kept_rows(tensor: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """A tensor as one row per position, `(positions, size)`, without padding."""
    return kept_vectors(tensor.flatten(0, -2), tensor, masks)


def patches(layer: nn.Module) -> Hashable:
    """Key under which layers extract identical patches from one input, so that they can share its moments."""
    if isinstance(layer, _TRANSPOSED):
        return "channels"
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    return (layer.kernel_size, layer.stride, str(layer.padding), layer.dilation, layer.padding_mode, layer.groups)


def groups_of(layer: nn.Module) -> int:
    """How many parts of its inputs and outputs a layer keeps apart, whose vectors lie one after the other in a row."""
    return layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1


def input_vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors that the layer's matrix is applied to, one a row: the last dimension, or a convolution's patches."""
    if isinstance(layer, _TRANSPOSED):
        return _channels(layer, x)
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
    """The outputs of the layer's matrix, one a row; for a transposed convolution, the patches that it adds up."""
    if isinstance(layer, _TRANSPOSED):
        return _scattered_patches(layer, gradient)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return gradient.flatten(0, -2)
    return _channels(layer, gradient)


def _channels(layer: nn.modules.conv._ConvNd, images: Tensor) -> Tensor:
    """The channels at every position as a row."""
    if images.dim() == len(layer.kernel_size) + 1:
        images = images.unsqueeze(0)
    return images.movedim(1, -1).flatten(0, -2)


def _scattered_patches(layer: nn.modules.conv._ConvNd, gradient: Tensor) -> Tensor:
    """The gradients at the outputs that each input position contributes to: `channels x kernel` a row.

    Position p adds its results to the outputs from `stride p - padding` on; those outside are cut off.
    """
    spatial = len(layer.kernel_size)
    if gradient.dim() == spatial + 1:
        gradient = gradient.unsqueeze(0)
    geometry = zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding, strict=True)
    for axis, (size, step, before, gap, more) in enumerate(geometry, start=2):
        assert isinstance(before, int)
        width, outputs = (size - 1) * gap + 1, gradient.shape[axis]
        inputs = (outputs + 2 * before - width - more) // step + 1
        after = max(0, (inputs - 1) * step + width - before - outputs)
        padded = nn.functional.pad(gradient.movedim(axis, -1), [before, after]).movedim(-1, axis)
        gradient = padded.unfold(axis, width, step).narrow(axis, 0, inputs)[..., ::gap]
    return gradient.movedim(1, 1 + spatial).flatten(0, spatial).flatten(1)


def oas_shrinkage(moment: Tensor, samples: int) -> Tensor:
    """Shrink a second moment of `samples` vectors towards a multiple of the identity, so that it is positive definite.

    The weight is that of the oracle approximating shrinkage (OAS) of Chen, Wiesel, Eldar and Hero (IEEE Transactions on
    Signal Processing, 2010, equation 23): large if there are few samples for the dimension, small if there are many. A
    moment that is zero becomes the identity.
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
    # The products were computed in float32: eigenvalues below its precision are noise.
    weight = max(weight, torch.finfo(torch.float32).eps * size)
    return ((1 - weight) * scaled + weight * identity) * (trace / size)
