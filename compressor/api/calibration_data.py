"""Examples to calibrate on: those that were given, those that the model makes itself, or none."""

from __future__ import annotations

import logging
from dataclasses import replace

from compressor.api.options import CALIBRATION_DETAILS, CompressOptions
from compressor.api.requests import preprocessing, requested_budget
from compressor.calibration import CalibrationData, CalibrationSettings, split_examples
from compressor.calibration.examples import open_calibration_data
from compressor.calibration.kept_examples import digest_of_examples, keep_examples, kept_examples
from compressor.calibration.self_generated import SelfRequest, examples_by_default, self_generated
from compressor.data import EvaluationData
from compressor.engine import Fingerprint, Journal, Run
from compressor.errors import BadInput
from compressor.evaluation import require_accepted
from compressor.formatting import format_size
from compressor.free_memory import free_memory
from compressor.model import Model
from compressor.planning import Budget
from compressor.report.wording import needs_calibration

logger = logging.getLogger(__name__)


def calibration_settings(asked: CompressOptions, data: CalibrationData | None = None) -> CalibrationSettings:
    """The settings of the effort that is asked for, or those that were given, on as many tokens as some data have."""
    settings = asked.calibration_settings or CalibrationSettings.of(asked.effort)
    return settings if data is None else settings.on(data.tokens)


def calibration_data(asked: CompressOptions, subject: Model, run: Run) -> CalibrationData | None:
    """The examples that were given or kept, or that the model makes itself where it is asked to or does so by default.

    Raises `BadInput` for data that the model does not take, and for options about calibration where there is none.
    """
    kept = None if run.calibrated is None else kept_examples(run.calibrated)
    if asked.calibrates and not asked.calibrates_itself:
        given = _accepted(asked, subject, _given(asked, subject), run=run)
        return given if run.calibrated is None else _kept(run.calibrated, given)
    if asked.calibrates_itself:
        if kept is not None:
            _require_as_kept(asked, kept)
        return _own(asked, subject, _request(asked, subject), run=run)
    if kept is not None:
        _require_as_kept(asked, kept)
        return kept
    found = _by_default(asked, subject, run)
    if found is None:
        if asked.calibration_cache is not None:
            what, remedy = "holds no examples yet", "pass `calibration=DATA` once"
            raise BadInput(what, where=asked.calibration_cache, option="calibration_cache", remedy=remedy)
        for name in CALIBRATION_DETAILS & asked.given:
            what = f"`{name}` is about calibration data, and none were given"
            raise BadInput(what, option=name, remedy="pass `calibration=DATA`, or leave it out")
        _warn_of_missing_data(subject, requested_budget(asked))
    return found


def _require_as_kept(asked: CompressOptions, kept: CalibrationData) -> None:
    """Raise `BadInput` where other examples are asked for than those of the cache."""
    count, wanted = kept.examples + kept.holdout_examples, asked.calibration_samples
    if asked.calibrates_itself and not kept.made:
        what, option = "holds examples that were given, and not the model's own", "calibration"
    elif wanted is not None and wanted != count:
        what, option = f"holds {count} examples, and `calibration_samples` is {wanted}", "calibration_samples"
    else:
        return
    raise BadInput(what, where=asked.calibration_cache, option=option, remedy=f"leave out `{option}`")


def _given(asked: CompressOptions, subject: Model) -> EvaluationData:
    return open_calibration_data(
        asked.calibration,
        preprocessing(asked, subject),
        samples=asked.calibration_samples,
        sequence_length=asked.calibration_length,
        settings=calibration_settings(asked),
    )


def _accepted(asked: CompressOptions, subject: Model, samples: EvaluationData, *, run: Run) -> CalibrationData:
    require_accepted(subject.streamed, samples, device=run.device)
    return split_examples(samples, calibration_settings(asked))


def _request(asked: CompressOptions, subject: Model) -> SelfRequest:
    settings = calibration_settings(asked).self_generated
    count = asked.calibration_samples or settings.samples
    return SelfRequest(count, asked.calibration_length, preprocessing(asked, subject), settings)


def _own(asked: CompressOptions, subject: Model, request: SelfRequest, *, run: Run) -> CalibrationData:
    def make() -> CalibrationData:
        nbytes = sum(info.nbytes for info in subject.checkpoint.tensors.values())
        free = free_memory(run.device)
        by_block = not subject.in_memory and free is not None and nbytes > free
        if by_block:
            logger.warning(
                "%s does not fit in memory (%s): its blocks are read again for every token that it writes, which takes"
                " long; `calibration=DATA` does not",
                subject.name,
                format_size(nbytes),
            )
        samples = self_generated(subject, request, run=run, by_block=by_block)
        subject.let_go()
        return replace(_accepted(asked, subject, samples, run=run), made=samples.name)

    if run.calibrated is None:
        return keep_examples(run.journal, make)
    kept = kept_examples(run.calibrated)
    return _kept(run.calibrated, make()) if kept is None else kept


def _kept(journal: Journal, data: CalibrationData) -> CalibrationData:
    """The examples of the cache, which are those that were given or made: `BadInput` where they are not."""
    journal.expect(Fingerprint({"the calibration data": digest_of_examples(data)}))
    return keep_examples(journal, lambda: data)


def _by_default(asked: CompressOptions, subject: Model, run: Run) -> CalibrationData | None:
    """Examples that the model makes itself where nobody asked for any, if that is known to help and is soon done."""
    if not asked.may_calibrate_itself:
        return None
    try:
        subject.require_runnable()
    except BadInput:  # nobody asked for more than its weights
        return None
    try:
        request = _request(asked, subject)
        count = examples_by_default(subject, request, device=run.device)
        if count is None:
            return None
        request = replace(request, count=asked.calibration_samples or count)
        return _own(asked, subject, request, run=run)
    except BadInput as error:
        logger.info("not calibrated on examples of its own: %s", error)
        return None


def _warn_of_missing_data(subject: Model, budget: Budget | None) -> None:
    """Say before the work what compressing attention layers by their weights alone can do, and how to avoid it."""
    asked = budget or Budget("tolerance")
    if not needs_calibration(asked, has_attention=subject.has_attention):
        return
    size = " with a size, such as `keep=0.8`, and" if asked.kind in ("tolerance", "window-rule") else " with"
    logger.warning(
        "%s has attention layers: compressed by its weights alone it may lose most of what it knows; to avoid that, run"
        " it%s `calibration=FILE`, about a hundred examples (or builtin:stdlib for text, builtin:digits for images), or"
        " `calibration='self'`, examples that the model makes itself",
        subject.name,
        size,
    )
