"""Experts of mixtures: the same function apart as together, and each matrix a layer with a rank of its own."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from compressor import compress
from compressor.calibration import calibrate, split_examples
from compressor.calibration.compensation import _calls, _of_the_same_positions
from compressor.calibration.examples import Chunk
from compressor.calibration.walk import Walk
from compressor.data import open_data
from compressor.engine import Run
from compressor.evaluation import count_macs
from compressor.io import open_checkpoint
from compressor.model import evaluation_mode
from compressor.network import find_layers, fuse_experts, module_architecture, with_separate_experts
from tests.lowrank.architectures import ARCHITECTURES

TOKENS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
MIXTURES = ["mixtral", "qwen3-moe"]


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_apart_compute_what_transformers_computes(name: str, implementation: str) -> None:
    dense = ARCHITECTURES[name].dense()
    dense.set_experts_implementation(implementation)
    kinds = [type(experts) for experts in experts_of(dense)]
    apart = with_separate_experts(dense)
    assert [type(experts) for experts in experts_of(dense)] == kinds
    assert kinds
    assert not any(isinstance(experts, tuple(kinds)) for experts in experts_of(apart))
    torch.testing.assert_close(logits(apart), logits(dense), rtol=1e-5, atol=1e-6)
    # One memory: what changes in one changes in the other.
    for whole, parts in zip(experts_of(dense), experts_of(apart), strict=True):
        assert {p.untyped_storage().data_ptr() for p in parts.parameters()} == {
            p.untyped_storage().data_ptr() for p in whole.parameters()
        }
    together = fuse_experts(copy.deepcopy(apart))
    assert [type(experts) for experts in experts_of(together)] == kinds
    state = together.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in dense.state_dict().items())


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_are_those_of_transformers(name: str) -> None:
    dense = ARCHITECTURES[name].dense()
    apart = copy.deepcopy(with_separate_experts(dense))
    for model in (dense, apart):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for whole, parts in zip(experts_of(dense), experts_of(apart), strict=True):
        gradients = [[p.grad for p in expert.parameters()] for expert in parts.children()]
        gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in gradients])  # type: ignore[list-item]
        torch.testing.assert_close(gate_up, whole.get_parameter("gate_up_proj").grad, rtol=1e-4, atol=1e-7)
        down = torch.stack([down for _, _, down in gradients])  # type: ignore[misc]
        torch.testing.assert_close(down, whole.get_parameter("down_proj").grad, rtol=1e-4, atol=1e-7)


def test_arithmetic_is_counted_the_same_apart_and_together() -> None:
    dense = ARCHITECTURES["mixtral"].dense()
    before = dense.config._experts_implementation
    assert count_macs(dense, {"input_ids": TOKENS}) == count_macs(with_separate_experts(dense), {"input_ids": TOKENS})
    assert dense.config._experts_implementation == before


def test_every_expert_has_its_own_rank(tmp_path: Path) -> None:
    dense = ARCHITECTURES["mixtral"].dense()
    true_ranks = [2, 5, 7, 11]
    with torch.no_grad():
        for experts in experts_of(dense):
            for weights in experts.parameters():
                for weight, rank in zip(weights, true_ranks, strict=True):
                    half = len(weight) if weights.shape[1] == 32 else len(weight) // 2
                    for part in weight.split(half):
                        part.copy_(torch.randn(half, rank) @ torch.randn(rank, part.shape[1]) * 0.01)
    dense.save_pretrained(tmp_path / "dense")
    report = compress(tmp_path / "dense", output=tmp_path / "small", tolerance=1e-3, prefer="size")
    found = {plan.name: plan.rank for plan in report.plan.layers if ".experts." in plan.name}
    assert len(found) == 2 * 4 * 3
    for name, rank in found.items():
        assert rank == true_ranks[int(name.split(".experts.")[1].split(".")[0])], name
    small = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(small), logits(dense), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_with_calibration_experts_lose_less() -> None:
    dense = ARCHITECTURES["mixtral"].dense()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(10)  # so that the experts matter
    *examples, held_out = torch.randint(3, 20, (7, 6, 9))
    only: dict[str, Any] = {"keep": 0.5, "include": ["*.experts.*"], "prefer": "size", "bits": 16}
    calibrated = compress(
        dense, **only, calibration=[{"input_ids": part} for part in examples], effort="balanced"
    ).model
    truncated = compress(dense, **only, calibration="none").model

    @torch.no_grad()
    def divergence(model: Any) -> float:
        p, q = (each.eval()(input_ids=held_out).logits.log_softmax(-1) for each in (dense, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(calibrated) < 0.5 * divergence(truncated)


def test_what_an_expert_is_given_is_compared_token_by_token() -> None:
    dense = with_separate_experts(ARCHITECTURES["mixtral"].dense()).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "gate.weight" in name:
                parameter.mul_(40)
    data = [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]
    [name] = [name for name, _ in dense.named_modules() if name.endswith("layers.1.mlp.experts")]
    layer = dense.get_submodule(f"{name}.2").layers[0]
    calibration = calibrate(
        dense,
        find_layers(open_checkpoint(dense), module_architecture(dense)),
        split_examples(open_data(data)),
        run=Run(torch.device("cpu")),
    )
    changed = copy.deepcopy(dense.model.layers[0].self_attn.o_proj)
    with torch.no_grad():
        changed.weight.mul_(-3)
    walk, chunk = Walk(calibration, {"model.layers.1.self_attn.o_proj": changed}), Chunk("fit", 0)
    with evaluation_mode(torch.device("cpu"), dense):
        for _ in range(2):
            walk.advance()
        before, after = (
            _calls(dense, {"2": layer}, partial(run, chunk), once=False)["2"]
            for run in (walk.run_dense, walk.run_compressed)
        )
    tokens = [set(call.tokens.tolist()) for call in (*before, *after)]
    assert tokens[0] != tokens[1]
    [(x, y)] = _of_the_same_positions(before, after)
    both = sorted(tokens[0] & tokens[1])
    assert both
    for calls, rows in ((before, x), (after, y)):
        assert torch.equal(rows, torch.stack([calls[0].x[calls[0].tokens.tolist().index(t)] for t in both]))


@pytest.mark.slow
def test_experts_that_calibration_does_not_reach_stay_dense() -> None:
    dense = ARCHITECTURES["mixtral"].dense()
    dense.config.num_experts_per_tok = 1
    reached: set[tuple[int, int]] = set()
    for block, layer in enumerate(dense.model.layers):
        layer.mlp.gate.top_k = 1
        layer.mlp.gate.register_forward_hook(
            lambda _gate, _given, output, block=block: reached.update((block, e) for e in output[-1].flatten().tolist())
        )
    examples = torch.tensor([[3], [4]] * 4)  # one position each, so at most two experts in a block
    with torch.no_grad():
        dense(input_ids=examples)
    routed = set(reached)
    plan = compress(
        dense, keep=0.9, calibration=[{"input_ids": examples[:4]}, {"input_ids": examples[4:]}], prefer="size", bits=16
    ).plan
    assert 0 < len(routed) <= 4
    for layer in plan.layers:
        if ".experts." in layer.name:
            block, expert = int(layer.name.split(".")[2]), int(layer.name.split(".experts.")[1].split(".")[0])
            assert ("reached" in layer.reason) == ((block, expert) not in routed), layer.name
            assert layer.rank is None or (block, expert) in routed


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_left_out_stay_together(name: str, tmp_path: Path) -> None:
    dense = ARCHITECTURES[name].dense()
    dense.save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense",
        output=tmp_path / "small",
        keep=0.6,
        calibration="none",
        exclude=["*.experts.*"],
        prefer="size",
    )
    loaded = ARCHITECTURES[name].load(tmp_path / "small")
    in_memory: Any = compress(dense, keep=0.6, calibration="none", exclude=["*.experts.*"], prefer="size").model
    for model in (loaded, in_memory):
        assert [type(experts) for experts in experts_of(model)] == [type(experts) for experts in experts_of(dense)]
    assert torch.equal(logits(loaded), logits(in_memory))


@pytest.mark.slow
def test_a_model_without_its_head_loads(tmp_path: Path) -> None:
    ARCHITECTURES["mixtral"].dense().save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", output=tmp_path / "small", keep=0.6, calibration="none", prefer="size")
    whole = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "small")
    bare, loading = transformers.AutoModel.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not loading["missing_keys"]
    with torch.no_grad():
        expected = whole.model(input_ids=TOKENS).last_hidden_state
        assert torch.equal(bare(input_ids=TOKENS).last_hidden_state, expected)


def test_a_model_that_had_no_head_loads_with_one(tmp_path: Path) -> None:
    ARCHITECTURES["mixtral"].dense().model.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", output=tmp_path / "small", keep=0.6, calibration="none", prefer="size")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "small")
    whole, loading = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert set(loading["missing_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        expected = bare(input_ids=TOKENS).last_hidden_state
        assert torch.equal(whole.model(input_ids=TOKENS).last_hidden_state, expected)
