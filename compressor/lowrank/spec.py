"""The specification of a model's low-rank layers, and the only place that knows its spelling in files.

It stands in the metadata of a safetensors file, by the names of the checkpoint's layers, and under
`quantization_config` in a transformers folder's `config.json`, by the names of the model's modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from compressor.forms import DENSE, FORMS, pair_name, quantization_of, quantized_name
from compressor.initial import Draws, Fingerprint
from compressor.io import Stack
from compressor.lowrank.compressed_tensors import METHOD, compressed_tensors_config, quantized_targets
from compressor.network import Kind
from compressor.quantize import Quantization
from compressor.version import VERSION

FORMAT_VERSION = 4
# The format of models with quantized layers, of which no other is stored as the source's was, and which were not in one
# tensor.
_FORMAT_OF_INTEGERS = 3
# The formats of models without quantized layers, and without layers in forms of what training wrote either.
_FORMAT_OF_INITIAL = 2
_FORMAT_OF_PAIRS = 1
METADATA_KEY = "compressor"
# In the name of a layer that is a matrix of one expert.
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")

# What the configuration of a folder that brings the code of its low-rank layers along says: which layers these are.
CODE_CONFIG_KEY = "low_rank"
CODE_CLASS_PREFIX = "LowRank"


@dataclass(frozen=True)
class LayerSpec:
    """One low-rank layer: the form and rank of its pair, and the kind of layer that it stands for.

    `share` is what remains of the weight that the pair is added to: the base's where it stands for a difference to one,
    the initial one in a form of what training wrote. In files a quantized form is that of the pair, with the bits, the
    group size, and whether there are zero points beside it.
    """

    form: str
    rank: int
    kind: Kind
    share: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.form, str) or self.form not in FORMS:
            raise ValueError(f"there is no low-rank form {self.form!r}")
        if type(self.rank) is not int or self.rank < FORMS[self.form].least_rank:
            raise ValueError(f"{self.rank!r} is not a rank")
        if self.kind not in get_args(Kind) or self.kind == "other":
            raise ValueError(f"there is no kind of layer {self.kind!r}")
        share = 1.0 if self.share is None else self.share
        if type(share) not in (int, float) or not math.isfinite(share):
            raise ValueError(f"{share!r} is not a share")
        if self.share is None and FORMS[self.form].from_initial:
            raise ValueError(f"in the form {self.form!r} it has a share of its initial weights")

    @property
    def quantization(self) -> Quantization | None:
        """How its numbers are quantized; None where they are not."""
        return quantization_of(self.form)

    @property
    def is_packed_linear(self) -> bool:
        """Whether it is what compressed-tensors knows: a linear layer of integers and scales, without a correction.

        Zero points are left out: transformers cannot load those of compressed-tensors.
        """
        quantization = self.quantization
        plain = quantization is not None and not quantization.zero_points and pair_name(self.form) == DENSE
        return plain and self.rank == 0 and self.kind == "linear"

    def to_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"form": pair_name(self.form), "rank": self.rank, "kind": self.kind}
        own |= {} if self.quantization is None else self.quantization.to_dict()
        return own if self.share is None else own | {"share": self.share}

    @classmethod
    def from_dict(cls, document: Any) -> LayerSpec:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        needed, quantized = {"form", "rank", "kind"}, {"bits", "group_size", "zero_points"}
        if not isinstance(document, Mapping) or not needed <= set(document) <= {*needed, *quantized, "share"}:
            raise ValueError("a low-rank layer has a form, a rank and a kind")
        form = document["form"]
        if quantized & set(document):
            form = quantized_name(str(form), Quantization.from_dict(document))
        return cls(form, document["rank"], document["kind"], document.get("share"))


@dataclass(frozen=True)
class InitialTensor:
    """The initial weights of a layer: their name in the state of the model's module, and what they are checked by."""

    name: str
    fingerprint: Fingerprint

    def to_dict(self, layer: str) -> dict[str, Any]:
        """What `from_dict` reads: the name only where it is not that of the layer's weight."""
        said: dict[str, Any] = {} if self.name == f"{layer}.weight" else {"name": self.name}
        return said | {"fingerprint": self.fingerprint.to_list()}

    @classmethod
    def from_dict(cls, document: Any, layer: str) -> InitialTensor:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        name = document.get("name", f"{layer}.weight") if isinstance(document, Mapping) else None
        if not isinstance(name, str):
            raise ValueError("initial weights have a fingerprint, and a name if it is not the layer's")
        return cls(name, Fingerprint.of_list(document.get("fingerprint")))


