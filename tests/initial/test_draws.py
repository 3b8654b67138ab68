"""Records of the draws of an initialization, and their replay."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from compressor.initial import Draws, Fingerprint, record
from compressor.network import with_separate_experts

SMALL = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
KEPT = Path(__file__).parent / "draws.json"


def model_of(family: str, head: str, **shape: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{family}Config")(**shape)
        module: nn.Module = getattr(transformers, head)(config)
        return module

    return build


def various() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Embedding(9, 5, padding_idx=0), nn.Linear(5, 3)
    )


T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
PATCHES = {name: size for name, size in SMALL.items() if name != "vocab_size"} | {"image_size": 8, "patch_size": 2}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": model_of("Bert", "BertForMaskedLM", **SMALL),
    "gpt2": model_of("GPT2", "GPT2LMHeadModel", vocab_size=99, **GPT2),
    "t5": model_of("T5", "T5ForConditionalGeneration", vocab_size=99, **T5),
    "llama": model_of("Llama", "LlamaForCausalLM", num_key_value_heads=2, **SMALL),
    "mixtral": model_of("Mixtral", "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4, **SMALL),
    "resnet": model_of("ResNet", "ResNetForImageClassification", embedding_size=8, layer_type="basic", **IMAGES),
    "convnext": model_of("ConvNext", "ConvNextForImageClassification", num_stages=2, **IMAGES),
    "vit": model_of("ViT", "ViTForImageClassification", **PATCHES),
    "lstm": lambda: nn.LSTM(5, 7, 2),
    "attention": lambda: nn.MultiheadAttention(16, 4),
    "various": various,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_matrix_is_replayed_bit_by_bit_and_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    found = record(BUILDERS[name], 7)
    whole = found.module.state_dict()
    state = with_separate_experts(found.module).state_dict() | whole
    assert not [each for each in found.unrecorded if state[each].dim() > 1]
    document = json.loads(json.dumps(found.draws.to_dict()))
    draws = Draws.from_dict(document, most_numbers=sum(each.numel() for each in whole.values()))
    assert draws == found.draws
    replayed = dict(draws.replay())
    assert replayed.keys() == found.draws.tensors.keys()
    assert all(torch.equal(each, state[own]) for own, each in replayed.items())
    assert all(torch.equal(draws.tensor(own), state[own]) for own in reversed(draws.tensors))
    assert draws.names == draws.tensors.keys()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    expected = BUILDERS[name]().state_dict()
    torch.set_rng_state(before)
    assert all(torch.equal(expected[own], state[own]) for own in whole)


def test_some_tensors_are_replayed_from_a_record_of_these_alone() -> None:
    found = record(BUILDERS["llama"], 3)
    names = [name for name in found.draws.tensors if "layers.1.mlp" in name]
    own = found.draws.only(names)
    assert own.tensors.keys() == set(names)
    assert len(json.dumps(own.to_dict())) < len(json.dumps(found.draws.to_dict()))
    state = found.module.state_dict()
    assert all(torch.equal(each, state[name]) for name, each in own.replay())
    assert [name for name, _ in found.draws.replay(names[:1])] == names[:1]


def test_another_seed_and_the_first_draws() -> None:
    found, other = (record(BUILDERS["llama"], seed) for seed in (0, 1))
    again = dict(found.draws.with_seed(1).replay())
    assert all(torch.equal(each, again[name]) for name, each in other.draws.replay())
    first = found.draws.first(found.draws.numbers // 2)
    assert 0 < len(first.tensors) < len(found.draws.tensors)
    assert first.numbers <= found.draws.numbers // 2
    whole = dict(found.draws.replay())
    assert all(torch.equal(each, whole[name]) for name, each in first.replay())


def chained(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).uniform_(-0.9, 0.9).erfinv().mul_(0.02).clamp_(-2, 2))


@pytest.mark.parametrize("init", [nn.init.normal_, nn.init.uniform_, chained])
def test_the_first_numbers_of_a_draw(init: Callable[[torch.Tensor], object]) -> None:
    def build() -> nn.Module:
        module = nn.Linear(50, 41, bias=False)
        init(module.weight)
        return module.bfloat16() if init is nn.init.uniform_ else module

    found = record(build, 5)
    draws = found.draws.without_overwritten()
    part = draws.part("weight", 1024)
    assert part is not None
    assert part.numbers == 1024
    replayed = dict(draws.replay())["weight"].flatten()
    assert torch.equal(part.tensor("weight"), replayed[:1024])
    assert draws.part("weight", 1000) is draws.part("weight", 2048) is None
    assert found.draws.part("weight", 1024) is None  # the default initialization comes first


def test_without_draws_that_are_overwritten_a_library_that_skips_them_is_replayed() -> None:
    def built() -> nn.Module:
        layer = nn.Linear(20, 30, bias=False)
        nn.init.normal_(layer.weight)
        return layer

    def skipping() -> nn.Module:
        layer: nn.Module = nn.utils.skip_init(nn.Linear, 20, 30, bias=False)
        nn.init.normal_(layer.weight)
        return layer

    [(_, found)] = record(built, 5).draws.without_overwritten().replay()
    assert torch.equal(found, record(skipping, 5).module.state_dict()["weight"])


def test_what_is_not_drawn_by_known_operations_is_unrecorded() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(8, 8)))
            self.drawn = nn.Parameter(torch.randn(8, 8) * 0.1)
            self.given = nn.Parameter(torch.tensor([[1.0, 2.0]]))

    found = record(Odd, 0)
    assert found.draws.tensors.keys() == {"drawn"}
    assert found.unrecorded == {"orthogonal", "given"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_draws_in_another_dtype(dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        torch.set_default_dtype(dtype)
        try:
            return nn.Linear(9, 30)
        finally:
            torch.set_default_dtype(torch.float32)

    found = record(build, 0)
    assert {each.dtype for _, each in found.draws.replay()} == {dtype}
    converted = record(lambda: various().to(torch.bfloat16), 0)
    assert not converted.unrecorded


def test_what_is_never_written_is_zero() -> None:
    sound = record(lambda: nn.Linear(3, 2), 0).draws.to_dict()
    draws = Draws.from_dict(sound | {"steps": []}, most_numbers=100)
    assert all(not draws.tensor(name).any() for name in draws.tensors)
    copied = Draws.from_dict(sound | {"steps": [["copy_", [0, [2], [1], 0], [1, [2], [1], 0]]]}, most_numbers=100)
    assert all(not tensor.any() for _, tensor in copied.replay())


def changed(document: dict[str, Any], **other: Any) -> dict[str, Any]:
    return copy.deepcopy(document) | other


def repeated(times: Any, by: Any = 0) -> dict[str, Any]:
    return {"times": times, "steps": [["zero_", 0]], "strides": [[by]]}


@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_blocks_of_a_network_are_written_once(blocks: int) -> None:
    shape = {**SMALL, "num_hidden_layers": blocks}
    draws = record(model_of("Bert", "BertForMaskedLM", **shape), 3).draws
    matrices = draws.only({name for name in draws.names if "dense" in name or "self" in name})
    document = json.loads(json.dumps(matrices.to_dict()))
    assert Draws.from_dict(document) == matrices
    assert len(json.dumps(document["steps"])) < 2000
    assert len(matrices.steps) > 20 * blocks


def test_hostile_documents_are_refused() -> None:
    sound = record(various, 0).draws.to_dict()
    assert Draws.from_dict(sound, most_numbers=10_000)
    for document in (
        None, [], {}, changed(sound, seed=-1), changed(sound, seed="0"), changed(sound, torch=3),
        changed(sound, steps=[["system", 0]]), changed(sound, steps=[["uniform_", 99, 0.0, 1.0]]),
        changed(sound, steps=[["uniform_", -1]]), changed(sound, steps=[["normal_", 0, float("nan"), 1.0]]),
        changed(sound, steps=[["normal_", 0, 0.0, 1.0, 2.0]]), changed(sound, steps=[["copy_", 0, [1, [4], [1]]]]),
        changed(sound, registers=[[10**12, "float32"]]), changed(sound, registers=[[3, "int64"]]),
        changed(sound, tensors={"0.weight": [0, [10**6], [1], 0]}),
        changed(sound, tensors={"0.weight": [0, [-1], [1], 0]}),
        changed(sound, steps=sound["steps"] * 300), changed(sound, steps=[["zero_", 0]] * (2**20 + 1)),
        changed(sound, steps=[["fill_", 0, 10**400]]), changed(sound, steps=[["fill_", 0, 1e300]]),
        changed(sound, steps=[["normal_", 0, 0.0, -1.0]]), changed(sound, steps=[["uniform_", 0, 1.0, 0.0]]),
        changed(sound, steps=[["zero_", 0, 1.0]]), changed(sound, steps=[["zero_", [0, [2, 2], [1, 1], 0]]]),
        changed(sound, steps=[["copy_", [0, [2], [1], 0], [0, [3], [1], 0]]]), changed(sound, format=2),
        changed(sound, steps=[repeated(10**12)]), changed(sound, steps=[repeated(2, by=-1)]),
        changed(sound, steps=[repeated(2, by=99)]), changed(sound, steps=[repeated(2, by=0.5)]),
        changed(sound, steps=[repeated(2.0)]), changed(sound, steps=[{"times": 2}]),
        changed(sound, steps=[repeated(2) | {"strides": []}]), changed(sound, steps=[repeated(2) | {"strides": [[]]}]),
        changed(sound, steps=[{"times": 2, "steps": [repeated(2)], "strides": [[0]]}]),
        changed(sound, registers=[{"times": 10**12, "registers": [[3, "float32"]]}]),
        changed(sound, registers=[{"times": -1, "registers": [[3, "float32"]]}]),
        changed(sound, registers=[[0.5, "float32"]]),
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011 - each says something else
            Draws.from_dict(document, most_numbers=10_000)


REPLAYED = """
import json, sys, torch
from compressor.initial import Draws, Fingerprint
document = json.load(open(sys.argv[1]))
draws = Draws.from_dict(document["draws"], most_numbers=10_000)
torch.set_num_threads(int(sys.argv[2]))
for name, tensor in draws.replay():
    assert Fingerprint.of_list(document["fingerprints"][name]).defect(tensor) is None, name
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_other_cpus_and_numbers_of_threads_draw_the_same(threads: int) -> None:
    own = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": str(threads)}
    arguments = [sys.executable, "-c", REPLAYED, str(KEPT), str(threads)]
    run = subprocess.run(arguments, env=own, check=True, capture_output=True, text=True)
    assert run.stdout.split()[-1] == "DEFAULT"


def test_this_release_draws_what_another_one_drew() -> None:
    document = json.loads(KEPT.read_text(encoding="utf-8"))
    draws = Draws.from_dict(document["draws"], most_numbers=10_000)
    assert draws.tensors.keys() == document["fingerprints"].keys()
    for name, tensor in draws.replay():
        own = Fingerprint.of_list(document["fingerprints"][name])
        assert own.defect(tensor) is None
        assert own.defect(tensor * (1 + 1e-4)) is not None
    other = dict(draws.with_seed(draws.seed + 1).replay())
    assert all(Fingerprint.of_list(each).defect(other[name]) for name, each in document["fingerprints"].items())
