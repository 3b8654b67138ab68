"""A model's module tree without its weights: what knows which tensor is a linear layer and which a convolution.

The only module that touches how transformers maps the names in a file to the names of its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Skeleton:
    """A module tree, and the name in it of every tensor of a checkpoint.

    `module_name` maps a tensor's name in the file to its name in the tree; None where the tree assembles the tensor
    from several (fused experts) or does not have it. `untrained` says that its weights are those of a new model.
    """

    module: nn.Module
    module_name: Callable[[str], str | None]
    untrained: bool = False


def module_skeleton(module: nn.Module, *, untrained: bool = False) -> Skeleton:
    """The skeleton of a module in memory: names in its state dict are names of its modules."""
    return Skeleton(module, lambda name: name, untrained)


def transformers_skeleton(folder: Path) -> Skeleton | None:
    """The tree that transformers builds for the `config.json` in `folder`, on the meta device.

    None when transformers does not know the architecture or cannot build it without running the checkpoint's own code.
    """
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            build = architecture.from_config if architecture is transformers.AutoModel else architecture._from_config
            model: Any = build(config)
        model.tie_weights()
    except Exception:  # whatever a foreign configuration makes transformers raise, the file itself can still be read
        return None
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()

    def module_name(name: str) -> str | None:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return renamed if converted is None and renamed in known else None

    return Skeleton(model, module_name)
