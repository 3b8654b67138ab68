"""Modules whose weights are computed from others, such as by weight normalization, with the weights themselves.

What is deployed is the effective weight: weight and spectral normalization, in both of PyTorch's ways, and pruning
serve training. Low-rank layers take its place, and what it was computed from is dropped.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressor.arguments import copying
from compressor.lowrank.factored_parameter import factored_parameters

logger = logging.getLogger(__name__)


def with_effective_weights(module: nn.Module) -> nn.Module:
    """The module itself, or where weights in it are computed from others, a copy in which they are parameters.

    They have the values that they have in evaluation mode, and are as trainable as what they are computed from. A copy
    is also made of a module with tensors from `torch.inference_mode`, which nothing can be differentiated through.
    """
    computed = {
        f"{name}.{weight}" if name else weight: None
        for name, part in module.named_modules()
        for weight in _computed(part)
    }
    made_in_inference = {
        id(tensor): _usable(tensor) for tensor in chain(module.parameters(), module.buffers()) if tensor.is_inference()
    }
    if not computed and not made_in_inference:
        return module
    if computed:
        shown = ", ".join(list(computed)[:4]) + (f" and {len(computed) - 4} more" if len(computed) > 4 else "")
        logger.warning("computed weights become parameters of their own in the compressed model: %s", shown)
    with copying(module):
        copied = copy.deepcopy(module, {**_last_results(module), **made_in_inference})
    flags = {part: part.training for part in copied.modules()}
    copied.eval()  # in training mode spectral normalization would go on estimating
    for part in list(copied.modules()):
        _drop_hooks(part)
        if parametrize.is_parametrized(part) and not factored_parameters(part):
            _drop_parametrizations(part)
    for part in copied.modules():
        part.training = flags[part]
    return copied


def let_script(root: nn.Module) -> None:
    """Let TorchScript, which compiles no parametrized module, compile a model whose parameters are factored.

    It compiles a copy with the products of the factors, which shares all other tensors. A part of the model that is
    given to TorchScript by itself is refused.
    """
    if any(factored_parameters(part) for part in root.modules()):
        root.__prepare_scriptable__ = partial(_multiplied_out, root)  # type: ignore[assignment]


def _multiplied_out(root: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(root.parameters(), root.buffers())}
    copied = copy.deepcopy(root, _last_results(root) | shared)
    del copied.__prepare_scriptable__
    for part in list(copied.modules()):
        if factored_parameters(part):
            _drop_parametrizations(part)
    return copied


def _computed(part: nn.Module) -> Iterator[str]:
    """The names of a module's weights that are computed."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            yield hook.name
        if isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name
    if parametrize.is_parametrized(part) and not factored_parameters(part):
        parametrizations: Any = part.parametrizations
        yield from parametrizations


def _usable(tensor: Tensor) -> Tensor:
    cloned = tensor.clone()
    return nn.Parameter(cloned, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cloned


def _last_results(module: nn.Module) -> dict[int, Any]:
    """What old ways of normalization and recurrent layers keep of their last pass, without its graph, by its id.

    With its graph it cannot be copied.
    """
    values = [value for part in module.modules() for value in _tensors_in(vars(part))]
    return {id(value): value.detach().clone() for value in values if not value.is_leaf}


def _tensors_in(attributes: dict[str, Any]) -> Iterator[Tensor]:
    for value in attributes.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Tensor):
                yield each


def _drop_hooks(part: nn.Module) -> None:
    for hook in list(part._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            trainable = getattr(part, f"{hook.name}_v").requires_grad
            remove_weight_norm(part, hook.name)
            getattr(part, hook.name).requires_grad_(trainable)
        elif isinstance(hook, SpectralNorm):
            trainable = getattr(part, f"{hook.name}_orig").requires_grad
            remove_spectral_norm(part, hook.name)
            getattr(part, hook.name).requires_grad_(trainable)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]


def _drop_parametrizations(part: nn.Module) -> None:
    """Make the parametrized tensors ordinary ones again.

    `remove_parametrizations` would take the property from a class that copies of a module share.
    """
    lists: Any = part.parametrizations
    values = {name: getattr(part, name).detach().clone() for name in lists}
    part.__class__ = type(part).__bases__[0]
    del part._modules["parametrizations"]
    for name, value in values.items():
        originals = list(lists[name].parameters(recurse=False))
        if originals:
            part.register_parameter(name, nn.Parameter(value, any(each.requires_grad for each in originals)))
        else:
            part.register_buffer(name, value)
    if isinstance(part, nn.RNNBase):
        part._init_flat_weights()
