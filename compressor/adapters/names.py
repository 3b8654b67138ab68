"""What the modules of a model are called, in adapters that keep the dots of their names and in those that do not.

Adapters in kohya's names have underscores in place of dots. Where a dot was is known only of names that are known:
those of the models of diffusers and transformers, and of the original code of Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# The attributes of which names are made: https://github.com/huggingface/diffusers (`models`),
# https://github.com/huggingface/transformers (CLIP, T5, Llama), https://github.com/Stability-AI/generative-models
# and https://github.com/black-forest-labs/flux (`modules`).
_WORDS = frozenset(
    [
        "down_blocks",
        "up_blocks",
        "mid_block",
        "transformer_blocks",
        "single_transformer_blocks",
        "attentions",
        "resnets",
        "downsamplers",
        "upsamplers",
        "motion_modules",
        "temporal_transformer_blocks",
        "temp_attentions",
        "temp_convs",
        "conv",
        "conv1",
        "conv2",
        "conv_in",
        "conv_out",
        "conv_shortcut",
        "time_embedding",
        "time_emb_proj",
        "add_embedding",
        "linear",
        "linear_1",
        "linear_2",
        "proj",
        "proj_in",
        "proj_out",
        "proj_mlp",
        "attn",
        "attn1",
        "attn2",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "to_add_out",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "ff",
        "ff_context",
        "net",
        "norm",
        "norm1",
        "norm2",
        "norm3",
        "norm_out",
        "norm1_context",
        "context_embedder",
        "x_embedder",
        "time_text_embed",
        "timestep_embedder",
        "text_embedder",
        "guidance_embedder",
        "text_model",
        "encoder",
        "decoder",
        "layers",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "o_proj",
        "mlp",
        "fc1",
        "fc2",
        "gate_proj",
        "up_proj",
        "down_proj",
        "embeddings",
        "token_embedding",
        "position_embedding",
        "text_projection",
        "final_layer_norm",
        "layer_norm1",
        "layer_norm2",
        "model",
        "block",
        "layer",
        "SelfAttention",
        "EncDecAttention",
        "DenseReluDense",
        "q",
        "k",
        "v",
        "o",
        "wi",
        "wi_0",
        "wi_1",
        "wo",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "time_embed",
        "label_emb",
        "out",
        "in_layers",
        "out_layers",
        "emb_layers",
        "skip_connection",
        "op",
        "double_blocks",
        "single_blocks",
        "img_attn",
        "txt_attn",
        "img_mlp",
        "txt_mlp",
        "img_mod",
        "txt_mod",
        "modulation",
        "lin",
        "linear1",
        "linear2",
        "qkv",
        "img_in",
        "txt_in",
        "time_in",
        "vector_in",
        "guidance_in",
        "in_layer",
        "out_layer",
        "final_layer",
    ]
)
_LONGEST_WORD = max(word.count("_") + 1 for word in _WORDS)
# What begins the names in a model, by the part of a pipeline that the model is.
_UNET = frozenset(
    [
        "down_blocks",
        "up_blocks",
        "mid_block",
        "conv_in",
        "conv_out",
        "time_embedding",
        "add_embedding",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "time_embed",
        "label_emb",
        "out",
    ]
)
_TRANSFORMER = frozenset(["transformer_blocks", "single_transformer_blocks"])
_ORIGINAL_TRANSFORMER = frozenset(["double_blocks", "single_blocks"])
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_BLOCKS_BESIDE_SAMPLER = 2  # resnets of a block of SD 1.5, SD 2, and SDXL


@dataclass(frozen=True)
class ModuleName:
    """The name of a module: the part of a pipeline that its model is, and its path there.

    Attributes:
        part: `unet`, `transformer`, `text_encoder`, and so on; empty where there is one model alone.
        path: The module's name in the model, as diffusers and transformers have it.
        dotted: Whether the dots of the path are known; else it has underscores in their place.
    """

    part: str
    path: str
    dotted: bool = True

    def __str__(self) -> str:
        return f"{self.part}.{self.path}" if self.part else self.path

    @property
    def flat(self) -> ModuleName:
        """The name without its dots, equal for all ways to write it."""
        return ModuleName(self.part, self.path.replace(".", "_"), False)


def with_dots(flat: str) -> str | None:
    """The path whose dots became underscores; None where it has a word that is not known."""
    tokens, words, at = flat.split("_"), list[str](), 0
    while at < len(tokens):
        for length in range(min(_LONGEST_WORD, len(tokens) - at), 0, -1):
            word = "_".join(tokens[at : at + length])
            if word in _WORDS or (length == 1 and word.isdecimal()):
                words.append(word)
                at += length
                break
        else:
            return None
    return ".".join(words)


def part_of(paths: Collection[str]) -> str:
    """The part of a pipeline that a model with modules of these names is; empty where they do not tell."""
    first = {path.partition(".")[0] for path in paths}
    if first & _TRANSFORMER:
        return "transformer"
    if first & _UNET:
        return "unet"
    return "text_encoder" if "text_model" in first else ""


def is_of_diffusers(name: ModuleName) -> bool:
    """Whether a name is one that diffusers has, and not one of a model's original code."""
    first = name.path.partition(".")[0]
    original = first in _ORIGINAL_TRANSFORMER or (name.part == "unet" and first not in _UNET)
    return name.dotted and bool(name.part) and not original


