"""What the state dicts of torch's optimizers and learning-rate schedulers tell about the training.

Neither names its class: the keys tell which one it is. Keys are those of `torch.optim` and `torch.optim.lr_scheduler`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.recipe.recipe import finite_number

# Above this share of the peak, the floor of a cosine or the start of a warm-up changes what is forgotten.
_NEGLIGIBLE = 1e-3
_SHORT_START = 0.1
_MOST_NAMES = 200
_MOST_MILESTONES = 10_000
# Optimizers by the keys that only their groups have.
_OPTIMIZERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("lars", frozenset({"trust_coefficient"})),
    ("sgd", frozenset({"momentum", "dampening", "nesterov"})),
    ("nadam", frozenset({"momentum_decay"})),
    ("adamw", frozenset({"correct_bias"})),  # transformers' own, up to version 4
    ("rmsprop", frozenset({"alpha", "centered"})),
    ("adafactor", frozenset({"beta2_decay"})),
    ("adadelta", frozenset({"rho"})),
    ("adagrad", frozenset({"lr_decay"})),
    ("muon", frozenset({"ns_steps"})),
)
# Schedules whose form a recipe does not know, by a key of their state.
_OTHER_SCHEDULES = (
    ("T_0", "cosine_with_restarts"),
    ("_schedule_phases", "one_cycle"),
    ("max_lrs", "cyclic"),
    ("patience", "reduce_on_plateau"),
    ("factor", "constant_factor"),
    ("gamma", "exponential"),
)
# The base rates of these are not the peak.
_RISING = ("one_cycle", "cyclic")


@dataclass(frozen=True)
class OptimizerState:
    """The fields of a recipe that an optimizer's state tells, and what else it says.

    `rate`: the learning rate that was in use last, where no scheduler left the one it started from. `scheduled`:
    whether a scheduler of torch was at work. `remarks`: what it leaves open.
    """

    values: dict[str, Any]
    rate: float | None
    scheduled: bool
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule in the steps of its own scheduler, of which it has taken `taken`.

    `name` as in `TrainingRecipe.schedule`; `length` is what it was laid out for, `rate` its peak.
    """

    name: str
    taken: int | None
    length: float | None = None
    warmup: float = 0
    milestones: tuple[float, ...] | None = None
    factor: float | None = None
    rate: float | None = None


def read_optimizer_state(state: Mapping[Any, Any], shapes: Mapping[str, Sequence[int]]) -> OptimizerState | None:
    """Read an optimizer's state dict; `shapes` are those of the model's tensors. None if it is not one."""
    groups = [group for group in _list(state.get("param_groups")) if isinstance(group, Mapping)]
    if not groups:
        return None
    per_parameter = state.get("state")
    moments = per_parameter if isinstance(per_parameter, Mapping) else {}
    main = max(groups, key=lambda group: (finite_number(group.get("weight_decay")) or 0) > 0 and _size(group))
    main = max((g for g in groups if bool(g.get("weight_decay")) == bool(main.get("weight_decay"))), key=_size)
    values, remarks = _optimizer_named(main, moments)
    values |= _weight_decays(groups, main, moments, shapes=shapes, remarks=remarks)
    rates = {rate for group in groups if (rate := _peak(group)) is not None}
    if len(rates) > 1:
        remarks.append(f"its {len(groups)} groups have learning rates from {min(rates):g} to {max(rates):g}")
    steps = [
        step for each in moments.values() if isinstance(each, Mapping) and (step := finite_number(each.get("step")))
    ]
    if steps:
        values["steps"] = int(max(steps))
    started = main.get("initial_lr") is not None
    if started:
        values["learning_rate"] = _peak(main)
    return OptimizerState(
        {name: value for name, value in values.items() if value is not None},
        None if started else finite_number(main.get("lr")),
        started,
        tuple(remarks),
    )


