"""Calibration examples in a journal, so that a later run has them without the data that they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from compressor.calibration.examples import PARTS, CalibrationData
from compressor.data import Batch
from compressor.engine import Journal, digest_of

_UNIT, _ABOUT = "examples", "about the examples"


def kept_examples(journal: Journal) -> CalibrationData | None:
    """The examples that a journal has; None where there are none."""
    if not journal.knows(_ABOUT) or not journal.holds(_UNIT):
        return None
    about: dict[str, Any] = journal.value(_ABOUT, dict)
    inputs: dict[tuple[str, int], dict[str, Tensor]] = {}
    labels: dict[tuple[str, int], Tensor] = {}
    for key, tensor in journal.read(_UNIT).items():
        part, place, name = json.loads(key)
        own = tensor.clone()  # kernels mind where in memory numbers begin, and new memory begins alike
        if name is None:
            labels[part, place] = own
        else:
            inputs.setdefault((part, place), {})[name] = own
    fit, holdout = (
        tuple(
            Batch({name: inputs[part, place][name] for name in names}, labels[part, place])
            for place, names in enumerate(about[part])
        )
        for part in PARTS
    )
    return CalibrationData(fit, holdout, about["labeled"], about["unused"], about["made"])


def keep_examples(journal: Journal, make: Callable[[], CalibrationData]) -> CalibrationData:
    """The examples that a journal has, or else those that are made now, and in a journal that stays are kept there."""
    if (found := kept_examples(journal)) is not None:
        return found
    data = make()
    if not journal.kept:
        return data
    batches = {part: [data.read(chunk) for chunk in data.chunks(part)] for part in PARTS}
    tensors = {
        json.dumps([part, place, name]): tensor.clone()  # which may be a view of another
        for part, parts in batches.items()
        for place, batch in enumerate(parts)
        for name, tensor in [*batch.inputs.items(), (None, batch.labels)]
    }
    journal.write(_UNIT, tensors)
    about = {part: [list(batch.inputs) for batch in parts] for part, parts in batches.items()}
    stated = {"labeled": data.labeled, "unused": data.unused, "made": data.made}
    journal.value(_ABOUT, lambda: {**about, **stated})
    return data


def digest_of_examples(data: CalibrationData) -> str:
    """SHA-256 of all examples, and of how they are split."""
    digest = hashlib.sha256()
    for part in PARTS:
        for chunk in data.chunks(part):
            batch = data.read(chunk)
            digest.update(f"{part} {digest_of({**batch.inputs, '': batch.labels})}\n".encode())
    return digest.hexdigest()
