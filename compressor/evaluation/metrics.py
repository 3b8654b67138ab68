"""How good a model is on some data: accuracy of classifiers, perplexity of language models, or the caller's metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.data import IGNORED_LABEL, Batch, CustomMetric, EvaluationData
from compressor.data.batches import count_examples
from compressor.errors import BadInput
from compressor.evaluation.custom_metric import metric_value, without_each_part
from compressor.freed_memory import freed_memory
from compressor.model import evaluation_mode, logits_of, resolve_device
from compressor.model.head import Head, find_head
from compressor.model.inference import forward_call
from compressor.torch_state import in_float64

# Inputs that are tokens of the model's vocabulary.
TOKEN_IDS = ("input_ids", "decoder_input_ids", "labels")

# Logits scored at once in float64: 128 MB, whatever the vocabulary.
SCORED_AT_ONCE = 2**24


@dataclass(frozen=True)
class ExampleScores:
    """For every example in order: the sum of its losses in nats, its correct predictions, and all its predictions."""

    losses: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    predictions: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """One model's score on one set of data.

    `value` is a fraction in [0, 1] for accuracy (higher is better) and at least 1 for perplexity (lower is
    better). `loss` is the mean cross-entropy in nats per prediction, and `count` the number of predictions:
    one per example for a classifier, one per token but the first of each window for a language model, and one per
    target token, padding aside, for an encoder-decoder.
    A model whose loss is not finite has `loss` (and perplexity) infinity. `examples` holds what each example
    contributed.

    Of the caller's own metric `higher_is_better` is known, and None of the others; there is no `loss`, `count` is the
    number of examples, and `replicates` are its values without each part of the data (see `drop_error`).
    """

    metric: str
    value: float
    loss: float | None
    count: int
    examples: ExampleScores | None = field(default=None, repr=False, compare=False)
    higher_is_better: bool | None = None
    replicates: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def recorded(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        parts = None if self.examples is None else [each.tolist() for each in astuple(self.examples)]
        return {**vars(self), "examples": parts, "replicates": list(self.replicates)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """What was recorded."""
        parts = record["examples"]
        examples = None if parts is None else ExampleScores(*map(np.array, parts))
        return cls(**{**record, "examples": examples, "replicates": tuple(record["replicates"])})


def measure_quality(
    model: nn.Module, data: EvaluationData, *, device: str | torch.device = "auto", replicates: bool = False
) -> Quality:
    """Score `model` on every example of `data`; nothing is skipped, whatever it scores.

    With a metric of the caller's own it is the value of that, and with `replicates` also its values without each of
    ten parts of the data, which takes nine times as long.

    Perplexity is `exp` of the mean negative log-likelihood over all scored tokens, not a mean of means (Jelinek
    et al. 1977, "Perplexity, a measure of the difficulty of speech recognition tasks"). Losses are computed in
    float64 from the model's logits. The model is left as it was. Raises `BadInput` if model and data do not fit:
    labels or token ids out of the model's range, windows longer than its positions, or the wrong head.
    """
    if data.metric is not None:
        return _custom_quality(model, data, data.metric, device=resolve_device(device), replicates=replicates)
    losses: list[npt.NDArray[np.float64]] = []
    right: list[npt.NDArray[np.float64]] = []
    predictions: list[npt.NDArray[np.float64]] = []
    head: Head | None = None
    with evaluation_mode(resolve_device(device), model):
        for batch in data:
            freed_memory().give_back()
            _require_known_tokens(model, batch, data.name)
            if not losses and data.task in ("language-modeling", "text-to-text"):
                head = _accepted(model, batch, data.name, run=partial(_head, examples=batch[:1]))
            scores = _predictions(model, batch, data, head=head, first=not losses)
            labels = batch.labels.to(scores.hidden.device)
            for found, each in zip((losses, right), _score(scores, labels.flatten()), strict=True):
                found.append(each.reshape(len(labels), -1).sum(1).cpu().numpy())
            predictions.append((batch.labels != IGNORED_LABEL).reshape(len(labels), -1).sum(1).double().numpy())
    examples = ExampleScores(*(np.concatenate(each) for each in (losses, right, predictions)))
    count = int(examples.predictions.sum())
    if count == 0:
        raise BadInput("no label is to be predicted", where=data.name, remedy=f"{IGNORED_LABEL} is for padding alone")
    total_loss = float(examples.losses.sum())
    loss = total_loss / count if math.isfinite(total_loss) else math.inf
    if data.task in ("language-modeling", "text-to-text"):
        return Quality("perplexity", _exp(loss), loss, count, examples)
    return Quality("accuracy", float(examples.right.sum()) / count, loss, count, examples)


def require_accepted(model: nn.Module, data: EvaluationData, *, device: str | torch.device = "auto") -> None:
    """Raise `BadInput` for inputs that a model cannot run on, because of unknown token ids or wrong shapes."""
    with evaluation_mode(resolve_device(device), model):
        first = data.read(range(1))
        if any(name in first.inputs for name in TOKEN_IDS):  # others are not read once more for nothing
            for batch in data:
                _require_known_tokens(model, batch, data.name)
        _accepted(model, first, data.name, run=lambda model, inputs: forward_call(model, inputs)())


def accepts(model: nn.Module, batch: Batch, *, device: str | torch.device = "auto") -> bool:
    """Whether a model runs on the inputs of a batch alone; a metric may run it in another way."""
    with evaluation_mode(resolve_device(device), model):
        try:
            forward_call(model, batch.inputs)()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model's code may raise anything
            return False
    return True


def quality_drop(baseline: Quality, compressed: Quality) -> float:
    """How much worse `compressed` is than `baseline`: positive is worse, negative is better.

    For accuracy it is the accuracy lost, as a fraction (0.01 is one point); for perplexity the increase; for another
    metric the change in its own unit. Infinity if the compressed model's value is not finite, so that it passes no
    gate.
    """
    return _drop(baseline.value, compressed.value, compressed)


def _drop(before: float, after: float, quality: Quality) -> float:
    if not math.isfinite(after):
        return math.inf
    higher = quality.metric == "accuracy" if quality.higher_is_better is None else quality.higher_is_better
    return before - after if higher else after - before


def drop_error(baseline: Quality, compressed: Quality) -> float:
    """The standard error of `quality_drop`: its typical distance from the drop on other data of the same kind.

    Both models see the same examples, so it is computed from the variation of the differences between the models. For
    a mean over predictions it is that of a ratio; for a perplexity, exp of a mean, it is linearized (the delta method;
    Cochran 1977, Sampling Techniques, section 6.4). Infinity if the drop is infinite, or for a single example.

    Of a metric that is only known as a function it is the jackknife's: with `d_i` the drop on the data without the i-th
    of k parts, drawn at random, `sqrt((k - 1) / k * sum((d_i - mean(d))^2))`. It is right for means and for smooth
    functions of them, such as F1, correlations and BLEU, not for medians (Wolter 2007, Introduction to Variance
    Estimation, sections 4.2 and 4.4; Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11). Ten
    parts give it to about a quarter of itself.
    """
    if compressed.higher_is_better is not None:
        return _jackknife(baseline, compressed)
    before, after = baseline.examples, compressed.examples
    assert before is not None
    assert after is not None
    number = len(before.predictions)
    if number < 2 or not math.isfinite(quality_drop(baseline, compressed)):
        return math.inf
    if compressed.metric == "perplexity":
        deviations = _deviations(after.losses, after.predictions) * compressed.value
        deviations -= _deviations(before.losses, before.predictions) * baseline.value
    else:
        deviations = _deviations(before.right - after.right, before.predictions)
    return math.sqrt(number / (number - 1) * float(np.square(deviations).sum())) / baseline.count


def _jackknife(baseline: Quality, compressed: Quality) -> float:
    """The standard error of a drop by what it is without each part of the data."""
    pairs = zip(baseline.replicates, compressed.replicates, strict=True)
    drops = np.array([_drop(before, after, compressed) for before, after in pairs])
    if len(drops) < 2 or not np.isfinite(drops).all():
        return math.inf
    return math.sqrt((len(drops) - 1) / len(drops) * float(np.square(drops - drops.mean()).sum()))


def _custom_quality(
    model: nn.Module, data: EvaluationData, metric: CustomMetric, *, device: torch.device, replicates: bool
) -> Quality:
    without: list[float] = []
    with evaluation_mode(device, model):
        value = metric_value(metric, model, data)
        if replicates:
            without = [metric_value(metric, model, rest) for rest in without_each_part(data)]
    count = sum(count_examples(batch.given) for batch in data.batches) if data.batches else data.count
    return Quality(metric.name, value, None, count, higher_is_better=metric.higher_is_better, replicates=tuple(without))


def _deviations(sums: npt.NDArray[np.float64], predictions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The difference of each example's sum from its number of predictions times the mean over all predictions."""
    mean = float(sums.sum() / predictions.sum())
    return sums - predictions * mean


