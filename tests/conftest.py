"""What holds for the whole suite.

PyTorch, transformers, and the package take seconds to import, and are imported where they are used: of the processes
of a run the one that only hands out the tests needs none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.warm import WARM, Warm

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from compressor.data import Batch, EvaluationData

# How long an example takes says how busy the machine is, and nothing about the code. The suite tries the same examples
# each time, so that a change fails by what it changes; `make explore-properties` tries others.
_UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("suite", _UNHURRIED, max_examples=50, derandomize=True)
settings.register_profile("explore", _UNHURRIED, max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WARM] = Warm()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[WARM].close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are too small for more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def warm(pytestconfig: pytest.Config) -> Warm:
    """Runs code in processes of its own that start at once."""
    return pytestconfig.stash[WARM]


ALPHABET = "abcdefgh \n"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: 0 is padding, 1 unknown, the letters of the alphabet follow."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, **{letter: 2 + i for i, letter in enumerate(ALPHABET)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Two layers with grouped-query attention, vocabulary 12."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def vector_data() -> Callable[[Tensor, Tensor], EvaluationData]:
    from compressor.data import Batch, EvaluationData

    def from_tensors(inputs: Tensor, labels: Tensor, batch_size: int = 4) -> EvaluationData:
        def read(positions: object) -> Batch:
            chosen = list(positions)  # type: ignore[call-overload]
            return Batch({"inputs": inputs[chosen]}, labels[chosen])

        return EvaluationData("vectors", "classification", len(inputs), batch_size, read)

    return from_tensors


@pytest.fixture(scope="session")
def lookup() -> type[nn.Module]:
    from torch import nn

    class Lookup(nn.Module):
        """Looks its predictions up: the logits of token or example number i are row i of a table."""

        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.table = nn.Parameter(table)

        def forward(self, numbers: Tensor) -> Tensor:
            return self.table[numbers.long().squeeze(-1) if numbers.is_floating_point() else numbers]

    return Lookup


Saved = Callable[..., list[Path]]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Writes networks to weight files, named A, B, C."""
    from safetensors.torch import save_file

    def save(networks: Sequence[nn.Module]) -> list[Path]:
        paths = [tmp_path / f"{name}.safetensors" for name, _ in zip("ABC", networks, strict=False)]
        for path, network in zip(paths, networks, strict=True):
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
        return paths

    return save


@pytest.fixture
def task_files(tmp_path: Path) -> Callable[[Sequence[tuple[Tensor, Tensor]]], list[Path]]:
    """Writes each task's inputs and labels to a file of arrays."""
    from safetensors.torch import save_file

    def save(tasks: Sequence[tuple[Tensor, Tensor]]) -> list[Path]:
        paths = [tmp_path / f"data-{number}.safetensors" for number, _ in enumerate(tasks)]
        for path, (inputs, labels) in zip(paths, tasks, strict=True):
            save_file({"inputs": inputs.contiguous(), "labels": labels.contiguous()}, path)
        return paths

    return save
