"""Quality against independent oracles: transformers' own loss, closed forms, and models whose score is known."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from compressor.data import Batch, EvaluationData, Preprocessing, open_data
from compressor.errors import BadInput
from compressor.evaluation import Quality, drop_error, measure_quality, quality_drop
from compressor.evaluation.metrics import ExampleScores

LETTERS = "abcdefgh"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(len(LETTERS), (211,), generator=generator)
    path = tmp_path / "text.txt"
    path.write_text("".join(LETTERS[number] for number in numbers))
    return path


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_perplexity_is_transformers_own_loss_on_the_same_windows(llama, tokenizer, text_file, *, batch_size):
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=16), batch_size=batch_size)
    quality = measure_quality(llama, data, device="cpu")

    windows = torch.tensor(tokenizer(text_file.read_text())["input_ids"][: 13 * 16]).reshape(13, 16)
    with torch.no_grad():
        loss = llama(input_ids=windows, labels=windows).loss.item()
    assert quality.metric == "perplexity"
    assert quality.count == 13 * 15
    assert quality.loss == pytest.approx(loss, rel=1e-6)
    assert quality.value == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [12, 257, 5_000])
def test_a_uniform_model_has_its_vocabulary_for_perplexity(lookup, tokenizer, text_file, *, vocabulary):
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=16))
    quality = measure_quality(lookup(torch.zeros(12, 1).expand(12, vocabulary)), data, device="cpu")
    assert quality.value == pytest.approx(vocabulary, rel=1e-12)


def test_a_bigram_model_has_the_perplexity_of_its_counts(lookup, tokenizer, text_file):
    """The logits are the log-frequencies of each letter after each other: an oracle made by counting."""
    ids = tokenizer(text_file.read_text())["input_ids"]
    pairs = list(itertools.pairwise(ids))
    table = torch.full((12, 12), -30.0)
    for first, second in set(pairs):
        table[first, second] = math.log(pairs.count((first, second)) / sum(a == first for a, _ in pairs))
    expected = -sum(float(table[first, second]) for first, second in pairs) / len(pairs)
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=len(ids)))
    quality = measure_quality(lookup(table), data, device="cpu")
    assert quality.count == len(pairs)
    assert quality.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("wrong", [0, 1, 5, 11])
def test_the_accuracy_of_a_lookup_model_is_exact(lookup, vector_data, wrong):
    numbers = torch.arange(11.0).unsqueeze(1)
    labels = torch.arange(11) % 3
    table = torch.nn.functional.one_hot(labels, 3).float()
    table[:wrong] = table[:wrong].roll(1, dims=1)
    quality = measure_quality(lookup(table), vector_data(numbers, labels), device="cpu")
    assert (quality.metric, quality.value, quality.count) == ("accuracy", (11 - wrong) / 11, 11)
    right_loss, wrong_loss = math.log(math.e + 2) - 1, math.log(math.e + 2)
    expected = (right_loss * (11 - wrong) + wrong_loss * wrong) / 11
    assert quality.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_said_as_infinite_and_never_skipped(lookup, tokenizer, text_file, *, value):
    table = torch.zeros(12, 12)
    table[4, :] = value
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=16), batch_size=1)
    quality = measure_quality(lookup(table), data, device="cpu")
    assert quality == Quality("perplexity", math.inf, math.inf, 13 * 15)


def test_a_finite_loss_beyond_the_largest_float_is_an_infinite_perplexity(lookup, tokenizer, text_file):
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=16))
    table = torch.zeros(12, 12)
    table[:, 0] = 1e4
    quality = measure_quality(lookup(table), data, device="cpu")
    assert quality.value == math.inf
    assert quality.loss == pytest.approx(1e4)


def test_nan_is_no_right_prediction(lookup, vector_data):
    table = torch.eye(3)
    table[1, 1] = math.nan
    quality = measure_quality(lookup(table), vector_data(torch.arange(3.0).unsqueeze(1), torch.arange(3)), device="cpu")
    assert quality.value == 2 / 3
    assert quality.loss == math.inf


def test_the_model_is_left_as_it_was_found(vector_data):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    data = vector_data(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64))

    first, second = (measure_quality(model, data, device="cpu") for _ in range(2))

    assert first == second, "dropout and batch statistics must be off"
    assert [module.training for module in model] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_model_that_fails_is_left_as_it_was_found(vector_data):
    model = nn.Sequential(nn.Linear(3, 4)).train()
    with pytest.raises(BadInput):
        measure_quality(model, vector_data(torch.randn(9, 7), torch.zeros(9, dtype=torch.int64)), device="cpu")
    assert model.training
    assert torch.is_grad_enabled()


def test_inputs_are_given_in_the_models_dtype(vector_data):
    model = nn.Linear(3, 2).to(torch.bfloat16)
    data = vector_data(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64))
    assert math.isfinite(measure_quality(model, data, device="cpu").loss)


def test_padding_does_not_change_what_a_classifier_says(tokenizer, tmp_path):
    """Texts of unequal length score in one batch as they score alone."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
    )
    path = tmp_path / "texts.jsonl"
    rows = [{"text": LETTERS[: 1 + i % 8], "label": i % 3} for i in range(10)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    together, alone = (
        measure_quality(model, open_data(path, Preprocessing(tokenizer=tokenizer), batch_size=size), device="cpu")
        for size in (10, 1)
    )
    assert together.value == alone.value
    assert together.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "baseline", "compressed", "drop"),
    [
        ("accuracy", 0.75, 0.5, 0.25),
        ("accuracy", 0.5, 0.75, -0.25),
        ("perplexity", 4.0, 4.5, 0.5),
        ("perplexity", 4.5, 4.0, -0.5),
        ("perplexity", 4.0, math.inf, math.inf),
        ("perplexity", math.inf, math.inf, math.inf),
        ("perplexity", math.inf, 4.0, -math.inf),
    ],
)
def test_a_positive_drop_is_worse(metric, baseline, compressed, *, drop):
    assert quality_drop(Quality(metric, baseline, 1.0, 8), Quality(metric, compressed, 1.0, 8)) == drop


