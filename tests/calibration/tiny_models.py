"""Small models of every shape that calibration meets, with inputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import Calibration, CalibrationData, CalibrationSettings, RefinementSettings, calibrate
from compressor.calibration.settings import EndToEndSettings
from compressor.data import Batch
from compressor.data.builtin_data import digits
from compressor.engine import Run
from compressor.io import open_checkpoint
from compressor.network import Layer, find_layers, module_architecture
from compressor.planning import LayerPlan

torch.set_num_threads(1)

CPU = torch.device("cpu")
# For what does not depend on how far the factors are fitted, nor on what uniform quantization loses: Adam and that take
# most of the time of a calibration.
TWO_PASSES = CalibrationSettings(
    refinement=RefinementSettings(passes=2, steps=4),
    end_to_end=EndToEndSettings(replace(EndToEndSettings().fitting, steps=4), texts=1),
    uniform=False,
)
BLOCKS = 3
TOKENS = 40

# How each is built, and whether its inputs are texts or images.
CHAINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3": (
        "Qwen3",
        "ForCausalLM",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "use_sliding_window": True,
         "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2", "LMHeadModel", {"n_head": 4}),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", {"num_attention_heads": 4}),
    "opt": (
        "OPT",
        "ForCausalLM",
        {"num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 12, "tie_word_embeddings": False},
    ),
    "bert": ("Bert", "ForMaskedLM", {"num_attention_heads": 4}),
    "vit": ("ViT", "ForImageClassification", {"num_attention_heads": 4, "image_size": 8, "patch_size": 2}),
}  # fmt: skip
TEXTS = tuple(name for name in CHAINS if name != "vit")


def trained_on_digits(model: nn.Module) -> nn.Module:
    """The model after eight epochs of AdamW."""
    images, labels = digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(8):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def transformer(name: str) -> nn.Module:
    """A transformer of three blocks with random weights, large enough for every block to matter."""
    import transformers

    family, head, own = CHAINS[name]
    shape = {
        "vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS,
        "max_position_embeddings": 32, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "num_labels": 5,
    } | own  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape)
    model: nn.Module = getattr(transformers, head if head[0] == "G" else f"{family}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # so that no bias is zero
    return model


def inputs_for(name: str, examples: int, length: int = 8, *, padded: bool = False) -> dict[str, Tensor]:
    """Random inputs; `padded` gives every text after the first one token less than the one before."""
    if name == "vit":
        return {"pixel_values": torch.randn(examples, 3, 8, 8)}
    ids = torch.randint(3, TOKENS, (examples, length))
    if not padded:
        return {"input_ids": ids}
    mask = (torch.arange(length)[None] < length - torch.arange(examples)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def batch_of(inputs: Mapping[str, Tensor]) -> Batch:
    return Batch(dict(inputs), torch.empty(0))


class Block(nn.Module):
    """A residual block whose first step may be in place."""

    def __init__(self, size: int, *, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(size, size), nn.ReLU(inplace=inplace), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(self.relu(x)))) + x


class Bypassed(nn.Module):
    """A chain of blocks that a projection's result enters at the first one and passes by all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(BLOCKS))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = self.project(x)
        hidden = start
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden + 3 * start)


class Piped(nn.Module):
    """Two chains, the second of which is given what the first gives, with nothing in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*(Block(6) for _ in range(2)))
        self.second = nn.Sequential(*(Block(6) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Conditioned(nn.Module):
    """A block that is given the same context as all others of its chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + torch.tanh(self.first(x) + self.second(context))


