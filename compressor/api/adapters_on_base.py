"""An adapter resized in the metric of the loss: on its base, as the difference of the fine-tune that both make."""

from __future__ import annotations

from pathlib import Path

from compressor.adapters import Adapter, applied_adapter
from compressor.api.fine_tune import compress_fine_tune
from compressor.api.options import CALIBRATION_DETAILS, CompressOptions
from compressor.errors import BadInput
from compressor.model import open_model, open_runnable
from compressor.results import Compression

_BUDGETS = frozenset({"keep", "max_size", "max_drop"})
_ALLOWED = (
    _BUDGETS
    | CALIBRATION_DETAILS
    | {"base", "calibration", "data", "data_samples", "metric", "tokenizer", "processor", "allow_miss"}
    | {"output", "overwrite", "progress", "revision", "push_to", "dry_run", "device", "seed"}
)


def compress_adapter_on_base(adapter: Adapter, asked: CompressOptions) -> Compression:
    """Resize an adapter so that base and adapter together lose the least, by calibration or a measured drop."""
    source = adapter.checkpoint.source
    if asked.base is None:
        what = "is an adapter, and what its ranks are worth is measured on its base"
        raise BadInput(what, where=source, option="base", remedy="give the model that it was trained on as `base`")
    for name in sorted(asked.given - _ALLOWED):
        what = f"`{name}` is not for adapters on a base"
        sizes = "ask for a size with `keep` or `max_size`, or leave out `base` and `calibration`"
        remedy = sizes if name in asked.alternatives else f"leave out `{name}`"
        raise BadInput(what, option=name, remedy=remedy)
    if not asked.calibrates and asked.max_drop is None:
        what = "is an adapter, and without data its base says nothing of its ranks"
        raise BadInput(what, where=source, option="base", remedy="add `calibration`, or leave out `base`")
    base = open_model(asked.base)
    if base.checkpoint.folder is None or base.architecture is None:
        remedy = "give the one that the adapter was trained on"
        raise BadInput("is no model folder", where=base.name, option="base", remedy=remedy)
    if asked.output is not None and Path(asked.output).suffix == ".safetensors":
        what = f"{Path(asked.output).name} would be a file, and an adapter on a base is written as a folder of PEFT"
        raise BadInput(what, option="output", remedy="leave out its .safetensors")
    applied = applied_adapter(adapter, base)
    biased = [layer.name for layer in base.layers if layer.name in applied.modules and layer.bias is not None]
    if asked.calibrates and biased:
        what = f"changes {biased[0]}, which has a bias that calibration would move, and an adapter has none"
        raise BadInput(what, where=source, option="calibration", remedy="leave out `calibration`, for a `max_drop`")
    return compress_fine_tune(applied.model, open_runnable(asked.base), asked, of=applied)
