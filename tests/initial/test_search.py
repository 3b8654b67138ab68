"""The seed of a model is found where it is tried, and none where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from compressor.initial import InitialWeights, record
from compressor.initial.probe import probe_of
from compressor.initial.search import SEARCH, FoundSeed, find_seed, what_is_searched
from compressor.io import open_checkpoint
from compressor.network import find_layers, module_architecture, with_separate_experts

FEW = replace(SEARCH, seeds=30, customary=(1337,))


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))


def overwritten() -> nn.Module:
    """A network that overwrites PyTorch's default initialization by its own."""
    module = build()
    for layer in (module[0], module[2]):
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.zeros_(layer.bias)
    return module


def skipped() -> nn.Module:
    """The same, by a library that skips the default."""
    module = nn.Sequential(*(nn.utils.skip_init(nn.Linear, *each) for each in ((40, 48), (48, 40))))
    for layer in module:
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(module[0], nn.ReLU(), module[1])


def found(module: nn.Module, of=build, **options) -> FoundSeed | None:
    checkpoint = open_checkpoint(module)
    layers = find_layers(checkpoint, module_architecture(module))
    return find_seed(record(of, 999).draws, checkpoint, layers, **{"settings": FEW, **options})


def trained(build_it, seed: int) -> nn.Module:
    """A network after some training: a part of its start, and a matrix of rank 1."""
    module = record(build_it, seed).module
    with torch.no_grad():
        for layer in (module[0], module[2]):
            rows, columns = layer.weight.shape
            layer.weight.mul_(0.7).add_(torch.ones(rows, 1) @ torch.linspace(-0.2, 0.2, columns)[None])
    return module


@pytest.mark.parametrize("seed", [0, 17, 1337])
def test_a_seed_that_is_tried_is_found(seed):
    hit = found(trained(build, seed))
    assert hit is not None
    assert hit.seed == hit.draws.seed == seed
    assert hit.z.keys() == {"0", "2"}
    assert hit.next_best < 8 < min(hit.z.values())


def test_the_seed_of_fused_experts_is_found():
    def experts() -> nn.Module:
        shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=3, **shape)
        return transformers.MixtralForCausalLM(config)

    module = with_separate_experts(record(experts, 5).module)
    hit = found(module, of=experts)
    assert hit is not None
    assert hit.seed == 5
    initial = InitialWeights.from_draws(hit.draws)
    own = [name for name, each in module.named_parameters() if ".experts." in name]
    assert len(own) == 9
    for name in own:
        assert hit.z[name.removesuffix(".weight")] > 8
        assert torch.equal(initial.read(name), module.get_parameter(name))


def test_a_stated_seed_is_tried_first():
    assert found(trained(build, 5_000)) is None
    hit = found(trained(build, 5_000), stated=(5_000,))
    assert hit is not None
    assert (hit.seed, hit.tried) == (5_000, 1)


@pytest.mark.parametrize(("of", "with_overwritten"), [(overwritten, True), (skipped, False)])
def test_a_default_initialization_is_drawn_before_or_not(of, with_overwritten):
    hit = found(trained(of, 3), of=overwritten)
    assert hit is not None
    assert (hit.seed, hit.with_overwritten) == (3, with_overwritten)
    start = record(of, 3).module[0].weight
    assert torch.equal(InitialWeights.from_draws(hit.draws).read("0.weight"), start)


@pytest.mark.parametrize("jump_from", [1, 2**30])
@pytest.mark.parametrize(("of", "with_overwritten"), [(overwritten, True), (skipped, False)])
def test_the_first_part_of_a_large_matrix_is_enough(of, with_overwritten, jump_from):
    settings = replace(FEW, numbers=512, jump_from=jump_from, at_once=2)
    hit = found(trained(of, 3), of=overwritten, settings=settings)
    assert hit is not None
    assert (hit.seed, hit.with_overwritten) == (3, with_overwritten)
    assert found(trained(of, 333), of=overwritten, settings=settings) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_are_jumped_over_only_where_their_words_are_known(dtype):
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(37, 15, dtype=dtype), nn.Linear(15, 8, dtype=dtype), nn.Linear(8, 100))

    draws = record(build, 0).draws
    probe = probe_of(draws, ["2.weight"], numbers=2**17, jump_from=1)
    if dtype != torch.bfloat16:  # of which releases of PyTorch draw more or fewer words
        assert (probe.jump is not None) == (dtype == torch.float32)
    [generator] = probe.generators([7])
    assert torch.equal(dict(probe.first.replay(None, generator))["2.weight"], record(build, 7).module[2].weight)


def test_a_matrix_that_nothing_confirms_is_no_hit():
    module = trained(build, 4)
    with torch.no_grad():
        module[2].weight.normal_()
    assert found(module) is None


def test_no_network_of_other_seeds_has_one():
    assert [found(trained(build, 100_000 + place)) for place in range(20)] == [None] * 20


def test_what_does_not_depend_on_the_seed_is_no_evidence():
    def constant() -> nn.Module:
        module = build()
        for layer in (module[0], module[2]):
            nn.init.eye_(layer.weight)
        return module

    assert found(constant(), of=constant) is None


def test_a_search_whose_candidates_need_many_numbers_tries_fewer():
    few = replace(FEW, seeds=10_000, customary=(), most_numbers=1)
    assert found(trained(build, 99), settings=few) is not None
    assert found(trained(build, 101), settings=few) is None


def test_what_is_tried_is_said():
    module = overwritten()
    layers = find_layers(open_checkpoint(module), module_architecture(module))
    said = what_is_searched(record(overwritten, 0).draws, layers, stated=(77,), settings=FEW)
    assert said.startswith("77, 0 to 29 and 1 customary seeds, each with and without the default initialization")
    assert "accelerator" in said