@dataclass(frozen=True)
class InitialRecord:
    """Where the initial weights of layers come from: draws that are made again, or a checkpoint that has to be given.

    `tensors` are by the names of the layers. `checkpoint` and `digest` are the name and the SHA-256 of the checkpoint.
    """

    tensors: Mapping[str, InitialTensor]
    draws: Draws | None = None
    checkpoint: str = ""
    digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        tensors = {name: each.to_dict(name) for name, each in self.tensors.items()}
        if self.draws is not None:
            return {"draws": self.draws.to_dict(), "tensors": tensors}
        return {"checkpoint": self.checkpoint, "digest": self.digest, "tensors": tensors}

    @classmethod
    def from_dict(cls, document: Any) -> InitialRecord:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        if not isinstance(document, Mapping) or not isinstance(document.get("tensors"), Mapping):
            raise ValueError("it does not say what its initial weights are")
        tensors = {str(name): InitialTensor.from_dict(each, str(name)) for name, each in document["tensors"].items()}
        if "draws" in document:
            return cls(tensors, Draws.from_dict(document["draws"]))
        checkpoint, digest = document.get("checkpoint"), document.get("digest")
        if not isinstance(checkpoint, str) or not isinstance(digest, str | None):
            raise ValueError("it does not say where its initial weights come from")
        return cls(tensors, None, checkpoint, digest)


