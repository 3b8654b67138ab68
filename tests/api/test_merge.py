"""Merged networks do what their parts do: exactly side by side, by the sum of weights where it was asked for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, merge, restore
from compressor.model import load_model
from compressor.results import MergeRefused


def chain(*sizes: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    for tensor in (network[1].weight, network[1].bias, network[1].running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(network[1].running_var, 0.5, 2)
    return network.eval()


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


# Side by side


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "sizes", [(6, 3), (6, 8, 3), (6, 8, 7, 3), (6, 8, 8, 7, 3)], ids=lambda sizes: f"{len(sizes) - 1}-layers"
)
@torch.no_grad()
def test_separate_heads_put_out_exactly_what_the_parts_do(
    sizes: tuple[int, ...], count: int, saved: Any, *, tmp_path: Path
) -> None:
    parts = [chain(*sizes, seed=seed) for seed in range(count)]
    out = tmp_path / "merged.safetensors"
    merge(saved(parts), output=out, mode="concat", head="separate", factory=lambda: chain(*sizes))
    x = sample(5, 6)
    torch.testing.assert_close(load_model(out, lambda: chain(*sizes))(x), torch.cat([part(x) for part in parts], 1))


@torch.no_grad()
def test_a_shared_head_adds_the_outputs(saved: Any, tmp_path: Path) -> None:
    parts = [chain(6, 8, 7, 3, seed=seed) for seed in range(3)]
    out = tmp_path / "merged.safetensors"
    merge(saved(parts), output=out, mode="concat", factory=lambda: chain(6, 8, 7, 3))
    x = sample(5, 6)
    torch.testing.assert_close(load_model(out, lambda: chain(6, 8, 7, 3))(x), sum(part(x) for part in parts))


@pytest.mark.parametrize("head", ["shared", "separate"])
@torch.no_grad()
def test_convolutions_and_batch_normalization_stand_side_by_side(head: Any, saved: Any, tmp_path: Path) -> None:
    parts = [convolutional(seed) for seed in range(2)]
    out = tmp_path / "merged.safetensors"
    merge(saved(parts), output=out, mode="concat", head=head, factory=convolutional)
    x = sample(5, 2, 6, 6)
    alone = [part(x) for part in parts]
    expected = sum(alone) if head == "shared" else torch.cat(alone, 1)
    torch.testing.assert_close(load_model(out, convolutional).eval()(x), expected)


@torch.no_grad()
def test_plain_torch_loads_it_into_wider_layers_even_from_parts_of_other_widths(saved: Any, tmp_path: Path) -> None:
    parts = [chain(6, 8, 5, 3, seed=0), chain(6, 4, 9, 2, seed=1)]
    out = tmp_path / "merged.safetensors"
    merging = merge(saved(parts), output=out, mode="concat", head="separate")
    wide = chain(6, 12, 14, 5)
    wide.load_state_dict(load_file(out))
    x = sample(5, 6)
    torch.testing.assert_close(wide(x), torch.cat([part(x) for part in parts], 1))
    assert any("plain chain: 0 -> 2 -> 4" in warning for warning in merging.warnings)


@torch.no_grad()
def test_merged_networks_merge_again(saved: Any, tmp_path: Path) -> None:
    parts = [chain(6, 8, 3, seed=seed) for seed in range(3)]
    a, b, c = saved(parts)
    options: dict[str, Any] = {"mode": "concat", "head": "separate", "factory": lambda: chain(6, 8, 3)}
    merge([a, b], output=tmp_path / "ab.safetensors", **options)
    merge([tmp_path / "ab.safetensors", c], output=tmp_path / "abc.safetensors", **options)
    x = sample(5, 6)
    found = load_model(tmp_path / "abc.safetensors", options["factory"])(x)
    torch.testing.assert_close(found, torch.cat([part(x) for part in parts], 1))


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_merged_networks_are_compressed(calibrated: bool, saved: Any, task_files: Any, *, tmp_path: Path) -> None:
    """Blocks of rank 2 in layers that are wider than the factory builds them: rank 4 is exact, and it is found."""

    def build() -> nn.Sequential:
        return chain(6, 24, 20, 3)

    parts = [build() for _ in range(2)]
    for part in parts:
        part[2].weight.copy_(torch.randn(20, 2) @ torch.randn(2, 24))
    out, small, restored = (tmp_path / f"{name}.safetensors" for name in ("merged", "small", "restored"))
    merge(saved(parts), output=out, mode="concat", head="separate", factory=build)
    data, seen = task_files([(sample(64 + n, 6), torch.arange(64 + n) % 6) for n in range(2)])
    # Of 24 x 6, 40 x 48 and 6 x 40 numbers the middle layer keeps 4 (40 + 48 - 4).
    request: dict[str, Any] = {"keep": 0.4, "calibration": seen} if calibrated else {"tolerance": 1e-4}
    report = compress(out, output=small, factory=build, data=data, **request)
    assert report.plan.layers[1].rank in {4, 5}
    assert report.evaluation is not None
    x = sample(5, 6)
    expected = torch.cat([part(x) for part in parts], 1)
    torch.testing.assert_close(load_model(small, build)(x), expected, atol=1e-4, rtol=1e-4)
    restore(small, output=restored)
    torch.testing.assert_close(load_model(restored, build)(x), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="does not fit"):
        compress(out, output=tmp_path / "no.safetensors", factory=convolutional, keep=0.4)


# Factor pairs


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize(("mode", "head"), [("sum", "shared"), ("concat", "shared"), ("concat", "separate")])
def test_pairs_are_joined_without_going_dense(form: Any, mode: Any, head: Any, *, saved: Any, tmp_path: Path) -> None:
    """Restoring the merged pairs gives what merging the restored parts gives."""
    parts = saved([chain(40, 32, 36, 30, seed=seed) for seed in range(2)])
    small, dense = ([path.with_stem(f"{path.stem}-{what}") for path in parts] for what in ("small", "dense"))
    for part, compressed, restored in zip(parts, small, dense, strict=True):
        compress(part, output=compressed, keep=0.2, form=form)
        restore(compressed, output=restored)
    out, expected, back = (tmp_path / f"{name}.safetensors" for name in ("merged", "expected", "back"))
    merge(small, output=out, mode=mode, head=head)
    merge(dense, output=expected, mode=mode, head=head)
    restore(out, output=back)
    found = load_file(back)
    for name, tensor in load_file(expected).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
    stored, sources = load_file(out), [load_file(path) for path in small]
    for layer in ("0", "2", "4"):
        ranks = [source[f"{layer}.down.weight"].shape[0] for source in sources]
        assert stored[f"{layer}.down.weight"].shape[0] == sum(ranks)
        assert stored[f"{layer}.weight"].shape == (0,)
        own_outputs = mode == "concat" and (layer != "4" or head == "separate")
        assert (f"{layer}.order" in stored) == (form == "pivoted" and own_outputs)


@torch.no_grad()
def test_compressed_networks_merge_to_something_that_runs(saved: Any, tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return chain(40, 32, 36, 30)

    def convolutions() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.Flatten(), nn.Linear(48, 6))

    for factory, x in ((build, sample(4, 40)), (convolutions, sample(4, 8, 6, 6))):
        parts = saved([factory(), factory()])
        small = [part.with_stem(f"{part.stem}-small-{len(x.shape)}") for part in parts]
        for part, path in zip(parts, small, strict=True):
            compress(part, output=path, keep=0.5, factory=factory)
        out = tmp_path / f"merged-{len(x.shape)}.safetensors"
        merge(small, output=out, mode="concat", head="separate", factory=factory)
        alone = [load_model(path, factory)(x) for path in small]
        torch.testing.assert_close(load_model(out, factory)(x), torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


def test_a_pair_beside_a_dense_layer_is_multiplied_out(saved: Any, tmp_path: Path) -> None:
    a, b = saved([chain(40, 32, 30, seed=seed) for seed in range(2)])
    small, restored = tmp_path / "small.safetensors", tmp_path / "restored.safetensors"
    compress(a, output=small, keep=0.4)
    restore(small, output=restored)
    merge([small, b], output=tmp_path / "out.safetensors", mode="sum")
    found = load_file(tmp_path / "out.safetensors")
    expected = {name: tensor + load_file(b)[name] for name, tensor in load_file(restored).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_of_every_tensor_rounded_once(dtype: torch.dtype, saved: Any, tmp_path: Path) -> None:
    parts = [chain(6, 8, 3, seed=seed).to(dtype) for seed in range(3)]
    merge(saved(parts), output=tmp_path / "sum.safetensors", mode="sum")
    for name, tensor in load_file(tmp_path / "sum.safetensors").items():
        exact = sum(part.state_dict()[name].double() for part in parts)
        assert isinstance(exact, Tensor)
        assert torch.equal(tensor, exact.to(dtype))


def test_with_a_base_what_each_was_fine_tuned_by_is_added_to_it(saved: Any, tmp_path: Path) -> None:
    parts = [convolutional(seed) for seed in range(3)]
    *tuned, base = saved(parts)
    merge(tuned, base=base, output=tmp_path / "sum.safetensors", mode="sum", factory=convolutional)
    first, second, start = (part.state_dict() for part in parts)
    for name, tensor in load_file(tmp_path / "sum.safetensors").items():
        if tensor.is_floating_point():
            changes = (first[name].double() - start[name]) + (second[name].double() - start[name])
            torch.testing.assert_close(tensor, (start[name] + changes).float())
    merge([base, base], base=base, output=tmp_path / "same.safetensors", mode="sum")
    for name, tensor in load_file(tmp_path / "same.safetensors").items():
        torch.testing.assert_close(tensor, start[name])


def test_names_that_are_tied_in_all_parts_are_stored_once(tmp_path: Path) -> None:
    for name in "AB":
        weight = torch.randn(4, 4)
        torch.save({"a.weight": weight, "b.weight": weight}, tmp_path / f"{name}.pt")
    out = tmp_path / "out.safetensors"
    merge([tmp_path / "A.pt", tmp_path / "B.pt"], output=out, mode="sum")
    assert load_file(out).keys() == {"a.weight"}
    torch.save({"a.weight": torch.ones(4, 4), "b.weight": torch.zeros(4, 4)}, tmp_path / "B.pt")
    merge([tmp_path / "A.pt", tmp_path / "B.pt"], output=out, mode="sum", overwrite=True)
    assert load_file(out).keys() == {"a.weight", "b.weight"}


# What is said of it


def test_the_file_says_what_it_was_made_from_and_is_the_same_each_time(saved: Any, tmp_path: Path) -> None:
    paths = saved([chain(6, 8, 3, seed=seed) for seed in range(2)])
    outs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for out in outs:
        merging = merge(paths, output=out, mode="concat", head="separate")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    header = json.loads(outs[0].read_bytes()[8 : 8 + int.from_bytes(outs[0].read_bytes()[:8], "little")])
    record = json.loads(header["__metadata__"]["merge"])
    assert (record["mode"], record["head"]) == ("concat", "separate")
    assert [part["source"] for part in record["parts"]] == ["A.safetensors", "B.safetensors"]
    assert merging.parameters == sum(tensor.numel() for tensor in load_file(outs[0]).values())
    assert merging.bytes == outs[1].stat().st_size
    json.dumps(merging.to_dict())


@pytest.mark.parametrize(
    ("sizes", "recipes", "said"),
    [
        ((6, 8, 8, 3), ("0.01", "0.01"), "no guarantee for the sum of deep"),
        ((6, 8, 3), ("0", "0"), "had no weight decay"),
        ((6, 8, 3), (None, None), "nothing says"),
        ((6, 8, 3), ("0.0001", "0.01"), "of the random start of"),
    ],
)
def test_a_sum_without_a_guarantee_warns(sizes: Any, recipes: Any, said: str, *, tmp_path: Path) -> None:
    paths = []
    for number, decay in enumerate(recipes):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(folder / "net.safetensors")
        save_file(chain(*sizes, bias=False, seed=number).state_dict(), paths[-1])
        if decay is not None:
            recipe = f"optimizer: sgd\nlearning_rate: 0.1\nsteps: 10000\nmomentum: 0\nweight_decay: {decay}\n"
            (folder / "recipe.yaml").write_text(recipe + "schedule: constant\n")
    merging = merge(paths, output=tmp_path / "out.safetensors", mode="sum", factory=lambda: chain(*sizes, bias=False))
    assert any(said in warning for warning in merging.warnings)


def test_fine_tunes_of_one_model_are_recognized(saved: Any, tmp_path: Path) -> None:
    tuned = []
    for seed in range(2):
        tuned.append(chain(6, 8, 3))
        torch.manual_seed(seed)
        for parameter in tuned[-1].parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    merging = merge(saved(tuned), output=tmp_path / "out.safetensors", mode="sum")
    assert any("`base`" in warning for warning in merging.warnings)
    a, b = saved([chain(6, 8, 3, seed=seed) for seed in range(2)])
    merging = merge([a, b], output=tmp_path / "out.safetensors", mode="sum", overwrite=True)
    assert not any("`base`" in warning for warning in merging.warnings)


# What is refused


def refused(match: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        merge(*arguments, **named)
    assert "\n" not in str(caught.value)
    assert not Path(named["output"]).exists()


def test_requests_that_contradict_themselves_are_refused(saved: Any, tmp_path: Path) -> None:
    paths, out = saved([chain(6, 8, 3, seed=seed) for seed in range(2)]), tmp_path / "out.safetensors"
    refused("one network", paths[:1], output=out, mode="sum")
    refused("one head", paths, output=out, mode="sum", head="separate")
    refused("contradict", paths, output=out, mode="concat", base=paths[0])
    refused("data of 1 task", paths, output=out, mode="sum", data=["builtin:digits"])
    refused("needs to measure", paths, output=out, mode="sum", max_drop=0.1)
    refused("out of range", paths, output=out, mode="sum", max_drop=-1.0, data=["builtin:digits"] * 2)
    refused("architecture", paths, output=out, mode="sum", data=["builtin:digits"] * 2)
    refused("written as safetensors", paths, output=tmp_path / "out.pt", mode="sum")
    refused("does not fit", paths, output=out, mode="sum", factory=lambda: chain(6, 9, 3))


def test_an_output_never_replaces_one_of_the_parts(saved: Any, tmp_path: Path) -> None:
    paths = saved([chain(6, 8, 3, seed=seed) for seed in range(3)])
    before = [path.read_bytes() for path in paths]
    for path in paths:
        with pytest.raises(BadInput):
            merge(paths[:2], base=paths[2], output=path, mode="sum", overwrite=True)
    assert [path.read_bytes() for path in paths] == before


def test_networks_that_do_not_match_are_refused_in_one_line(saved: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    refused("is 8 in .* and 9 in", saved([chain(6, 8, 3), chain(6, 9, 3)]), output=out, mode="sum")
    refused("architectures differ", saved([chain(6, 8, 3), chain(6, 8, 8, 3)]), output=out, mode="sum")
    refused("architectures differ", saved([chain(6, 8, 3), chain(6, 8, 3, bias=False)]), output=out, mode="concat")
    refused("6 and 5 inputs", saved([chain(6, 8, 3), chain(5, 8, 3)]), output=out, mode="concat")
    refused("3 and 4 outputs; give each its own", saved([chain(6, 8, 3), chain(6, 8, 4)]), output=out, mode="concat")
    refused("normalization", saved([convolutional(0), convolutional(1)]), output=out, mode="sum")
    refused("order of its layers|belongs to no", saved([convolutional(0), convolutional(1)]), output=out, mode="concat")
    broken = chain(6, 8, 3)
    broken[0].weight.data[0, 0] = torch.nan
    refused("NaN", saved([broken, chain(6, 8, 3)]), output=out, mode="sum")


def test_shared_normalization_of_inputs_must_be_the_same(saved: Any, tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(6, affine=False), *chain(6, 8, 3))

    parts = [build().eval(), build().eval()]
    merge(saved(parts), output=tmp_path / "out.safetensors", mode="concat", factory=build)
    x = sample(5, 6)
    with torch.no_grad():
        found = load_model(tmp_path / "out.safetensors", build).eval()(x)
        torch.testing.assert_close(found, sum(part(x) for part in parts))
    parts[1][0].running_mean += 1
    refused("differs between", saved(parts), output=tmp_path / "no.safetensors", mode="concat", factory=build)


def test_what_loses_too_much_is_not_written_but_told(saved: Any, task_files: Any, tmp_path: Path) -> None:
    parts = [chain(6, 32, 3, seed=seed) for seed in range(2)]
    x = sample(60, 6)
    with torch.no_grad():
        data = task_files([(x, part(x).argmax(1)) for part in parts])  # each is right on all of its own
    options: dict[str, Any] = {"mode": "sum", "data": data, "factory": lambda: chain(6, 32, 3)}
    out = tmp_path / "out.safetensors"
    with pytest.raises(MergeRefused) as caught:
        merge(saved(parts), output=out, max_drop=0.01, **options)
    merging = caught.value.merging
    assert [task.alone for task in merging.tasks] == [1, 1]
    assert max(task.drop for task in merging.tasks) > 0.01
    assert merging.output is None
    assert list(tmp_path.glob("*out*")) == []
    # Asked for no more than it keeps, the same merge is written.
    allowed = max(task.drop for task in merging.tasks)
    assert merge(saved(parts), output=out, max_drop=allowed, **options).tasks == merging.tasks
    assert out.exists()


def test_interference_and_inputs_are_measured_on_the_data(saved: Any, task_files: Any, tmp_path: Path) -> None:
    parts = [chain(6, 8, 3, bias=False, seed=seed) for seed in range(2)]
    left, right = sample(20, 6), sample(20, 6)
    left[:, 3:], right[:, :3] = 0, 0
    data = task_files([(left, torch.zeros(20, dtype=torch.int64)), (right, torch.zeros(20, dtype=torch.int64))])
    merging = merge(
        saved(parts),
        output=tmp_path / "o.safetensors",
        mode="sum",
        data=data,
        factory=lambda: chain(6, 8, 3, bias=False),
    )
    assert merging.inputs is not None
    assert (merging.inputs.source, merging.inputs.largest) == ("data", 0)
    found = merging.layers[0].interference
    assert found is not None
    first, second = (part[0].weight.detach() for part in parts)
    assert found[0] == pytest.approx(float((left @ second.T).norm() / (left @ first.T).norm()), rel=1e-5)


def test_single_numbers_are_summed_with_a_base_and_shared_without(tmp_path: Path) -> None:
    """A scale or a temperature is no weight of a sum, but what fine-tuning added to it can be added."""
    weights = {name: torch.randn(8, 8) for name in "abc"}
    scales = {"a": 4.0, "b": 4.0, "c": 5.0}
    for name, weight in weights.items():
        save_file({"fc.weight": weight, "logit_scale": torch.tensor(scales[name])}, tmp_path / f"{name}.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    merge([a, b], output=tmp_path / "shared.safetensors", mode="sum")
    merge([a, c], base=b, output=tmp_path / "added.safetensors", mode="sum")
    shared, added = (load_file(tmp_path / f"{name}.safetensors") for name in ("shared", "added"))
    assert shared["logit_scale"] == 4
    torch.testing.assert_close(shared["fc.weight"], weights["a"] + weights["b"])
    assert added["logit_scale"] == 5
    torch.testing.assert_close(added["fc.weight"], weights["a"] + weights["c"] - weights["b"])
    with pytest.raises(BadInput, match="logit_scale differs between"):
        merge([a, c], output=tmp_path / "other.safetensors", mode="sum")
