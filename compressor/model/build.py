"""Dense models to evaluate, from a user's own code or a transformers folder, and what prepares data."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.data.preprocessing import read_config
from compressor.errors import BadInput, first_line
from compressor.lowrank import METADATA_KEY, LowRankSpec, is_compressed_tensors

FACTORY_FORM = "use package.module:name or path/to/file.py:name"


def load_factory(spec: str) -> Callable[[], nn.Module]:
    """Return what builds a model in the user's own code: `package.module:name` or `path/to/file.py:name`.

    The code runs, with its own folder (for a file) or the current one (for a module) first on the import
    path while it is imported. Raises `BadInput` when it cannot be imported or has no such callable; calling
    the result raises `BadInput` when the user's function fails or returns anything but an `nn.Module`.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise BadInput(f"{spec!r} names no function that builds the model", option="factory", remedy=FACTORY_FORM)
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        what = "not callable" if hasattr(module, name) else "not defined"
        remedy = "name a function that returns the model"
        raise BadInput(f"{name} is {what} there", where=source, option="factory", remedy=remedy)

    return partial(built, factory, spec)


def built(factory: Callable[[], object], where: str) -> nn.Module:
    """What the user's function builds; raises `BadInput` when it fails or returns anything but an `nn.Module`."""
    try:
        model = factory()
    except Exception as error:
        raise BadInput(
            f"building the model raised {type(error).__name__}: {error}",
            where=where,
            option="factory",
            remedy="mend the function; it is called without arguments",
        ) from error
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"it returned {type(model).__name__}, not a torch.nn.Module",
            where=where,
            option="factory",
            remedy="name a function that returns the model",
        )
    return model


def load_transformers(folder: Path, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Load a dense transformers model from a local folder, by the architecture that its config.json names.

    No code from the folder runs and nothing is fetched. Raises `BadInput` when the folder has no usable
    config.json, when transformers does not know the architecture, or when weights are missing or misfit,
    which transformers itself would replace by random numbers.
    """
    architecture, model_class = _model_class(folder)
    try:
        with _silent_loading():
            given = _packed_config(folder, model_class) if state is None else _of_state(folder, model_class, state)
            model, loaded = model_class.from_pretrained(
                folder if state is None else None,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **given,
            )
    except Exception as error:
        # for each thing that can be wrong in a folder's files transformers has an exception of another kind
        raise BadInput(
            f"transformers cannot load it: {first_line(error)}", where=folder, remedy="repair the folder"
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in loaded.get(problem) or ()):
            raise BadInput(
                f"the weights do not fit {architecture}: {problem.replace('_keys', '')} {_some(names)}",
                where=folder,
                remedy="repair the folder: these would be random numbers",
            )
    assert isinstance(model, nn.Module)
    return model


def _of_state(folder: Path, model_class: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What loads tensors that are in no file of the folder, with its configuration."""
    return {"config": model_class.config_class.from_pretrained(folder, local_files_only=True), "state_dict": state}


def _packed_config(folder: Path, model_class: Any) -> dict[str, Any]:
    """The configuration of a folder that is quantized, with which our own layers hold its tensors; {} for another one.

    The loaders of others want libraries or devices of their own, and compressed-tensors would make dense layers of
    integers when they run.
    """
    said = read_config(folder).get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") == METADATA_KEY:
        return {}
    spec = LowRankSpec({}, source=said)
    if is_compressed_tensors({"quantization_config": said}):
        with suppress(ValueError):  # of others, who name classes of layers
            spec = LowRankSpec.from_config(said)
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    config.quantization_config = spec.to_own_config()
    return {"config": config}


def untrained_transformers(folder: Path) -> Callable[[], nn.Module]:
    """What builds a transformers model with fresh weights: its class, with the configuration in a local folder.

    No code from the folder runs and nothing is fetched. Raises `BadInput` as `load_transformers` does.
    """
    _, model_class = _model_class(folder)
    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise BadInput(
            f"transformers cannot read its configuration: {first_line(error)}", where=folder, remedy="repair the folder"
        ) from error
    return partial(_untrained, model_class, config, folder)


def _untrained(model_class: Any, config: Any, folder: Path) -> nn.Module:
    try:
        model = model_class(config)
    except Exception as error:
        raise BadInput(
            f"transformers cannot build its model: {first_line(error)}", where=folder, remedy="repair config.json"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _model_class(folder: Path) -> tuple[str, Any]:
    """The architecture that a folder's config.json names, and its class in transformers."""
    architecture = _architecture(folder)
    import transformers

    model_class = getattr(transformers, architecture, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise BadInput(
            f"transformers {transformers.__version__} has no model {architecture}",
            where=folder / "config.json",
            remedy="pass `factory` with a function that builds it",
        )
    return architecture, model_class


def load_state(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], *, at_once: int = 2**28
) -> None:
    """Copy tensors into `module`, each to the parameter or buffer of the same name and shape.

    `read` gives the values of a tensor by its name; those of about `at_once` bytes are held at a time. A name may be
    missing only if it is tied to one that is there, or has no numbers. Values are converted to the module's dtype.
    Raises `BadInput` listing what is missing, unexpected or of another shape; the module is then unchanged.
    """
    expected = module.state_dict(keep_vars=True)
    given = {id(expected[name]) for name in shapes if name in expected}
    missing = [
        name
        for name, tensor in expected.items()
        if name not in shapes and id(tensor) not in given and tensor.numel() > 0
    ]
    unexpected = [name for name in shapes if name not in expected]
    misshapen = [
        f"{name} {shapes[name]} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    problems = [
        f"{kind} {_some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise BadInput(
            f"the weights do not fit {type(module).__name__}: {'; '.join(problems)}",
            remedy="use the factory of the model that was saved",
        )
    part: dict[str, Tensor] = {}
    # The tensors of one module come together, because its own code may load them together.
    for _, names in groupby((name for name in expected if name in shapes), key=lambda name: name.rpartition(".")[0]):
        part |= {name: read(name) for name in names}
        if sum(tensor.nbytes for tensor in part.values()) >= at_once:
            module.load_state_dict(part, strict=False)
            part = {}
    module.load_state_dict(part, strict=False)


def _import_module(name: str) -> Any:
    with _import_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise _import_failed(name, error) from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise BadInput("there is no such file", where=path, option="factory", remedy=FACTORY_FORM)
    name = f"compressor_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses, among others, look their own module up while it is being imported
    sys.modules[name] = module
    with _import_path(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise _import_failed(path, error) from error
    return module


def _import_failed(where: str | Path, error: Exception) -> BadInput:
    what = f"importing it raised {type(error).__name__}: {first_line(error)}"
    return BadInput(what, where=where, option="factory", remedy=FACTORY_FORM)


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _architecture(folder: Path) -> str:
    architectures = read_config(folder).get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise BadInput(
            "it names no architecture",
            where=folder / "config.json",
            remedy='add "architectures": ["..."], or pass `factory` with a function that builds the model',
        )
    return architectures[0]


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Keep transformers' own progress bar and its report of missing weights off the terminal."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def build_model(factory: str | Callable[[], nn.Module]) -> nn.Module:
    """The architecture that the user's own code builds: `package.module:name`, `file.py:name` or a callable."""
    return load_factory(factory)() if isinstance(factory, str) else built(factory, getattr(factory, "__name__", "it"))
