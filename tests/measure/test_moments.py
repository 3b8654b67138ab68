"""Moments against brute force: every position's input and gradient by hand, and the loss they predict."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration.criterion import sampled_loss
from compressor.errors import BadInput
from compressor.measure.moments import Centered, MomentPass, collect_moments, gram, oas_shrinkage

CONVOLUTIONS = [
    nn.Conv1d(3, 4, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False),
    nn.Conv3d(3, 4, 2, padding=1, padding_mode="replicate"),
]


def sampled(logits: Callable[[], Tensor], masks: Sequence[Tensor] = (), seed: int = 0) -> MomentPass:
    """A pass whose gradients are those of the loss on targets drawn from the model itself."""
    generator = torch.Generator().manual_seed(seed)
    return MomentPass(lambda: sampled_loss(logits(), masks, "likelihood", generator=generator).backward(), masks)


def gathered(layer: nn.Module, model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """E[x x^T] and E[g g^T] of one layer by an autograd of its own."""
    moments = collect_moments({"layer": layer}, [sampled(lambda x=x: model(x)) for x in batches])["layer"]
    assert moments is not None
    return {"inputs": moments.inputs, "gradients": moments.gradients}


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_convolution_is_its_matrix_times_the_patches_of_the_moment(
    convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d,
) -> None:
    torch.manual_seed(0)
    spatial = len(convolution.kernel_size)
    x = torch.randn(2, 3, *(6,) * spatial)
    model = nn.Sequential(convolution, nn.Flatten(), nn.LazyLinear(5))
    model(x)
    moment = gathered(convolution, model, [x])["inputs"]
    matrix = convolution.weight.detach().double().flatten(1)
    outputs = convolution(x)
    if convolution.bias is not None:
        outputs = outputs - convolution.bias.view(-1, *(1,) * spatial)
    outputs = outputs.detach().double().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(matrix @ moment @ matrix.T, outputs.T @ outputs / len(outputs), rtol=1e-4, atol=1e-5)


def test_the_moments_of_groups_are_blocks_of_those_of_the_block_diagonal_convolution() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(6, 9, (3, 2), stride=(1, 2), padding=1, groups=3, padding_mode="circular")
    whole = nn.Conv2d(6, 9, (3, 2), stride=(1, 2), padding=1, padding_mode="circular")
    whole.bias = grouped.bias
    whole.weight.data = torch.zeros(9, 6, 3, 2)
    for group in range(3):
        rows, channels = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        whole.weight.data[rows, channels] = grouped.weight.data[rows]
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(4, 6, 6, 5) + 2
    head(grouped(x))
    found, expected = (
        collect_moments({"layer": layer}, [sampled(lambda layer=layer: head(layer(x)))])["layer"]
        for layer in (grouped, whole)
    )
    assert found is not None
    assert expected is not None
    assert (found.positions, found.input_positions) == (expected.positions, expected.input_positions)
    torch.testing.assert_close(found.mean.flatten(), expected.mean, rtol=1e-6, atol=1e-6)
    for mine, other, side in ((found.inputs, expected.inputs, 12), (found.gradients, expected.gradients, 3)):
        blocks = [other[place : place + side, place : place + side] for place in range(0, 3 * side, side)]
        torch.testing.assert_close(mine, torch.stack(blocks), rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def test_convolutions_with_and_without_groups_do_not_share_the_moment_of_their_input() -> None:
    torch.manual_seed(0)
    layers = {
        "whole": nn.Conv1d(4, 4, 3),
        "groups": nn.Conv1d(4, 4, 3, groups=2),
        "alike": nn.Conv1d(4, 6, 3, groups=2),
    }
    x = torch.randn(2, 4, 9)
    found = collect_moments(layers, [sampled(lambda: torch.cat([layer(x) for layer in layers.values()], 1).mean(2))])
    assert [tuple(each.inputs.shape) for each in found.values() if each] == [(12, 12), (2, 6, 6), (2, 6, 6)]
    assert found["groups"].inputs is found["alike"].inputs


def test_the_gradients_moment_is_the_fisher_of_a_softmax() -> None:
    # For logits z = W x the gradient of the sampled loss is p - onehot(y), whose second moment is diag(p) - p p^T.
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    x = torch.randn(1, 4)
    many = [x.repeat(20_000, 1)]
    measured = gathered(layer, nn.Sequential(layer), many)["gradients"]
    p = layer(x).softmax(-1).detach().double().squeeze(0)
    torch.testing.assert_close(measured, torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.02)


def test_the_predicted_loss_is_the_divergence_of_a_small_change() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(4000, 6)
    moments = collect_moments({"layer": layer}, [sampled(lambda: model(x))])["layer"]
    assert moments is not None
    ratios = []
    for seed in range(10):
        torch.manual_seed(seed)
        change = 0.02 * torch.randn(8, 6)
        predicted = 0.5 * float((moments.gradients @ change.double() @ moments.inputs * change.double()).sum())
        with torch.no_grad():
            before = model(x).double().log_softmax(-1)
            layer.weight += change
            after = model(x).double().log_softmax(-1)
            layer.weight -= change
        measured = float(nn.functional.kl_div(after, before, log_target=True, reduction="batchmean"))
        ratios.append(predicted / measured)
    # Inputs and gradients are taken as independent, which they are not quite: right on average, not in every direction.
    assert 0.8 < sum(ratios) / len(ratios) < 1.25
    assert all(0.5 < ratio < 2 for ratio in ratios)


def test_positions_count_what_the_layer_is_applied_to() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.token(x).mean(1))

    model = Pooled()
    layers = {"token": model.token, "head": model.head}
    found = collect_moments(layers, [sampled(lambda: model(torch.randn(6, 7, 4)))])
    assert found["token"] is not None
    assert found["head"] is not None
    assert (found["token"].positions, found["head"].positions) == (42, 6)


def test_padding_is_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    found = collect_moments({"layer": model}, [sampled(lambda: model(x), (mask,))])["layer"]
    assert found is not None
    assert found.positions == 7
    kept = x[mask.bool()].double()
    torch.testing.assert_close(found.inputs, kept.T @ kept / 7, rtol=1e-6, atol=1e-6)


def test_layers_with_one_input_share_its_moment_and_others_do_not() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.q(x) * self.k(x))

    model = Attention()
    passes = [sampled(lambda: model(torch.randn(6, 4))) for _ in range(3)]
    found = collect_moments({"q": model.q, "k": model.k, "out": model.out}, passes)
    assert all(found.values())
    assert torch.equal(found["q"].inputs, found["k"].inputs)  # type: ignore[union-attr]
    assert not torch.equal(found["q"].inputs, found["out"].inputs)  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_moments_and_another_seed_does_not() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(50, 4)
    first, again, other = (
        collect_moments({"layer": model}, [sampled(lambda: model(x), seed=seed)])["layer"] for seed in (1, 1, 2)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.gradients, again.gradients)
    assert not torch.equal(first.gradients, other.gradients)


def test_a_layer_that_nothing_reaches_has_no_moments() -> None:
    used, unused = nn.Linear(4, 3), nn.Linear(4, 3)
    found = collect_moments({"used": used, "unused": unused}, [sampled(lambda: used(torch.randn(2, 4)))])
    assert found["used"] is not None
    assert found["unused"] is None


def test_bad_calibration_is_named() -> None:
    layer = nn.Linear(4, 3)
    deep = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(BadInput, match="not finite"):
        collect_moments({"1": layer}, [sampled(lambda: deep(torch.full((2, 4), torch.inf)))])


@pytest.mark.parametrize(("samples", "rank"), list(itertools.product((1, 5, 1000), (0, 1, 3, 8))))
def test_shrinkage_makes_any_moment_positive_definite_and_keeps_its_trace(samples: int, rank: int) -> None:
    torch.manual_seed(0)
    factor = torch.randn(8, rank, dtype=torch.float64)
    moment = factor @ factor.T
    estimate = oas_shrinkage(moment, samples)
    assert float(torch.linalg.eigvalsh(estimate)[0]) > 0
    torch.linalg.cholesky(estimate)
    expected = float(moment.trace()) if rank else 8.0
    assert float(estimate.trace()) == pytest.approx(expected)


def test_shrinkage_is_nearer_to_the_truth_than_the_sample_and_vanishes_with_the_samples() -> None:
    torch.manual_seed(0)
    size = 30
    scales = torch.logspace(0, -2, size, dtype=torch.float64)
    truth = torch.diag(scales)

    def errors(samples: int) -> tuple[float, float]:
        data = torch.randn(samples, size, dtype=torch.float64) * scales.sqrt()
        sample = data.T @ data / samples
        return float((oas_shrinkage(sample, samples) - truth).norm()), float((sample - truth).norm())

    for samples in (10, 30, 60):
        pairs = [errors(samples) for _ in range(20)]
        assert sum(shrunken for shrunken, _ in pairs) < sum(plain for _, plain in pairs)
    data = torch.randn(100_000, size, dtype=torch.float64) * scales.sqrt()
    sample = data.T @ data / len(data)
    assert float((oas_shrinkage(sample, len(data)) - sample).norm() / sample.norm()) < 1e-3


class TwoPaths(nn.Module):
    """One layer used on three tensors, one of them changed in place in between."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.relu(x)
        return self.b(x) + self.b(input=10 * self.relu(y))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_used_several_times_has_the_moment_of_all_that_it_saw(inplace: bool) -> None:
    torch.manual_seed(0)
    model = TwoPaths(inplace=inplace).requires_grad_(False)
    x = torch.randn(50, 4)
    seen = torch.cat([x.relu(), 10 * model.a(x).relu()]).detach().double()
    passes = [sampled(lambda: model(x.clone()))]
    found = collect_moments({"a": model.a, "b": model.b}, passes)
    assert found["a"] is not None
    assert found["b"] is not None
    torch.testing.assert_close(found["b"].inputs, seen.T @ seen / 100, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["a"].inputs, x.double().T @ x.double() / 50, rtol=1e-5, atol=1e-5)
    assert found["b"].positions == 2 * found["a"].positions


