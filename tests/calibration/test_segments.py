"""A model cut into segments is the model: the same outputs, nothing of it changed, and no chain where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration.criterion import outputs_of
from compressor.calibration.segments import Segments, State, find_segments
from compressor.data import Batch
from tests.calibration.tiny_models import (
    BLOCKS,
    CHAINS,
    ODD,
    SEVERAL,
    TEXTS,
    Block,
    batch_of,
    eligible,
    inputs_for,
    left_as_it_was,
    odd,
    transformer,
)


def cut(model: nn.Module, batch: Batch) -> Segments:
    with torch.no_grad():
        return find_segments(model, eligible(model), batch)


@torch.no_grad()
def one_after_another(model: nn.Module, segments: Segments, batch: Batch) -> Tensor:
    state: State = ()
    for index in range(segments.count):
        state = segments.run(model, index, batch, state=state)
    [outputs] = state
    return outputs


@pytest.mark.parametrize("name", CHAINS)
def test_a_transformer_is_as_many_segments_as_blocks_and_one_and_they_give_its_outputs(name: str) -> None:
    model = transformer(name).eval()
    first = batch_of(inputs_for(name, 2))
    with left_as_it_was(model):
        segments = cut(model, first)
        assert segments.count == BLOCKS + 1
        batches = [first, batch_of(inputs_for(name, 5))]
        if name in TEXTS:
            batches += [batch_of(inputs_for(name, 3, length=11)), batch_of(inputs_for(name, 4, padded=True))]
        for batch in batches:
            with torch.no_grad():
                whole = outputs_of(model, batch.inputs)
            assert torch.equal(one_after_another(model, segments, batch), whole)


@pytest.mark.parametrize("name", CHAINS)
def test_a_segment_is_what_lies_between_two_blocks(name: str) -> None:
    # By plain hooks on the blocks of one run of the whole model.
    model, batch = transformer(name).eval(), batch_of(inputs_for(name, 2))
    segments = cut(model, batch)
    seen: list[Tensor] = []
    [chain] = segments.chains
    for block in chain.blocks:
        model.get_submodule(block).register_forward_pre_hook(
            lambda _, args, named: seen.append((args or tuple(named.values()))[0]), with_kwargs=True
        )
    with torch.no_grad():
        outputs_of(model, batch.inputs)
        entered = list(seen)
        for index, expected in enumerate(entered):
            [after] = segments.run(model, index, batch, state=(entered[index - 1],) if index else ())
            assert torch.equal(after, expected)
    assert len(entered) == BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_other_models_give_the_same_in_however_many_segments(name: str) -> None:
    model, inputs = odd(name)
    model.eval()
    batch = batch_of(inputs)
    with left_as_it_was(model):
        segments = cut(model, batch)
        with torch.no_grad():
            whole = outputs_of(model, batch.inputs)
        assert torch.equal(one_after_another(model, segments, batch), whole)
    assert segments.count == SEVERAL.get(name, 1)


class Weighted(nn.Module):
    """Blocks whose every result is in the outputs, so that none can be passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for block in self.blocks:
            results.append(block(results[-1]))
        return torch.stack(results).sum(0)


class Backwards(Weighted):
    """Blocks that run in another order than they are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class Twice(Weighted):
    """Blocks that run twice over."""

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


@pytest.mark.parametrize("model", [Weighted(), Backwards(), Twice()])
def test_what_is_no_chain_is_one_segment(model: nn.Module) -> None:
    assert cut(model, batch_of({"inputs": torch.randn(4, 6)})).count == 1


class Shared(nn.Module):
    """A chain, then a longer one, then the longest, which cannot be run apart: all its blocks share a layer."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.first, self.second = (nn.Sequential(*(Block(6) for _ in range(count))) for count in (2, 3))
        self.third = nn.Sequential(*(nn.Sequential(nn.Tanh(), shared) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class InPlace(nn.Module):
    """Two chains, and what the first gives changed in place before the second and used again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(*(Block(6) for _ in range(count))) for count in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x)
        between += 1
        return self.second(between) + between


@pytest.mark.parametrize("model", [Shared(), InPlace()])
def test_as_many_chains_are_found_as_can_be_run_apart(model: nn.Module) -> None:
    batch = batch_of({"inputs": torch.randn(4, 6)})
    segments = cut(model, batch)
    assert segments.count == 6
    with torch.no_grad():
        assert torch.equal(one_after_another(model, segments, batch), outputs_of(model, batch.inputs))


@pytest.mark.parametrize("index", range(BLOCKS + 1))
def test_an_exception_in_a_segment_leaves_the_model_as_it_was(index: int) -> None:
    model, batch = transformer("llama").eval(), batch_of(inputs_for("llama", 2))
    segments = cut(model, batch)
    broken = batch_of({"input_ids": torch.tensor([[10_000]])}) if index == 0 else batch
    with left_as_it_was(model), pytest.raises(Exception, match=r"out of range|shape|size"):
        segments.run(model, index, broken, state=(torch.zeros(2, 8, 5),) if index else ())


def test_a_forward_of_a_blocks_own_is_put_back() -> None:
    # accelerate and others hang one on the instance.
    model, batch = transformer("gpt2").eval(), batch_of(inputs_for("gpt2", 2))
    for block in model.transformer.h:
        block.forward = block.forward
    with left_as_it_was(model):
        own = [block.forward for block in model.transformer.h]
        segments = cut(model, batch)
        assert segments.count == BLOCKS + 1
        one_after_another(model, segments, batch)
        assert [block.forward for block in model.transformer.h] == own
