"""Low-rank models in transformers: the quantizer that swaps the layers before `from_pretrained` fills them.

Importing this module registers the quantization method `lowrank`; `import compressor` arranges that it happens as soon
as transformers' own registry is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.forms import from_initial
from compressor.lowrank.batched_experts import BatchedExperts, batch_experts, separate_batched
from compressor.lowrank.encoded_modules import PutEncoded, encoded_in_files, put_encoded
from compressor.lowrank.initial_layer import PutLayer, form_layers, put_initial
from compressor.lowrank.modules import put_pair
from compressor.lowrank.restoring import restored_module
from compressor.lowrank.sources import without_source
from compressor.lowrank.spec import METADATA_KEY, LowRankSpec
from compressor.network import SeparateExperts, fuse_experts, join_embeddings
from compressor.network.conversions import makes_experts, name_conversions, without_merges
from compressor.network.experts import separable_experts, separate_experts


@register_quantization_config(METADATA_KEY)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The low-rank layers as listed in `config.json`, by module name."""

    def __init__(self, quant_method: str = METADATA_KEY, **said: Any) -> None:
        self.quant_method = quant_method
        self.spec = LowRankSpec.from_dict(said)

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_config()


@register_quantizer(METADATA_KEY)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts unfilled low-rank layers into the model that transformers is about to fill."""

    requires_calibration = True  # a dense model has to be compressed first; this only loads the result

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        spec = self.quantization_config.spec
        layers = spec.layers
        prefix = f"{model.base_model_prefix}."
        # The names are those of the class that was compressed, with a head or without, and so with the prefix or not.
        layouts = separable_experts(model)
        named = any(f".{experts}." in f".{prefix}{name}" for experts in layouts for name in layers)
        of_source = spec.source is not None and any(layout.apart_in_files for layout in layouts.values())
        if named or spec.stacks or of_source:
            separate_experts(model)
        # What a pair takes the place of is one module, as it was when it was compressed.
        if any(layer.kind == "embedding" for layer in layers.values()):
            join_embeddings(model)
        modules = dict(model.named_modules())
        self._numbers = sum(each.numel() for each in model.parameters())
        self._initial: dict[str, PutLayer] = {}
        for name, layer in layers.items():
            place = _place(name, modules, prefix)
            if place in modules:  # a head may be absent from the class that is loaded
                if from_initial(layer.form):
                    self._initial[name] = put_initial(model, place, layer.form, rank=layer.rank)
                else:
                    put_pair(model, place, layer.form, rank=layer.rank)
                _spare_initialization(model, place.rpartition(".")[0])
        batch_experts(model, [_place(stem, modules, prefix) for stem in spec.batched])
        self._encoded: list[PutEncoded] = []
        if spec.source is not None:
            own = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.bfloat16)
            self._encoded = put_encoded(model, encoded_in_files(checkpoint_files or [], spec.source, own, left=layers))
        self._names = set(model.state_dict())
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        spec = self.quantization_config.spec
        for each in self._encoded:
            each.fill()
        if self._encoded:
            fuse_experts(model)
        if not spec.from_initial and spec.source is None:
            return model
        if spec.from_initial:
            form_layers(model, self._initial, spec, numbers=self._numbers)
        others = without_source(spec.without_initial())
        if others.layers:
            self.quantization_config.spec = others
        else:
            self.remove_quantization_config(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """The conversions less those that would merge experts which are apart; some releases do not pass the model."""
        return without_merges(super().update_weight_conversions(weight_conversions, *model), self._names)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        config = copy.deepcopy(model.config)
        del config.quantization_config
        # A model that was saved has the name of its dtype there.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        own = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
        with torch.device("meta"):
            architecture = type(model)(config)
        architecture.tie_weights()
        separable = (SeparateExperts, BatchedExperts)
        apart = [name for name, module in model.named_modules() if isinstance(module, separable)]
        if apart:
            separate_experts(architecture)
        model = restored_module(separate_batched(model), architecture, dtype)
        if dtype not in (None, own):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        used = getattr(model, "_weight_conversions", None)  # in loading, which are reversed in saving
        if used is not None and apart and not any(makes_experts(each, apart) for each in used):
            model._weight_conversions = used + [each for each in name_conversions(model) if makes_experts(each, apart)]
        return model


def _place(name: str, modules: Mapping[str, Any], prefix: str) -> str:
    """What a module is called in a model that has a head or not, where the name is that in one of the other kind."""
    return name if name in modules else name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _spare_initialization(model: Any, holder: str) -> None:
    """Keep transformers from initializing modules that contain a low-rank layer, where that would fail.

    It does that, without effect, for modules that it loads too, and stops where they depend on the shape of a dense
    weight (Whisper's table of positions). A module with parameters or buffers of its own is left to it.
    """
    names = [holder]
    while names[-1] and not hasattr(model.get_submodule(names[-1]), "_init_weights"):
        names.append(names[-1].rpartition(".")[0])
    module, pretrained = model.get_submodule(holder), model.get_submodule(names[-1])
    if any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
        return
    try:
        pretrained._init_weights(module)  # of no values yet, on the meta device
    except (TypeError, ValueError, IndexError, ArithmeticError):
        module._is_hf_initialized = True


def tell_transformers(model: Any, spec: LowRankSpec) -> None:
    """Let a model that was compressed in memory be saved like a loaded one.

    `spec` has the names of its modules.
    """
    model.config.quantization_config = LowRankConfig(**spec.to_own_config())
    model.hf_quantizer = LowRankQuantizer(model.config.quantization_config)