def test_activations_in_place_after_the_first_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    same = nn.Sequential(model[0], nn.ReLU(), model[2])
    x = torch.randn(20, 4)
    one, other = (
        collect_moments({"0": each[0], "2": each[2]}, [sampled(lambda each=each: each(x))])  # type: ignore[misc]
        for each in (model, same)
    )
    for name in ("0", "2"):
        assert one[name] is not None
        assert torch.equal(one[name].inputs, other[name].inputs)  # type: ignore[union-attr]
        assert torch.equal(one[name].gradients, other[name].gradients)  # type: ignore[union-attr]


def test_padding_counts_neither_as_input_nor_as_prediction() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=30,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 30, (2, 8))
    padded = torch.cat([ids, torch.zeros(2, 24, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, 8), torch.zeros(2, 24)], 1).long()
    layers = {"q": model.model.layers[0].self_attn.q_proj, "down": model.model.layers[0].mlp.down_proj}
    short = collect_moments(layers, [sampled(lambda: model(input_ids=ids).logits)])
    long = collect_moments(layers, [sampled(lambda: model(input_ids=padded, attention_mask=mask).logits, (mask,))])
    for name in layers:
        assert short[name] is not None
        assert long[name] is not None
        assert short[name].positions == long[name].positions == 16  # type: ignore[union-attr]
        torch.testing.assert_close(short[name].inputs, long[name].inputs, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
        torch.testing.assert_close(short[name].gradients, long[name].gradients, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 5, 191, 192, 193, 400, 2000])