@dataclass(frozen=True)
class _Scores:
    """What the scores of some predictions are formed of, some at a time: a large vocabulary has many."""

    model: nn.Module
    head: Head | None
    hidden: Tensor
    """The inputs of the head, or the scores themselves where no head is known, `(..., size)`."""

    @property
    def classes(self) -> int:
        return self.hidden.shape[-1] if self.head is None else self.head.width

    def of(self, rows: Tensor) -> Tensor:
        """The scores of some rows of `hidden`."""
        return rows if self.head is None else self.head(self.model, rows[None])[0]


def _head(model: nn.Module, _: Mapping[str, Tensor], *, examples: Batch) -> Head | None:
    return find_head(model, partial(logits_of, inputs=examples.inputs))


def _predictions(model: nn.Module, batch: Batch, data: EvaluationData, *, head: Head | None, first: bool) -> _Scores:
    """The scores for `batch.labels`: one vector of them for each label."""
    name = type(model).__name__
    if data.task == "language-modeling" and name.endswith("ForMaskedLM"):
        raise BadInput(
            f"{name} predicts masked tokens, so its perplexity is not defined",
            where=data.name,
            remedy="evaluate a causal language model, or in Python measure by a `metric`, which masks tokens itself",
        )
    if batch.labels.numel() == 0:
        raise BadInput(
            "there are no labels to measure by",
            where=data.name,
            remedy="add `labels`, or in Python measure by a `metric` where the verb takes one",
        )
    # A model that accepts one batch accepts them all: a later failure is not about the choice of data.
    run = logits_of if head is None else partial(_hidden, head)
    hidden = _accepted(model, batch, data.name, run=run) if first else run(model, batch.inputs)
    if data.task == "language-modeling" and hidden.ndim == 3:
        hidden = hidden[:, :-1]
    scores = _Scores(model, head, hidden)
    if hidden.shape[:-1] != batch.labels.shape:
        shape = (*hidden.shape[:-1], scores.classes)
        raise BadInput(
            f"{name} gives scores of shape {shape} for labels of shape {tuple(batch.labels.shape)}",
            where=data.name,
            remedy=f"use a model whose head is for {data.task.replace('-', ' ')}, or in Python a `metric`",
        )
    predicted = batch.labels[batch.labels != IGNORED_LABEL]
    if predicted.numel() == 0:
        return scores
    lowest, highest = int(predicted.min()), int(predicted.max())
    if lowest < 0 or highest >= scores.classes:
        bad = lowest if lowest < 0 else highest
        raise BadInput(
            f"label {bad} is out of the range 0 to {scores.classes - 1} of the model's {scores.classes} classes",
            where=data.name,
            remedy="use the labels, or the tokenizer, that the model was trained with",
        )
    return scores


