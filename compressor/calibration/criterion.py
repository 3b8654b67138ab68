"""The cost of a change of a model's outputs, and gradients whose second moment is its curvature.

For classifiers and language models the cost is the Kullback-Leibler divergence of the predictions, and its curvature
the true Fisher information: gradients of the loss on targets drawn from the model itself, not on the labels (Kunstner,
Balles and Hennig, "Limitations of the empirical Fisher approximation", NeurIPS 2019). A confident model would sample an
informative target only about once in a thousand examples. So targets are also drawn in proportion to the squared length
of their gradients, and weighted by the inverse: importance sampling (Katharopoulos and Fleuret, ICML 2018, for
examples), which leaves the second moment as it is. A random sign makes the mean zero, so that the gradients of several
predictions are uncorrelated where they add up. For any other model the cost is half the squared change of the outputs,
and random cotangents sample its curvature (Martens and Grosse, ICML 2015, section 5, for a Gaussian likelihood of unit
variance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.measure.moments import kept_rows
from compressor.model.inference import forward_call
from compressor.planning import LossUnit
from compressor.torch_state import in_float64, scratch_buffers

Criterion = Literal["likelihood", "outputs"]

# Units of the cost.
UNITS: Mapping[Criterion, LossUnit] = {
    "likelihood": "nats per prediction",
    "outputs": "half the squared change of the outputs",
}

# Predictions copied to float64 at a time: with a large vocabulary the copies are large.
ROWS_AT_ONCE = 256


def rows_within(size: int, width: int) -> int:
    """How many rows of `width` outputs take at most `size` bytes in float32: one at least, or whole parts of the rows
    that are copied to float64 at a time."""
    rows = max(1, size // (4 * width))
    return rows if rows < ROWS_AT_ONCE else rows - rows % ROWS_AT_ONCE


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits, or its first output if there are none, such as the last hidden state.

    Buffers are restored after every call, so that all calls compute the same function. Several logits of one shape,
    such as those of the start and the end of an answer, are stacked in a dimension before the last; each is a
    distribution.
    """
    with scratch_buffers(model):
        output = forward_call(model, inputs)()
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    named = output.items() if isinstance(output, Mapping) else ()
    several = [each for name, each in named if str(name).endswith("_logits") and isinstance(each, Tensor)]
    if logits is None and len(several) > 1 and len({each.shape for each in several}) == 1 and several[0].dim() > 1:
        return torch.stack(several, dim=-2)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    first = logits if isinstance(logits, Tensor) else next((each for each in values if isinstance(each, Tensor)), None)
    if first is None:
        raise BadInput(
            f"{type(model).__name__} returns {type(output).__name__}, in which no tensor is found",
            remedy="give a model that returns a tensor, or something with logits",
        )
    return first


def criterion_of(model: nn.Module, outputs: Tensor, labels: Tensor | None) -> Criterion:
    """Whether the outputs are logits of classes or tokens: by the model's name, or by labels that fit them.

    Labels fit if there is one for each row of outputs, or for each but the last of a text, and each is the number of a
    column. The hidden states of an encoder, which a text may fit by chance, are recognized by the model's name. A
    single column, as of a regression or a binary logit, is no distribution.
    """
    name = type(model).__name__
    predicts = name.endswith(
        ("ForCausalLM", "ForMaskedLM", "LMHeadModel", "Classification", "ConditionalGeneration", "QuestionAnswering")
    )
    rows = outputs.shape[:-1]
    next_tokens = len(rows) == 2 and labels is not None and labels.shape == (rows[0], rows[1] - 1)
    fit = labels is not None and (labels.numel() == rows.numel() or next_tokens)
    fit = fit and labels is not None and labels.numel() > 0 and int(labels.max()) < outputs.shape[-1]
    # The name of a transformers model without a head ends in Model: BertModel, T5EncoderModel.
    fit = fit and not (hasattr(model, "config") and name.endswith("Model"))
    return "likelihood" if (predicts or fit) and outputs.shape[-1] > 1 else "outputs"


def sampled_loss(
    outputs: Tensor, masks: Sequence[Tensor], criterion: Criterion, *, generator: torch.Generator
) -> Tensor:
    """A loss, summed over rows, whose gradient at the outputs has the criterion's curvature as its second moment."""
    parts = torch.split(kept_rows(outputs, masks), ROWS_AT_ONCE)
    return torch.stack([_sampled_loss(rows.float(), criterion, generator) for rows in parts]).sum()


def _sampled_loss(rows: Tensor, criterion: Criterion, generator: torch.Generator) -> Tensor:
    if criterion == "outputs":
        return (rows * _signs(rows, generator)).sum()
    targets, weights = _drawn_targets(rows.detach(), generator)
    return (nn.functional.cross_entropy(rows, targets, reduction="none") * weights).sum()


