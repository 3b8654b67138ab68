from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressor import compress

torch.set_num_threads(1)


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**(sizes | changes), num_key_value_heads=2, vocab_size=60, **special)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder, of plain and of pivoted pairs."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder / "dense")
    compress(folder / "dense", output=folder / "small", keep=0.6, calibration="none", prefer="size")
    return folder / "small"