class Bridged(nn.Module):
    """An encoder, a recurrent layer, and a decoder all of whose blocks are given what that makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.start = nn.Linear(6, 8), nn.Linear(6, 8)
        self.encoder = nn.ModuleList(Block(8) for _ in range(2))
        self.bridge = nn.GRU(8, 8, batch_first=True)
        self.decoder = nn.ModuleList(Conditioned() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        context = self.enter(x)
        for block in self.encoder:
            context = block(context)
        context = self.bridge(context)[0]
        hidden = self.start(x)
        for block in self.decoder:
            hidden = block(hidden, context)
        return self.head(hidden)


def odd(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that is no plain chain of blocks, or a chain with a snare, with inputs for it."""
    torch.manual_seed(seed)
    if name == "mlp":
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), {
            "inputs": torch.randn(5, 6)
        }
    if name == "stages":
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in ((3, 4), (4, 6), (6, 8))
        ]
        model = nn.Sequential(*stages, nn.Flatten(), nn.Linear(8, 4))
        return model, {"inputs": torch.randn(5, 3, 8, 8)}
    if name == "in place":
        blocks = nn.Sequential(*(Block(8, inplace=True) for _ in range(BLOCKS)))
        return nn.Sequential(nn.Linear(6, 8), blocks, nn.Linear(8, 4)), {"inputs": torch.randn(5, 6)}
    if name == "piped":
        return Piped(), {"inputs": torch.randn(5, 6)}
    if name == "bridged":
        return Bridged(), {"inputs": torch.randn(5, 7, 6)}
    if name == "bypassed":
        return Bypassed(), {"inputs": torch.randn(5, 6)}
    import transformers

    if name == "bart":
        bart = transformers.BartConfig(
            d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=TOKENS, max_position_embeddings=16, init_std=0.3,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )  # fmt: skip
        inputs = {"input_ids": torch.randint(3, TOKENS, (5, 7)), "decoder_input_ids": torch.randint(3, TOKENS, (5, 6))}
        inputs["attention_mask"] = (torch.arange(7)[None] < 7 - torch.arange(5)[:, None]).long()
        return transformers.BartForConditionalGeneration(bart), inputs
    if name == "clip":
        both = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        clip = transformers.CLIPConfig(
            text_config=both | {"vocab_size": TOKENS, "max_position_embeddings": 8, "eos_token_id": 2},
            vision_config=both | {"image_size": 8, "patch_size": 4}, projection_dim=12, initializer_factor=8.0,
        )  # fmt: skip
        inputs = {"input_ids": torch.randint(3, TOKENS, (5, 7)), "pixel_values": torch.randn(5, 3, 8, 8)}
        return transformers.CLIPModel(clip), inputs
    if name == "swin":
        swin = transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 3], num_heads=[2, 4], window_size=2, num_labels=5,
            initializer_range=0.3,
        )  # fmt: skip
        return transformers.SwinForImageClassification(swin), {"pixel_values": torch.randn(5, 3, 16, 16)}
    if name == "resnet":  # whose blocks of two convolutions are as long as its stages
        resnet = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[2, 3], layer_type="basic", num_labels=5
        )
        return transformers.ResNetForImageClassification(resnet), {"pixel_values": torch.randn(5, 3, 16, 16)}
    if name == "t5":
        t5 = transformers.T5Config(
            d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=2, num_decoder_layers=3, vocab_size=TOKENS,
            decoder_start_token_id=0,
        )  # fmt: skip
        inputs = {"input_ids": torch.randint(3, TOKENS, (5, 7)), "decoder_input_ids": torch.randint(3, TOKENS, (5, 6))}
        return transformers.T5ForConditionalGeneration(t5), inputs
    whisper = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=TOKENS, num_mel_bins=4, max_source_positions=6,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.3,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(5, 4, 12), "decoder_input_ids": torch.randint(3, TOKENS, (5, 6))}
    return transformers.WhisperForConditionalGeneration(whisper), inputs


# Those that are more than one segment, with the number of these.
SEVERAL = {
    "in place": BLOCKS + 1, "piped": 6, "bridged": 3, "resnet": 6, "t5": 6, "bart": 6, "whisper": 6, "clip": 5,
    "swin": 6,
}  # fmt: skip
ODD = ("mlp", "stages", "bypassed", *SEVERAL)


def eligible(model: nn.Module, *, embeddings: bool = False) -> list[Layer]:
    found = find_layers(open_checkpoint(model), module_architecture(model), embeddings=embeddings)
    return [each for each in found if each.eligible]


def calibrated(
    model: nn.Module,
    fit: Sequence[Mapping[str, Tensor]],
    holdout: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    labels: Tensor | None = None,
    embeddings: bool = False,
    settings: CalibrationSettings | None = None,
) -> Calibration:
    """Calibration of all eligible layers; the fit examples are the holdout too where there are no others."""
    parts = [
        tuple(Batch(dict(inputs), torch.empty(0) if labels is None else labels) for inputs in part)
        for part in (fit, fit if holdout is None else holdout)
    ]
    data = CalibrationData(parts[0], parts[1], labeled=labels is not None)
    layers = eligible(model, embeddings=embeddings)
    return calibrate(model, layers, data, run=Run(CPU), settings=settings or CalibrationSettings())


def planned(layer: Layer, rank: int | None) -> LayerPlan:
    form = "channel" if layer.kind == "convolution" else "plain"
    return LayerPlan(layer.name, layer.shape, layer.kind, rank, form, 0, 0.0, "")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was: what each module is and has, its flags and hooks, and every number."""
    modules = {
        name: (id(module), sorted(module.__dict__), module.training, list(module._modules.items()),
               dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }  # fmt: skip
    tensors = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return {"modules": modules, "tensors": tensors}


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Check that nothing about a model is other than before."""
    before, values = fingerprint(model), {name: each.clone() for name, each in model.state_dict().items()}
    try:
        yield
    finally:
        assert fingerprint(model) == before
        assert all(torch.equal(each, values[name]) for name, each in model.state_dict().items())