def test_the_gram_matrix_is_the_product(size: int) -> None:
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-12, atol=1e-12)


def test_moments_of_inputs_with_a_large_mean_keep_what_varies() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (100 + torch.randn(512, 300, generator=generator) for _ in range(2))
    wide = x.double(), y.double()
    a, b = Centered.of(x), Centered.of(y)
    for found, exact in (
        (a.second_moment(), wide[0].T @ wide[0]),
        (a.product(b), wide[0].T @ wide[1]),
        (b.second_moment(), wide[1].T @ wide[1]),
    ):
        assert (found - exact).abs().max() / 512 < 1e-4  # of the variance, which is one; the moment itself is 10,000
    torch.testing.assert_close(a.sum, wide[0].sum(0))


def test_products_in_bfloat16_are_far_more_exact_than_their_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    seen: list[torch.dtype] = []

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((a.dtype, b.dtype))
        return a.float() @ b.float()  # products of bfloat16 are exact in float32

    means = torch.tensor([0.0, 1.0, 100.0]).repeat(20)
    x, y = ((means + torch.randn(2000, 60, generator=generator)).bfloat16() for _ in range(2))
    a, b = (Centered.of(each, multiply=multiply) for each in (x, y))
    wide = x.double(), y.double()
    for found, exact in (
        (a.second_moment(), wide[0].T @ wide[0]),
        (a.product(b), wide[0].T @ wide[1]),
    ):
        assert (found - exact).abs().max() / len(x) < 1e-5  # of the variance, which is one
    assert set(seen) == {torch.bfloat16}
    assert Centered.of(x.float(), multiply=multiply).multiply is None


def test_vectors_in_bfloat16_have_the_moments_of_the_same_numbers_in_float32() -> None:
    x = (3 + torch.randn(50, 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    narrow, wide = Centered.of(x), Centered.of(x.float())
    assert torch.equal(narrow.second_moment(), wide.second_moment())
    assert torch.equal(narrow.product(wide), wide.product(narrow))
    assert torch.equal(narrow.sum, wide.sum)
