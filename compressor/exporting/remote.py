"""A folder that brings the code of its low-rank layers along: loads wherever torch and transformers are.

The code is that of the low-rank layers of all forms, copied when the folder is written, and two classes that
transformers finds through `auto_map`: the architecture whose layers are swapped as soon as it is built, and its
configuration.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import symtable
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.errors import BadInput, CompressorError
from compressor.forms import DENSE, FORMS, layers, quantized_layers
from compressor.io import CODE_FILE, Artifact, Checkpoint, portable_config
from compressor.lowrank import (
    CODE_CLASS_PREFIX,
    CODE_CONFIG_KEY,
    METADATA_KEY,
    LowRankSpec,
    formed_layers,
    is_compressed_tensors,
)
from compressor.lowrank import modules as low_rank_modules
from compressor.network import same_table, transformers_module
from compressor.quantize import groups, packing, products
from compressor.quantize.settings import DEFAULTS as QUANTIZATION
from compressor.version import VERSION

_IMPORTS = """import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
"""

_BUILDERS = """def pair_builder(form):
    builders = {{
        {builders}
    }}
    build, settings = builders[form]
    return lambda dense, rank: build(dense, rank, **settings)


def layer_builder(form):
    pair, _, quantization = form.partition("@")
    if not quantization:
        return pair_builder(form)
    size = quantization.removesuffix("z").partition("g")[2]

    def fitted(inputs):
        return fitted_group(int(size) if size else None, inputs, smallest={smallest}, largest={largest})

    how = {{"bits": int(quantization[0]), "zero_points": quantization.endswith("z"), "fitted": fitted}}
    if pair == {dense!r}:
        return lambda dense, rank: quantized_matrix(dense, correction(dense, rank), **how)
    return lambda dense, rank: quantized_pair(pair_builder(pair)(dense, rank), **how)


def correction(dense, rank):
    if rank == 0:
        return None
    convolution = channel_layer if getattr(dense, "groups", 1) == 1 else grouped_layer
    build = convolution if dense.weight.dim() > 2 else plain_layer
    return quantized_pair(build(dense, rank), bits=8, zero_points=False, fitted=lambda inputs: None)
"""

_CLASSES = '''

from transformers import {configuration}, {architecture}  # noqa: E402


class {prefix}{configuration}({configuration}):
    """The dense model's configuration; `{key}` says which layers are low-rank."""


class {prefix}{architecture}({architecture}):
    """The dense architecture with its low-rank layers in place, ready to be filled."""

    config_class = {prefix}{configuration}

    def __init__(self, config, *arguments, **keywords):
        super().__init__(config, *arguments, **keywords)
        for name, layer in config.{key}["layers"].items():
            form = layer["form"]
            if "bits" in layer:
                size, zero_points = layer["group_size"], "z" if layer["zero_points"] else ""
                form = f"{{form}}@{{layer['bits']}}" + ("" if size is None else f"g{{size}}") + zero_points
            put_pair(self, name, form, rank=layer["rank"])