def _hidden(head: Head, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return head.inputs(model, partial(logits_of, inputs=inputs))


def _accepted(
    model: nn.Module, batch: Batch, where: str, *, run: Callable[[nn.Module, Mapping[str, Tensor]], Any] = logits_of
) -> Any:
    """The result of `run` on a batch; `BadInput` with the reason if the model does not accept it."""
    try:
        return run(model, batch.inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in batch.inputs.items())
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"{type(model).__name__} does not accept this data ({shapes}): {reason}",
            where=where,
            remedy="use data of the shape and kind the model was trained on",
        ) from error


def _score(predictions: _Scores, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every prediction in nats, and whether it is correct, as float64."""
    rows = max(1, SCORED_AT_ONCE // predictions.classes)
    losses, right = [], []
    hidden = predictions.hidden.flatten(0, -2)
    for some, targets in zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True):
        scores = predictions.of(some)
        losses.append(
            nn.functional.cross_entropy(wide := in_float64(scores), targets.to(wide.device), reduction="none")
        )
        # `argmax` returns the position of a NaN, which is no prediction.
        right.append(in_float64((scores.argmax(-1) == targets) & ~scores.isnan().any(-1)))
    return torch.cat(losses), torch.cat(right)


def _require_known_tokens(model: nn.Module, batch: Batch, where: str) -> None:
    """Refuse token ids that would be an IndexError on the CPU, and on CUDA an assertion that ends the process."""
    config = getattr(model, "config", None)
    if config is None:
        return
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    for name in TOKEN_IDS:
        given = batch.inputs.get(name)
        if given is None or vocabulary is None:
            continue
        given = given[given != IGNORED_LABEL] if name == "labels" else given
        bad = [int(each) for each in (given.amin(), given.amax()) if not 0 <= each < vocabulary] if len(given) else []
        if bad:
            raise BadInput(
                f"token id {bad[-1]} is beyond the model's vocabulary of {vocabulary}",
                where=where,
                remedy="use the tokenizer that the model was trained with",
            )
    token_ids = batch.inputs.get("input_ids")
    positions = getattr(config, "max_position_embeddings", None)
    if token_ids is not None and positions is not None and token_ids.shape[-1] > positions:
        raise BadInput(
            f"{token_ids.shape[-1]} tokens are longer than the model's {positions} positions",
            where=where,
            remedy=f"use a sequence length of at most {positions}",
        )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
