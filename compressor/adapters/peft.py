"""Adapters as PEFT writes them: a folder with a configuration, and factors A and B.

The scale of a module is `alpha / r` of its configuration, or `alpha / sqrt(r)` with `use_rslora`; patterns state both
for some modules alone. Source: https://github.com/huggingface/peft (`tuners/lora/config.py`, `utils/other.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.adapters.dialect import Description, FactorNames, WrittenModule
from compressor.adapters.groups import Group, grouped
from compressor.adapters.module import Adapter, AdapterModule
from compressor.adapters.names import ModuleName, part_of
from compressor.choices import AdapterDialect
from compressor.errors import BadInput
from compressor.io import ADAPTER_CONFIG, Checkpoint, adapter_config
from compressor.io.adapters import MERGE_WITH_PEFT
from compressor.io.files import read_json_object

PREFIX = "base_model.model."
# With these a pattern cannot take forever: each repetition multiplies its time by the length of a name, and each group
# by its alternatives.
_LONGEST_PATTERN = 1000
_MOST_REPETITIONS = 3
_MOST_GROUPS = 3
_LONGEST_PATH = 300
# Starts that leave the base as it is; all others change it, by what the rank was.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Scaling:
    """What a configuration says of the scale of each module."""

    alpha: float
    patterns: Patterns
    stabilized: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str | Path | None) -> Scaling:
        alpha = as_number(config.get("lora_alpha", 8), "lora_alpha", where)
        patterns = Patterns.of(config.get("alpha_pattern") or {}, where)
        return cls(alpha, patterns, bool(config.get("use_rslora")))

    def module(self, group: Group, name: ModuleName) -> AdapterModule:
        """The module of a group of tensors, scaled as it says."""
        return group.module(name, self.patterns.of_module(name.path, self.alpha), stabilized=self.stabilized)


@dataclass(frozen=True)
class Peft:
    """The dialect of PEFT."""

    name: AdapterDialect = "peft"

    def read(self, checkpoint: Checkpoint) -> Adapter:
        config = _config(checkpoint)
        groups, others = grouped(checkpoint)
        paths = {group.place: group.place.removeprefix(PREFIX) for group in groups}
        part = part_of(paths.values())
        scaling = Scaling.of(config, adapter_config(checkpoint))
        modules = tuple(scaling.module(group, ModuleName(part, paths[group.place])) for group in groups)
        return Adapter(checkpoint, self.name, modules, tuple(others), config)

    def names(self, module: AdapterModule, adapter: Adapter) -> FactorNames:
        place = module.place if adapter.dialect == "peft" else f"{PREFIX}{_path(module, adapter)}"
        if module.kind == "embedding":
            return FactorNames(f"{place}.lora_embedding_A", f"{place}.lora_embedding_B")
        return FactorNames(f"{place}.lora_A.weight", f"{place}.lora_B.weight")

    def described(self, adapter: Adapter, modules: Sequence[WrittenModule]) -> Description:
        paths = [_path(each.module, adapter) for each in modules]
        ranks = dict(zip(paths, (each.rank for each in modules), strict=True))
        alphas = dict(zip(paths, (each.module.scaled.alpha_at(each.rank) for each in modules), strict=True))
        base: Mapping[str, Any] = adapter.config or {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(paths),
        }
        config = dict(base) | lora_ranks(ranks, alphas) | {"use_rslora": False}
        return Description({"format": "pt"}, {ADAPTER_CONFIG: config})


def lora_ranks(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """What a configuration says so that each module has its rank and its alpha."""
    rank, alpha = _most_common(ranks.values()), _whole(_most_common(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": each for path, each in ranks.items() if each != rank},
        "alpha_pattern": {f"^{re.escape(path)}": _whole(each) for path, each in alphas.items() if each != alpha},
    }


@dataclass(frozen=True)
class Patterns:
    """Values of some modules, by expressions that their names, or the last parts of these, match; the first counts."""

    expressions: tuple[tuple[int, re.Pattern[str], float], ...]
    names: Mapping[str, tuple[int, float]]

    @classmethod
    def of(cls, stated: object, where: str | Path | None) -> Patterns:
        """Those that a configuration states; `BadInput` for what is none."""
        if not isinstance(stated, Mapping):
            raise _bad_config("has patterns that are no mapping", where)
        expressions, names = list[tuple[int, re.Pattern[str], float]](), dict[str, tuple[int, float]]()
        for at, (pattern, value) in enumerate(stated.items()):
            number, plain = as_number(value, "a pattern", where), pattern.removeprefix("^").replace("\\", "")
            if pattern.startswith("^") and pattern in (f"^{re.escape(plain)}", f"^{plain}"):
                # One name and nothing else, as most patterns are: thousands of them are looked up in no time.
                names.setdefault(plain, (at, number))
            else:
                expressions.append((at, _compiled(pattern, where), number))
        return cls(tuple(expressions), names)

    def of_module(self, path: str, default: float) -> float:
        """The value of a module; the default where no pattern matches it."""
        if self.expressions and len(path) > _LONGEST_PATH:
            what = f"has patterns, and a module whose name has {len(path):,} characters ({path[:40]}...)"
            raise BadInput(what, remedy=f"rename it, to {_LONGEST_PATH} at most")
        found = [(at, value) for at, expression, value in self.expressions if expression.match(path)][:1]
        if path in self.names:
            found.append(self.names[path])
        return min(found)[1] if found else default


def _compiled(pattern: str, where: str | Path | None) -> re.Pattern[str]:
    repetitions = len(re.findall(r"(?<!\()[*+?{]", pattern))
    too_many = repetitions > _MOST_REPETITIONS or pattern.count("(") > _MOST_GROUPS
    # A repeated group can take exponential time.
    if len(pattern) > _LONGEST_PATTERN or too_many or re.search(r"\)[+*{]", pattern) is not None:
        raise _bad_config(f"has the pattern {pattern[:60]!r}, which is not simple", where)
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        raise _bad_config(f"has the pattern {pattern[:60]!r}, which is no expression", where) from None


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    path = adapter_config(checkpoint)
    if path is None:
        raise BadInput(
            f"has the names of PEFT, whose scales are in {ADAPTER_CONFIG}, and there is none",
            where=checkpoint.source,
            remedy=f"give the folder that holds the weights and {ADAPTER_CONFIG}",
        )
    config = read_json_object(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        what = f"is an adapter of type {str(kind)[:40]}, and LORA is read"
        raise BadInput(what, where=path, remedy=MERGE_WITH_PEFT)
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        what = f"was started by {str(start)[:40]!r}, which also changed the base by what its rank was"
        remedy = "save it as a plain adapter first: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        raise BadInput(what, where=path, remedy=remedy)
    for name in ("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"):
        if config.get(name):
            raise BadInput(f"has {name}, which is not read", where=path, remedy=MERGE_WITH_PEFT)
    return config


def _path(module: AdapterModule, adapter: Adapter) -> str:
    """The name of a module in its model; the folder is of one model, and its names have dots."""
    where = adapter.checkpoint.source
    parts = sorted(adapter.parts)
    if len(parts) > 1:
        what = f"changes {len(parts)} models ({', '.join(parts)}), and an adapter folder of PEFT is of one"
        raise BadInput(what, where=where, option="to", remedy="export it with `to='diffusers'`")
    if not module.name.dotted:
        what = f"{module.name.path[:80]}: where the dots of this name were is not known"
        raise BadInput(what, where=where, option="to", remedy="leave it in the names that it has")
    return module.name.path


def _most_common(values: Iterable[Any]) -> Any:
    """The most common value, the largest of several; 1 of none."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=1)


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def as_number(value: object, name: str, where: str | Path | None) -> float:
    """A number of a configuration; `BadInput` for anything else."""
    with suppress(OverflowError):  # JSON has integers that no float holds
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise _bad_config(f"has {name} {str(value)[:40]!r}, which is no number", where)


def _bad_config(what: str, where: str | Path | None) -> BadInput:
    return BadInput(what, where=where, remedy="correct it, or save the adapter again")
