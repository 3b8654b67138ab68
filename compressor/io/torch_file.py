"""State dicts written by `torch.save`, read without running code that they contain."""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor.documents import reading
from compressor.errors import BadInput
from compressor.io.files import read_bytes_at
from compressor.io.tensors import StoredTensor, TensorInMemory, TensorOnDisk, require_short_names
from compressor.io.training_state import LeftOut, is_ema, left_out, plain_document, settings_as_mappings

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of what `torch.save` wrote before torch 1.6: its magic number, pickled."""

_STATE_DICT_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module"),
    *("net", "network", "params", "weights"),
)
_NESTING_LIMIT = 3  # such as {"model": {"state_dict": ...}}; a damaged file can even contain itself
_PREFIXES = ("module.", "_orig_mod.")
# What a small file may ask for beside its own bytes: of a deflated record, of tensors that repeat what is stored
# (`expand`), and, at 50 to 64 bytes each, of containers that the pickle makes.
_MOST_BESIDE_THE_FILE = 2**24
_LARGEST_PICKLE = 2**26
_MOST_CONTAINERS = 1_500_000
_CONTAINER_OPCODES = (b"]", b"}", b"\x85", b"\x86", b"\x87", b"(")
_PICKLES_BEFORE_THE_VALUES = 5  # of the older format: magic number, version, system, state dict, keys of the storages
_SAVE_STATE_DICT = "save `model.state_dict()` with torch.save or as safetensors"


@dataclass(frozen=True)
class TorchFile:
    """What a torch checkpoint holds.

    `tensors`: the model's, by name in the order in which they were saved. `key`: what they are kept under, such as
    "state_dict"; empty where they are the whole file. `left_out`: what else is in there. `training`: the plain values
    beside the weights, as mappings and lists.
    """

    tensors: dict[str, StoredTensor]
    key: str
    left_out: tuple[LeftOut, ...]
    training: Mapping[str, Any]


def read_torch_file(path: Path) -> TorchFile:
    """The model's tensors in a torch checkpoint, and what else it holds.

    From a zip file (torch 1.6 and later) only the structure is loaded; each tensor is then read from the
    file by itself. A file in the older format, or one written on a machine of the other byte order, is loaded whole.

    In a training checkpoint the model's own mapping is taken (`state_dict`, `model_state_dict`, `model` or
    `module`, the first that holds tensors); one that is called an EMA only where there is no other.

    Raises:
        BadInput: the file is truncated, needs code to be unpickled, or holds no state dict.
    """
    is_zip = _is_zip(path)
    records = _stored_records(path) if is_zip else None
    if records is not None:
        # torch.load leaves `_checkpoint_offset` on the storages that it does not fill.
        document = _load(path, "meta")
        keys, weights = _weights(path, document)
        state_dict = _tensors(weights)
        if all(_data_offset(tensor) is not None for tensor in state_dict.values()):
            on_disk = {name: _placed(path, name, tensor, records=records) for name, tensor in state_dict.items()}
            resolved = path.resolve()
            on_disk = {name: replace(tensor, file=resolved) for name, tensor in on_disk.items()}
            _require_stored_values(path, on_disk)
            number = partial(_number_on_disk, path, records)
            return _torch_file(document, keys, weights, tensors=on_disk, number=number)
    if not is_zip:
        _require_few_containers(path)
    document = _load(path, "cpu")
    keys, weights = _weights(path, document)
    loaded = {name: TensorInMemory(_plain(path, name, tensor)) for name, tensor in _tensors(weights).items()}
    _require_stored_values(path, loaded)
    return _torch_file(document, keys, weights, tensors=loaded, number=torch.Tensor.item)


def read_state_file(path: Path) -> Mapping[str, Any]:
    """The plain values in a torch file of an optimizer's or a scheduler's state; its tensors are not read.

    Raises:
        BadInput: the file is damaged, needs code to be unpickled, or is none whose structure alone can be read.
    """
    records = _stored_records(path) if _is_zip(path) else None
    document = _load(path, "meta") if records is not None else None
    if records is None or not isinstance(document, Mapping):
        raise BadInput("is not a state whose structure can be read", where=path, remedy=_SAVE_STATE_DICT)
    return plain_document(document, {}, partial(_number_on_disk, path, records))


def _torch_file(
    document: Any,
    keys: Sequence[str],
    weights: Mapping[Any, Any],
    *,
    tensors: Mapping[str, StoredTensor],
    number: Callable[[torch.Tensor], object],
) -> TorchFile:
    training = plain_document(document, weights, number)
    return TorchFile(dict(tensors), ".".join(keys), left_out(document, keys, weights), training)


def _number_on_disk(path: Path, records: Mapping[int, int], tensor: torch.Tensor) -> object:
    """The value of a tensor of one element; None where it cannot be read."""
    if _data_offset(tensor) is None:
        return None
    try:
        return _placed(path, "", tensor, records=records).read().item()
    except BadInput:
        return None


def without_wrapper_prefixes(names: list[str]) -> list[str]:
    """Names as in the bare module: `module.` (DistributedDataParallel) and `_orig_mod.` (torch.compile) are removed.

    Only if every name starts with them.
    """
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return names


def _load(path: Path, location: str) -> object:
    with reading(path):
        try:
            with settings_as_mappings():
                return torch.load(path, map_location=location, weights_only=True)
        except pickle.UnpicklingError as error:
            if forbidden := re.search(r"GLOBAL\s+([\w.]+)", str(error)):
                what = f"is a pickle that needs the Python class {forbidden[1]}, and unpickling could run any code"
            else:
                what = "is a pickle of more than tensors, and unpickling it could run any code"
            raise BadInput(what, where=path, remedy=_SAVE_STATE_DICT) from None
        except OSError:
            raise
        except Exception as error:
            # A damaged file can make the unpickler raise anything at all.
            what = f"is damaged or holds no state dict of plain tensors ({str(error)[:120]})"
            remedy = f"download or copy it again, or {_SAVE_STATE_DICT}"
            raise BadInput(what, where=path, remedy=remedy) from None


def _is_zip(path: Path) -> bool:
    with reading(path), path.open("rb") as file:
        return file.read(4) == ZIP_MAGIC


def _stored_records(path: Path) -> dict[int, int] | None:
    # Where the uncompressed records of the zip begin, in bytes -> their size; None where reading the values
    # as they lie would swap their bytes.
    records = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("/constants.pkl"):
                    raise BadInput("is a TorchScript archive", where=path, remedy=_SAVE_STATE_DICT)
                _require_modest_record(path, archive, entry)
                if entry.filename.endswith("/byteorder"):
                    with archive.open(entry) as byteorder:
                        if byteorder.read(16) != sys.byteorder.encode():
                            return None
                if entry.compress_type == zipfile.ZIP_STORED:
                    local_header = read_bytes_at(path, entry.header_offset, 30)
                    name_size, extra_size = struct.unpack("<HH", local_header[26:30])
                    records[entry.header_offset + 30 + name_size + extra_size] = entry.file_size
    except BadInput:
        raise
    except Exception as error:
        # zipfile raises BadZipFile for most damage, and struct, Unicode or seek errors for the rest.
        what = f"is a truncated or damaged torch checkpoint ({str(error)[:120]})"
        raise BadInput(what, where=path, remedy="download or copy the file again") from None
    return records


def _require_modest_record(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Refuse a record of a zip file that inflates to far more than the file, or a pickle that makes too much."""
    is_pickle = entry.filename.endswith("/data.pkl")
    most = _MOST_BESIDE_THE_FILE + path.stat().st_size
    most = min(most, _LARGEST_PICKLE) if is_pickle else most
    deflated = entry.compress_type != zipfile.ZIP_STORED
    if (deflated or is_pickle) and entry.file_size > most:
        what = f"is not a usual torch checkpoint: its {entry.filename.rpartition('/')[2]} has {entry.file_size:,} bytes"
        raise BadInput(what, where=path, remedy=_SAVE_STATE_DICT)
    if is_pickle:
        pickled = archive.read(entry)
        if sum(pickled.count(opcode) for opcode in _CONTAINER_OPCODES) > _MOST_CONTAINERS:
            raise _too_many_containers(path)


