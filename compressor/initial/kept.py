"""What a training run keeps of where it started, beside its checkpoints: a record of draws, or the initial state."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from compressor.documents import read_json
from compressor.errors import BadInput
from compressor.initial.draws import Draws
from compressor.initial.recording import record
from compressor.initial.weights import InitialWeights
from compressor.io import staged_file, write_json

KEPT_FOLDER = "initial"
"""The folder below a run's own that holds one of the two files."""

_DRAWS, _STATE = "draws.json", "model.safetensors"


def keep_initial(model: nn.Module, run: str | Path, seeds: Iterable[int] = ()) -> Path:
    """Keep the weights of a model that is not trained yet in the folder of a run: as a seed if one gives them.

    Args:
        model: The untrained model. One of transformers is built again from its configuration after each seed.
        run: The folder of the run; what an earlier run kept there is replaced.
        seeds: Seeds that may have been set before the model was built. One counts only if it gives all weights of two
            or more dimensions, bit by bit.

    Returns:
        `initial/draws.json`, a record of a few kilobytes, or `initial/model.safetensors`, the state itself, in that
        folder. `--initial` takes both, and the record is found without being asked for.

    Raises:
        BadInput: nothing can be written there.
    """
    folder = Path(run) / KEPT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    draws = next(filter(None, (_replayed(model, seed) for seed in dict.fromkeys(seeds))), None)
    (folder / (_DRAWS if draws is None else _STATE)).unlink(missing_ok=True)
    path = folder / (_STATE if draws is None else _DRAWS)
    with staged_file(path, overwrite=True) as staged:
        if draws is None:
            _write_state(model, staged)
        else:
            write_json(staged, draws.to_dict())
    return path


def find_kept(model: str | Path) -> Path | None:
    """What a run kept of its start: beside a checkpoint, its file, or the folder that its folder is in; or None."""
    place = Path(model)
    beside = place if place.is_dir() else place.parent
    for folder in (beside, beside.resolve().parent):
        for name in (_DRAWS, _STATE):
            path = folder / KEPT_FOLDER / name
            if path.is_file():
                return path
    return None


def is_record(path: str | Path) -> bool:
    """Whether a path is that of a record of draws by its name: the index of a sharded checkpoint is JSON too."""
    return Path(path).suffix == ".json" and not Path(path).name.endswith(".index.json") and Path(path).is_file()


def read_kept(path: str | Path, numbers: int | None = None) -> InitialWeights:
    """The initial weights that `keep_initial` wrote.

    Args:
        path: The file.
        numbers: How many numbers the model has, which bounds what may be drawn for it; None where it is not known.

    Raises:
        BadInput: the file is something else, or draws more.
    """
    path = Path(path)
    if path.suffix != ".json":
        return InitialWeights.from_checkpoint(path)
    try:
        draws = Draws.from_dict(read_json(path))
        if numbers is not None and not draws.is_within(numbers):
            raise ValueError("it draws more numbers than the model has")
    except ValueError as error:
        remedy = "give the draws.json that a training run kept, a seed, or a checkpoint"
        raise BadInput(f"holds no initialization: {error}", where=path, option="initial", remedy=remedy) from None
    return InitialWeights.from_draws(draws)


def _replayed(model: nn.Module, seed: int) -> Draws | None:
    """The draws of a seed, if they give all matrices of the model."""
    config = getattr(model, "config", None)
    build = getattr(type(model), "_from_config", None)
    if config is None or build is None:
        return None
    found: Draws | None = None
    with suppress(BadInput):
        found = record(lambda: build(copy.deepcopy(config)), seed).draws
    if found is None:
        return None
    waiting = {name for name, each in model.named_parameters() if each.dim() >= 2}
    ours = model.state_dict()
    for name, drawn in found.replay(waiting):
        own = ours[name].detach().cpu()
        if own.dtype != drawn.dtype or not torch.equal(own, drawn):
            return None
        waiting.discard(name)
    return None if waiting else found


def _write_state(model: nn.Module, path: Path) -> None:
    """Write all floating-point tensors of a model, each that is tied once, by the first of its names."""
    from safetensors.torch import save_file

    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensors.setdefault(id(tensor), (name, tensor))
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.values()}, path)
