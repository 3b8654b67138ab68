"""A checkpoint as named tensors that are read one at a time, whatever kind of file holds them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch

from compressor.arguments import require_model
from compressor.documents import reading
from compressor.errors import BadInput
from compressor.formatting import format_size
from compressor.io.adapters import MERGE_WITH_PEFT, adapter_kind
from compressor.io.files import (
    AnyFile,
    read_at,
    read_bytes_at,
    read_json_object,
    regular_file_size,
    require_content,
)
from compressor.io.foreign import HEAD, refuse_foreign, refuse_foreign_in
from compressor.io.hub import RemoteModel, hub_model, local_model
from compressor.io.remote_file import RemoteFile
from compressor.io.safetensors_file import looks_like_safetensors, read_safetensors
from compressor.io.stacks import Stack
from compressor.io.tensors import StoredTensor, TensorInfo, TensorInMemory, bytes_of
from compressor.io.torch_file import LEGACY_MAGIC, ZIP_MAGIC, read_torch_file, without_wrapper_prefixes
from compressor.io.training_state import LeftOut, of_an_optimizer
from compressor.io.workspace import remove_abandoned
from compressor.recipe.training_files import is_training_state

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt")
"""File name endings under which trained weights are kept."""

CHANGE_SUFFIX = ".change"
"""What the names of files in an archive of checkpoints end with: they hold changes, not weights."""

_INDEX_SUFFIX = ".index.json"
_STANDARD_NAMES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# The configuration of a PEFT adapter.
ADAPTER_CONFIG = "adapter_config.json"
_FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_FP8_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_DIGEST_BLOCK = 1 << 22
# The keys of a configuration for its number of layers; some models share one layer's weights among several.
_COUNT_OF_LAYERS = re.compile(r"(^|_)(layers?|blocks?|depths?|stages?)$")
_LEAST_LAYERS_REFUSED = 1000
_MOST_LABELS = 2**22


def portable_name(path: str) -> str:
    """The name of a file or folder in texts for others: without an absolute path of this machine."""
    return Path(path).name if Path(path).is_absolute() else path


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A trained model's weights by name; opening one reads names, shapes and dtypes, not values.

    Attributes:
        source: The path that was opened; None for a module.
        form: `file`, `folder` or `module`.
        files: The weight files, sorted; none for a module.
        folder: The model folder that was opened, if it was one.
        tensors: Each stored tensor once, in stored order; of tied names the first.
        aliases: Further names of tied tensors, with their names in `tensors`.
        metadata: The text that safetensors files carry in their headers.
        config: The `config.json` of the model folder, or of the folder of a weight file if it can be read.
        weights_at: The keys under which a torch file keeps the weights, such as "state_dict"; empty if they are all
            of it.
        left_out: What the files hold beside the weights: the state of an optimizer, an EMA copy.
        training: The plain values that a torch file holds beside the weights: settings, counters, the groups of an
            optimizer.
        stacks: Tensors of the files that hold several layers. In `tensors` are their parts, and `read` takes the name
            of the whole too.

    Example:
        >>> checkpoint = compressor.open_checkpoint("model.safetensors")
        >>> checkpoint.read("fc.weight").shape
    """

    source: Path | None
    form: Literal["file", "folder", "module"]
    files: tuple[AnyFile, ...]
    folder: Path | None
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    _stored: Mapping[str, StoredTensor] = field(repr=False)
    weights_at: str = ""
    left_out: tuple[LeftOut, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict, repr=False)
    stacks: tuple[Stack, ...] = ()

    def __repr__(self) -> str:
        size = format_size(sum(info.nbytes for info in self.tensors.values()))
        return f"<Checkpoint of {self.source or 'a module'}: {len(self.tensors)} tensors, {size}>"

    def read(self, name: str) -> torch.Tensor:
        """One tensor's values, in contiguous CPU memory of their own; nothing is kept.

        Args:
            name: A key of `tensors` or `aliases`.

        Raises:
            KeyError: the checkpoint has no such tensor.
            BadInput: the file is gone or has become shorter since it was opened.
        """
        return self._stored[self.aliases.get(name, name)].read()

    def stored(self, name: str) -> StoredTensor:
        """Where the values of a tensor are, by any of its names: small to hand to another process, but for a module.

        Raises `KeyError` where the checkpoint has no such tensor.
        """
        return self._stored[self.aliases.get(name, name)]

    def changed(self, tensors: Mapping[str, StoredTensor | None]) -> Checkpoint:
        """The same with other tensors under some names, and without those under which there is None."""
        stored = {**self._stored, **{name: each for name, each in tensors.items() if each is not None}}
        names = dict.fromkeys((*self.tensors, *(name for name in tensors if name not in self.aliases)))
        infos = {
            name: self.tensors[name]
            if name not in tensors
            else TensorInfo(name, stored[name].shape, stored[name].dtype)
            for name in names
            if tensors.get(name, self) is not None
        }
        return replace(self, tensors=infos, _stored=stored)

    def taken_apart(self, stacks: Sequence[Stack]) -> Checkpoint:
        """The same with the parts of some tensors in the places of these."""
        parts = {stack.tensor: stack.parts(self._stored[stack.tensor]) for stack in stacks}
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            own = parts.get(name)
            tensors |= {name: info} if own is None else _infos(own)
        stored = {**self._stored, **{name: each for own in parts.values() for name, each in own.items()}}
        return replace(self, tensors=tensors, _stored=stored)

    def apart_like(self, other: Checkpoint) -> Checkpoint:
        """The same with those tensors taken apart that hold several layers in another checkpoint."""
        stacks = [stack for stack in other.stacks if self._holds(stack)]
        return self.taken_apart(stacks).stacked(stacks, self)

    def _holds(self, stack: Stack) -> bool:
        return stack.tensor in self.tensors and stack.fits(self.tensors[stack.tensor].shape)

    def stacked(self, stacks: Sequence[Stack], wholes: Checkpoint) -> Checkpoint:
        """The same, knowing the tensors that hold several of its own, which another checkpoint has."""
        own = {stack.tensor: wholes._stored[stack.tensor] for stack in stacks}
        return replace(self, _stored={**self._stored, **own}, stacks=(*self.stacks, *stacks))

    @cached_property
    def wholes(self) -> dict[str, TensorInfo]:
        """Name, shape and dtype of the tensors that hold several of its own, by name."""
        return _infos({stack.tensor: self._stored[stack.tensor] for stack in self.stacks})

    @cached_property
    def held_by(self) -> dict[str, str]:
        """The name of the tensor that holds others in the files of the original, by the names of these."""
        return {name: stack.tensor for stack in self.stacks for name in stack.names()}

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stored tensor with its name, one at a time."""
        return ((name, self.read(name)) for name in self.tensors)

    @property
    def name(self) -> str:
        """The model's name without a path of this machine: `org/name` on the hub, or the last part of its path."""
        if self.source is None:
            return "module"
        fetched = hub_model(self.source)
        return fetched.repository if fetched is not None else Path(os.path.abspath(self.source)).name  # noqa: PTH100 - a link's own name

    @property
    def directory(self) -> Path | None:
        """The folder that the weight files are in; None for a module."""
        return None if self.source is None else self.folder or self.source.parent

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(info.elements for info in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files in bytes, without what is `left_out`; of the tensors for a module."""
        tensors = sum(info.nbytes for info in self.tensors.values())
        if self.form == "module":
            return tensors
        size = sum(regular_file_size(path) for path in self.files)
        if not self.left_out:
            return size
        return max(size - sum(each.bytes for each in self.left_out), tensors)

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the weight files one after the other; of names and values for a module.

        For one file it is what `sha256sum` prints.
        """
        digest = hashlib.sha256()
        if self.form == "module":
            for name, info in self.tensors.items():
                digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
                digest.update(bytes_of(self.read(name)))
        buffer = memoryview(bytearray(_DIGEST_BLOCK))
        for path in self.files:
            size = regular_file_size(path)
            for offset in range(0, size, _DIGEST_BLOCK):
                block = buffer[: min(_DIGEST_BLOCK, size - offset)]
                read_at(path, offset, block)
                digest.update(block)
        return digest.hexdigest()


def _infos(stored: Mapping[str, StoredTensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, each.shape, each.dtype) for name, each in stored.items()}


def open_checkpoint(model: str | Path | torch.nn.Module | RemoteModel) -> Checkpoint:
    """Open a trained model: a weight file, the index of a sharded one, a model folder, or a module in memory.

    Weight files are safetensors or what `torch.save` wrote; the content decides, not the name. In a folder the file is
    `model.safetensors`, else its index, else `pytorch_model.bin`, else its index, else the only weight file there is.
    Values are read when they are asked for, one tensor at a time (`read_torch_file` says which torch files are loaded
    whole). Torch files lose the prefixes that DistributedDataParallel and torch.compile put before every name. A module
    is not copied: reading gives its present values.

    Args:
        model: A path, or a module. If there is no such path, `org/name` is a model of the Hugging Face hub, which is
            fetched; one that `remote_model` gives is not, and its tensors are read from the hub.

    Returns:
        The checkpoint.

    Raises:
        BadInput: nothing there, a damaged file, no weights, or files that contradict each other; the message says which
            and what to do.

    Example:
        >>> compressor.open_checkpoint("model.safetensors").tensors["fc.weight"].shape
    """
    if isinstance(model, RemoteModel):
        return _open_remote(model)
    require_model(model)
    if isinstance(model, torch.nn.Module):
        return _open_module(model)
    if not os.path.lexists(model):
        # A run that was killed while it replaced a folder may have left both beside their place.
        remove_abandoned(Path(model).absolute().parent)
    source = Path(local_model(model))
    with reading(source):
        is_folder = stat.S_ISDIR(source.stat().st_mode)
    folder = source if is_folder else None
    weights = _weights_in(source) if is_folder else source
    files: tuple[AnyFile, ...] = (weights,)
    if weights.name.endswith(_INDEX_SUFFIX):
        files, content = _read_sharded(weights)
    else:
        content = _read_weight_file(weights)
    return _opened(content, source=source, files=files, folder=folder, beside=weights.parent)


def _open_remote(model: RemoteModel) -> Checkpoint:
    """A model folder of the hub of which all but the weights is in the cache."""
    folder, remote = model
    name = _chosen([*remote, *(entry.name for entry in folder.glob(f"*{_INDEX_SUFFIX}"))], folder)
    if name.endswith(_INDEX_SUFFIX):
        files, content = _read_sharded(folder / name, remote)
    else:
        files, content = (remote[name],), _read_weight_file(remote[name])
    return _opened(content, source=folder, files=files, folder=folder, beside=folder)


def _opened(
    content: _WeightFile, *, source: Path, files: tuple[AnyFile, ...], folder: Path | None, beside: Path
) -> Checkpoint:
    """The checkpoint of weight files; a configuration may lie beside them."""
    stored = content.tensors
    if content.is_torch:
        stored = dict(zip(without_wrapper_prefixes(list(stored)), stored.values(), strict=True))
    of_optimizer = [name for name in stored if of_an_optimizer(name)]
    if of_optimizer and len(of_optimizer) < len(stored):
        size = sum(TensorInfo(name, stored[name].shape, stored[name].dtype).nbytes for name in of_optimizer)
        state = LeftOut(f"{of_optimizer[0][:80]} and the like", "optimizer state", size)
        content = content._replace(left_out=(*content.left_out, state))
        stored = {name: tensor for name, tensor in stored.items() if not of_an_optimizer(name)}
    if not stored:
        raise BadInput("holds no tensors", where=source, remedy="give a checkpoint with trained weights")
    return _checkpoint(
        content._replace(tensors=stored),
        source=source,
        form="file" if folder is None else "folder",
        files=files,
        folder=folder,
        config=_config(beside / "config.json", len(stored), must_be_good=folder is not None),
    )


def _config(path: Path, tensors: int, *, must_be_good: bool) -> dict[str, Any] | None:
    try:
        if not path.is_file():
            return None
        config = read_json_object(path)
        _require_possible_sizes(config, path, tensors)
        return config
    except BadInput:
        if must_be_good:
            raise
        return None  # what lies beside a file need not belong to it


def _require_possible_sizes(config: Mapping[str, Any], path: Path, tensors: int) -> None:
    """Refuse a configuration with far more layers than tensors, before a model of that size is built."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _require_possible_sizes(value, path, tensors)
            continue
        if key == "num_labels":
            most = _MOST_LABELS
        elif _COUNT_OF_LAYERS.search(key):
            most = max(_LEAST_LAYERS_REFUSED, 4 * tensors)
        else:
            continue
        largest = max(
            (size for size in (value if isinstance(value, list) else [value]) if type(size) is int), default=0
        )
        if largest > most:
            shown = f"{largest:,}" if largest < 10**15 else "a number of more than 15 digits"
            what = f"{key} is {shown}, but the weights are {tensors:,} tensors"
            raise BadInput(what, where=path, remedy="put the model's own config.json there")


def require_finite(name: str, tensor: torch.Tensor, source: Path | None = None) -> None:
    """Refuse a tensor with NaN or infinite values, which no factorization survives.

    Raises:
        BadInput: naming the tensor and counting the values.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # torch has no isfinite for eight-bit floats.
    values = tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor
    if bool(torch.isfinite(values).all()):
        return
    nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    what = f"holds {nan} NaN and {infinite} infinite values among {tensor.numel()}"
    remedy = "use a checkpoint from before the training diverged"
    raise BadInput(what, where=f"tensor {name}" if source is None else f"{source}: tensor {name}", remedy=remedy)


def require_in_range(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that was computed and rounded to its dtype; refuse it if values exceed the dtype's range.

    Raises:
        BadInput: naming the tensor and the dtype.
    """
    if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        dtype, limit = str(tensor.dtype).removeprefix("torch."), torch.finfo(tensor.dtype).max
        count = int((~torch.isfinite(tensor)).sum())
        raise BadInput(
            f"{count} of {tensor.numel()} numbers exceed the range of {dtype} (up to {limit:g})",
            where=f"tensor {name}",
            remedy="convert the model to bfloat16 or float32, or leave this layer as it is with `exclude`",
        )
    return tensor


def refuse_fp8(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with 8-bit floating-point weights: its numbers mean nothing without their scales.

    Raises:
        BadInput: naming the first such weight and whether its scale is there.
    """
    fp8 = {getattr(torch, name) for name in _FP8_DTYPES}
    for name, info in checkpoint.tensors.items():
        if info.dtype not in fp8:
            continue
        scale = next((name + end for end in _FP8_SCALE_SUFFIXES if name + end in checkpoint.tensors), None)
        what = f"weight {name} is FP8 ({str(info.dtype).removeprefix('torch.')}) " + (
            f"scaled by {scale}" if scale else "without its scales"
        )
        remedy = "compress the bfloat16 original, or dequantize it first"
        raise BadInput(what, where=checkpoint.source, remedy=remedy)


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Refuse the weights of an adapter: they are no model, but what is added to one.

    Raises:
        BadInput: the tensors are called an adapter's, or the folder, or that of the file, is one of PEFT.
    """
    source = checkpoint.source
    if (kind := adapter_kind({*checkpoint.tensors, *checkpoint.aliases})) is not None:
        raise BadInput(f"is a {kind[0]}, not a model", where=source, remedy=kind[1])
    if adapter_config(checkpoint) is not None:
        raise BadInput("is a PEFT adapter, not a model", where=source, remedy=MERGE_WITH_PEFT)


def adapter_config(checkpoint: Checkpoint) -> Path | None:
    """The configuration of PEFT that belongs to a checkpoint: in its folder, or beside a file that is named for it."""
    source = checkpoint.source
    if source is None or (checkpoint.folder is None and not source.name.startswith("adapter_model.")):
        return None
    path = (checkpoint.folder or source.parent) / ADAPTER_CONFIG
    return path if path.is_file() else None


def _checkpoint(
    content: _WeightFile,
    *,
    source: Path | None,
    form: Literal["file", "folder", "module"],
    files: tuple[AnyFile, ...],
    folder: Path | None,
    config: Mapping[str, Any] | None,
) -> Checkpoint:
    stored, metadata = content.tensors, content.metadata
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    first_name: dict[Hashable, str] = {}
    for name, tensor in stored.items():
        canonical = first_name.setdefault(tensor.region, name)
        if canonical == name:
            tensors[name] = TensorInfo(name, tensor.shape, tensor.dtype)
        else:
            aliases[name] = canonical
    # safetensors' `save_model` stores a tied tensor once, and notes its other names in the metadata.
    noted = {alias: name for alias, name in metadata.items() if alias not in stored and name in stored}
    aliases |= {alias: aliases.get(name, name) for alias, name in noted.items() if alias != "format"}
    return Checkpoint(
        source=source,
        form=form,
        files=files,
        folder=folder,
        tensors=tensors,
        aliases=aliases,
        metadata=metadata,
        config=config,
        _stored=stored,
        weights_at=content.weights_at,
        left_out=content.left_out,
        training=content.training,
    )


def _open_module(module: torch.nn.Module) -> Checkpoint:
    stored: dict[str, StoredTensor] = {
        name: TensorInMemory(value)
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    if not stored:
        what = f"the module {type(module).__name__} has no parameters or buffers"
        raise BadInput(what, remedy="give a trained module")
    content = _WeightFile(stored, metadata={}, is_torch=False)
    return _checkpoint(content, source=None, form="module", files=(), folder=None, config=None)


def _weights_in(folder: Path) -> Path:
    with reading(folder):
        return folder / _chosen([entry.name for entry in folder.iterdir()], folder)


def _chosen(names: Iterable[str], folder: Path) -> str:
    """The weight file, or the index of several, among the files of a model folder."""
    names = sorted(names)
    for name in _STANDARD_NAMES:
        if name in names:
            return name
    endings = tuple(suffix + _INDEX_SUFFIX for suffix in WEIGHT_SUFFIXES)
    indices = [name for name in names if name.endswith(endings)]
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES) and not is_training_state(Path(name))]
    found = indices or weights
    if not found:
        if any(name.endswith(CHANGE_SUFFIX) for name in names):
            remedy = "restore one first: 'compress restore ARCHIVE --checkpoint NAME'"
            raise BadInput("is an archive of checkpoints", where=folder, remedy=remedy)
        refuse_foreign_in(folder, names)
        remedy = "give the folder that has model.safetensors or pytorch_model.bin, or a weight file"
        raise BadInput("is a folder without a weight file", where=folder, remedy=remedy)
    if len(found) > 1:
        what = f"is a folder with {len(found)} weight files ({', '.join(found[:4])}{', ...' * (len(found) > 4)})"
        raise BadInput(what, where=folder, remedy="give the one that is meant")
    return found[0]


class _WeightFile(NamedTuple):
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    is_torch: bool
    weights_at: str = ""
    left_out: tuple[LeftOut, ...] = ()
    training: Mapping[str, Any] = {}


def _read_weight_file(path: AnyFile) -> _WeightFile:
    size = regular_file_size(path)
    head = read_bytes_at(path, 0, min(size, HEAD))
    require_content(path, head)
    if isinstance(path, RemoteFile):
        remote, metadata = read_safetensors(path)
        return _WeightFile({**remote}, metadata, False)
    if looks_like_safetensors(head) or (size < 9 and path.suffix == ".safetensors"):
        tensors, metadata = read_safetensors(path)
        # The values come from the file that was checked, even if a link or the working directory changes later.
        resolved = path.resolve()
        return _WeightFile({name: replace(t, file=resolved) for name, t in tensors.items()}, metadata, False)
    refuse_foreign(path, head)
    if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        # The name promises that nothing is unpickled, and torch.load goes by the name as well.
        if path.suffix == ".safetensors":
            what = "is a torch checkpoint under a safetensors name"
            raise BadInput(what, where=path, remedy="rename it to .pt, or convert it")
        read = read_torch_file(path)
        return _WeightFile(read.tensors, {}, True, read.key, read.left_out, read.training)
    if head.lstrip()[:1] == b"{":
        raise BadInput("is JSON, not weights", where=path, remedy="give the weight file or the model folder")
    if head[:1] == b"\x80":
        remedy = "save `model.state_dict()` with torch.save or as safetensors"
        raise BadInput("is a bare pickle, which could run any code", where=path, remedy=remedy)
    what = f"is neither safetensors nor a torch checkpoint (it starts with {head[:8]!r})"
    raise BadInput(what, where=path, remedy="check that it is a weight file, and download it again if it is")


def _read_sharded(
    index: Path, remote: Mapping[str, RemoteFile] | None = None
) -> tuple[tuple[AnyFile, ...], _WeightFile]:
    """The shards that an index lists, beside it or on the hub, and what they hold together."""
    weight_map = _checked_weight_map(index)
    _require_all_shards(index, set(weight_map.values()))
    shards: dict[str, _WeightFile] = {}
    places: list[AnyFile] = []
    for file_name in sorted(set(weight_map.values())):
        path: AnyFile = index.parent / file_name
        if remote is not None and file_name in remote:
            path = remote[file_name]
        elif not os.path.lexists(index.parent / file_name):
            what = f"the shard {file_name} that {index.name} lists is missing"
            raise BadInput(what, where=index.parent, remedy="download the whole model")
        shards[file_name] = _read_weight_file(path)
        places.append(path)
    holder = {name: file_name for file_name, shard in shards.items() for name in shard.tensors}
    for name, file_name in weight_map.items():
        if name not in shards[file_name].tensors:
            place = f"in {holder[name]}" if name in holder else "in no shard"
            raise _contradiction(index, f"puts tensor {name!r} into {file_name}, but it is {place}")
    for file_name, shard in shards.items():
        for name in shard.tensors:
            if weight_map.get(name) != file_name:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise _contradiction(index, f"{listed}, but tensor {name!r} is in {file_name}")
    whole = _WeightFile(
        {name: shards[file_name].tensors[name] for name, file_name in weight_map.items()},
        {key: text for shard in shards.values() for key, text in shard.metadata.items()},
        all(shard.is_torch for shard in shards.values()),
        left_out=tuple(each for shard in shards.values() for each in shard.left_out),
    )
    return tuple(places), whole


def _checked_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _contradiction(index, "has no weight_map that names a file for each tensor")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_inside(file_name):
            what = f"puts tensor {name!r} into {str(file_name)[:80]!r}, which is no file of this folder"
            raise _contradiction(index, what)
    return weight_map


def _require_all_shards(index: Path, listed: set[str]) -> None:
    """Shards that are numbered `...-00001-of-00005...` must all be listed."""
    numbered = [match for name in listed if (match := re.search(r"(\d+)-of-(\d+)", name))]
    for total in {int(match[2]) for match in numbered}:
        there = {int(match[1]) for match in numbered if int(match[2]) == total}
        if missing := sorted(set(range(1, total + 1)) - there)[:3]:
            which = ", ".join(map(str, missing))
            raise _contradiction(index, f"lists no tensor of shard {which} of {total}")


def _is_inside(file_name: str) -> bool:
    try:
        os.fsencode(file_name)
    except UnicodeEncodeError:
        return False
    parts = PurePosixPath(file_name)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and "\0" not in file_name


def _contradiction(index: Path, what: str) -> BadInput:
    return BadInput(what, where=index, remedy="download the index and its shards again, from one place")
