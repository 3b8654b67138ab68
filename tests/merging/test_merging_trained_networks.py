"""The theory's two claims on trained networks: shallow sums need weight decay, and side by side works at any depth.

Two tasks, five digits each, in disjoint blocks of the inputs, so the inputs are exactly orthogonal. Bias-free ReLU
networks, plain SGD, one recipe for all; the accuracies are of the validation and test splits together, some 360
examples of each task, and for the sums of shallow networks the mean over several random starts.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import Merging, merge
from compressor.data.builtin_data import Split, digits

pytestmark = pytest.mark.slow

ONE_POINT = 0.01
BLOCK, WIDTH, STEPS, LEARNING_RATE = 64, 128, 1500, 0.2


def task(number: int, split: Split) -> tuple[Tensor, Tensor]:
    images, labels = digits(split)
    chosen = labels // 5 == number
    inputs = torch.zeros(int(chosen.sum()), 2 * BLOCK)
    inputs[:, number * BLOCK : (number + 1) * BLOCK] = images[chosen].flatten(1)
    return inputs, labels[chosen] % 5


def network(depth: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise([2 * BLOCK, *[WIDTH] * (depth - 1), 5]):
        layers += [nn.Linear(d_in, d_out, bias=False), activation()]
    return nn.Sequential(*layers[:-1])


# Weight decay and the factor of the initialization: both, and the start that nothing forgets.
DECAYED, DECAYED_LARGE, UNDECAYED_LARGE = (0.01, 1.0), (0.01, 4.0), (0.0, 4.0)
SETTINGS = {2: (DECAYED, DECAYED_LARGE, UNDECAYED_LARGE), 3: (DECAYED,), 4: (DECAYED,)}
STARTS = {2: 3, 3: 1, 4: 1}


def trained(depth: int) -> dict[tuple[float, float], list[list[nn.Sequential]]]:
    """For each setting and random start the networks of both tasks, all trained at once as batched matrix products."""
    runs = [(setting, number) for setting in SETTINGS[depth] for _ in range(STARTS[depth]) for number in range(2)]
    nets = []
    for seed, ((_, initialization), _) in enumerate(runs):
        torch.manual_seed(seed)
        nets.append(network(depth))
        for parameter in nets[-1].parameters():
            parameter.data *= initialization
    weights = [
        torch.stack(layers).detach().requires_grad_() for layers in zip(*(n.parameters() for n in nets), strict=True)
    ]
    decays = torch.tensor([decay for (decay, _), _ in runs])[:, None, None]
    data = [task(number, "train") for number in range(2)]
    sizes = torch.tensor([len(data[number][1]) for _, number in runs])
    starts = torch.tensor([number * len(data[0][1]) for _, number in runs])
    inputs, classes = (torch.cat(halves) for halves in zip(*data, strict=True))
    draws = torch.rand(STEPS, len(runs), 16, generator=torch.Generator().manual_seed(0))
    for draw in (draws * sizes[:, None]).long() + starts[:, None]:
        hidden, labels = inputs[draw], classes[draw]
        for weight in weights[:-1]:
            hidden = torch.bmm(hidden, weight.mT).relu()
        logits = torch.bmm(hidden, weights[-1].mT)
        # A mean over all examples, times the number of networks: each gets the gradient of its own mean loss.
        loss = len(runs) * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(LEARNING_RATE * (gradient + decays * weight))
    for index, net in enumerate(nets):
        for parameter, weight in zip(net.parameters(), weights, strict=True):
            parameter.data = weight[index].detach().clone()
    pairs = [nets[place : place + 2] for place in range(0, len(nets), 2)]
    count = STARTS[depth]
    return {setting: pairs[place * count :][:count] for place, setting in enumerate(SETTINGS[depth])}


@pytest.fixture(scope="module")
def networks() -> dict[int, dict[tuple[float, float], list[list[nn.Sequential]]]]:
    return {depth: trained(depth) for depth in SETTINGS}


@pytest.fixture
def merged(networks: Any, saved: Any, task_files: Any, *, tmp_path: Path) -> Any:
    held_out = [zip(task(number, "validation"), task(number, "test"), strict=True) for number in range(2)]
    data = task_files([tuple(torch.cat(halves) for halves in splits) for splits in held_out])

    def merge_pairs(mode: Any, depth: int, setting: tuple[float, float]) -> list[Merging]:
        return [
            merge(
                saved(pair),
                output=tmp_path / f"merged-{number}.safetensors",
                mode=mode,
                data=data,
                factory=lambda: network(depth),
                overwrite=True,
            )
            for number, pair in enumerate(networks[depth][setting])
        ]

    return merge_pairs


def mean_drops(mergings: list[Merging]) -> list[float]:
    """Each task's loss of accuracy, and that all networks were good alone and their inputs orthogonal."""
    for merging in mergings:
        assert merging.inputs is not None
        assert merging.inputs.largest == 0
        assert all(each.alone > 0.95 for each in merging.tasks)
    return [sum(merging.tasks[number].drop for merging in mergings) / len(mergings) for number in range(2)]