def texts(examples: torch.Tensor) -> EvaluationData:
    def read(positions):
        return Batch({"input_ids": examples[list(positions)]}, examples[list(positions), 1:])

    return EvaluationData("texts", "language-modeling", len(examples), 32, read)


def vectors(inputs: torch.Tensor, labels: torch.Tensor) -> EvaluationData:
    def read(positions):
        return Batch({"inputs": inputs[list(positions)]}, labels[list(positions)])

    return EvaluationData("vectors", "classification", len(inputs), 32, read)


@pytest.mark.parametrize("kind", ["accuracy", "perplexity"])
def test_the_error_of_a_drop_is_that_of_leaving_out_one_example_after_the_other(lookup, kind):
    """The jackknife (Quenouille 1949) recomputes the drop itself, so it shares nothing with the linearization."""
    torch.manual_seed(0)
    if kind == "perplexity":
        table = torch.randn(12, 12)
        models = [lookup(table), lookup(table + 0.3 * torch.randn(12, 12))]
        examples = torch.randint(12, (60, 16))
        subsets = [texts(examples), *(texts(examples[torch.arange(60) != left_out]) for left_out in range(60))]
    else:
        models = [nn.Linear(5, 3), nn.Linear(5, 3)]
        with torch.no_grad():
            for changed, own in zip(models[1].parameters(), models[0].parameters(), strict=True):
                changed.copy_(own + 0.4 * torch.randn_like(own))
        inputs, labels = torch.randn(60, 5), torch.randint(3, (60,))
        keeps = [torch.arange(60) != left_out for left_out in range(60)]
        subsets = [vectors(inputs, labels), *(vectors(inputs[keep], labels[keep]) for keep in keeps)]
    qualities = [[measure_quality(model, data, device="cpu") for model in models] for data in subsets]
    drops = torch.tensor([quality_drop(*pair) for pair in qualities[1:]], dtype=torch.float64)
    expected = math.sqrt(59 / 60 * float((drops - drops.mean()).square().sum()))
    assert expected > 0
    assert drop_error(*qualities[0]) == pytest.approx(expected, rel=0.02)


