"""What a user hung on a layer goes on working when it becomes low-rank, or the layer stays dense and says why."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import Compression, compress
from compressor.lowrank import low_rank_layer
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan


class Network(nn.Module):
    """One layer of every kind that becomes a pair, each called by a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.head.weight = self.words.weight
        self.plain, self.pivoted = nn.Linear(8, 8), nn.Linear(8, 8)
        self.channel, self.spatial = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.back = nn.ConvTranspose2d(2, 2, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.pivoted(torch.tanh(self.plain(input=self.words(tokens))))
        image = self.back(self.spatial(self.channel(hidden.reshape(-1, 2, 4, 4))))
        return self.head(image.reshape(hidden.shape))


FORMS: dict[str, str] = {
    "words": "plain",
    "plain": "plain",
    "pivoted": "pivoted",
    "channel": "channel",
    "spatial": "spatial",
    "back": "channel",
}
RANKS = {"words": 8, "plain": 8, "pivoted": 7, "channel": 4, "spatial": 6, "back": 2}
TOKENS = torch.arange(12).reshape(3, 4)


def without_loss(model: nn.Module, forms: dict[str, str] = FORMS) -> Compression:
    layers = (LayerPlan(name, (0, 0), "", RANKS[name], form, 0, 0.0, "") for name, form in forms.items())
    report = compress(model, embeddings=True, plan=Plan("", None, Budget("plan"), tuple(layers)))
    assert report.model is not None
    assert all(hasattr(report.model.get_submodule(name), "down") for name in forms)
    return report


def exactly(model: nn.Module) -> nn.Module:
    """The model compressed without any loss."""
    small = without_loss(model).model
    assert small is not None
    return small


def network() -> Network:
    """The pivoted layer is of rank seven, the others have their full rank."""
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():
        model.pivoted.weight[0] = model.pivoted.weight[1:].sum(0)
    return model


@pytest.mark.parametrize("name", [*FORMS, "head"])
def test_hooks_of_every_kind_run_in_their_order_with_their_flags(name: str) -> None:
    model = network()
    layer = model.get_submodule(name)
    calls: list[str] = []

    def pre(_: nn.Module, args: Any, kwargs: Any) -> Any:
        calls.append("pre with kwargs")
        if name == "words":
            return args, kwargs
        return tuple(0.5 * each for each in args), {key: 0.5 * each for key, each in kwargs.items()}

    def after(label: str, factor: float, shift: float) -> Any:
        def hook(_: nn.Module, *seen: Any) -> Tensor:
            calls.append(label)
            return seen[-1] * factor + shift

        return hook

    layer.register_forward_pre_hook(pre, with_kwargs=True)
    layer.register_forward_hook(after("second", 2.0, 0.0))
    layer.register_forward_hook(after("first", 1.0, 3.0), prepend=True, with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    if name != "words":
        layer.register_full_backward_hook(lambda *_: calls.append("backward"))
        layer.register_full_backward_pre_hook(
            lambda _, grads: tuple(calls.append("backward pre") or 2 * g for g in grads)
        )

    def run(of: nn.Module) -> tuple[Tensor, list[Tensor], list[str]]:
        calls.clear()
        of.zero_grad()
        outputs = of(TOKENS)
        outputs.square().sum().backward()
        return outputs.detach(), [p.grad for n, p in of.named_parameters() if n.endswith("bias")], list(calls)

    expected, found = run(model), run(exactly(model))
    assert expected[2] == found[2]
    assert expected[2][:3] == ["pre with kwargs", "first", "second"]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sorted(found[1], key=len), sorted(expected[1], key=len), rtol=1e-3, atol=1e-3)
    assert not any(hasattr(each, "down") for each in model.modules())


def test_a_hook_that_always_runs_runs_when_the_layer_fails() -> None:
    model = network()
    calls: list[int] = []
    model.plain.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    with pytest.raises(RuntimeError):
        exactly(model).plain(torch.rand(3, 5))
    assert calls


class Gain(nn.Module):
    """What another layer's hook is bound to."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def hook(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.gain


def test_a_hook_that_is_bound_to_a_module_is_bound_to_its_copy() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Gain())
    model[0].weight.data = torch.rand(8, 1) @ torch.rand(1, 8)
    model[1].forward = MethodType(lambda self, x: x, model[1])  # bound too, and above no layer
    model[0].register_forward_hook(model[1].hook)
    small: Any = compress(model, tolerance=1e-6, prefer="size").model
    assert hasattr(small[0], "down")
    small[1].gain.data.fill_(5.0)
    x = torch.rand(2, 8)
    torch.testing.assert_close(small(x) * 3, model(x) * 5, rtol=1e-4, atol=1e-5)


def test_attributes_that_hooks_read_are_there() -> None:
    model = network()
    model.plain.factor = 3.0
    model.plain.register_forward_hook(lambda layer, _, output: output * layer.factor)
    torch.testing.assert_close(exactly(model)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_hooks_of_a_state_dict_run() -> None:
    model = network()
    model.plain.register_state_dict_post_hook(
        lambda layer, state, prefix, _: state.update({f"{prefix}note": torch.ones(1)})
    )
    taken: list[Any] = []
    model.plain.register_load_state_dict_pre_hook(
        lambda layer, state, prefix, *_: taken.append((type(layer).__name__, state.pop(f"{prefix}note")))
    )
    small = exactly(model)
    small.load_state_dict(small.state_dict(), strict=True)
    assert taken == [("LowRankLinear", torch.ones(1))]


def test_a_factory_that_hangs_hooks_on_its_layers_gets_them_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        model[0].register_forward_hook(lambda _, inputs, output: 3 * output)
        return model

    model, x = build(), torch.rand(4, 16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = compress(tmp_path / "model.safetensors", keep=0.9, factory=build)
    in_memory = compress(model, keep=0.9, prefer="size").model
    assert in_memory is not None
    torch.testing.assert_close(load_model(str(report.output), build)(x), in_memory(x))


def test_a_pair_beside_a_layer_is_inside_its_hooks() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 16)), torch.rand(4, 16)
    base[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].square(),))
    base[0].register_forward_hook(lambda _, inputs, output: output.square())
    tuned = copy.deepcopy(base)
    tuned[0].weight.data += torch.rand(16, 1) @ torch.rand(1, 16)
    adapted = compress(tuned, base=base, keep=0.3).model
    assert adapted is not None
    torch.testing.assert_close(adapted(x), tuned(x), rtol=1e-4, atol=1e-4)


def test_calibration_sees_what_hooks_do() -> None:
    def changed(model: nn.Module) -> nn.Module:
        model[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * torch.tensor([1.0] * 4 + [0.0] * 12),))
        model[0].register_forward_hook(lambda _, inputs, output: output.square())
        return model

    torch.manual_seed(0)
    model = changed(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    batches = [torch.randn(16, 16) for _ in range(8)]
    layers = (LayerPlan("0", (0, 0), "", 4, "plain", 0, 0.0, ""),)
    small = compress(model, calibration=batches, plan=Plan("", None, Budget("plan"), layers)).model
    assert small is not None
    x = torch.randn(8, 16)
    # Only four of the inputs reach the layer, so that rank four computes all that it does.
    torch.testing.assert_close(small(x), model(x), rtol=1e-2, atol=1e-2)


def replaced(layer: nn.Module) -> None:
    own = layer.forward
    layer.forward = lambda *inputs, **named: own(*inputs, **named) * 2  # type: ignore[method-assign]


def with_buffer(layer: nn.Module) -> None:
    layer.register_buffer("scale", torch.tensor(2.0))
    layer.register_forward_hook(lambda each, _, output: output * each.scale)


def with_parameter(layer: nn.Module) -> None:
    layer.register_parameter("gain", nn.Parameter(torch.tensor(2.0)))
    layer.register_forward_hook(lambda each, _, output: output * each.gain)


def with_module(layer: nn.Module) -> None:
    layer.add_module("extra", nn.ReLU())
    layer.register_forward_hook(lambda each, _, output: each.extra(output))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced, "its forward was replaced"),
        (with_buffer, "it has scale besides its weight"),
        (with_parameter, "it has gain besides its weight"),
        (with_module, "it has extra besides its weight"),
    ],
)
@pytest.mark.parametrize("name", ["plain", "spatial", "back", "words", "head"])
def test_a_layer_that_does_more_stays_dense_and_says_why(name: str, change: Any, reason: str) -> None:
    model = network()
    change(model.get_submodule(name))
    own = "words" if name == "head" else name
    reason = f"head, tied to it: {reason}" if name == "head" else reason
    report = without_loss(model, {layer: form for layer, form in FORMS.items() if layer != own})
    assert report.model is not None
    assert {layer.name: layer.skip for layer in report.skipped}[own] == reason
    assert type(report.model.get_submodule(name)) is type(model.get_submodule(name))
    torch.testing.assert_close(report.model(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-3)


class ByItsWeight:
    def __call__(self, layer: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output * layer.weight.norm()


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer, _, output: output * layer.weight.norm(),
        lambda layer, _, output: output * sum(getattr(each, "weight").norm() for each in [layer]),  # noqa: B009
        partial(lambda scale, layer, _, output: output * scale * layer.weight.norm(), 2),
        ByItsWeight(),
    ],
    ids=["directly", "inside", "partial", "called"],
)
def test_a_layer_whose_hook_reads_its_weight_stays_dense(hook: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.rand(3, 32)
    model[0].register_forward_hook(hook)
    model[1].register_forward_hook(lambda layer, _, output: output * layer.in_features)
    report = compress(model, keep=0.5, prefer="size")
    assert {layer.name: layer.skip for layer in report.skipped} == {"0": "a hook reads its weight"}
    assert report.model is not None
    torch.testing.assert_close(report.model[0](x), model[0](x))  # type: ignore[index]


@pytest.mark.parametrize("bound", [True, False])
def test_layers_inside_a_replaced_forward_stay_dense_unless_it_is_bound(bound: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16)), torch.rand(3, 16)
    inner = model[0]
    own = inner.forward
    inner.forward = partial(lambda self, x: self[0](x) * 2, inner) if bound else lambda x: own(x) * 2
    report = compress(model, keep=0.5, prefer="size")
    skipped = {layer.name: layer.skip for layer in report.skipped}
    assert skipped == ({} if bound else {"0.0": "the forward of 0 was replaced"})
    small: Any = report.model
    expected = small[1](small[0][0](x) * 2)
    torch.testing.assert_close(small(x), expected)


class Unregistered(nn.Module):
    """Calls a layer that PyTorch knows by an attribute that it does not know."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        for layer in (self.layer, self.other):
            layer.weight.data = torch.randn(16, 2) @ torch.randn(2, 16)
        self.held = hold(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        held = self.held["layer"] if isinstance(self.held, dict) else self.held
        return self.other(held[0](x) if isinstance(held, list) else held(x))


@pytest.mark.parametrize(
    "hold",
    [lambda layer: [layer], lambda layer: {"layer": layer}, lambda layer: layer.forward],
    ids=["list", "dictionary", "bound method"],
)
def test_a_layer_that_is_called_where_pytorch_does_not_see_it_stays_dense(hold: Any) -> None:
    model, x = Unregistered(hold).eval(), torch.randn(3, 16)
    result = compress(model, tolerance=1e-3, prefer="size")
    assert result.model is not None
    assert [(layer.name, layer.rank) for layer in result.plan.layers] == [("other", 2)]
    assert [layer.skip for layer in result.skipped] == ["held refers to it too, and cannot be updated"]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


class Scaled(nn.Linear):
    """A linear layer with more state, and a forward of its own."""

    def __init__(self, *sides: int) -> None:
        super().__init__(*sides)
        self.register_buffer("scale", torch.tensor(3.0))
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale * self.gain


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("parametrized", [None, "weight", "bias"])
def test_a_subclass_and_a_parametrization_keep_their_state_and_their_hooks(parametrized: str | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(16, 16), nn.Tanh(), nn.Linear(16, 16)), torch.rand(3, 16)
    model[0].weight.data = 0.2 * torch.rand(16, 3) @ torch.rand(3, 16)
    model[0].register_forward_hook(lambda layer, _, output: output + layer.gain)
    if parametrized is not None:
        nn.utils.parametrize.register_parametrization(model[0], parametrized, nn.Hardtanh())
    small: Any = compress(model, tolerance=1e-5, prefer="size").model
    assert isinstance(small[0], Scaled)
    assert small[0].note == "kept"
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-3)


def test_the_dense_layers_hooks_are_left_alone() -> None:
    dense = nn.Linear(8, 8)
    handle = dense.register_forward_hook(lambda _, inputs, output: output * 2)
    small = compress(nn.Sequential(dense), keep=0.5, prefer="size").model
    assert small is not None
    handle.remove()
    x = torch.rand(2, 8)
    torch.testing.assert_close(dense(x), nn.functional.linear(x, dense.weight, dense.bias))
    assert len(small[0]._forward_hooks) == 1
    assert not low_rank_layer(dense, "plain", 2)._forward_hooks