def _optimizer_named(group: Mapping[Any, Any], moments: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    keys = {key for key in group if isinstance(key, str)}
    decoupled = group.get("decoupled_weight_decay")
    remarks: list[str] = []
    name = next((name for name, needed in _OPTIMIZERS if needed <= keys), None)
    if name is None and "betas" in keys:
        name = _like_adam(group, moments)
        if name is None and "amsgrad" in keys:
            remarks.append("the states of Adam and AdamW are alike: say which it was (`optimizer`)")
    values: dict[str, Any] = {"optimizer": name}
    if name == "sgd":
        values |= {field: group.get(field) for field in ("momentum", "dampening", "nesterov")}
        # A scheduler that cycles the momentum leaves the last one there.
        if group.get("max_momentum") != group.get("base_momentum"):
            values["momentum"] = None
            remarks.append("its momentum was changed by the schedule")
    if name in ("nadam", "radam") and isinstance(decoupled, bool):
        values["decoupled_weight_decay"] = decoupled
    return values, remarks


def _like_adam(group: Mapping[Any, Any], moments: Mapping[Any, Any]) -> str | None:
    """Which optimizer with betas it was; None if it may be Adam or AdamW."""
    kept = next((each.keys() for each in moments.values() if isinstance(each, Mapping)), ())
    decoupled = group.get("decoupled_weight_decay")
    if "exp_inf" in kept:
        return "adamax"
    if "amsgrad" in group:
        if isinstance(decoupled, bool):
            return "adamw" if decoupled else "adam"
        return None if group.get("weight_decay") else "adam"
    if isinstance(decoupled, bool):
        return "radam"
    return "lion" if kept and "exp_avg_sq" not in kept and "eps" not in group else None


def _weight_decays(
    groups: list[Mapping[Any, Any]],
    main: Mapping[Any, Any],
    moments: Mapping[Any, Any],
    *,
    shapes: Mapping[str, Sequence[int]],
    remarks: list[str],
) -> dict[str, Any]:
    """The weight decay of the main group, and the parameters with a different one or none."""
    decay = finite_number(main.get("weight_decay"))
    if decay is None:
        return {}
    undecayed: list[str] = []
    others: dict[str, float] = {}
    known = True
    for group in groups:
        own = finite_number(group.get("weight_decay"))
        if own == decay or own is None:
            continue
        names = _names_in(group, moments, shapes)
        if names is None or len(names) > _MOST_NAMES:
            known = False
            remarks.append(f"a group has the weight decay {own:g}, and its {_size(group)} parameters are not named")
        elif own == 0:
            undecayed += names
        else:
            others |= dict.fromkeys(names, own)
    values: dict[str, Any] = {"weight_decay": decay, "undecayed": undecayed if known else None}
    return values | ({"group_weight_decay": others} if others else {})


def _names_in(
    group: Mapping[Any, Any], moments: Mapping[Any, Any], shapes: Mapping[str, Sequence[int]]
) -> list[str] | None:
    """Names of the parameters in a group: its own, or all vectors if it holds only vectors."""
    if named := [name for name in _list(group.get("param_names")) if isinstance(name, str)]:
        return [name.removeprefix("module.").removeprefix("_orig_mod.") for name in named]
    indices = _list(group.get("params"))
    kept = [moments.get(index) for index in indices]
    dimensions = [_dimensions(each) for each in kept if isinstance(each, Mapping)]
    if not indices or len(dimensions) < len(indices) or any(each is None or each > 1 for each in dimensions):
        return None
    return [name for name, shape in shapes.items() if len(shape) <= 1]


def _dimensions(moments: Mapping[Any, Any]) -> int | None:
    """The dimensions of a parameter, from those of its moments."""
    for name in ("exp_avg", "momentum_buffer", "square_avg", "sum", "exp_inf"):
        if (shape := getattr(moments.get(name), "shape", None)) is not None:
            return len(shape)
    # The moments of a parameter of one number are read as numbers.
    return None if finite_number(moments.get("exp_avg")) is None else 1


def read_scheduler_state(state: Mapping[Any, Any]) -> Schedule | None:
    """The schedule in the state dict of a PyTorch scheduler; None if it is not one."""
    if "last_epoch" not in state:
        return None
    taken = _whole(state.get("last_epoch"))
    rates = [rate for rate in map(finite_number, _list(state.get("base_lrs"))) if rate is not None]
    rate = max(rates) if rates else None
    length = finite_number(state.get("T_max") or state.get("total_iters") or state.get("total_steps"))
    if "_schedulers" in state:
        return _sequence(state, taken)
    if "milestones" in state or "step_size" in state:
        return Schedule(
            "step", taken, milestones=_milestones(state), factor=finite_number(state.get("gamma")), rate=rate
        )
    if "T_max" in state:
        floor = finite_number(state.get("eta_min")) or 0.0
        low = rate is not None and floor <= _NEGLIGIBLE * rate
        return Schedule("cosine" if low else "cosine_with_min_lr", taken, length, rate=rate)
    if {"start_factor", "end_factor"} <= state.keys():
        return _ramp(state, taken=taken, length=length, rate=rate)
    if "power" in state:
        return Schedule("linear" if state["power"] == 1 else "polynomial", taken, length, rate=rate)
    name = next((name for key, name in _OTHER_SCHEDULES if key in state), "")
    if peaks := [peak for peak in map(finite_number, _list(state.get("max_lrs"))) if peak is not None]:
        return Schedule(name, taken, length, rate=max(peaks))
    return Schedule(name, taken, length, rate=None if name in _RISING else rate)


def _milestones(state: Mapping[Any, Any]) -> tuple[float, ...]:
    """The milestones of a MultiStepLR, or those that a StepLR has passed."""
    if (every := _whole(state.get("step_size"))) is not None and every > 0:
        count = min((_whole(state.get("last_epoch")) or 0) // every, _MOST_MILESTONES)
        return tuple(every * k for k in range(1, count + 1))
    found = state.get("milestones")
    # A milestone that is listed twice counts twice.
    pairs = list(found.items()) if isinstance(found, Mapping) else [(each, 1) for each in _list(found)]
    steps = [(step, min(_whole(often) or 1, 10)) for at, often in pairs if (step := finite_number(at)) is not None]
    return tuple(sorted(step for step, often in steps for _ in range(often)))


def _ramp(state: Mapping[Any, Any], *, taken: int | None, length: float | None, rate: float | None) -> Schedule:
    start, end = finite_number(state["start_factor"]), finite_number(state["end_factor"])
    if start == 1 and end == 0:
        return Schedule("linear", taken, length, rate=rate)
    if start is not None and start <= _SHORT_START and end == 1 and length is not None:
        return Schedule("constant", taken, warmup=length, rate=rate)
    return Schedule("linear_between", taken, length, rate=rate)


def _sequence(state: Mapping[Any, Any], taken: int | None) -> Schedule:
    """A warm-up followed by one schedule; a recipe has no name for any other sequence."""
    inner = (read_scheduler_state(each) for each in _list(state["_schedulers"]) if isinstance(each, Mapping))
    schedules = [schedule for schedule in inner if schedule is not None]
    changes = [change for at in _list(state.get("_milestones")) if (change := finite_number(at)) is not None]
    if len(schedules) != 2 or len(changes) != 1 or (schedules[0].name, schedules[0].warmup) != ("constant", changes[0]):
        return Schedule("sequence", taken)
    (warmup,), (first, then) = changes, schedules
    length = None if then.length is None else warmup + then.length
    milestones = None if then.milestones is None else tuple(warmup + each for each in then.milestones)
    return Schedule(then.name, taken, length, warmup, milestones, then.factor, first.rate)


def _peak(group: Mapping[Any, Any]) -> float | None:
    return finite_number(group.get("max_lr", group.get("initial_lr", group.get("lr"))))


def _size(group: Mapping[Any, Any]) -> int:
    return len(_list(group.get("params")))


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _whole(value: object) -> int | None:
    number = finite_number(value)
    return None if number is None else int(number)
