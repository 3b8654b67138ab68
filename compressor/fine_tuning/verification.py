"""An adapter loaded by PEFT's own rules, before anybody relies on it, and compared with the change that it stands for.

The base is the architecture alone: its weights are zeros that take no memory, since what PEFT adds to them is compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.fine_tuning.adapter import ADAPTER_WEIGHTS, REMEDY, Adapter
from compressor.fine_tuning.mixture import ExpertBlock
from compressor.io import Checkpoint, open_checkpoint
from compressor.network import Layer, transformers_module

# Changes of matrices are compared by what they make of a few random vectors: none that differ agree on these.
_PROBES = 4
# Far above the rounding of float32, far below any pair that is lost, misplaced or scaled.
_AGREEMENT = 1e-3


def verify_with_peft(folder: Path, adapter: Adapter) -> str | None:
    """The version of PEFT that gives every change of an adapter in `folder`; None where PEFT is not installed.

    Raises `BadInput` where PEFT cannot load the adapter, or loads it as anything else.
    """
    try:
        import peft
    except ImportError:
        return None
    difference = adapter.adaptation.difference
    tuned = difference.tuned
    _require_all_changes(adapter)
    # The fine-tune is the base with more tokens where it has more; else it need not be all of the base.
    folder_of_base = difference.base.folder if difference.vocabulary is None else tuned.folder
    model = None if folder_of_base is None else transformers_module(folder_of_base)
    if model is None:
        raise BadInput("its architecture cannot be built to try the adapter", where=tuned.source, remedy=REMEDY)
    _fill_without_memory(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        except Exception as error:  # PEFT raises what it likes where it cannot load an adapter
            reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise BadInput(f"PEFT cannot load its adapter ({reason})", where=tuned.source, remedy=REMEDY) from error
    modules = {_plain_name(name): module for name, module in loaded.base_model.model.named_modules()}
    stored = open_checkpoint(folder / ADAPTER_WEIGHTS)
    for name, same in _compared(adapter, stored, adapted=_parameters_of(loaded.base_model.model), modules=modules):
        if not same:
            raise BadInput(
                f"PEFT {peft.__version__} loads its adapter, but not the change of {name}",
                where=tuned.source,
                remedy=REMEDY,
            )
    return str(peft.__version__)


def _require_all_changes(adapter: Adapter) -> None:
    difference = adapter.adaptation.difference
    held = {difference.tuned.aliases.get(name, name) for name in adapter.saved.tensors.values()}
    held |= {name for layer, _ in adapter.ranks for name in (layer.tensor, layer.bias) if name is not None}
    if missing := sorted(difference.changed - held):
        raise BadInput(
            f"{missing[0]} has changed, and no adapter holds it", where=difference.tuned.source, remedy=REMEDY
        )


def _fill_without_memory(model: nn.Module) -> None:
    """Put float32 zeros in the place of a model's weights on the meta device, all of a weight in one number."""
    for module in model.modules():
        module._buffers.update(
            {
                name: torch.zeros_like(buffer, device="cpu")
                for name, buffer in module._buffers.items()
                if buffer is not None
            }
        )
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros(()).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")


def _parameters_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the name of the parameter that each adapts."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{_plain_name(name)}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _compared(
    adapter: Adapter, stored: Checkpoint, *, adapted: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, bool]]:
    """Every change that the adapter stands for, and whether PEFT makes the same one."""
    tuned = adapter.adaptation.difference.tuned
    places: dict[str, tuple[ExpertBlock, int, int]] = {
        name: (block, role, index)
        for block in adapter.experts
        for role, names in enumerate(block.roles)
        for index, name in enumerate(names)
    }
    probed: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, _ in adapter.ranks:
        if layer.module in places:
            block, role, index = places[layer.module]
            parameter = f"{block.name}.{'down_proj' if role == 2 else 'gate_up_proj'}"
        else:
            parameter = f"{layer.module}.{layer.parameter}"
        if (module := adapted.get(parameter)) is None:
            yield layer.tensor, False
            continue
        down, up = (stored.read(f"{adapter.place(layer)}.lora_{side}.weight").float() for side in "AB")
        if parameter not in probed:
            probed[parameter] = _change_of_probes(module, layer)
        probes, change = probed[parameter]
        if layer.module in places:
            change = change[index] if role == 2 else change[index].chunk(2)[role]
        yield layer.tensor, _agree(change, up.flatten(1) @ (down.flatten(1) @ probes))
        if adapter.with_bias:
            bias = module.lora_B["default"].bias
            yield f"{layer.name}.bias", _agree(bias, stored.read(f"{adapter.place(layer)}.lora_B.bias").float())
    for in_model, name in adapter.saved.tensors.items():
        yield name, _saved(in_model, modules, tuned.read(name).float())


@torch.no_grad()
def _change_of_probes(module: Any, layer: Layer) -> tuple[Tensor, Tensor]:
    """Random vectors as columns, and what the change that PEFT adds to a weight makes of them."""
    down = module.lora_A["default"].weight
    if down.dim() > 2:
        change = module.get_delta_weight("default")
        return torch.eye(change[0].numel()), change.flatten(1)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(down.shape[1], _PROBES, generator=generator)
    # The product with the probes is that of A with them: PEFT does the rest, and never forms the whole matrix.
    module.lora_A["default"].weight = nn.Parameter(down.float() @ probes, requires_grad=False)
    change = module.get_delta_weight("default")
    return probes, change.T if layer.kind == "transposed linear" else change


def _saved(in_model: str, modules: Mapping[str, nn.Module], value: Tensor) -> bool:
    """Whether PEFT puts a tensor that is saved whole in its place."""
    module, _, name = in_model.rpartition(".")
    while module:
        wrapper = modules.get(module)
        if hasattr(wrapper, "modules_to_save"):
            kept = dict(wrapper.modules_to_save["default"].state_dict()).get(name)  # type: ignore[union-attr,index]
            return kept is not None and kept.shape == value.shape and bool(torch.equal(kept.float(), value))
        module, _, last = module.rpartition(".")
        name = f"{last}.{name}"
    return False


def _agree(change: Tensor, expected: Tensor) -> bool:
    return change.shape == expected.shape and bool((change - expected).norm() <= _AGREEMENT * expected.norm())