'''


# In the name of a layer that is a matrix of one expert.
_OF_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def remote_configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `config.json` of the exported folder, with the names of its classes.

    Raises `BadInput` for a checkpoint that is not a compressed transformers folder, and for layers that the copied code
    does not have.
    """
    config = dict(checkpoint.config or {})
    described = config.pop("quantization_config", None)
    if checkpoint.folder is not None and described is None and (formed := formed_layers(checkpoint)):
        raise BadInput(
            f"needs no code: its {len(formed)} compressed layers are dense once they are loaded",
            where=checkpoint.source,
            remedy="export it with `to='dense'`, or give it as it is to those who have this package",
        )
    if checkpoint.folder is not None and is_compressed_tensors(checkpoint.config):
        raise BadInput(
            "needs no code: compressed-tensors loads its integers and scales",
            where=checkpoint.source,
            remedy="give it as it is to those who have transformers and compressed-tensors, or vLLM",
        )
    if checkpoint.folder is None or not isinstance(described, Mapping) or described.get("quant_method") != METADATA_KEY:
        raise BadInput(
            "is no transformers folder with low-rank layers",
            where=checkpoint.source,
            remedy="give the folder that 'compress FOLDER' wrote; a dense one loads as it is",
        )
    if any(_OF_EXPERT.search(str(name)) for name in described.get("layers") or ()):
        raise BadInput(
            "has low-rank experts, which the copied code cannot put into transformers' mixtures",
            where=checkpoint.source,
            remedy="export it with `to='dense'`, or give it as it is to those who have this package",
        )
    try:
        spec = LowRankSpec.from_dict(described)
    except ValueError as error:
        raise BadInput(
            f"has a quantization_config that cannot be used: {error}",
            where=checkpoint.folder / "config.json",
            remedy="compress the dense model again",
        ) from None
    if spec.source is not None:
        raise BadInput(
            "has layers that are stored as others quantized them, which the copied code does not read",
            where=checkpoint.source,
            remedy="export it with `to='dense'`, or give it as it is to those who have this package",
        )
    # Anything else would be lost in the exported folder.
    if strange := sorted(key for key, value in described.items() if key not in spec.to_config() and value):
        raise BadInput(
            f"has layers that cannot be exported with their code ({', '.join(strange)})",
            where=checkpoint.source,
            remedy="export it with `to='dense'`",
        )
    if any(layer.kind == "embedding" for layer in spec.layers.values()):
        _require_own_tables(checkpoint.folder, spec)
    architecture, configuration, auto_classes = _classes_of(checkpoint.folder, config)
    module = CODE_FILE.removesuffix(".py")
    config["architectures"] = [f"{CODE_CLASS_PREFIX}{architecture}"]
    config["auto_map"] = {
        "AutoConfig": f"{module}.{CODE_CLASS_PREFIX}{configuration}",
        **dict.fromkeys(auto_classes, f"{module}.{CODE_CLASS_PREFIX}{architecture}"),
    }
    config[CODE_CONFIG_KEY] = spec.to_dict()
    return config


def _require_own_tables(folder: Path, spec: LowRankSpec) -> None:
    """Refuse a compressed embedding that a model has in several places, for which no code is copied."""
    model = transformers_module(folder)
    shared = {} if model is None else same_table(model)
    if name := next((each for each in shared.values() if each in spec.layers), None):
        places = [place for place, of in shared.items() if of == name]
        raise BadInput(
            f"has {name} in other places too ({', '.join(places)}), which the copied code does not know",
            where=folder,
            remedy="export it with `to='dense'`, or compress it without `embeddings`",
        )


def remote_artifact(checkpoint: Checkpoint, config: Mapping[str, Any], shard_size: int) -> Artifact:
    """The folder with its `remote_configuration` and the code; the tensors are those of the compressed one."""
    configuration, architecture = (
        name.rpartition(".")[2].removeprefix(CODE_CLASS_PREFIX)
        for name in (config["auto_map"]["AutoConfig"], config["architectures"][0])
    )
    return Artifact(
        form="folder",
        infos=list(checkpoint.tensors.values()),
        tensors=checkpoint.stream,
        metadata={"format": "pt"} | dict(checkpoint.metadata),
        shard_size=shard_size,
        companions_of=checkpoint,
        documents=lambda: {
            "config.json": portable_config(config, code=config["auto_map"]),
            CODE_FILE: remote_code(architecture, configuration),
        },
    )


def remote_code(architecture: str, configuration: str) -> str:
    """The source of the exported module: our low-rank layers, without this package, and the model's two classes.

    Raises `CompressorError` where the layers use more of this package than is copied.
    """
    shared = "\n\n".join(map(_body, (layers, groups, packing, products, quantized_layers)))
    own = _body(low_rank_modules)
    pieces: dict[Callable[..., Any], None] = {}
    forms = [form for form in FORMS.values() if not form.from_initial]  # which are dense once they are loaded
    for form in forms:
        pieces |= dict.fromkeys((*form.classes, form.build))
    parts = [inspect.getsource(piece) for piece in pieces]
    builders = (f"{form.name!r}: ({form.build.__name__}, {form.settings!r})," for form in forms)
    table = _BUILDERS.format(
        builders="\n        ".join(builders),
        dense=DENSE,
        smallest=QUANTIZATION.smallest_group,
        largest=QUANTIZATION.largest_group,
    )
    classes = _CLASSES.format(
        architecture=architecture, configuration=configuration, prefix=CODE_CLASS_PREFIX, key=CODE_CONFIG_KEY
    )
    header = f"# Written by compressor {VERSION}, Apache-2.0: needs torch and transformers.\n\n{_IMPORTS}"
    code = "\n\n".join([header, shared, *parts, table, own]) + classes
    if needed := sorted(_undefined(code)):
        raise CompressorError(f"the layers' code cannot stand alone: it needs {', '.join(needed)}")
    return code


def _body(module: ModuleType) -> str:
    """The source of a module without its docstring and its imports."""
    source = inspect.getsource(module)
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(source.splitlines()[imports[-1].end_lineno :]).strip() + "\n"


def _undefined(code: str) -> set[str]:
    """The names that a module's code uses, also inside functions, and does not define."""
    top = symtable.symtable(code, "code", "exec")
    defined = {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
    used = {
        each.get_name()
        for scope in _scopes(top)
        for each in scope.get_symbols()
        if each.is_referenced() and (each.is_global() or scope is top)
    }
    return used - defined - set(dir(builtins))


def _scopes(scope: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield scope
    for child in scope.get_children():
        yield from _scopes(child)


def _classes_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """The names of the architecture, of its configuration, and of the classes `Auto...` that lead to it."""
    import transformers

    where, remedy = folder / "config.json", "export it with `to='dense'`"
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise BadInput("does not name one architecture", where=where, remedy="correct 'architectures' in it")
    [architecture] = architectures
    try:
        known = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a foreign configuration makes transformers raise
        what = f"transformers {transformers.__version__} cannot read it"
        raise BadInput(what, where=where, remedy=remedy) from error
    model_class = getattr(transformers, architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        what = f"transformers {transformers.__version__} has no model {architecture}"
        raise BadInput(what, where=where, remedy=remedy)
    autos = []
    for name in sorted({name for name in transformers.__all__ if name.startswith("AutoModel")}):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is None or type(known) not in mapping:
            continue
        leads_to = mapping[type(known)]
        if model_class in (leads_to if isinstance(leads_to, tuple | list) else (leads_to,)):
            autos.append(name)
    return architecture, type(known).__name__, autos
