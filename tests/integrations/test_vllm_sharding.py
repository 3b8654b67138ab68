"""Tensor parallelism of low-rank layers, played through on the CPU without vLLM: the ranks together are the layer."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.integrations.sharding import ShardedPart, fused_product, row_shard, shard_rows, stacked_down
from compressor.integrations.vllm import Gathered, forms_of, part_names, runnable_spec, shards_of
from compressor.lowrank import LayerSpec, LowRankSpec
from compressor.lowrank.tensor_format import factorize
from compressor.network import Layer
from compressor.planning import LayerPlan

HEAD, HIDDEN = 4, 24
generator = torch.Generator().manual_seed(0)


def stored_part(d_out: int, d_in: int, form: str, *, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """What the checkpoint holds of a layer, by role, and the matrix that it stands for, in float64."""
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    if form == "dense":
        return {"weight": weight}, weight
    layer = Layer("X", "X", "X.weight", None, "linear", (d_out, d_in), (d_out, d_in))
    plan = LayerPlan("X", (d_out, d_in), "linear", rank, form, 0, 0.0, "")  # type: ignore[arg-type]
    tensors = factorize(layer, plan, weight, bias=None).tensors
    parts = {"down": tensors["X.down.weight"], "up": tensors["X.up.weight"]}
    matrix = parts["up"] @ parts["down"]
    if form == "pivoted":
        parts["order"] = tensors["X.order"]
        matrix = torch.cat([parts["down"], matrix])[parts["order"].long()]
    return parts, matrix


def gathered(
    forms: Sequence[str], parts: Sequence[Mapping[str, Tensor]], shards: Sequence[str | int | None]
) -> Gathered:
    """The parts as an engine hands them over, the last tensor first."""
    tensors = Gathered(forms)
    for part, shard in reversed(list(zip(parts, shards, strict=True))):
        for role in reversed(part):
            assert not tensors.complete
            tensors.put(role, part[role], shard)
    assert tensors.complete
    return tensors


def output(x: Tensor, parts: Sequence[ShardedPart]) -> list[Tensor]:
    """The output of one rank, a tensor for each part."""
    ranks = [None if part.down is None else part.down.shape[0] for part in parts]
    y = fused_product(x, stacked_down(parts), ups=[part.up for part in parts], ranks=ranks)
    return list(y.split([part.up.shape[0] for part in parts], dim=-1))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("forms", [("plain", "pivoted", "dense"), ("pivoted", "plain", "plain")])
def test_query_key_and_value(forms: tuple[str, ...], tp_size: int) -> None:
    heads, kv_heads = 8, 2
    sizes = [heads * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    parts, matrices = zip(
        *(stored_part(size, HIDDEN, form, rank=rank) for size, form, rank in zip(sizes, forms, (9, 3, 2), strict=True)),
        strict=True,
    )
    x = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
    replicas = max(1, tp_size // kv_heads)
    # What an engine says that each rank has of every output.
    own = [heads // tp_size * HEAD, *[max(1, kv_heads // tp_size) * HEAD] * 2]
    outputs = []
    for rank in range(tp_size):
        tensors = gathered(forms, parts, ["q", "k", "v"])
        shards = shards_of(tensors, own, tp_rank=rank, tp_size=tp_size, row_parallel=False, kv_replicas=replicas)
        assert [part.up.shape[0] for part in shards] == own
        outputs.append(output(x, shards))
    for index, matrix in enumerate(matrices):
        step = replicas if index else 1
        whole = torch.cat([outputs[rank][index] for rank in range(0, tp_size, step)], dim=-1)
        torch.testing.assert_close(whole, x @ matrix.T, rtol=0, atol=1e-12)
        if index and replicas > 1:  # ranks that share a head compute the same
            assert torch.equal(outputs[0][index], outputs[1][index])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("forms", [("plain", "pivoted"), ("dense", "plain")])
def test_gate_and_up(forms: tuple[str, ...], tp_size: int) -> None:
    parts, matrices = zip(
        *(stored_part(32, HIDDEN, form, rank=rank) for form, rank in zip(forms, (6, 4), strict=True)), strict=True
    )
    x = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64)
    outputs = []
    for rank in range(tp_size):
        shards = shards_of(
            gathered(forms, parts, [0, 1]), [32 // tp_size] * 2, tp_rank=rank, tp_size=tp_size, row_parallel=False
        )
        outputs.append(output(x, shards))
    for index, matrix in enumerate(matrices):
        whole = torch.cat([each[index] for each in outputs], dim=-1)
        torch.testing.assert_close(whole, x @ matrix.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_a_pair_of_the_whole_fused_layer(form: str, tp_size: int) -> None:
    """Phi-3 has query, key and value in one matrix on disk: each rank takes its rows of each of them."""
    sizes = [16, 8, 8]
    part, matrix = stored_part(sum(sizes), HIDDEN, form, rank=7)
    x = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64)
    outputs = []
    for rank in range(tp_size):
        own = [size // tp_size for size in sizes]
        [shard] = shards_of(gathered([form], [part], [None]), own, tp_rank=rank, tp_size=tp_size, row_parallel=False)
        outputs.append(output(x, [shard])[0].split(own, dim=-1))
    whole = torch.cat([each[index] for index in range(3) for each in outputs], dim=-1)
    torch.testing.assert_close(whole, x @ matrix.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("form", ["plain", "pivoted", "dense"])
def test_a_row_parallel_layer_is_the_sum_of_its_ranks(form: str, tp_size: int) -> None:
    part, matrix = stored_part(20, HIDDEN, form, rank=5)
    x = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64)
    total = torch.zeros(3, 20, dtype=torch.float64)
    for rank, mine in enumerate(x.chunk(tp_size, dim=-1)):
        shards = shards_of(gathered([form], [part], [None]), [20], tp_rank=rank, tp_size=tp_size, row_parallel=True)
        total += output(mine, shards)[0]
        assert shards[0].up.shape[0] == 20
        if form != "dense":
            assert shards[0].down is not None
            assert shards[0].down.shape == (5, HIDDEN // tp_size)
    torch.testing.assert_close(total, x @ matrix.T, rtol=0, atol=1e-12)


def test_what_does_not_divide_is_refused() -> None:
    part, _ = stored_part(20, HIDDEN, "plain", rank=5)
    with pytest.raises(ValueError, match="cannot be shared by 5 ranks"):
        row_shard(part, 0, 5)
    with pytest.raises(ValueError, match="rows 16 to 24 of 20"):
        shard_rows(20, 8, 2)
    with pytest.raises(ValueError, match="no order in part"):
        Gathered(["plain"]).put("order", torch.zeros(20), None)


def test_parts_are_found_by_the_names_on_disk() -> None:
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    names = part_names("model.layers.0.self_attn.qkv_proj", packed)
    assert names == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    plain, pivoted = LayerSpec("plain", 8, "linear"), LayerSpec("pivoted", 4, "linear")
    spec = LowRankSpec({names[0]: plain, names[2]: pivoted})
    assert forms_of(names, "model.layers.0.self_attn.qkv_proj", spec) == ["plain", "dense", "pivoted"]
    assert forms_of(names, "model.layers.0.self_attn.qkv_proj", LowRankSpec({})) is None
    assert part_names("lm_head", packed) == ["lm_head"]
    whole = "model.layers.0.self_attn.qkv_proj"
    assert forms_of(names, whole, LowRankSpec({whole: plain})) == ["plain"]


@pytest.mark.slow
def test_the_entry_point_leads_there_and_vllm_is_not_imported() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["compressor"].partition(":")
    code = f"import sys, {module}; assert callable({module}.{name}); print('vllm' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (LayerSpec("plain@4g32", 3, "linear"), "no quantized pairs: compress with --bits 16"),
        (LayerSpec("dense@2g32z", 0, "linear"), "no quantized pairs"),
        (LayerSpec("channel", 3, "convolution"), "no low-rank convolutions"),
    ],
)
def test_what_vllm_does_not_run_is_refused(layer: LayerSpec, words: str) -> None:
    good = LowRankSpec({"a": LayerSpec("plain", 3, "linear")})
    assert runnable_spec(good.to_config()) == good
    with pytest.raises(ValueError, match=words):
        runnable_spec(LowRankSpec({**good.layers, "b": layer}).to_config())


def test_a_folder_of_bits_alone_is_left_to_vllm_itself() -> None:
    config = LowRankSpec({"a": LayerSpec("dense@4g32", 0, "linear")}).to_config()
    assert config["quant_method"] == "compressed-tensors"
