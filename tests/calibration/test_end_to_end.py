"""All layers fitted together to the dense model's predictions: kept only where that lowers the holdout loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import (
    Calibration,
    CalibrationData,
    CalibrationSettings,
    Compensated,
    RefinementSettings,
    calibrate,
    holdout_loss,
    refine,
    refine_end_to_end,
    uncompensated,
)
from compressor.calibration.candidates import Candidate, Search
from compressor.calibration.end_to_end import fits_end_to_end
from compressor.calibration.refinement import fit_to_dense
from compressor.calibration.settings import EndToEndSettings
from compressor.engine import Fingerprint, Journal, Run
from compressor.planning import LayerPlan
from tests.calibration.tiny_models import CPU, batch_of, calibrated, eligible, inputs_for, left_as_it_was, transformer

FORMS = [("dense@3g16", 0), ("dense@2g16z", 2), ("plain", 5)]
FITTING = replace(EndToEndSettings().fitting, passes=3, steps=4, scales_learning_rate=1e-2)
SETTINGS = CalibrationSettings(end_to_end=EndToEndSettings(FITTING, texts=1))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibration]:
    """A small language model, calibrated in a journal that stays."""
    torch.manual_seed(0)
    model = transformer("llama").eval()
    fit, holdout = (tuple(batch_of(inputs_for("llama", 12)) for _ in range(2)) for _ in range(2))
    journal = Journal.open(tmp_path_factory.mktemp("work"), Fingerprint(), option="work_dir")
    data = CalibrationData(fit, holdout, labeled=False)
    yield calibrate(model, eligible(model), data, run=Run(CPU, journal=journal), settings=SETTINGS)
    journal.close()


def planned(calibration: Calibration, form: str, rank: int) -> list[LayerPlan]:
    layers = calibration.layers.values()
    return [LayerPlan(each.name, each.shape, each.kind, rank, form, rank, 0.0, "") for each in layers]


def started(calibration: Calibration, form: str, rank: int) -> Compensated:
    return uncompensated(calibration, planned(calibration, form, rank))


def tensors(solution: Compensated) -> dict[str, Tensor]:
    return {key: each for factors in solution.factors.values() for key, each in factors.items()}


def same(one: Compensated, other: Compensated) -> bool:
    found, others = tensors(one), tensors(other)
    return found.keys() == others.keys() and all(torch.equal(each, others[key]) for key, each in found.items())


@pytest.mark.parametrize(("form", "rank"), FORMS)
def test_what_is_judged_is_stored_and_loses_less(calibration: Calibration, form: str, rank: int) -> None:
    start = started(calibration, form, rank)
    judged: list[float] = []

    def noted(
        modules: Mapping[str, nn.Module],
        losses: Sequence[Callable[[], Tensor]],
        holdout_error: Callable[[], float],
        *,
        seed: int,
        settings: RefinementSettings,
    ) -> bool:
        def error() -> float:
            judged.append(holdout_error())
            return judged[-1]

        return fit_to_dense(modules, losses, error, seed=seed, settings=settings)

    with left_as_it_was(calibration.model):
        fitted = refine_end_to_end(calibration, start, f"judged {form}", fit=noted)
    assert judged[0] == pytest.approx(holdout_loss(calibration, start.modules), rel=1e-5)
    assert min(judged) < 0.99 * judged[0]
    assert holdout_loss(calibration, fitted.modules) == pytest.approx(min(judged), rel=1e-5)
    before, after = tensors(start), tensors(fitted)
    assert before.keys() == after.keys()
    assert all(each.dtype == before[key].dtype and each.shape == before[key].shape for key, each in after.items())
    assert not same(start, fitted)


def test_the_same_seed_gives_the_same_bits(calibration: Calibration) -> None:
    start = started(calibration, "dense@3g16", 0)
    assert same(refine_end_to_end(calibration, start, "one"), refine_end_to_end(calibration, start, "other"))


def never(*_: object, **__: object) -> bool:
    raise AssertionError("nothing is left to be fitted")


def test_what_is_kept_in_a_journal_is_not_fitted_again(calibration: Calibration) -> None:
    start = started(calibration, "dense@3g16", 0)
    fitted = refine_end_to_end(calibration, start, "kept")
    assert not same(fitted, start)
    assert same(refine_end_to_end(calibration, start, "kept", fit=never), fitted)


def test_layers_that_gain_nothing_are_left(calibration: Calibration) -> None:
    start = started(calibration, "dense@3g16", 0)

    def spoiled(modules: Mapping[str, nn.Module], *_: object, **__: object) -> bool:
        for parameter in (each for module in modules.values() for each in module.parameters()):
            parameter.data.mul_(2)
        return False

    assert same(refine_end_to_end(calibration, start, "spoiled", fit=spoiled), start)


@pytest.mark.parametrize(
    ("error", "raises"),
    [
        (RuntimeError("one of the variables needed for gradient computation has been modified"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
    ],
)
def test_only_what_cannot_be_differentiated_is_left(
    calibration: Calibration, error: Exception, *, raises: bool
) -> None:
    start = started(calibration, "dense@3g16", 0)

    def fails(*_: object, **__: object) -> bool:
        raise error

    for fitted in (refine_end_to_end, refine):
        if raises:
            with pytest.raises(type(error), match=str(error)[:20]):
                fitted(calibration, start, f"fails {error}", fit=fails)
        else:
            assert same(fitted(calibration, start, f"fails {error}", fit=fails), start)


class OwnForCausalLM(nn.Module):
    """Named as causal language models of transformers are, and none of these."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.inner(self.embedding(input_ids))))
        return logits