@pytest.mark.parametrize("setting", [DECAYED, DECAYED_LARGE], ids=str)
def test_shallow_networks_with_weight_decay_can_be_added(setting: tuple[float, float], merged: Any) -> None:
    mergings = merged("sum", 2, setting)
    assert max(mean_drops(mergings)) <= ONE_POINT
    assert not any("no guarantee" in warning for merging in mergings for warning in merging.warnings)


def test_without_weight_decay_a_large_initialization_is_in_the_way(merged: Any) -> None:
    """The inputs are as orthogonal as before; what interferes is the random start that was never forgotten."""
    mergings = merged("sum", 2, UNDECAYED_LARGE)
    assert max(mean_drops(mergings)) > 5 * ONE_POINT
    kept = merged("sum", 2, DECAYED_LARGE)
    for forgetful, other in zip(mergings, kept, strict=True):
        # At the first layer orthogonal inputs meet nothing but the other's random start.
        assert min(forgetful.layers[0].interference) > 5 * max(other.layers[0].interference)
        assert any("interfere" in warning for warning in forgetful.warnings)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_side_by_side_every_depth_keeps_both_tasks(depth: int, merged: Any) -> None:
    assert max(mean_drops(merged("concat", depth, DECAYED))) <= ONE_POINT


@pytest.mark.parametrize("depth", [3, 4])
def test_the_sum_of_deep_relu_networks_warns_and_says_which_layer_interferes(depth: int, merged: Any) -> None:
    (merging,) = merged("sum", depth, DECAYED)
    assert any("no guarantee for the sum of deep ReLU" in warning for warning in merging.warnings)
    first, *hidden = merging.layers
    # Orthogonal inputs keep the first layers apart, and nothing keeps apart what comes out of a ReLU.
    assert 10 * max(first.interference) < max(max(layer.interference) for layer in hidden)


def test_deep_linear_networks_with_weight_decay_can_be_added(saved: Any, task_files: Any, tmp_path: Path) -> None:
    """Three layers without activations: low rank keeps the hidden layers apart, and no ReLU undoes it."""
    pair = []
    for number in range(2):
        torch.manual_seed(number)
        net = network(3, nn.Identity)
        optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, weight_decay=0.015)
        inputs, labels = task(number, "train")
        for _ in range(1000):
            optimizer.zero_grad()
            drawn = torch.randint(len(labels), (32,))
            nn.functional.cross_entropy(net(inputs[drawn]), labels[drawn]).backward()
            optimizer.step()
        pair.append(net)
    held_out = [zip(task(number, "validation"), task(number, "test"), strict=True) for number in range(2)]
    merging = merge(
        saved(pair),
        output=tmp_path / "merged.safetensors",
        mode="sum",
        data=task_files([tuple(torch.cat(halves) for halves in splits) for splits in held_out]),
        factory=lambda: network(3, nn.Identity),
    )
    assert all(each.alone > 0.9 and each.drop <= ONE_POINT for each in merging.tasks)
    assert not any("no guarantee" in warning for warning in merging.warnings)
    # Logits of five classes need four directions, and weight decay leaves no more.
    for net in pair:
        assert all(torch.linalg.matrix_rank(weight.detach(), rtol=0.1) <= 4 for weight in net.parameters())
