"""What an archive says of itself: its checkpoints, their tensors, and where the initial weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from compressor.archiving.change import Change
from compressor.errors import BadInput
from compressor.io import TensorInfo
from compressor.io.checkpoint import CHANGE_SUFFIX
from compressor.io.safetensors_file import DTYPES
from compressor.io.steps import Unit
from compressor.lowrank import InitialRecord

FORMAT_VERSION = 1
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_NUMBERS = 2**60


@dataclass(frozen=True)
class ArchivedCheckpoint:
    """What was stored of one checkpoint.

    Attributes:
        name: What it is called.
        number: Its step or epoch.
        bytes: Of its weight files.
        stored_bytes: Of its file in the archive.
        digest: The SHA-256 of that file.
        error: The largest relative error of a tensor.
        from_initial: How many tensors are changes from the initial weights.
        from_previous: How many are changes from the checkpoint before.
        in_full: How many are stored from nothing.
        unchanged: How many of these three are within the tolerance of the share that is left, and store nothing.
        exact: How many are stored bit for bit.
        rank: The median rank of the pairs of factors; None where no change is one.
        largest_rank: The largest; 0 where no change is one.
        rank_bound: The smallest rank that training can have written in a matrix at most; None where it is vacuous.
        bounded: Of how many matrices the memory window bounds the rank below the full one.
    """

    name: str
    number: int
    bytes: int
    stored_bytes: int
    digest: str
    error: float
    from_initial: int = 0
    from_previous: int = 0
    in_full: int = 0
    unchanged: int = 0
    exact: int = 0
    rank: float | None = None
    largest_rank: int = 0
    rank_bound: int | None = None
    bounded: int = 0

    @property
    def file(self) -> str:
        """Its file in the archive."""
        return self.name + CHANGE_SUFFIX

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Any) -> ArchivedCheckpoint:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        if not isinstance(document, Mapping) or document.keys() != {each.name for each in fields(cls)}:
            raise ValueError("a checkpoint is not described as one is")
        found = dict(document)
        name, bound, rank = found["name"], found["rank_bound"], found["rank"]
        counts = [found[each.name] for each in fields(cls) if each.type == "int"]
        if not isinstance(name, str) or PurePath(name).name != name or "\0" in name or name in ("", ".", ".."):
            raise ValueError(f"{str(name)[:80]!r} is no name of a checkpoint")
        if not all(type(each) is int and each >= 0 for each in counts):
            raise ValueError(f"the checkpoint {name!r} has counts that are none")
        if type(found["error"]) not in (int, float) or not isinstance(found["digest"], str):
            raise ValueError(f"the checkpoint {name!r} has no error or digest")
        if type(bound) not in (int, type(None)) or type(rank) not in (int, float, type(None)):
            raise ValueError(f"the checkpoint {name!r} has a rank or bound that is none")
        return cls(**found)


@dataclass(frozen=True)
class ArchiveIndex:
    """The content of an archive.

    Attributes:
        form: Whether the checkpoints were files or folders.
        tolerance: The largest relative error of a tensor that was asked for.
        unit: What the numbers of the checkpoints count.
        tensors: The tensors of each checkpoint.
        aliases: Further names of tied tensors.
        checkpoints: The checkpoints in order; each may be a change from the one before.
        initial: Where the initial weights come from, by the names of the tensors that are changes from them.
    """

    form: Literal["file", "folder"]
    tolerance: float
    unit: Unit
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    checkpoints: Sequence[ArchivedCheckpoint]
    initial: InitialRecord | None = None

    def checkpoint(self, name: str, folder: Path) -> ArchivedCheckpoint:
        """The checkpoint of a name, with or without the ending of its file; `BadInput` where there is none."""
        found = [each for each in self.checkpoints if each.name == name]
        found += [each for each in self.checkpoints if PurePath(each.name).stem == name]
        if found:
            return found[0]
        names = [each.name for each in self.checkpoints]
        some = ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])
        raise BadInput(f"holds no checkpoint {name!r}", where=folder, option="checkpoint", remedy=f"it has {some}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "form": self.form,
            "tolerance": self.tolerance,
            "unit": self.unit,
            "tensors": {name: [list(info.shape), _DTYPE_NAMES[info.dtype]] for name, info in self.tensors.items()},
            "aliases": dict(self.aliases),
            "checkpoints": [each.to_dict() for each in self.checkpoints],
            "initial": None if self.initial is None else self.initial.to_dict(),
        }

    @classmethod
    def from_dict(cls, document: Any) -> ArchiveIndex:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        if not isinstance(document, Mapping):
            raise ValueError("it does not say what it holds")
        version = document.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"it is of format {version!r}, and this version reads formats up to {FORMAT_VERSION}")
        form, tolerance = document.get("form"), document.get("tolerance")
        unit: Any = document.get("unit")
        tensors, aliases, checkpoints = (document.get(key) for key in ("tensors", "aliases", "checkpoints"))
        if form not in ("file", "folder") or unit not in get_args(Unit) or not isinstance(tolerance, int | float):
            raise ValueError("it does not say what its checkpoints are")
        if not isinstance(tensors, Mapping) or not tensors or not isinstance(checkpoints, list) or not checkpoints:
            raise ValueError("it lists no tensors or no checkpoints")
        if not isinstance(aliases, Mapping) or not all(name in tensors for name in aliases.values()):
            raise ValueError("it ties tensors that it does not have")
        initial = document.get("initial")
        found = cls(
            form,
            float(tolerance),
            unit,
            {name: _tensor(name, each) for name, each in tensors.items()},
            dict(aliases),
            tuple(map(ArchivedCheckpoint.from_dict, checkpoints)),
            None if initial is None else InitialRecord.from_dict(initial),
        )
        if len({each.name for each in found.checkpoints}) < len(found.checkpoints):
            raise ValueError("two of its checkpoints have one name")
        numbers = sum(info.elements for info in found.tensors.values())
        draws = None if found.initial is None else found.initial.draws
        if numbers > _MOST_NUMBERS or (draws is not None and not draws.is_within(numbers)):
            raise ValueError("its initialization draws more numbers than its checkpoints have")
        return found


def _tensor(name: str, document: Any) -> TensorInfo:
    match document:
        case [list() as shape, str() as dtype] if dtype in DTYPES:
            if all(type(side) is int and 0 <= side < _MOST_NUMBERS for side in shape):
                return TensorInfo(name, tuple(shape), DTYPES[dtype])
    raise ValueError(f"the tensor {name[:80]!r} has no shape and dtype")


def change_to_list(change: Change) -> list[Any]:
    """A change without its numbers, as a file has it."""
    own: list[Any] = [change.source, change.share]
    if change.exact:
        return [*own, "exact"]
    return [*own, change.rank, change.factor_step, change.step, *change.widths] if change.payload else own


def change_from_list(document: Any, payload: bytes) -> Change:
    """Read what `change_to_list` returns; ValueError for anything else."""
    match document:
        case [source, share]:
            return Change(source, share)
        case [source, share, "exact"]:
            return Change(source, share, exact=True, payload=payload)
        case [source, share, rank, factor_step, step, left, right, rest]:
            return Change(source, share, False, rank, factor_step, step, (left, right, rest), payload)
    raise ValueError(f"{str(document)[:80]!r} is no change")