def from_original(path: str) -> str:
    """The name that diffusers has for a module of the UNet in the original code of Stable Diffusion."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if (found := re.fullmatch(r"middle_block\.([012])\.(.+)", path)) is not None:
        place, rest = int(found[1]), found[2]
        return f"mid_block.attentions.0.{rest}" if place == 1 else f"mid_block.resnets.{place // 2}.{_resnet(rest)}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", path)
    if found is None:
        return path
    down, number, inner, rest = found[1] == "input", int(found[2]), int(found[3]), found[4]
    block, place = divmod(number - down, _BLOCKS_BESIDE_SAMPLER + 1)
    side = f"{'down' if down else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{side}.downsamplers.0.conv"
    if rest == "conv":
        return f"{side}.upsamplers.0.conv"
    return f"{side}.attentions.{place}.{rest}" if inner == 1 else f"{side}.resnets.{place}.{_resnet(rest)}"


def to_original(path: str, with_attention: Collection[str] = ()) -> str:
    """The inverse of `from_original`; `with_attention` are the blocks, such as `up_blocks.0`, that have attention."""
    outside = {ours: original for original, ours in _OUTSIDE.items()}
    if path in outside:
        return outside[path]
    resnet = {ours: original for original, ours in _RESNET.items()}
    if (found := re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d)\.(.+)", path)) is not None:
        rest = found[3]
        return (
            f"middle_block.1.{rest}"
            if found[1] == "attentions"
            else f"middle_block.{2 * int(found[2])}.{resnet.get(rest, rest)}"
        )
    found = re.fullmatch(r"((down|up)_blocks\.(\d+))\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if found is None:
        return path
    down, block, what, place, rest = found[2] == "down", int(found[3]), found[4], int(found[5]), found[6]
    if what in ("downsamplers", "upsamplers"):
        place = _BLOCKS_BESIDE_SAMPLER
    number = block * (_BLOCKS_BESIDE_SAMPLER + 1) + place + down
    if what == "downsamplers":
        return f"input_blocks.{number}.0.op"
    if what == "upsamplers":
        return f"output_blocks.{number}.{2 if found[1] in with_attention else 1}.conv"
    side = "input" if down else "output"
    if what == "attentions":
        return f"{side}_blocks.{number}.1.{rest}"
    return f"{side}_blocks.{number}.0.{resnet.get(rest, rest)}"


def _resnet(rest: str) -> str:
    return _RESNET.get(rest, rest)
