"""What `transformers.Trainer` leaves beside a model: `training_args.bin` and `trainer_state.json`.

`training_args.bin` is a pickle, which could run code when it is loaded. Here it is read with every class in
it replaced by an inert one, and only plain values of known names are taken out.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import statistics
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compressor.documents import read_json, read_regular_file
from compressor.errors import BadInput
from compressor.recipe.recipe import TrainingRecipe, finite_number, whole_seed

_MOST_BYTES = 2**24
_LEAST_SAMPLES = 3
# Near the end of a schedule a logged rate says little about the peak.
_LEAST_FACTOR = 0.05
_SAME_PEAK = 1e-3
_FACTORS: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}
_MOST_BYTES_OF_PICKLE = 2**20
# What `torch.save` writes before the object in its format without a zip archive.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# The parameters that Trainer.get_decay_parameter_names excludes from weight decay, as globs.
_UNDECAYED = (
    "*bias*",
    "*layernorm*",
    "*rmsnorm*",
    "norm",
    "norm.*",
    "*.norm",
    "*.norm.*",
    "*_norm",
    "*_norm.*",
)


def read_training_args(path: str | Path) -> TrainingRecipe:
    """The recipe in a `training_args.bin`; nothing in the file is executed.

    Raises `BadInput` if the file is no pickled object with hyperparameters in it.
    """
    path = Path(path)
    found = _attributes(_saved_object(path))
    arguments = {name: value for name in found if (value := _scalar(found[name])) is not None}
    # `trl` calls the length to which examples are cut `max_length`, or `max_seq_length` before.
    sequence_length = arguments.get("max_length", arguments.get("max_seq_length"))
    planned = arguments.get("max_steps", -1)
    by_steps = isinstance(planned, int) and planned > 0
    schedule = arguments.get("lr_scheduler_type")
    name = "adafactor" if arguments.get("adafactor") is True else arguments.get("optim")
    if name is None and arguments.get("adafactor") is False:
        name = "adamw"  # before transformers 4.11 there was no other choice
    values = {
        **optimizer_named(name, arguments.get("optim_args")),
        "learning_rate": arguments.get("learning_rate"),
        # Arguments of the schedule change its form, so that its name alone does not say what it was.
        "schedule": None if found.get("lr_scheduler_kwargs") else schedule,
        "warmup_steps": warmup(schedule, arguments.get("warmup_steps"), arguments.get("warmup_ratio")),
        "batch_size": _global_batch(found, arguments),
        "schedule_steps": planned if by_steps else None,
        "epochs": None if by_steps else arguments.get("num_train_epochs"),
        "sequence_length": sequence_length,
        "seed": whole_seed(arguments.get("seed")),
    }
    if not {"learning_rate", "optim", "adafactor"} & arguments.keys():
        raise BadInput(
            "holds no training arguments", where=path, remedy="pass a training_args.bin written by a Trainer"
        )
    values.setdefault("weight_decay", arguments.get("weight_decay"))
    values["undecayed"] = list(_UNDECAYED)
    return TrainingRecipe.from_dict(values, source=path.name)


def read_trainer_state(path: str | Path) -> TrainingRecipe:
    """The recipe in a `trainer_state.json`: the steps and epochs done, the steps planned, and the schedule logged.

    Its batch size is one process's without accumulation, and is not taken. The learning rates in its log are samples
    that may miss the peak: they are taken where all of them lie on one schedule without a warm-up. Raises `BadInput` if
    the file is no JSON object.
    """
    path = Path(path)
    state = read_json(path)
    values = {
        "steps": state.get("global_step"),
        "schedule_steps": state.get("max_steps") or None,
        "epochs": state.get("epoch") or None,
        **_logged_schedule(state.get("log_history"), state.get("max_steps")),
    }
    return TrainingRecipe.from_dict(values, source=path.name)


def _logged_schedule(log: object, planned: object) -> dict[str, Any]:
    """The schedule and its peak that all logged learning rates lie on; {} for fewer than three or none such."""
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    pairs = [(finite_number(entry.get("step")), finite_number(entry.get("learning_rate"))) for entry in entries]
    samples = [(step, rate) for step, rate in pairs if step is not None and rate is not None and rate > 0]
    length = finite_number(planned)
    if len(samples) < _LEAST_SAMPLES or length is None or length <= 0:
        return {}
    for name, factor in _FACTORS.items():
        for logged_after in (0, 1):  # a Trainer logs the rate of this step or of the next one
            shares = [((step - logged_after) / length, rate) for step, rate in samples]
            peaks = [rate / factor(share) for share, rate in shares if factor(share) > _LEAST_FACTOR]
            if len(peaks) >= _LEAST_SAMPLES and max(peaks) <= min(peaks) * (1 + _SAME_PEAK):
                return {"schedule": name, "learning_rate": statistics.median(peaks), "warmup_steps": 0}
    return {}


def optimizer_named(name: object, arguments: object = None) -> dict[str, Any]:
    """The fields determined by a Trainer's optimizer name and its `key=value` arguments."""
    fields: dict[str, Any] = {"optimizer": name}
    if isinstance(name, str) and name.lower().rpartition(".")[2] == "sgd":
        # The Trainer hands torch.optim.SGD only what is written here; momentum is then torch's 0.
        fields["momentum"] = 0.0
        for part in "".join(str(arguments or "").split()).split(","):
            key, _, value = part.partition("=")
            if key in ("momentum", "dampening", "nesterov", "weight_decay"):
                fields[key] = value
    return fields