@dataclass(frozen=True)
class LowRankSpec:
    """The low-rank layers of a model, by name, and where the initial weights of those come from that have a share.

    `dense` are the linear layers that stay as they are, as far as they are known: compressed-tensors lists them.
    `source` is the `quantization_config` of what was compressed, where other layers are still stored by it.
    `stacks` are the tensors of the original, by their names in its files, that held several layers which are stored by
    themselves here, and `batched` are the blocks of experts of which all matrices or factors of a kind are in one.
    """

    layers: Mapping[str, LayerSpec]
    initial: InitialRecord | None = None
    dense: tuple[str, ...] = field(default=(), compare=False)
    source: Mapping[str, Any] | None = None
    stacks: tuple[Stack, ...] = ()
    batched: tuple[str, ...] = ()

    def renamed(self, name: Callable[[str], str]) -> LowRankSpec:
        """The same layers under other names."""
        initial = self.initial
        if initial is not None:
            initial = replace(initial, tensors={name(old): each for old, each in initial.tensors.items()})
        layers = {name(old): layer for old, layer in self.layers.items()}
        return LowRankSpec(layers, initial, tuple(map(name, self.dense)), self.source, self.stacks, self._stems(name))

    def _stems(self, name: Callable[[str], str]) -> tuple[str, ...]:
        """What the names of batched experts begin with under other names: a layer of each is renamed."""
        firsts = ((stem, next(layer for layer in self.layers if layer.startswith(f"{stem}."))) for stem in self.batched)
        return tuple(name(layer).removesuffix(layer.removeprefix(stem)) for stem, layer in firsts)

    @property
    def from_initial(self) -> dict[str, LayerSpec]:
        """The layers in forms of what training wrote: they are dense once a model is loaded."""
        return {name: layer for name, layer in self.layers.items() if FORMS[layer.form].from_initial}

    def without_initial(self) -> LowRankSpec:
        """The other layers."""
        layers = {name: layer for name, layer in self.layers.items() if name not in self.from_initial}
        return LowRankSpec(layers, dense=self.dense, source=self.source, stacks=self.stacks, batched=self.batched)

    @property
    def is_compressed_tensors(self) -> bool:
        """Whether a transformers folder of these layers is a checkpoint of compressed-tensors.

        Experts are none of its layers: transformers has them in one parameter, and would leave them at random.
        """
        packed = (layer.is_packed_linear and not _EXPERT.search(name) for name, layer in self.layers.items())
        return bool(self.layers) and self.source is None and not self.stacks and all(packed)

    def to_dict(self) -> dict[str, Any]:
        quantized = any(layer.quantization is not None for layer in self.layers.values())
        written_in = _FORMAT_OF_INTEGERS if quantized else _FORMAT_OF_INITIAL if self.initial else _FORMAT_OF_PAIRS
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        said: dict[str, Any] = {"format_version": written_in, "layers": layers}
        if self.source is not None:
            said |= {"format_version": FORMAT_VERSION, "source_quantization": dict(self.source)}
        if self.stacks:
            said |= {"format_version": FORMAT_VERSION, "stacks": [stack.to_dict() for stack in self.stacks]}
        said |= {"batched": list(self.batched)} if self.batched else {}
        return said if self.initial is None else said | {"initial": self.initial.to_dict()}

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` of a transformers model: that of compressed-tensors where this can load it."""
        if self.is_compressed_tensors:
            quantized = {name: layer.quantization for name, layer in self.layers.items()}
            return compressed_tensors_config({name: each for name, each in quantized.items() if each}, self.dense)
        return {"quant_method": METADATA_KEY, **self.to_dict()}

    def to_own_config(self) -> dict[str, Any]:
        """The `quantization_config` by which our own layers are loaded, whatever the folder says."""
        return {"quant_method": METADATA_KEY, **self.to_dict(), "dense": list(self.dense)}

    @classmethod
    def from_config(cls, document: Mapping[str, Any]) -> LowRankSpec:
        """Read what `to_config` returns; ValueError says what is wrong with it."""
        if document.get("quant_method") != METHOD:
            return cls.from_dict(document)
        targets = quantized_targets(document)
        if strange := [name for name in targets if name.startswith("re:") or name[:1].isupper()]:
            raise ValueError(f"it names classes or patterns ({strange[0][:40]}) in the place of layers")
        layers = {name: LayerSpec(quantized_name(DENSE, each), 0, "linear") for name, each in targets.items()}
        return cls(layers, dense=tuple(map(str, document.get("ignore") or ())))

    def to_metadata(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The entry in the metadata of a safetensors file: these layers, and a record of how they were made."""
        said = {**self.to_dict(), "version": VERSION, **record}
        return {METADATA_KEY: json.dumps(said, sort_keys=True)}

    def described(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The `config.json` of a model that has these low-rank layers and no others; of a dense one where it has none.

        What it says of code that comes along is left out too.
        """
        described = {key: value for key, value in config.items() if key not in ("quantization_config", CODE_CONFIG_KEY)}
        if CODE_CONFIG_KEY in config:
            described.pop("auto_map", None)
            described["architectures"] = [name.removeprefix(CODE_CLASS_PREFIX) for name in config["architectures"]]
        stored_otherwise = self.layers or self.stacks or self.source is not None
        return described | ({"quantization_config": self.to_config()} if stored_otherwise else {})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LowRankSpec:
        """Read what `to_dict` and `to_config` return; other entries are ignored, and ValueError says what is wrong."""
        written_in = document.get("format_version")
        if type(written_in) is not int or written_in < 1:
            raise ValueError(f"{written_in!r} is not a version of the low-rank format")
        if written_in > FORMAT_VERSION:
            raise ValueError(
                f"this model was written in low-rank format {written_in}, and this version of compressor reads "
                f"formats up to {FORMAT_VERSION}: upgrade it"
            )
        layers = document.get("layers")
        if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
            raise ValueError("it does not say which layers are low-rank")
        found = {}
        for name, layer in layers.items():
            try:
                found[name] = LayerSpec.from_dict(layer)
            except ValueError as error:
                raise ValueError(f"it does not say which layers are low-rank: {name}: {error}") from None
        initial = None if document.get("initial") is None else InitialRecord.from_dict(document["initial"])
        dense = document.get("dense")
        source = document.get("source_quantization")
        if source is not None and not isinstance(source, Mapping):
            raise ValueError("it does not say how the layers are stored that it left alone")
        stacks = document.get("stacks", [])
        if not isinstance(stacks, list):
            raise ValueError("it does not say which layers the original held in one tensor")
        batched = document.get("batched", [])
        if not isinstance(batched, list) or not all(isinstance(stem, str) for stem in batched):
            raise ValueError("it does not say which experts are stored in one tensor")
        spec = cls(
            found,
            initial,
            tuple(map(str, dense)) if isinstance(dense, list) else (),
            source,
            tuple(map(Stack.from_dict, stacks)),
            tuple(batched),
        )
        if without := next((each for each in spec.batched if not any(n.startswith(f"{each}.") for n in found)), None):
            raise ValueError(f"none of the layers of {without} is low-rank")
        known = () if initial is None else initial.tensors.keys()
        if missing := next((name for name in spec.from_initial if name not in known), None):
            raise ValueError(f"it does not say what the initial weights of {missing} are")
        return spec