def _drawn_targets(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a class for each row of logits, and weight its loss so that the gradients' second moment is the Fisher's.

    A class of probability p whose gradient at the logits has the squared length s is drawn in proportion to p s.
    Weighted by the square root of the mean of s over s, the squared length of every gradient is the trace of its row's
    Fisher matrix. The sign of the weight is random.
    """
    p = rows.float().softmax(-1)
    squared_lengths = _squared_lengths(p)
    # A row that is not finite gets any target: its loss is not finite either, and a GPU would stop at it for good.
    chances = (p * squared_lengths).nan_to_num_(nan=1.0)
    # By its distribution function, with one random number a row: `multinomial` draws one for every class.
    cumulative = chances.cumsum(-1)
    total = cumulative[:, -1:]
    drawn = torch.rand(len(rows), 1, generator=generator, device=rows.device) * total
    # A class of no chance is never the first whose sum is larger.
    targets = torch.searchsorted(cumulative, drawn, right=True).clamp_max_(rows.shape[-1] - 1)
    weights = (total / squared_lengths.gather(-1, targets)).sqrt()
    weights *= _signs(weights, generator)
    return targets.squeeze(-1), weights.squeeze(-1).to(rows.dtype)


def _squared_lengths(p: Tensor) -> Tensor:
    """`1 - 2 p + sum p^2` for each class of each row: the squared length of `e_class - p`, in full precision.

    For a class of nearly all of the probability the terms cancel: there it is summed from what the others have.
    """
    likeliest = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, likeliest, 0.0)
    squares = others.square().sum(-1, keepdim=True)
    lengths = 1 - 2 * p + (squares + p.gather(-1, likeliest).square())
    own = (others.sum(-1, keepdim=True).square() + squares).clamp_min(torch.finfo(p.dtype).tiny)
    return lengths.scatter_(-1, likeliest, own)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def divergence(before: Tensor, after: Tensor, masks: Sequence[Tensor], *, criterion: Criterion) -> tuple[Tensor, int]:
    """The cost of the compressed outputs against the dense ones, summed over rows, and the number of rows.

    The Kullback-Leibler divergence in nats, or half the squared difference.
    """
    dense, compressed = (kept_rows(each, masks) for each in (before, after))
    parts = zip(torch.split(dense, ROWS_AT_ONCE), torch.split(compressed, ROWS_AT_ONCE), strict=True)
    return torch.stack([_divergence(in_float64(a), in_float64(b), criterion) for a, b in parts]).sum(), dense.shape[0]


def _divergence(dense: Tensor, compressed: Tensor, criterion: Criterion) -> Tensor:
    if criterion == "outputs":
        return (dense - compressed).square().sum() / 2
    dense, compressed = dense.log_softmax(-1), compressed.log_softmax(-1)
    # A class of probability zero in the dense model adds nothing, whatever its probability in the compressed one.
    return torch.where(dense > -torch.inf, dense.exp() * (dense - compressed), 0.0).sum()


def summed_in_parts(
    cost: Callable[[Tensor, slice], Tensor], rows: Tensor, *, at_once: int, parameters: Sequence[Tensor] = ()
) -> Tensor:
    """The sum of a cost over parts of some rows, with the memory of one part, for its gradients too.

    `cost` is given a part of the rows and its place among them. Where the rows or the parameters that the cost depends
    on need gradients, these are computed with the cost, so that no graph of all parts is kept.
    """
    places = [slice(start, start + at_once) for start in range(0, max(len(rows), 1), at_once)]
    if torch.is_grad_enabled() and any(each.requires_grad for each in (rows, *parameters)):
        total: Tensor = _InParts.apply(cost, places, rows, *parameters)  # type: ignore[no-untyped-call]
        return total
    return torch.stack([cost(rows[place], place) for place in places]).sum()


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Callable[[Tensor, slice], Tensor], places: Sequence[slice], *tensors: Tensor) -> Tensor:
        rows, *parameters = tensors
        gradients = [torch.zeros_like(each) for each in tensors]
        costs = []
        for place in places:
            with torch.enable_grad():
                part = rows[place].detach().requires_grad_(True)
                value = cost(part, place)
            found = torch.autograd.grad(value, [part, *parameters], allow_unused=True)
            for total, more in zip((gradients[0][place], *gradients[1:]), found, strict=True):
                if more is not None:
                    total.add_(more)
            costs.append(value.detach())
        ctx.save_for_backward(*gradients)
        return torch.stack(costs).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(each * scale.to(each.dtype) for each in ctx.saved_tensors))


def hidden_rows(hidden: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Activations between blocks as one vector for every position that is not padding, in float32.

    Images have their channels in the second dimension, `(B, C, H, W)`; all else has its features in the last.
    """
    if hidden.dim() > 3:
        hidden = hidden.movedim(1, -1)
    return kept_rows(hidden, masks).float()
