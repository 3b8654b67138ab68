"""Moments a segment at a time are those of the whole model, and a change costs what they predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor import BadInput, compress
from compressor.calibration import (
    Calibration,
    CalibrationData,
    CalibrationSettings,
    RefinementSettings,
    calibrate,
    compensate,
    holdout_loss,
    refine,
    split_examples,
)
from compressor.calibration.calibrate import recalibrate
from compressor.calibration.calibration import dense_outputs
from compressor.calibration.criterion import hidden_rows, outputs_of, sampled_loss
from compressor.calibration.holdout import cost_of_predictions
from compressor.data import Batch, open_data
from compressor.engine import Fingerprint, Journal, Run
from compressor.factorize import Metric, TiedMetric
from compressor.measure.moments import kept_rows, oas_shrinkage
from tests.calibration.tiny_models import (
    BLOCKS,
    CHAINS,
    CPU,
    ODD,
    TEXTS,
    TOKENS,
    batch_of,
    calibrated,
    eligible,
    inputs_for,
    left_as_it_was,
    odd,
    planned,
    transformer,
)
from tests.model.test_head import capped

WHOLE = CalibrationSettings(by_segment=False)


def assert_same(one: Calibration, other: Calibration) -> None:
    """The same metrics and uses to float32 precision."""
    assert one.metrics.keys() == other.metrics.keys()
    assert len(one.metrics) > 0
    assert one.uses == other.uses
    for name in one.metrics:
        a, b = one.metrics[name], other.metrics[name]
        assert (a.mean is None) == (b.mean is None)
        pairs = [(a.inputs, b.inputs), (a.gradients, b.gradients)]
        if a.mean is not None and b.mean is not None:
            pairs.append((a.mean, b.mean))
        for left, right in pairs:
            assert float((left - right).abs().max()) <= 1e-4 * float(right.abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_moments_segment_by_segment_are_those_of_the_whole_model(name: str) -> None:
    model = transformer(name)
    data = [inputs_for(name, 4), inputs_for(name, 3)]
    if name in TEXTS:
        data += [inputs_for(name, 4, padded=True), inputs_for(name, 2, length=5)]
    with left_as_it_was(model):
        cut = calibrated(model, data)
        assert cut.segments.count == BLOCKS + 1
        assert cut.criterion == "likelihood"
        assert_same(cut, calibrated(model, data, settings=WHOLE))


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_and_those_of_other_models(name: str) -> None:
    model, inputs = odd(name)
    with left_as_it_was(model):
        cut = calibrated(model, [inputs, inputs])
        assert cut.metrics.keys() == {layer.name for layer in eligible(model)}
        assert_same(cut, calibrated(model, [inputs, inputs], settings=WHOLE))


@pytest.mark.parametrize("name", ["llama", "vit", "mlp", "piped"])
def test_moments_of_inputs_are_of_all_examples_where_gradients_are_of_some(name: str) -> None:
    chain = name in CHAINS
    model = transformer(name) if chain else odd(name)[0]
    data = [inputs_for(name, examples) if chain else {"inputs": torch.randn(examples, 6)} for examples in (4, 3, 4, 2)]
    some = calibrated(model, data, settings=CalibrationSettings(gradient_every=2, slices=1))
    inputs, gradients = (calibrated(model, each, settings=CalibrationSettings(slices=1)) for each in (data, data[::2]))
    assert some.uses == gradients.uses
    for layer, metric in some.metrics.items():
        assert isinstance(metric, Metric)
        torch.testing.assert_close(metric.gradients, gradients.metrics[layer].gradients)
        expected = inputs.metrics[layer]
        assert float((metric.inputs - expected.inputs).abs().max()) <= 1e-4 * float(expected.inputs.abs().max())
        assert (metric.mean is None) == (expected.mean is None)
        if metric.mean is not None:
            torch.testing.assert_close(metric.mean, expected.mean)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bart", "t5", "clip", "swin", "piped"])
def test_the_moments_between_segments_are_those_of_the_whole_models_gradients(name: str) -> None:
    model, inputs = (transformer(name), inputs_for(name, 5)) if name in CHAINS else odd(name)
    calibration = calibrated(model.eval(), [inputs])
    batch, chains = calibration.data.fit[0], calibration.segments.chains
    # What enters each block, then what each chain but the last gives, each followed by autograd alone.
    entering: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def enter(block: str, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        first = (arguments or tuple(named.values()))[0]
        entering[block] = first if first.requires_grad else first.clone().requires_grad_(True)
        entering[block].retain_grad()
        return (entering[block], *arguments[1:]), named

    def leave(block: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        given[block] = output[0] if isinstance(output, tuple) else output
        given[block].retain_grad()

    for chain in chains:
        for block in chain.blocks:
            model.get_submodule(block).register_forward_pre_hook(partial(enter, block), with_kwargs=True)
        if chain is not chains[-1]:
            model.get_submodule(chain.blocks[-1]).register_forward_hook(partial(leave, chain.blocks[-1]))
    generator = torch.Generator().manual_seed(calibration.run.seed)
    sampled_loss(outputs_of(model, batch.inputs), batch.masks, calibration.criterion, generator=generator).backward()

    def moment(gradient: Tensor) -> Tensor:
        rows = hidden_rows(gradient, batch.masks)
        return oas_shrinkage((rows.T @ rows).double() / len(rows), len(rows))

    blocks = [block for chain in chains for block in chain.blocks]
    for segment, block in enumerate(blocks):
        expected = [entering[block].grad]
        if segment > 0 and blocks[segment - 1] in given:
            # Where all that follows takes it from the next chain's first block there is nothing left of its own.
            expected.append(None if name in ("swin", "piped") else given[blocks[segment - 1]].grad)
        found = calibration.cache.boundary(segment)
        assert len(found) == len(expected)
        for one, gradient in zip(found, expected, strict=True):
            other = torch.zeros_like(one) if gradient is None else moment(gradient)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "clip", "t5"])
def test_and_those_of_embeddings(name: str) -> None:
    model, inputs = (transformer(name), inputs_for(name, 5)) if name in CHAINS else odd(name)
    cut = calibrated(model, [inputs, inputs], embeddings=True)
    # The position bias of T5 is looked up once for all blocks.
    assert (cut.segments.count == 1) == (name == "t5")
    whole = calibrated(model, [inputs, inputs], embeddings=True, settings=WHOLE)
    found = [name for name, layer in cut.layers.items() if layer.kind == "embedding"]
    assert found
    for each in found:
        a, b = cut.metrics[each], whole.metrics[each]
        assert type(a) is type(b)
        for one, other in zip(parts_of(a), parts_of(b), strict=True):
            torch.testing.assert_close(one.inputs, other.inputs, rtol=1e-4, atol=1e-9)
            assert float((one.gradients - other.gradients).abs().max()) <= 1e-4 * float(other.gradients.abs().max())
        assert cut.uses[each] == whole.uses[each]


def test_batches_that_are_run_backward_are_of_all_classes_of_examples_in_their_order() -> None:
    labels = torch.arange(128) // 16
    data = open_data((torch.randn(128, 3), labels))
    settings = CalibrationSettings.of("fast")
    split = split_examples(data, settings)
    assert len(split.fit) == 4
    [backward] = split.fit[:: settings.gradient_every]
    assert set(backward.labels.tolist()) == set(range(8))
    found = torch.cat([each.labels for each in (*split.fit, *split.holdout)])
    assert torch.equal(found.sort().values, labels)


def test_moments_of_inputs_are_not_taken_again_where_a_calibration_is_kept(tmp_path: Path) -> None:
    model, batches = transformer("llama"), [Batch(inputs_for("llama", 2), torch.empty(0)) for _ in range(4)]
    data = CalibrationData(tuple(batches[:3]), (batches[3],), labeled=False)
    journal = Journal.open(tmp_path / "cache", Fingerprint(), option="calibration_cache")
    found, units = [], []
    for _ in range(2):
        run = Run(CPU, calibrated=journal)
        settings = CalibrationSettings(gradient_every=2)
        found.append(calibrate(model, eligible(model), data, run=run, settings=settings))
        units.append((tmp_path / "cache" / "journal.jsonl").read_bytes())
    assert units[0] == units[1]
    assert found[0].uses == found[1].uses
    journal.close()


def few_logits(width: int = 40, rows: int = 5) -> CalibrationSettings:
    """Settings with which the logits of a few rows are in memory at a time."""
    return CalibrationSettings(logit_bytes=4 * width * rows, refinement=RefinementSettings(passes=2))


@contextmanager
def most_rows_of(head: nn.Module) -> Iterator[list[int]]:
    """The rows of outputs that a head has in a call."""
    rows: list[int] = []
    handle = head.register_forward_hook(lambda _, __, output: rows.append(output.shape[:-1].numel()))
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "capped", "t5", "whisper"])
def test_with_few_logits_at_a_time_the_moments_are_those_of_the_whole_model(name: str) -> None:
    data: list[dict[str, Tensor]]
    if name in CHAINS:
        model = transformer(name)
        data = [inputs_for(name, 4), inputs_for(name, 4, padded=True), inputs_for(name, 2, length=5)]
    elif name == "capped":
        model, data = capped(), [{"input_ids": torch.randint(3, 40, (4, 7))}]
    else:
        model, inputs = odd(name)
        data = [inputs]
    head = model.get_submodule(
        "cls.predictions.decoder" if name == "bert" else "lm_head" if name != "whisper" else "proj_out"
    )
    few = few_logits()
    with left_as_it_was(model), most_rows_of(head) as rows:
        cut = calibrated(model, data, settings=few, embeddings=name in ("llama", "capped"))
    assert cut.segments.head is not None
    # The first examples, on which it is found, are one at least.
    assert max(rows) <= 11
    assert rows.count(5) > 2
    whole = calibrated(model, data, settings=replace(few, by_segment=False), embeddings=name in ("llama", "capped"))
    assert whole.segments.head is None
    assert cut.uses == whole.uses
    for each in cut.metrics:
        for one, other in zip(parts_of(cut.metrics[each]), parts_of(whole.metrics[each]), strict=True):
            torch.testing.assert_close(one.inputs, other.inputs, rtol=1e-4, atol=1e-4 * float(other.inputs.abs().max()))
            tolerance = 1e-4 * float(other.gradients.abs().max())
            torch.testing.assert_close(one.gradients, other.gradients, rtol=1e-4, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("compressed_head", [False, True])
def test_so_are_the_holdout_loss_and_what_is_fitted(*, compressed_head: bool) -> None:
    model, data = transformer("llama"), [inputs_for("llama", 4), inputs_for("llama", 4, padded=True)]
    model.requires_grad_(False)
    once = calibrated(model, data, settings=few_logits())
    ranks = {name: 3 if compressed_head or name != "lm_head" else None for name in once.layers}
    start = compensate(once, [planned(layer, ranks[name]) for name, layer in once.layers.items()])
    found = {}
    for rows in (5, 1000):
        calibration = replace(once, settings=few_logits(rows=rows))
        with most_rows_of(model.get_submodule("lm_head")) as seen:
            fitted = refine(calibration, start)
            losses = [holdout_loss(calibration, each.modules) for each in (start, fitted)]
        assert seen
        assert max(seen) <= rows
        found[rows] = losses, fitted
    (few, few_fitted), (many, many_fitted) = found.values()
    assert few == pytest.approx(many, rel=1e-4)
    for name, tensors in few_fitted.factors.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, many_fitted.factors[name][key], rtol=0.02, atol=2e-3)


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, *given: Any) -> Any:
        _, arguments, named = given
        made = function(*arguments, **(named or {}))
        for each in made if isinstance(made, list | tuple) else (made,):
            if isinstance(each, Tensor) and each.device == CPU:
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
        return made


def test_of_a_head_of_many_classes_the_diagonal_of_its_gradients_is_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    x, labels = torch.randn(3000, 6), torch.zeros(3000, dtype=torch.long)
    settings = CalibrationSettings(most_classes=4)
    found = calibrated(model, [{"inputs": x}], labels=labels, settings=settings)
    hidden = model[:2](x).double().detach()
    p = model(x).double().detach().softmax(-1)
    metric, whole = found.metrics["2"], calibrated(model, [{"inputs": x}], labels=labels).metrics["2"]
    assert isinstance(metric, Metric)
    torch.testing.assert_close(metric.gradients, (p * (1 - p)).mean(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(metric.inputs, whole.inputs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metric.mean, hidden.mean(0), rtol=1e-5, atol=1e-7)
    assert found.uses["2"] == 1
    again = recalibrate(found, {})
    assert torch.equal(again.metrics["2"].gradients, metric.gradients)
    alike = calibrated(model, [{"inputs": x}], settings=replace(settings, gradient_moments=False), labels=labels)
    assert torch.equal(alike.metrics["2"].gradients, torch.ones(5, dtype=torch.float64))


def test_moments_are_taken_again_of_the_batches_that_layers_are_refitted_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    batches = [{"inputs": torch.randn(10, 6)} for _ in range(6)]
    settings = CalibrationSettings(refit_every=2, gradient_every=2, slices=2)
    some, others = recalibrate(calibrated(model, batches, settings=settings), {}), calibrated(model, batches)
    of_some = calibrated(model, [*batches[::2]])
    for name, metric in of_some.metrics.items():
        torch.testing.assert_close(some.metrics[name].inputs, metric.inputs)
        assert not torch.allclose(some.metrics[name].inputs, others.metrics[name].inputs)


@pytest.mark.parametrize("by_segment", [True, False])
def test_layers_as_wide_as_the_head_are_no_heads(*, by_segment: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    settings = CalibrationSettings(most_classes=4, by_segment=by_segment)
    found, expected = (
        calibrated(model, [{"inputs": torch.randn(20, 6, generator=torch.Generator().manual_seed(1))}], settings=each)
        for each in (settings, replace(settings, most_classes=4096))
    )
    assert found.heads == {"4"}
    for name in ("0", "2"):
        torch.testing.assert_close(found.metrics[name].gradients, expected.metrics[name].gradients)


def test_nothing_of_the_size_of_the_vocabulary_squared_is_made() -> None:
    vocabulary = 20_000
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(vocabulary, (4, 32))} for _ in range(2)]
    settings = CalibrationSettings(logit_bytes=4 * vocabulary * 8, refinement=RefinementSettings(passes=1))
    with Largest() as largest:
        calibration = calibrated(model, batches, settings=settings)
        plans = [planned(layer, 4) for layer in calibration.layers.values()]
        start = compensate(calibration, plans)
        refined = refine(calibration, start)
        assert holdout_loss(calibration, refined.modules) >= 0
    assert calibration.heads == {"lm_head"}
    assert calibration.metrics["lm_head"].gradients.shape == (vocabulary,)
    # The first example has 32 tokens, so its logits are the most; the head's matrix has 16 numbers for each class.
    assert largest.numbers <= 32 * vocabulary


def parts_of(metric: Metric | TiedMetric) -> tuple[Metric, ...]:
    return (metric,) if isinstance(metric, Metric) else (metric.lookup, metric.head)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_padding_changes_no_moment(name: str) -> None:
    model = transformer(name)
    ids = torch.randint(3, 40, (4, 6))
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones(4, 6), torch.zeros(4, 5)], 1).long(),
    }
    with_mask = {"input_ids": ids, "attention_mask": torch.ones(4, 6).long()}
    assert_same(calibrated(model, [padded]), calibrated(model, [with_mask]))


def t5() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_an_encoder_decoder_is_given_its_labels_shifted_by_itself() -> None:
    model = t5()
    ids, labels = torch.randint(3, 40, (4, 6)), torch.randint(3, 40, (4, 5))
    start = torch.zeros(4, 1, dtype=torch.long)
    explicit = {"input_ids": ids, "decoder_input_ids": torch.cat([start, labels[:, :-1]], 1)}
    assert_same(calibrated(model, [{"input_ids": ids, "labels": labels}]), calibrated(model, [explicit]))


def test_an_encoder_decoder_without_anything_for_its_decoder_is_named() -> None:
    with pytest.raises(BadInput, match="T5ForConditionalGeneration does not take calibration batches of input_ids"):
        calibrated(t5(), [{"input_ids": torch.randint(3, 40, (4, 6))}])


def test_a_module_of_several_inputs_takes_them_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(6, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + self.b(right)

    left, right = torch.randn(16, 5), torch.randn(16, 6)
    found = calibrated(Two(), [{"right": right, "left": left}])
    assert found.metrics["a"].inputs.shape == (5, 5)
    assert found.metrics["b"].inputs.shape == (6, 6)
    with pytest.raises(BadInput, match="does not take what this data has: left, other"):
        calibrated(Two(), [{"left": left, "other": right}])


@pytest.mark.slow
@pytest.mark.parametrize("length", [6, 5])
def test_padding_of_encoder_and_decoder_changes_no_moment(length: int) -> None:
    # The decoder's texts are as long as the encoder's, or shorter: each has its own padding.
    model = t5()
    ids, labels = torch.randint(3, 40, (4, 6)), torch.randint(3, 40, (4, length))
    longer = torch.cat([torch.ones(4, 6), torch.zeros(4, 3)], 1).long()
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(4, 3, dtype=torch.long)], 1),
        "attention_mask": longer,
        "labels": torch.cat([labels, torch.full((4, 3), -100)], 1),
    }
    assert_same(calibrated(model, [padded]), calibrated(model, [{"input_ids": ids, "labels": labels}]))


@pytest.mark.parametrize(("slices", "seeds"), [(1, {0: 7}), (2, {0: 7, 1: 8}), (8, {0: 7, 1: 8, 2: 9})])
def test_the_gradients_are_those_of_the_sampled_loss_drawn_in_order_by_one_generator_a_slice(
    slices: int, seeds: dict[int, int]
) -> None:
    # By autograd alone: the moment of the gradients at the outputs of the classifier.
    model = transformer("vit").eval()
    data = [inputs_for("vit", 3), inputs_for("vit", 4), inputs_for("vit", 2)]
    gradients = []
    for number, inputs in enumerate(data):
        if number in seeds:
            generator = torch.Generator().manual_seed(seeds[number])
        outputs = outputs_of(model, inputs).detach().requires_grad_(True)
        sampled_loss(outputs, (), "likelihood", generator=generator).backward()
        assert outputs.grad is not None
        gradients.append(outputs.grad)
    g = torch.cat(gradients).double()
    batches = tuple(batch_of(inputs) for inputs in data)
    examples = CalibrationData(batches, batches, labeled=False)
    run, settings = Run(torch.device("cpu"), seed=7), CalibrationSettings(slices=slices)
    calibration = calibrate(model, eligible(model), examples, run=run, settings=settings)
    found = calibration.metrics["classifier"].gradients
    expected = g.T @ g / len(g)
    # Shrinkage keeps the eigenvectors and pulls toward the trace's multiple of the identity.
    identity = torch.eye(len(expected), dtype=torch.float64) * expected.trace() / len(expected)
    weight = float(((found - expected) * (identity - expected)).sum() / (identity - expected).square().sum())
    assert 0 <= weight <= 1
    torch.testing.assert_close(found, (1 - weight) * expected + weight * identity, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("certainty", [0.0, 1.0, 4.0, 12.0, 30.0])
def test_the_sampled_gradients_have_the_fisher_as_their_second_moment_however_sure_the_model(certainty: float) -> None:
    logits = torch.tensor([certainty, 0.0, -0.5, 1.0], dtype=torch.float64)
    p = logits.softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    rows = logits.float().expand(20_000, 4).clone().requires_grad_(True)
    sampled_loss(rows, (), "likelihood", generator=torch.Generator().manual_seed(0)).backward()
    assert rows.grad is not None
    g = rows.grad.double()
    # Every gradient has the same length, so that a thousand examples say as much of a sure model as of another.
    torch.testing.assert_close(g.square().sum(-1), fisher.trace().expand(len(g)), rtol=1e-3, atol=0)
    error = (g.T @ g / len(g) - fisher).norm() / fisher.norm()
    assert error < 0.03
    # And a mean of zero: where the gradients of several predictions add up, their products cancel.
    assert g.mean(0).norm() < 4 * (fisher.trace() / len(g)).sqrt()


def test_the_moments_gradients_are_the_fisher_of_the_predictions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(20_000, 6)
    found = calibrated(model, [{"inputs": x}], labels=torch.zeros(20_000, dtype=torch.long))
    assert found.criterion == "likelihood"
    p = model(x).softmax(-1).detach().double()
    fisher = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(found.metrics["2"].gradients, fisher, rtol=0, atol=0.01)


def test_a_model_without_a_likelihood_has_the_curvature_of_its_outputs() -> None:
    # Half the squared change of z = W x has the identity for its curvature at z.
    torch.manual_seed(0)
    found = calibrated(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), [{"inputs": torch.randn(20_000, 6)}])
    assert found.criterion == "outputs"
    torch.testing.assert_close(found.metrics["2"].gradients, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("outputs", "labels", "criterion"),
    [
        ((8, 3), (8,), "likelihood"),
        ((8, 3), (8, 1), "likelihood"),
        ((8, 5, 3), (8, 5), "likelihood"),
        ((8, 5, 3), (8, 4), "likelihood"),  # of the next tokens
        ((8, 3), None, "outputs"),
        ((8, 1), (8,), "outputs"),  # one logit, or a count
        ((8, 3, 6, 6), (8, 6, 7), "outputs"),  # a class for every pixel, which the last dimension does not hold
    ],
)
def test_labels_make_outputs_a_prediction_where_they_fit(
    outputs: tuple[int, ...], labels: tuple[int, ...] | None, criterion: str
) -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, outputs[1:].numel())

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).view(outputs)

    outputs = torch.Size(outputs)
    given = None if labels is None else torch.zeros(labels, dtype=torch.long)
    found = calibrated(Shaped(), [{"inputs": torch.randn(8, 6)}], labels=given)
    assert found.criterion == criterion
    assert found.metrics.keys() == {"linear"}


def bert_encoder() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def changed_layer(calibration: Calibration, name: str, size: float, *, seed: int) -> tuple[nn.Module, float]:
    """A layer with a little noise in its matrix, the bias taking up the mean, and what that costs to second order."""
    layer, metric = calibration.layers[name], calibration.metrics[name]
    dense = calibration.model.get_submodule(layer.module)
    changed = type(dense)(dense.in_features, dense.out_features, bias=dense.bias is not None)
    noise = torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = size * float(dense.weight.detach().std()) * noise
    with torch.no_grad():
        changed.weight.copy_(dense.weight + change)
        if dense.bias is not None:
            assert metric.mean is not None
            changed.bias.copy_(dense.bias - change @ metric.mean)
    return changed, calibration.uses[name] / 2 * float((metric.gradients @ change @ metric.inputs * change).sum())


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "inputs", "labels", "criterion"),
    [
        (classifier, lambda: {"inputs": torch.randn(3000, 6)}, torch.zeros(3000, dtype=torch.long), "likelihood"),
        (classifier, lambda: {"inputs": torch.randn(3000, 6)}, None, "outputs"),
        (lambda: transformer("gpt-neox"), lambda: inputs_for("gpt-neox", 300), None, "likelihood"),
        (bert_encoder, lambda: inputs_for("bert", 300), None, "outputs"),
    ],
    ids=["classifier", "regression", "language model", "encoder"],
)
def test_the_predicted_loss_is_the_measured_one_for_small_changes(
    build: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]], labels: Tensor | None, *, criterion: str
) -> None:
    model = build()
    calibration = calibrated(model, [inputs()], labels=labels)
    assert calibration.criterion == criterion
    ratios = []
    for name, layer in list(calibration.layers.items())[:8]:
        predicted, measured = 0.0, 0.0
        for seed in range(4):
            module, cost = changed_layer(calibration, name, 0.01, seed=seed)
            predicted += cost
            measured += holdout_loss(calibration, {layer.module: module})
        ratios.append(predicted / measured)
    # Positions, and inputs and gradients, are taken as independent, which they are not quite.
    assert 0.7 < sum(ratios) / len(ratios) < 1.4, ratios


def test_the_holdout_loss_of_an_encoder_is_half_the_squared_change_of_its_outputs() -> None:
    model = bert_encoder()
    held = [inputs_for("bert", 3, padded=True), inputs_for("bert", 2, length=5)]
    calibration = calibrated(model, [inputs_for("bert", 4)], held)
    assert calibration.criterion == "outputs"
    name = next(iter(calibration.layers))
    layer = calibration.layers[name]
    changed, _ = changed_layer(calibration, name, 0.5, seed=0)
    found = holdout_loss(calibration, {layer.module: changed})
    total, rows = 0.0, 0
    with torch.no_grad():
        before = [model(**inputs).last_hidden_state for inputs in held]
        model.get_submodule(layer.module).load_state_dict(changed.state_dict())
        for inputs, old in zip(held, before, strict=True):
            mask = inputs.get("attention_mask", torch.ones(old.shape[:2])).bool()
            change = (model(**inputs).last_hidden_state - old)[mask]
            total += float(change.double().square().sum()) / 2
            rows += len(change)
    assert found == pytest.approx(total / rows, rel=1e-4)


def test_the_holdout_loss_of_a_classifier_is_the_divergence_of_its_predictions() -> None:
    model, held = classifier(), torch.randn(50, 6)
    data = [{"inputs": torch.randn(50, 6)}], [{"inputs": held[:20]}, {"inputs": held[20:]}]
    calibration = calibrated(model, *data, labels=torch.zeros(50, dtype=torch.long))
    changed, _ = changed_layer(calibration, "2", 0.5, seed=0)
    found = holdout_loss(calibration, {"2": changed})
    with torch.no_grad():
        p = model(held).double().softmax(-1)
        model[2] = changed
        q = model(held).double().softmax(-1)
    assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_rows_are_the_predictions_without_padding() -> None:
    outputs, mask = torch.randn(2, 3, 5), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(kept_rows(outputs, (mask,)), torch.stack([outputs[0, 0], outputs[0, 1], outputs[1, 0]]))
    assert torch.equal(kept_rows(outputs, ()), outputs.reshape(6, 5))
    assert torch.equal(kept_rows(outputs[:, 0], (mask,)), outputs[:, 0])


def test_bfloat16_is_calibrated_in_float32_and_better() -> None:
    model = transformer("llama").to(torch.bfloat16)
    data = [inputs_for("llama", 8) for _ in range(2)]
    half, full = calibrated(model, data), calibrated(model.float(), data)
    assert half.segments.count == BLOCKS + 1
    for name in full.metrics:
        assert half.metrics[name].inputs.dtype == torch.float64
        one, other = half.metrics[name].inputs, full.metrics[name].inputs
        assert float((one - other).norm()) < 0.05 * float(other.norm())


@pytest.mark.parametrize("batch", [0, 2])
def test_the_first_layer_that_is_given_an_overflow_is_named(batch: int) -> None:
    model = transformer("llama").half()
    block = model.model.layers[0]
    with torch.no_grad():
        # Of all tokens 5 alone has a first feature, which the first block multiplies and squares.
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[5, 0] = 60
        block.self_attn.o_proj.weight[0] = 0
        block.mlp.gate_proj.weight.zero_()
        block.mlp.gate_proj.weight[:, 0] = 1000
        block.mlp.up_proj.weight[:, 0] = 1000
    data = [torch.randint(6, 40, (2, 6)) for _ in range(4)]
    data[batch][0, 3] = 5
    with pytest.raises(BadInput, match=r"layer model\.layers\.0\.mlp\.down_proj are not finite"):
        compress(model, keep=0.5, calibration=[{"input_ids": ids} for ids in data], prefer="size", bits=16)


def test_without_the_gradients_moment_the_metric_is_of_the_inputs_alone() -> None:
    model, data = transformer("gpt2"), [inputs_for("gpt2", 4)]
    whole = calibrated(model, data)
    found = calibrated(model, data, settings=CalibrationSettings(gradient_moments=False))
    assert found.metrics.keys() == whole.metrics.keys()
    for name, metric in found.metrics.items():
        assert torch.equal(metric.inputs, whole.metrics[name].inputs)
        assert torch.equal(metric.gradients, torch.eye(len(metric.gradients), dtype=torch.float64))
        assert not torch.equal(metric.gradients, whole.metrics[name].gradients)


def test_large_means_leave_what_varies() -> None:
    # In float32 the second moment of 10,000 + noise holds nothing of the noise.
    torch.manual_seed(0)
    x = torch.randn(400, 6) * torch.tensor([0.1, 0.5, 1, 2, 3, 4]) + 1e4
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    metric = calibrated(model, [{"inputs": x[:200]}, {"inputs": x[200:]}]).metrics["0"]
    covariance = torch.cov(x.T.double(), correction=0)
    assert float((metric.inputs - covariance).norm()) < 0.05 * float(covariance.norm())


@pytest.mark.slow
@pytest.mark.parametrize("labels", [None, 1])
def test_any_form_of_batches(labels: int | None) -> None:
    model = transformer("gpt2")
    data = [inputs_for("gpt2", 2, length=4 + index, padded=index % 2 == 0) for index in range(4)]
    if labels is not None:
        data = [inputs | {"labels": inputs["input_ids"]} for inputs in data]
    assert compress(model, keep=0.6, calibration=data, prefer="size", bits=16).plan.calibration is not None


def test_batches_are_not_changed() -> None:
    model, inputs = odd("in place")
    before = inputs["inputs"].clone()
    calibrated(model, [inputs])
    assert torch.equal(before, inputs["inputs"])
    assert isinstance(batch_of(inputs), Batch)


def test_an_empty_batch_is_named() -> None:
    for data in ([torch.randn(4, 6), torch.randn(0, 6)], [{"labels": torch.zeros(3).long()}] * 3):
        with pytest.raises(BadInput, match="empty batch"):
            compress(classifier(), keep=0.5, calibration=data, prefer="size", bits=16)


def test_start_and_end_of_an_answer_both_count() -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(config).eval()
    inputs = inputs_for("bert", 5)
    both = outputs_of(model, inputs)
    said = model(**inputs)
    assert torch.equal(both[:, 0], said.start_logits)
    assert torch.equal(both[:, 1], said.end_logits)
    found = calibrated(model, [inputs, inputs_for("bert", 5)], [inputs])
    assert found.criterion == "likelihood"
    # The head's row for the end of the answer alone is changed: the loss is that of both, by hand.
    head = nn.Linear(16, 2)
    head.load_state_dict(model.qa_outputs.state_dict())
    with torch.no_grad():
        head.weight[1] *= 0.5
        changed = head(model.bert(**inputs).last_hidden_state)
        after, before = (each.double().log_softmax(-1) for each in (changed[..., 1], said.end_logits))
        expected = float((before.exp() * (before - after)).sum()) / (2 * 5)
    assert holdout_loss(found, {"qa_outputs": head}) == pytest.approx(expected, rel=1e-4)


def test_the_divergence_at_a_wide_head_and_its_gradient_are_those_of_the_logits() -> None:
    model = transformer("llama")
    fit, held = inputs_for("llama", 4), [inputs_for("llama", 3, padded=True), inputs_for("llama", 2, length=5)]
    costs, gradients = [], []
    for most in (1, TOKENS):
        calibration = calibrated(model, [fit], held, settings=CalibrationSettings(most_classes=most))
        chunk, last = calibration.data.chunks("holdout")[0], calibration.segments.count - 1
        [before] = dense_outputs(calibration, last, chunk)
        after = (before * 1.1).requires_grad_(True)
        cost, rows = cost_of_predictions(calibration, chunk, after, modules={})
        gradients.append(torch.autograd.grad(cost, after)[0])
        layer = next(iter(calibration.layers.values()))
        changed, _ = changed_layer(calibration, layer.name, 0.5, seed=0)
        costs.append((float(cost.detach()), rows, holdout_loss(calibration, {layer.module: changed})))
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert costs[0][0] > 0.01