class ConfiguredForCausalLM(OwnForCausalLM):
    config, main_input_name = SimpleNamespace(vocab_size=40), "input_ids"


class CachedForCausalLM(ConfiguredForCausalLM):
    def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = False) -> Tensor:
        return super().forward(input_ids)


@pytest.mark.parametrize("kind", [OwnForCausalLM, ConfiguredForCausalLM, CachedForCausalLM])
def test_a_model_that_cannot_continue_texts_is_refined_block_by_block(kind: type[nn.Module]) -> None:
    given = calibrated(kind().eval(), [inputs_for("llama", 12)], [inputs_for("llama", 12)], settings=SETTINGS)
    assert given.criterion == "likelihood"
    start, layers = started(given, "dense@3g16", 0), tuple(planned(given, "dense@3g16", 0))
    if fits_end_to_end(given):  # what it takes is as it should be, and what it gives is found not to be
        assert kind is CachedForCausalLM
        assert same(refine_end_to_end(given, start), start)
    found = Candidate(given, layers, None, 0.0, holdout_loss(given, start.modules), start)
    refined = Search(given, (), lambda *_: (), ()).refined(found)
    assert refined.refined
    assert refined.loss < found.loss


def test_a_language_model_whose_layers_have_few_weights_is_fitted(calibration: Calibration) -> None:
    def fits(**changed: int) -> bool:
        end_to_end = replace(SETTINGS.end_to_end, **changed)
        return fits_end_to_end(replace(calibration, settings=replace(SETTINGS, end_to_end=end_to_end)))

    weights = sum(layer.parameters for layer in calibration.layers.values())
    assert fits(most_weights=weights)
    assert not fits(most_weights=weights - 1)
    assert not fits(texts=0)


@pytest.mark.parametrize(("form", "rank", "whole"), [("dense@3g16", 0, True), ("plain", 5, False)])
def test_quantized_layers_of_a_language_model_are_refined_as_a_whole(
    calibration: Calibration, caplog: pytest.LogCaptureFixture, *, form: str, rank: int, whole: bool
) -> None:
    start, layers = started(calibration, form, rank), tuple(planned(calibration, form, rank))
    found = Candidate(calibration, layers, None, 0.0, holdout_loss(calibration, start.modules), start)
    search = Search(calibration, (), lambda *_: (), ())
    with caplog.at_level("DEBUG"):
        refined = search.refined(found)
    assert refined.refined
    assert refined.loss == holdout_loss(calibration, refined.solved.modules) < found.loss
    assert ("refined end to end" in caplog.text) == whole


def test_the_closest_quantized_rival_is_refined_as_a_whole_too(
    calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    def candidate(form: str, rank: int) -> Candidate:
        start, layers = started(calibration, form, rank), tuple(planned(calibration, form, rank))
        return Candidate(calibration, layers, None, 0.0, holdout_loss(calibration, start.modules), start)

    found, farther, closest = candidate("dense@2g16z", 0), candidate("dense@2g16z", 2), candidate("dense@3g16", 0)
    assert closest.loss < min(found.loss, farther.loss)
    farther = replace(farther, loss=max(found.loss, farther.loss) + 1)
    with caplog.at_level("DEBUG"):
        refined = Search(calibration, (), lambda *_: (), ()).refined(replace(found, close=(farther, closest)))
    assert caplog.text.count("refined end to end") == 2
    assert refined.layers == closest.layers