def test_of_the_same_model_twice_the_drop_is_certain_and_of_one_example_it_is_not(lookup):
    model = lookup(torch.randn(12, 12))
    many, one = (measure_quality(model, texts(torch.randint(12, (count, 16))), device="cpu") for count in (9, 1))
    assert drop_error(many, many) == 0
    assert drop_error(one, one) == math.inf


def test_a_label_that_the_model_cannot_predict_is_bad_input(vector_data):
    model = nn.Linear(3, 4)
    for label in (4, -1):
        labels = torch.tensor([0, label])
        with pytest.raises(BadInput, match=f"label {label} is out of the range 0 to 3 of the model's 4 classes"):
            measure_quality(model, vector_data(torch.randn(2, 3), labels), device="cpu")


def test_data_of_another_shape_is_bad_input(vector_data):
    data = vector_data(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadInput, match=r"Linear does not accept this data \(inputs \(2, 5\)\)"):
        measure_quality(nn.Linear(3, 4), data, device="cpu")


def test_scores_of_another_shape_are_bad_input(vector_data):
    data = vector_data(torch.randn(2, 5, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadInput, match=r"scores of shape \(2, 5, 4\) for labels of shape \(2,\)"):
        measure_quality(nn.Linear(3, 4), data, device="cpu")


def test_an_output_without_logits_is_bad_input(vector_data):
    data = vector_data(torch.randn(2, 1, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadInput, match="LSTM returns tuple, which has no logits"):
        measure_quality(nn.LSTM(3, 4), data, device="cpu")


def test_a_failure_after_the_first_batch_is_not_blamed_on_the_data(vector_data):
    class FailsLater(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("broken")
            return x

    with pytest.raises(RuntimeError, match="broken"):
        measure_quality(FailsLater(), vector_data(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64)), device="cpu")


def test_token_ids_beyond_the_vocabulary_are_bad_input(llama, tokenizer, text_file):
    llama.resize_token_embeddings(6)
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=16))
    with pytest.raises(BadInput, match="token id 9 is beyond the model's vocabulary of 6"):
        measure_quality(llama, data, device="cpu")


def test_windows_longer_than_the_positions_are_bad_input(llama, tokenizer, text_file):
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=65))
    with pytest.raises(BadInput, match="65 tokens are longer than the model's 64 positions"):
        measure_quality(llama, data, device="cpu")


def test_a_masked_language_model_has_no_perplexity(tokenizer, text_file):
    config = BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    data = open_data(text_file, Preprocessing(tokenizer=tokenizer, sequence_length=16))
    with pytest.raises(BadInput, match=r"predicts masked tokens.*`metric`"):
        measure_quality(BertForMaskedLM(config), data, device="cpu")


def test_a_plain_module_takes_one_tensor(lookup, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "ab", "label": 0}')
    with pytest.raises(BadInput, match="does not take what this data has"):
        measure_quality(lookup(torch.eye(12)), open_data(path, Preprocessing(tokenizer=tokenizer)), device="cpu")


@pytest.mark.parametrize("loss", [0.5, math.inf])
def test_a_quality_is_read_from_a_record_as_it_was(loss: float) -> None:
    scores = ExampleScores(np.array([0.1, loss]), np.array([1.0, 0.0]), np.array([2.0, 1.0]))
    for one in (
        Quality("accuracy", 0.75, loss, 3, scores, replicates=(0.5, 1 / 3)),
        Quality("f1", 0.1, None, 3, higher_is_better=True),
    ):
        again = Quality.of_record(json.loads(json.dumps(one.recorded())))
        assert again == one
        assert again.replicates == one.replicates
        assert (again.examples is None) == (one.examples is None)
        if one.examples is not None and again.examples is not None:
            for before, after in zip(astuple(one.examples), astuple(again.examples), strict=True):
                np.testing.assert_array_equal(before, after)