def warmup(schedule: object, steps: object, ratio: object) -> object:
    """A Trainer's warm-up: the steps unless they are 0, then the ratio; none in the schedule "constant"."""
    if schedule == "constant":
        return 0
    if steps not in (None, 0, 0.0, "0", "0.0"):
        return steps
    return ratio if ratio is not None else steps


def product(*factors: object) -> int | None:
    """The product of whole numbers; None if a factor is unknown."""
    numbers = [factor for factor in factors if isinstance(factor, int) and not isinstance(factor, bool)]
    return math.prod(numbers) if len(numbers) == len(factors) else None


def _global_batch(found: Mapping[str, Any], arguments: Mapping[str, Any]) -> int | None:
    # The older name comes first where it is given, as in `TrainingArguments.train_batch_size`.
    per_device = arguments.get("per_gpu_train_batch_size") or arguments.get("per_device_train_batch_size")
    accumulation = arguments.get("gradient_accumulation_steps")
    processes = _scalar(_attributes(found.get("distributed_state")).get("num_processes"))
    if processes is None and arguments.get("local_rank") == -1:
        processes = 1  # written before accelerate: -1 says that training was not distributed
    # One process drives several GPUs (DataParallel), one GPU, or, with 0, none.
    devices = arguments.get("_n_gpu", arguments.get("n_gpu")) or 1
    if devices == -1:
        return None  # counted only when they are first used
    return product(per_device, accumulation, processes, devices)


class _Inert:
    """Stands in for an object of any class: stores its constructor arguments and runs nothing."""

    arguments: tuple[object, ...]
    attributes: dict[str, Any]

    # Objects are unpickled without a call of __init__.
    def __new__(cls, *arguments: object, **_: object) -> _Inert:
        inert = super().__new__(cls)
        inert.arguments, inert.attributes = arguments, {}
        return inert

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes = {key: value for key, value in state.items() if isinstance(key, str)}

    def __setitem__(self, key: object, value: object) -> None:
        """Called by the unpickler to fill dictionaries."""

    def append(self, value: object) -> None:
        """Called by the unpickler to fill lists."""

    def extend(self, values: object) -> None:
        """Called by the unpickler to fill lists."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, _module: str, _name: str) -> type[_Inert]:
        # A class of its own each time: a pickle may write to the attributes of a class.
        return type("Inert", (_Inert,), {})

    def persistent_load(self, _identifier: object) -> _Inert:
        return _Inert()


def _attributes(value: object) -> dict[str, Any]:
    return value.attributes if isinstance(value, _Inert) else {}


def _scalar(value: object) -> str | int | float | bool | None:
    """A plain value, or the string value of an enumeration member."""
    if isinstance(value, _Inert) and len(value.arguments) == 1 and isinstance(value.arguments[0], str):
        return value.arguments[0]
    return value if isinstance(value, str | int | float | bool) else None


def _saved_object(path: Path) -> object:
    content = read_regular_file(path, _MOST_BYTES)
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                entry = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                with archive.open(entry) as file:
                    content = file.read(_MOST_BYTES_OF_PICKLE + 1)
        if len(content) > _MOST_BYTES_OF_PICKLE:
            raise BadInput("is too large to be training arguments", where=path, remedy="pass another file")
        stream = io.BytesIO(content)
        first = _unpickle(stream)
        if first != _LEGACY_MAGIC:
            return first
        _unpickle(stream)  # the format's version
        _unpickle(stream)  # about the system
        return _unpickle(stream)
    except BadInput:
        raise
    # A damaged pickle fails in as many ways as its opcodes do, and none of them is of interest here.
    except Exception as error:
        raise BadInput(
            "is not a training_args.bin that can be read", where=path, remedy="pass one written by a Trainer"
        ) from error


def _unpickle(stream: io.BytesIO) -> object:
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        # The unpickler makes room for the highest memo index it meets: one opcode could ask for gigabytes.
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > _MOST_BYTES_OF_PICKLE:
            raise pickle.UnpicklingError("memo index out of range")
    stream.seek(start)
    return _InertUnpickler(stream).load()
