"""The folder of a run that can be interrupted: what its results depend on, and how much of it is done."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, get_args

import torch

from compressor.api.option import described
from compressor.api.options import CompressOptions
from compressor.calibration import CalibrationData, CalibrationSettings
from compressor.calibration.kept_examples import digest_of_examples
from compressor.choices import Effort
from compressor.data import EvaluationData
from compressor.engine import Fingerprint, Journal, Run, digest_of
from compressor.initial import InitialWeights, initial_name
from compressor.latency.measure import device_name
from compressor.model import Model
from compressor.network import Layer
from compressor.version import VERSION

logger = logging.getLogger(__name__)

# What changes no number: where it goes, who is told, and what is only measured.
_WITHOUT_EFFECT = frozenset(
    {
        *("output", "overwrite", "push_to", "allow_miss", "dry_run", "progress", "device", "engine"),
        *("work_dir", "calibration_cache", "data", "data_samples", "metric"),
        # Seen in what is read by them.
        *("revision", "factory", "recipe", "tokenizer", "processor", "calibration", "initial"),
    }
)


@contextmanager
def kept_work(asked: CompressOptions, subject: Model, run: Run) -> Iterator[Run]:
    """The run with the journal of its work folder, if it has one.

    The folder is removed when the block ends well, and stays where it does not.

    Raises:
        BadInput: the folder is used by another process, or belongs to a run on something else.
    """
    if asked.work_dir is None:
        yield run
        return
    journal = Journal.open(asked.work_dir, _fingerprint(asked, subject, run), option="work_dir")
    if len(journal):
        logger.info("%s: goes on from %d results that are done", asked.work_dir, len(journal))
    try:
        yield replace(run, journal=journal)
    except BaseException:
        # Nothing was done yet, or all was: a run that died between the last step and this one.
        if not len(journal) or _is_written(journal):
            journal.remove()
        else:
            journal.close()
        raise
    if asked.dry_run:
        journal.close()
    else:
        journal.remove()


_OUTPUT = "output"


def note_output(run: Run, path: Path) -> None:
    """Record that all is done but to move the output to its place."""
    run.journal.value(_OUTPUT, lambda: str(path.absolute()))


def _is_written(journal: Journal) -> bool:
    return journal.knows(_OUTPUT) and Path(journal.value(_OUTPUT, str)).exists()


def expect_data(run: Run, calibration: CalibrationData | None, search: EvaluationData | None) -> None:
    """Record which data decide; `BadInput` where they are others than the run in the work folder began with."""
    if not run.journal.kept:
        return
    contents = {"the calibration data": "" if calibration is None else digest_of_examples(calibration)}
    if search is not None:
        batches = [{**batch.inputs, "": batch.labels} for batch in search]
        contents["the data that decide"] = _digest(*map(digest_of, batches))
    run.journal.expect(Fingerprint(contents))


def _fingerprint(asked: CompressOptions, subject: Model, run: Run) -> Fingerprint:
    """What the results depend on, but for the data, which are not open yet."""
    contents = {
        "the training recipe": _digest_of_fields(subject.recipe),
        "the initial weights": _digest_of_initial(subject.initial, subject.layers),
    }
    names = [name for name, _, _ in described(CompressOptions) if name not in _WITHOUT_EFFECT]
    settings = {f"`{name}`": _stated(getattr(asked, name)) for name in names}
    if asked.bits == ():
        settings["`bits`"] = "auto"  # which without calibration is not what is meant where it is left out
    if asked.metric is not None:
        contents["`metric`"] = _digest(*(path.read_bytes() for path in _source_of(asked.metric)))
    return _of_model(subject, run).joined(Fingerprint(contents, settings))


def code_version(package: Path, installed_from: str | None) -> str:
    """The version of the code in a package's folder, which of no release has a digest: each state of it has one number.

    Args:
        package: The folder.
        installed_from: What the installer noted of where it came from; nothing of what an index has (PEP 610).
    """
    if installed_from is None and not (package.parent / "pyproject.toml").is_file():
        return VERSION
    sources = sorted(path for kind in ("py", "json") for path in package.rglob(f"*.{kind}"))
    digest = _digest(*(part for path in sources for part in (str(path.relative_to(package)), path.read_bytes())))
    return f"{VERSION} with code of SHA-256 {digest[:16]}"


def _installed_from() -> str | None:
    try:
        return distribution("compressor").read_text("direct_url.json")
    except PackageNotFoundError:
        return None


def _of_model(subject: Model, run: Run) -> Fingerprint:
    """What is read of a model, and what computes with it."""
    return Fingerprint(
        {
            "the model": subject.checkpoint.digest() if subject.digest is None else subject.digest,
            "its configuration": _digest(json.dumps(subject.checkpoint.config, sort_keys=True, default=str)),
            "its code": _digest_of_code(subject),
        },
        {
            "the version": code_version(Path(__file__).parents[1], _installed_from()),
            "the version of PyTorch": str(torch.__version__),
            "the device": device_name(run.device),
            "the number of threads": str(torch.get_num_threads()),
        },
    )


@contextmanager
def kept_calibration(asked: CompressOptions, subject: Model, run: Run) -> Iterator[Run]:
    """The run with the journal of its calibration cache, if it has one.

    Raises:
        BadInput: the cache is used by another process, or is of another model, or was made with other settings.
    """
    if asked.calibration_cache is None:
        yield run
        return
    settings = asked.calibration_settings or CalibrationSettings.of(asked.effort)
    stated = {f"`{name}`": _stated(getattr(asked, name)) for name in ("include", "exclude", "embeddings", "seed")}
    if asked.calibration_settings is None:
        alike = [
            effort for effort in get_args(Effort) if CalibrationSettings.of(effort).of_moments == settings.of_moments
        ]
        stated["`effort`"] = " or ".join(alike)
    stated |= {f"the setting `{name}`": _stated(value) for name, value in settings.of_moments.items()}
    wanted = _of_model(subject, run).joined(Fingerprint({}, stated))
    journal = Journal.open(asked.calibration_cache, wanted, option="calibration_cache")
    try:
        yield replace(run, calibrated=journal)
    finally:
        journal.close()


def _stated(value: Any) -> str:
    """A value in words; of what is more than a word a digest."""
    if value is None or value == ():
        return "not given"
    if isinstance(value, Path):
        return f"a file of SHA-256 {_digest(value.read_bytes())[:16]}" if value.is_file() else str(value)
    if is_dataclass(value):
        return f"a {type(value).__name__} of SHA-256 {_digest_of_fields(value)[:16]}"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _digest_of_initial(initial: InitialWeights | None, layers: Sequence[Layer]) -> str:
    """The digest of initial weights: of the record of their draws, of the checkpoint, or of what tells them apart."""
    if initial is None:
        return ""
    if initial.draws is not None:
        return _digest(json.dumps(initial.draws.to_dict(), sort_keys=True))
    if initial.digest is not None:
        return initial.digest
    found = (initial.fingerprint(initial_name(layer)) for layer in layers if layer.eligible)
    return _digest(*(json.dumps(None if each is None else each.to_list()) for each in found))


def _digest_of_code(subject: Model) -> str:
    """The digest of the code that builds the model: a factory's file, or those in its folder."""
    paths: list[Path] = []
    folder = subject.checkpoint.folder
    if folder is not None:
        paths += sorted(folder.glob("*.py"))
    factory = subject.factory
    if isinstance(factory, str):
        place = Path(factory.rpartition(":")[0])
        paths += [place] if place.suffix == ".py" and place.is_file() else []
    elif factory is not None:
        paths += _source_of(factory)
    return _digest(*(path.read_bytes() for path in paths if path.is_file()))


def _digest_of_fields(value: Any) -> str:
    """The digest of all that a dataclass holds; of a function in it the name, for its address is another every time."""

    def named(other: Any) -> str:
        return getattr(other, "__qualname__", str(other))

    return _digest(json.dumps(asdict(value), sort_keys=True, default=named))


def _source_of(function: Callable[..., Any]) -> list[Path]:
    """The file that a function is from, where it is known."""
    try:
        path = Path(inspect.getsourcefile(function) or "")
    except TypeError:
        return []
    return [path] if path.is_file() else []


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()
