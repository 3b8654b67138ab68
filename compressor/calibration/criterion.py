"""What a change of a model's outputs costs, and the gradients that say so to second order.

For classifiers and language models the cost is the Kullback-Leibler divergence of the predictions, and its curvature
the true Fisher information: gradients of the loss on targets drawn from the model itself, not on the labels (Kunstner,
Balles and Hennig, "Limitations of the empirical Fisher approximation", NeurIPS 2019). A model that is sure of itself
draws the targets that matter about once in a thousand examples; so they are drawn in proportion to the squared length
of their gradients as well, and weighed by the inverse (importance sampling, as Katharopoulos and Fleuret, ICML 2018,
choose examples), which leaves the second moment as it is; a random sign keeps the mean at zero, without which the
gradients of several predictions would not be uncorrelated where they add up. For any other model the cost is half the
squared change of the outputs, whose curvature random cotangents sample (Martens and Grosse, ICML 2015, section 5, for a
Gaussian likelihood of unit variance).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.measure.moments import kept_rows
from compressor.model.inference import forward_call
from compressor.planning import LossUnit
from compressor.torch_state import scratch_buffers

Criterion = Literal["likelihood", "outputs"]

# What the cost is in.
UNITS: Mapping[Criterion, LossUnit] = {
    "likelihood": "nats per prediction",
    "outputs": "half the squared change of the outputs",
}

# Predictions of which float64 copies are held at a time: a large vocabulary makes them large.
ROWS_AT_ONCE = 256


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits; where it has none its first output, such as the last hidden state.

    Every call finds the buffers as the model was given, so that all calls are of one function.
    Several logits of one shape, such as those of the start and the end of an answer, are stacked in a dimension before
    the last, each a distribution of its own.
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
    """Whether outputs are logits: they predict classes or tokens, by the model's name or by labels that fit them.

    Labels fit that are one for each row of outputs, or for each but the last of a text, and classes of theirs; the
    hidden states of an encoder, which a text may fit by chance, are told by their name. A single column, such as a
    regression's or a binary logit, is no distribution.
    """
    name = type(model).__name__
    predicts = name.endswith(
        ("ForCausalLM", "ForMaskedLM", "LMHeadModel", "Classification", "ConditionalGeneration", "QuestionAnswering")
    )
    rows = outputs.shape[:-1]
    next_tokens = len(rows) == 2 and labels is not None and labels.shape == (rows[0], rows[1] - 1)
    fit = labels is not None and (labels.numel() == rows.numel() or next_tokens)
    fit = fit and labels is not None and labels.numel() > 0 and int(labels.max()) < outputs.shape[-1]
    # A transformers model without a head is called the base of its family: BertModel, T5EncoderModel.
    fit = fit and not (hasattr(model, "config") and name.endswith("Model"))
    return "likelihood" if (predicts or fit) and outputs.shape[-1] > 1 else "outputs"


def sampled_loss(
    outputs: Tensor, masks: Sequence[Tensor], criterion: Criterion, *, generator: torch.Generator
) -> Tensor:
    """A number whose gradient at the outputs has the criterion's curvature as its second moment, summed over rows."""
    parts = torch.split(kept_rows(outputs, masks), ROWS_AT_ONCE)
    return torch.stack([_sampled_loss(rows.float(), criterion, generator) for rows in parts]).sum()


def _sampled_loss(rows: Tensor, criterion: Criterion, generator: torch.Generator) -> Tensor:
    if criterion == "outputs":
        return (rows * _signs(rows, generator)).sum()
    targets, weights = _drawn_targets(rows.detach(), generator)
    return (nn.functional.cross_entropy(rows, targets, reduction="none") * weights).sum()


def _drawn_targets(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A class for each row of logits, and the weight of its loss: the gradients' second moment is the Fisher's.

    A class of probability p whose gradient at the logits has the squared length s is drawn with a probability in
    proportion to p s; weighed by the square root of the mean of s over s, every gradient has the length that is the
    Fisher's trace of its row. The sign of the weight is random.
    """
    p = rows.double().softmax(-1)
    squared_lengths = (1 - 2 * p + p.square().sum(-1, keepdim=True)).clamp_min(torch.finfo(p.dtype).tiny)
    chances = p * squared_lengths
    targets = torch.multinomial(chances, 1, generator=generator)
    weights = (chances.sum(-1, keepdim=True) / squared_lengths.gather(-1, targets)).sqrt()
    weights *= _signs(weights, generator)
    return targets.squeeze(-1), weights.squeeze(-1).to(rows.dtype)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def divergence(before: Tensor, after: Tensor, masks: Sequence[Tensor], *, criterion: Criterion) -> tuple[Tensor, int]:
    """What the compressed outputs cost against the dense ones, summed over rows, and the number of rows.

    Kullback-Leibler divergence in nats, or half the squared difference.
    """
    dense, compressed = (kept_rows(each, masks) for each in (before, after))
    parts = zip(torch.split(dense, ROWS_AT_ONCE), torch.split(compressed, ROWS_AT_ONCE), strict=True)
    return torch.stack([_divergence(a.double(), b.double(), criterion) for a, b in parts]).sum(), dense.shape[0]


def _divergence(dense: Tensor, compressed: Tensor, criterion: Criterion) -> Tensor:
    if criterion == "outputs":
        return (dense - compressed).square().sum() / 2
    dense, compressed = dense.log_softmax(-1), compressed.log_softmax(-1)
    # A class that the dense model rules out adds nothing, whatever the compressed one says of it.
    return torch.where(dense > -torch.inf, dense.exp() * (dense - compressed), 0.0).sum()


def hidden_rows(hidden: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """What goes from one block to the next as one vector for every position that is not padding, in float32.

    Images have their channels in the second dimension, `(B, C, H, W)`; everything else has its features in the last.
    """
    if hidden.dim() > 3:
        hidden = hidden.movedim(1, -1)
    return kept_rows(hidden, masks).float()
