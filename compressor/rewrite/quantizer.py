"""Low-rank models in transformers: the quantizer that swaps the layers before `from_pretrained` fills them.

Importing this module registers the quantisation method `lowrank`; `import compressor` arranges that it happens as soon
as transformers' own registry is loaded.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.planning.form import Form
from compressor.rewrite.modules import low_rank_layer, put_layer
from compressor.rewrite.tensor_format import FORMAT_VERSION, METADATA_KEY


@register_quantization_config(METADATA_KEY)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of the low-rank layers: the rank of each by module name, and which are pivoted pairs.

    A convolution is a channel pair unless it is among the `spatial` ones.
    """

    def __init__(
        self,
        ranks: dict[str, int],
        pivoted: list[str] | None = None,
        spatial: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METADATA_KEY,
        **_: Any,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this model was written in low-rank format {format_version}, and this lowrank-compressor reads "
                f"formats up to {FORMAT_VERSION}: upgrade it"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.ranks = dict(ranks)
        self.pivoted = list(pivoted or [])
        self.spatial = list(spatial or [])

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "ranks": self.ranks,
            "pivoted": self.pivoted,
            "spatial": self.spatial,
        }


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

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        pivoted, spatial = set(self.quantization_config.pivoted), set(self.quantization_config.spatial)
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        for name, rank in self.quantization_config.ranks.items():
            place = name if name in modules else name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
            if place in modules:  # a head may be absent from the class that is loaded
                form: Form = "pivoted" if name in pivoted else "spatial" if name in spatial else "plain"
                put_layer(model, place, low_rank_layer(modules[place], form, rank))
        return model
