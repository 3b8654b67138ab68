"""Networks whose weights are a share of their initial ones and a matrix of rank two, and files of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compressor.api.write import written
from compressor.engine import Engine, InProcess, Run
from compressor.initial import InitialWeights
from compressor.io import Naming, checked_target, form_of
from compressor.lowrank import Rewriting, StoredErrors, compressed_artifact
from compressor.model import LayerSelection, Model, open_model
from compressor.planning import Budget, LayerPlan, Plan
from compressor.recipe import TrainingRecipe

SEED, SHARE, RANK = 3, 0.9, 2


class Kinds(nn.Module):
    """A layer of every kind, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)
        self.head.weight = self.words.weight
        self.square, self.tall = nn.Linear(16, 16), nn.Linear(16, 32)
        self.channel, self.spatial = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.rnn = nn.LSTM(8, 16, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tall(torch.tanh(self.square(self.words(tokens))))
        image = self.spatial(self.channel(hidden.unflatten(-1, (8, 4)).transpose(1, 2)))
        image = self.back(self.grouped(image))
        return self.head(self.rnn(image.transpose(1, 2).mean(-1))[0])


# Forms and ranks of the layers of `Kinds`; the hidden weights of the recurrent layer are nothing but the start.
KINDS = {
    "words": ("plain", RANK),
    "square": ("pivoted", RANK),
    "tall": ("plain", RANK),
    "channel": ("channel", RANK),
    "spatial": ("spatial", 16),
    "back": ("channel", RANK),
    "rnn.weight_ih_l0": ("plain", RANK),
    "rnn.weight_hh_l0": ("pivoted", 0),
}


def gpt2() -> Any:
    """A tiny language model of transformers, whose head is tied."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=8, **ids)
    return transformers.GPT2LMHeadModel(config)


GPT2 = {
    "transformer.h.0.attn.c_proj": ("plain", RANK),
    "transformer.h.0.mlp.c_fc": ("pivoted", RANK),
    "transformer.h.0.mlp.c_proj": ("plain", RANK),
    "transformer.wte": ("plain", RANK),
}


def trained(build: Callable[[], nn.Module]) -> tuple[Any, InitialWeights]:
    """A network and its initial weights: a matrix of rank two is added to the share of each of its matrices."""
    initial = InitialWeights.from_seed(build, SEED)
    torch.manual_seed(0)
    model = build().eval()
    for name, parameter in model.named_parameters():
        start = initial.read(name) if parameter.dim() > 1 else None
        if start is not None:
            flat = start.flatten(1)
            size = 0.0 if name == "rnn.weight_hh_l0" else 0.3 * float(start.std())
            change = torch.randn(len(flat), RANK) @ torch.randn(RANK, flat.shape[1]) * size
            parameter.data = (SHARE * flat + change).reshape(start.shape)
    return model, initial


def planned(forms: Mapping[str, tuple[str, int]]) -> Plan:
    """A plan of what training wrote."""
    layers = tuple(
        LayerPlan(name, (0, 0), "", rank, f"initial+{form}", 0, 0.0, "", share=SHARE)
        for name, (form, rank) in forms.items()
    )
    return Plan("", None, Budget("plan"), layers)


def opened(model: Any, initial: InitialWeights, factory: Any = None) -> Model:
    """A model whose start is known."""
    return replace(open_model(model, factory=factory, select=LayerSelection(embeddings=True)), initial=initial)


def rewriting_of(subject: Model, forms: Mapping[str, tuple[str, int]]) -> Rewriting:
    return Rewriting(subject.checkpoint, TrainingRecipe(), subject.layers, planned(forms), initial=subject.initial)


def write(
    rewriting: Rewriting, path: Path, shard_size: int = 10**9, *, engine: Engine | None = None
) -> dict[str, float]:
    """Write the compressed model, and return the errors of its layers."""
    errors = StoredErrors()
    naming = Naming(form_of(rewriting.checkpoint), "")
    target = checked_target(rewriting.checkpoint, path, naming, overwrite=False)
    run = Run(torch.device("cpu"), engine=engine or InProcess())
    artifact = compressed_artifact(rewriting, shard_size, run=run, errors=errors)
    with written(artifact, target):
        pass
    return errors.of


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    tokens = torch.randint(0, 24, (3, 6), generator=torch.Generator().manual_seed(5))
    found = model.eval()(tokens)
    return found if isinstance(found, Tensor) else found.logits
