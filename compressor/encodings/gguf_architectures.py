"""The architectures of transformers that llama.cpp computes alike, and how it stores their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of transformers as llama.cpp has it.

    Args:
        name: What llama.cpp calls it.
        activation: The one activation that it computes there.
        permuted: Whether the rows of queries and keys are in another order there, that of its rotary embedding.
        norms_less_one: Whether transformers stores the weights of its norms less one.
        sliding: Of how many blocks the last attends to all tokens, the others to a window; 0 where all attend to all.
    """

    name: str
    activation: str = "silu"
    permuted: bool = False
    norms_less_one: bool = False
    sliding: int = 0


_GELU = "gelu_pytorch_tanh"
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "LlamaForCausalLM": GgufArchitecture("llama", permuted=True),
    "MistralForCausalLM": GgufArchitecture("llama", permuted=True),
    "Qwen2ForCausalLM": GgufArchitecture("qwen2"),
    "Qwen3ForCausalLM": GgufArchitecture("qwen3"),
    "GemmaForCausalLM": GgufArchitecture("gemma", _GELU, norms_less_one=True),
    "Gemma2ForCausalLM": GgufArchitecture("gemma2", _GELU, norms_less_one=True, sliding=2),
    "Gemma3ForCausalLM": GgufArchitecture("gemma3", _GELU, norms_less_one=True, sliding=6),
}
