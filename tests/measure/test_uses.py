"""How often an example uses a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AlbertConfig, AlbertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compressor import TrainingRecipe, inspect

SMALL = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (
            AlbertModel(AlbertConfig(**SMALL, embedding_size=8)),
            {"query": 3, "ffn": 3, "embedding_hidden_mapping_in": 1},
        ),
        (LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)), {"q_proj": 1, "down_proj": 1}),
    ],
    ids=["blocks that share a layer", "blocks with layers of their own"],
)
def test_a_layer_is_used_at_each_position_of_each_call(
    model: PreTrainedModel, calls: dict[str, int], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    found = {
        each.layer.name.rpartition(".")[2]: each.uses
        for each in inspect(tmp_path, recipe=TrainingRecipe(sequence_length=7)).layers
    }
    assert {name: found[name] for name in calls} == {name: 7 * count for name, count in calls.items()}
