"""The forms in which a low-rank layer can be stored, a module each; `FORMS` is where they are registered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from compressor.forms.channel import CHANNEL, LowRankConvolution, LowRankTransposedConvolution
from compressor.forms.grouped import GROUPED
from compressor.forms.initial import InitialForm, InitialLayer, formed_in
from compressor.forms.kernels import dense_kernels
from compressor.forms.layers import MARKERS
from compressor.forms.names import pair_name, quantization_of, quantized_name
from compressor.forms.pair_form import Approximations, MatrixPair, PairForm, StoredPairShape
from compressor.forms.pivoted import PIVOTED, PivotedLinear
from compressor.forms.plain import PLAIN, LowRankEmbedding, LowRankLinear
from compressor.forms.quantized import QuantizedDense, QuantizedPair
from compressor.forms.quantized_layers import QuantizedHead, QuantizedWeight
from compressor.forms.registry import DENSE, FORMS
from compressor.forms.spatial import SPATIAL, SpatialConvolution
from compressor.forms.weights import TRANSPOSED, Count, DenseWeight, StoredWeight
from compressor.latency import Amount, DeviceProfile, LayerUse, Size
from compressor.network import Kind


def pair_forms(weight: DenseWeight, *, initial: bool = False) -> tuple[PairForm, ...]:
    """The forms of the pairs that a layer can become; those of what training wrote where its `initial` is known."""
    return tuple(form for form in FORMS.values() if form.takes(weight) and (initial or not form.from_initial))


def layer_builder(form: str) -> Callable[[nn.Module, int], nn.Module]:
    """What builds the unfilled layer of a form in place of a dense one, from this one and a rank."""
    if form not in FORMS:
        raise ValueError(f"there is no low-rank form {form!r}")
    return FORMS[form].layer


def has_own_errors(form: str) -> bool:
    """Whether a layer's errors in a form differ from those of the truncated SVD of its own matrix."""
    return form != DENSE and FORMS[form].has_own_errors


def least_rank(form: str) -> int:
    """The smallest rank that can be stored in a form; that of a dense layer is 0."""
    return 0 if form == DENSE else FORMS[form].least_rank


def from_initial(form: str) -> bool:
    """Whether a form stands for what training wrote alone."""
    return form in FORMS and FORMS[form].from_initial


def pair_of(form: str) -> str | None:
    """The form of the pair that stands for what training wrote; None of other forms."""
    found = FORMS.get(form)
    return found.pair.name if isinstance(found, InitialForm) else None


def factorized_shape(weight: DenseWeight, form: str) -> tuple[int, int]:
    """The sides of the matrix that a pair of this form factorizes; of a dense layer its own."""
    return weight.shape if form == DENSE else FORMS[form].sides(weight)


def stored_parameters(weight: DenseWeight, form: str, rank: Count) -> Count:
    """Numbers in the file for a layer in a form."""
    return math.prod(weight.shape) + 0 * rank if form == DENSE else FORMS[form].parameters(weight, rank)


def stored_bytes(weight: DenseWeight, form: str, rank: Count, *, itemsize: int) -> Count:
    """Bytes of the tensors counted by `stored_parameters`, with `itemsize` bytes a number of the dense weight."""
    if form == DENSE:
        return stored_parameters(weight, form, rank) * itemsize
    return FORMS[form].nbytes(weight, rank, itemsize)


def predicted_seconds(
    profile: DeviceProfile, weight: DenseWeight, form: str, *, rank: Size, use: LayerUse, dtype: torch.dtype
) -> Amount:
    """The seconds that a layer is expected to take in one forward.

    Args:
        profile: The device.
        weight: The dense weight.
        form: The form of its pair, or `dense`.
        rank: The rank of the pair, or many; a dense layer has none, and takes as long at each.
        use: How a workload uses the layer.
        dtype: The dtype of weights and inputs.

    Returns:
        Seconds, at one rank or at each of many.
    """
    if form == DENSE:
        kernels = dense_kernels(weight, use, itemsize=dtype.itemsize)
    else:
        kernels = FORMS[form].kernels(weight, rank, use, itemsize=dtype.itemsize)
    one_call = sum((profile.seconds(kernel, dtype) for kernel in kernels), 0.0 * rank)
    return use.calls * one_call


def recognized(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> PairForm | None:
    """The form of the tensors below a layer, given by name; None where they are no pair."""
    known = {name for form in FORMS.values() for name in form.names}
    present = known & shapes.keys()
    alike = (form for form in FORMS.values() if present == set(form.names))
    return next((form for form in alike if form.recognizes(kind, shapes)), None)


__all__ = [
    "CHANNEL",
    "DENSE",
    "FORMS",
    "GROUPED",
    "MARKERS",
    "PIVOTED",
    "PLAIN",
    "SPATIAL",
    "TRANSPOSED",
    "Approximations",
    "Count",
    "DenseWeight",
    "InitialForm",
    "InitialLayer",
    "LowRankConvolution",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankTransposedConvolution",
    "MatrixPair",
    "PairForm",
    "PivotedLinear",
    "QuantizedDense",
    "QuantizedHead",
    "QuantizedPair",
    "QuantizedWeight",
    "SpatialConvolution",
    "StoredPairShape",
    "StoredWeight",
    "dense_kernels",
    "factorized_shape",
    "formed_in",
    "from_initial",
    "has_own_errors",
    "layer_builder",
    "least_rank",
    "pair_forms",
    "pair_name",
    "pair_of",
    "predicted_seconds",
    "quantization_of",
    "quantized_name",
    "recognized",
    "stored_bytes",
    "stored_parameters",
]