def _require_few_containers(path: Path) -> None:
    """Refuse a file of the older format whose pickles create too many objects, by their opcodes alone."""
    containers = 0
    with reading(path), path.open("rb") as file:
        try:
            for _ in range(_PICKLES_BEFORE_THE_VALUES):
                for opcode, _, _ in pickletools.genops(file):
                    containers += opcode.code.encode("latin-1") in _CONTAINER_OPCODES
                    if containers > _MOST_CONTAINERS:
                        raise _too_many_containers(path)
        except (ValueError, MemoryError, OverflowError):  # a length that was damaged asks for any amount of memory
            return  # damaged: torch.load says of what kind


def _too_many_containers(path: Path) -> BadInput:
    what = f"is not a usual torch checkpoint: it holds more than {_MOST_CONTAINERS:,} Python objects"
    return BadInput(what, where=path, remedy=_SAVE_STATE_DICT)


def _require_stored_values(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors that need far more memory than the file has bytes, because they repeat stored values."""
    size, total = path.stat().st_size, 0
    for name, tensor in {tensor.region: (name, tensor) for name, tensor in tensors.items()}.values():
        needed = math.prod(tensor.shape) * tensor.dtype.itemsize
        total += needed
        if needed > size + _MOST_BESIDE_THE_FILE or total > 4 * size + _MOST_BESIDE_THE_FILE:
            what = f"tensor {name!r} has {needed:,} bytes of values, of which the file of {size:,} bytes stores few"
            raise BadInput(what, where=path, remedy="save a contiguous copy of it: tensor.contiguous()")


def _weights(path: Path, document: Any) -> tuple[list[str], Mapping[Any, Any]]:
    """The mapping of the model's tensors in a document, and the keys that lead to it."""
    if isinstance(document, torch.Tensor):
        raise BadInput("holds one tensor without a name", where=path, remedy=_SAVE_STATE_DICT)
    if not isinstance(document, Mapping):
        what = f"holds a {type(document).__name__}, not a state dict"
        raise BadInput(what, where=path, remedy=_SAVE_STATE_DICT)
    keys: list[str] = []
    for _ in range(_NESTING_LIMIT):
        averages = [key for key in document if isinstance(key, str) and is_ema(key)]
        inside = next((key for key in (*_STATE_DICT_KEYS, *averages) if _leads_to_tensors(document.get(key))), None)
        if inside is None or (inside in averages and _tensors(document)):
            break
        keys.append(inside)
        document = document[inside]
    if not _tensors(document):
        names = ", ".join(str(key)[:40] for key in list(document)[:8]) or "nothing"
        what = f"holds no tensors under {', '.join(_STATE_DICT_KEYS)} or at the top (found: {names})"
        raise BadInput(what, where=path, remedy=_SAVE_STATE_DICT)
    require_short_names(_tensors(document), path)
    return keys, document


def _leads_to_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and bool(_tensors(value) or any(key in value for key in _STATE_DICT_KEYS))


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _plain(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        kind = "quantized" if tensor.is_quantized else "sparse or lazily conjugated"
        what = f"tensor {name!r} is {kind}"
        raise BadInput(what, where=path, remedy="save it as an ordinary dense tensor")
    return tensor


def _data_offset(tensor: torch.Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return 0  # refused by _plain, with its name
    offset: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return offset


def _placed(path: Path, name: str, tensor: torch.Tensor, *, records: Mapping[int, int]) -> TensorOnDisk:
    _plain(path, name, tensor)
    record = _data_offset(tensor)
    assert record is not None
    begin = record + int(tensor.storage_offset()) * tensor.dtype.itemsize
    placed = TensorOnDisk(path, begin, tuple(tensor.shape), tensor.stride(), tensor.dtype)
    # A torch that loads nothing compares nothing either: the view must lie inside the record it names.
    end = begin + placed.span * tensor.dtype.itemsize
    if record not in records or not record <= begin <= end <= record + records[record]:
        what = f"is damaged: tensor {name!r} lies outside the data stored for it"
        raise BadInput(what, where=path, remedy="download or copy the file again")
    return placed
