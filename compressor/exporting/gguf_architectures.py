"""What llama.cpp calls the models of transformers, their settings, and their tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.encodings.gguf_architectures import ARCHITECTURES, GgufArchitecture
from compressor.errors import BadInput

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufModel:
    """A model whose settings llama.cpp has: its architecture there, and its configuration in transformers."""

    architecture: GgufArchitecture
    config: Any

    @property
    def head_size(self) -> int:
        config = self.config
        size: int | None = getattr(config, "head_dim", None)
        return size or config.hidden_size // config.num_attention_heads

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary embedding of blocks that attend to all tokens."""
        found: Mapping[str, Any] = self.config.rope_parameters or {}
        of_all: Mapping[str, Any] = found.get("full_attention", found)
        return of_all

    def values(self, name: str, tensor: Tensor) -> Tensor:
        """The values of a tensor as llama.cpp wants them.

        In float32 where they are those of a norm, or a vector.
        """
        if name.endswith("norm.weight") or tensor.ndim == 1:
            tensor = tensor.float()
        if self.architecture.norms_less_one and name.endswith("norm.weight"):
            tensor = tensor + 1.0
        return self.permuted(name, tensor)

    def permuted(self, name: str, rows: Tensor) -> Tensor:
        """The rows of what belongs to a weight, in llama.cpp's order.

        Its rotary embedding turns pairs of neighbors in a head, that of transformers a number in the first half and one
        in the second. As `LlamaModel.permute` of llama.cpp's `convert_hf_to_gguf.py` does it.
        """
        if not self.architecture.permuted:
            return rows
        layer = name.rpartition(".")[0]
        if layer.endswith("q_proj"):
            heads = self.config.num_attention_heads
        elif layer.endswith("k_proj"):
            heads = self.config.num_key_value_heads
        else:
            return rows
        apart = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return apart.swapaxes(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors that llama.cpp wants beside those of the model: by what each frequency of Llama 3 is divided."""
        rope = self.rope
        if rope.get("rope_type") != "llama3":
            return {}
        size, trained = self.head_size, rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        lengths = 2 * math.pi / frequencies
        smooth = (trained / lengths - low) / (high - low)
        divided = 1.0 / ((1 - smooth) / factor + smooth)
        divided = torch.where(lengths < trained / high, 1.0, divided)
        return {"rope_freqs.weight": torch.where(lengths > trained / low, float(factor), divided)}

    def write_settings(self, writer: GGUFWriter) -> None:
        """Write the keys of the model, those of `convert_hf_to_gguf.py`."""
        config, rope = self.config, self.rope
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        if self.architecture.permuted:
            writer.add_rope_dimension_count(self.head_size)
        if "rope_theta" in rope:
            writer.add_rope_freq_base(rope["rope_theta"])
        self._write_rope_scaling(writer)
        if local := (config.rope_parameters or {}).get("sliding_attention", {}).get("rope_theta"):
            writer.add_rope_freq_base_swa(local)
        if self.architecture.sliding:
            writer.add_sliding_window(config.sliding_window)
        if self.architecture.name == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)

    def _write_rope_scaling(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope = self.rope
        kinds = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
        if (kind := kinds.get(rope.get("rope_type", "default"))) is None:
            return
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(rope["factor"])
        if kind is RopeScalingType.YARN:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def gguf_model(config: Mapping[str, Any], where: Path | None) -> GgufModel:
    """A model as llama.cpp has it; `BadInput` for one that llama.cpp would compute otherwise."""
    from transformers import AutoConfig

    remedy = "export it with `to='dense'`, and from there with llama.cpp's convert_hf_to_gguf.py"
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    architecture = ARCHITECTURES.get(named) if isinstance(named, str) else None
    if architecture is None:
        known = ", ".join(each.removesuffix("ForCausalLM") for each in ARCHITECTURES)
        raise BadInput(f"is {named}; GGUF is written of {known}", where=where, remedy=remedy)
    try:
        given = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        found: Any = AutoConfig.for_model(config["model_type"], **given)
    except Exception as error:  # whatever a foreign configuration makes transformers raise
        raise BadInput("has a configuration that transformers cannot read", where=where, remedy=remedy) from error
    model = GgufModel(architecture, found)
    if (difference := _difference(model)) is not None:
        raise BadInput(f"llama.cpp would compute something else: {difference}", where=where, remedy=remedy)
    _note_window(model)
    return model


def _difference(model: GgufModel) -> str | None:
    """What of a model llama.cpp does otherwise; None where nothing."""
    config, architecture = model.config, model.architecture
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        return f"its activation is {activation}, there {architecture.activation}"
    kinds = ("default", "linear", "yarn", "llama3") if not architecture.sliding else ("default", "linear")
    if (kind := model.rope.get("rope_type", "default")) not in kinds:
        return f"its rotary embedding is scaled as {kind}"
    if kind == "llama3" and architecture.name != "llama":
        return "its rotary embedding is scaled as llama3"
    if getattr(config, "query_pre_attn_scalar", model.head_size) != model.head_size:
        return "its queries are not divided by the root of a head's size"
    if (every := architecture.sliding) and config.layer_types != [
        "full_attention" if (block + 1) % every == 0 else "sliding_attention"
        for block in range(config.num_hidden_layers)
    ]:
        return f"not every {every}th block alone attends to all tokens"
    if architecture.name == "gemma3" and getattr(config, "attn_logit_softcapping", None):
        return "its attention is capped"
    return None


def _note_window(model: GgufModel) -> None:
    """Say where a window of attention matters, which llama.cpp does not have in this architecture."""
    config = model.config
    window = None if model.architecture.sliding else getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        logger.warning(
            "llama.cpp attends to all tokens, this model to a window of the last %d: they agree up to that length",
            window,
        )
