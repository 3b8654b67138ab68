"""DeepSeek's projections to a latent space and back: ordinary layers, because there is a norm between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor import compress, inspect, restore
from tests.encodings.stored import deepseek_v3, dense_folder

TOKENS = torch.tensor([[5, 9, 33, 7, 12, 60], [3, 4, 3, 21, 8, 2]])
PARTS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    found: Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    return found


def test_each_is_measured_and_compressed_by_itself(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", deepseek_v3(), torch.float32)
    measured = {each.layer.name: each for each in inspect(tmp_path / "dense").layers}
    of_attention = [name for name in measured if name.endswith(PARTS)]
    assert len(of_attention) == 2 * len(PARTS)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    for name in of_attention:
        values = torch.linalg.svdvals(weights[f"{name}.weight"].double())
        found = measured[name].singular_values
        assert found is not None
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), values, rtol=1e-5, atol=1e-8)
    include = [f"*.{part}" for part in PARTS]
    asked: dict[str, Any] = {"calibration": "none", "prefer": "size", "include": include}
    result = compress(tmp_path / "dense", output=tmp_path / "small", keep=0.6, **asked)
    assert {layer.name for layer in result.plan.layers} == set(of_attention)
    assert sum(layer.rank is not None for layer in result.plan.layers) >= len(PARTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 9)
    restore(tmp_path / "small", output=tmp_path / "restored")
    torch.testing.assert_close(logits(tmp_path / "small"), logits(tmp_path / "restored"), rtol=1e-4, atol=1e-5)


def root_mean_square_norm(width: int, eps: float, gain: Tensor | None = None) -> nn.RMSNorm:
    norm = nn.RMSNorm(width, eps=eps, dtype=torch.float64)
    nn.init.ones_(norm.weight) if gain is None else norm.load_state_dict({"weight": gain})
    return norm


def test_the_product_of_the_two_is_another_layer() -> None:
    torch.manual_seed(0)
    first, second, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 9), (7, 6), (20, 9)))
    through = root_mean_square_norm(6, 1e-6)(x @ first.T) @ second.T
    scale = (through * (x @ first.T @ second.T)).sum() / (x @ first.T @ second.T).square().sum()
    left = through - scale * (x @ first.T @ second.T)
    assert torch.linalg.vector_norm(left) > 0.1 * torch.linalg.vector_norm(through)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_inner_side_of_a_first_layer_of_low_rank_can_be_cut_exactly(eps: float) -> None:
    """`A = U A'` of rank s, U orthonormal of `r x s`: `B diag(g) U sqrt(r / s)`, no gain, and `eps r / s`."""
    torch.manual_seed(0)
    r, s = 6, 3
    basis = torch.linalg.qr(torch.randn(r, s, dtype=torch.float64)).Q
    inner, second, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((s, 9), (7, r), (20, 9)))
    gain = torch.rand(r, dtype=torch.float64) + 0.5
    before = root_mean_square_norm(r, eps, gain)(x @ (basis @ inner).T) @ second.T
    cut = (r / s) ** 0.5 * (second * gain) @ basis
    after = root_mean_square_norm(s, eps * r / s)(x @ inner.T) @ cut.T
    torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-12)
