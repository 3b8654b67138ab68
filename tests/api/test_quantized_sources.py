"""Checkpoints that others quantized go through all verbs as what they stand for; what is left alone stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import compressor
from compressor import BadInput, TimingSettings, compress, inspect, plan, restore
from compressor.encodings import encoded_names
from compressor.model import open_model, open_runnable
from tests.encodings import stored
from tests.encodings.stored import Quantize, dense_folder, store


@dataclass(frozen=True)
class Source:
    """A tiny model and how it is stored."""

    model: Callable[[], Any]
    quantize: Quantize
    said: dict[str, Any]
    where: Callable[[str], bool] = stored.is_linear

    def made(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """A folder of it, and one of what it means."""
        dense_folder(folder, self.model(), dtype)
        return store(folder, self.quantize, self.said, where=self.where)


SOURCES = {
    "deepseek-v3-fp8": Source(stored.deepseek_v3, stored.float8_blocks, stored.FLOAT8_BLOCKS),
    "qwen3-moe-fp8": Source(stored.qwen3_moe, stored.float8_blocks, stored.FLOAT8_BLOCKS),
    "llama-fp8-tensor": Source(stored.llama, stored.float8_tensor, stored.FLOAT8),
    "llama-fp8-rows": Source(stored.llama, stored.float8_rows, stored.FLOAT8),
    "llama-gptq": Source(stored.llama, stored.gptq(), stored.gptq_config()),
    "llama-gptq-8-ordered": Source(stored.llama, stored.gptq(8, ordered=True), stored.gptq_config(8)),
    "qwen3-moe-gptq-v2": Source(
        partial(stored.qwen3_moe, moe_intermediate_size=64), stored.gptq(version=2), stored.gptq_config(version=2)
    ),
    "llama-awq": Source(stored.llama, stored.awq(), stored.AWQ),
    "llama-packed": Source(
        stored.llama,
        stored.compressed_tensors(stored.FOUR_BITS),
        stored.compressed_tensors_config(stored.FOUR_BITS),
    ),
    "llama-int8": Source(
        stored.llama,
        stored.compressed_tensors(stored.EIGHT_BITS, "int-quantized"),
        stored.compressed_tensors_config(stored.EIGHT_BITS, "int-quantized"),
    ),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    return SOURCES[request.param]


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


IDS = torch.tensor([[5, 9, 33, 7, 12, 60], [3, 4, 3, 21, 8, 2]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(IDS).logits
    return output


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """The tensors of a file as bytes, with their dtypes."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {
            name: str(file.get_slice(name).get_dtype()).encode()
            + file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for name in file.keys()  # noqa: SIM118 - it is no mapping
        }


def test_it_is_run_as_what_it_means(source: Source, tmp_path: Path) -> None:
    means = source.made(tmp_path / "model")
    expected = logits(loaded(means))
    assert torch.equal(logits(open_runnable(tmp_path / "model").module), expected)
    model = open_model(tmp_path / "model")
    assert torch.equal(logits(model.streamed), logits(open_model(means).streamed))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        # It reads blocks whose sides divide those of the matrix alone.
        ("qwen3-moe-fp8", {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}),
        ("llama-packed", {}),
        ("llama-int8", {}),
    ],
)
def test_transformers_reads_the_same_numbers(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    source = SOURCES[name]
    if source.model is stored.qwen3_moe:
        source = replace(source, model=partial(stored.qwen3_moe, moe_intermediate_size=64))
    source.made(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **how).eval()
    torch.testing.assert_close(logits(open_runnable(tmp_path / "model").module), logits(theirs), rtol=1e-5, atol=1e-5)


def test_it_is_restored_to_the_floats_that_it_means(source: Source, tmp_path: Path) -> None:
    means = source.made(tmp_path / "model", torch.bfloat16)
    restore(tmp_path / "model", output=tmp_path / "dense")
    restored, expected = load_file(tmp_path / "dense" / "model.safetensors"), load_file(means / "model.safetensors")
    assert restored.keys() == expected.keys()
    for name, each in expected.items():
        assert restored[name].dtype == each.dtype
        torch.testing.assert_close(restored[name], each, rtol=2**-8, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_some_layers_compressed_others_left_as_they_are(source: Source, tmp_path: Path) -> None:
    source.made(tmp_path / "model")
    before = stored_bytes(tmp_path / "model")
    made = compress(
        tmp_path / "model",
        output=tmp_path / "small",
        keep=0.8,
        bits=(3, 4, 16),
        exclude="*.1.*down_proj",
        calibration="none",
        prefer="size",
    )
    excluded = [layer.name for layer in made.skipped if layer.name.endswith("down_proj")]
    left = [*excluded, *(each.name for each in made.plan.layers if each.rank is None and each.name != "lm_head")]
    assert excluded
    assert any(layer.rank is not None for layer in made.plan.layers)
    after = stored_bytes(tmp_path / "small")
    kept = {name for name in before if any(name.startswith(f"{layer}.") for layer in left)}
    assert all(after[name] == before[name] for name in kept)
    assert made.plan.eligible_after <= 0.8 * made.plan.eligible_before
    assert {each.name for each in made.plan.layers if each.encoding is not None} >= {
        each.name for each in made.plan.layers if each.name != "lm_head"
    }
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert said["source_quantization"] == source.said
    opened = open_runnable(tmp_path / "small")
    packed = [f"{name}.weight" for name in opened.pairs if name in left]  # integers of a kind that is ours too
    assert {*encoded_names(opened.checkpoint), *packed} == {f"{name}.weight" for name in left}
    small = loaded(tmp_path / "small")
    assert small.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 9)
    assert torch.equal(logits(open_runnable(tmp_path / "small").module), logits(small))
    restore(tmp_path / "small", output=tmp_path / "dense")
    torch.testing.assert_close(logits(loaded(tmp_path / "dense")), logits(small), rtol=1e-4, atol=1e-4)
    small.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(loaded(tmp_path / "again")), logits(small), rtol=1e-5, atol=1e-5)


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    source = Source(stored.gpt_oss, stored.mxfp4, stored.MXFP4, stored.is_experts)
    means = source.made(tmp_path / "model")
    expected = logits(loaded(means))
    assert torch.equal(logits(open_runnable(tmp_path / "model").module), expected)
    restore(tmp_path / "model", output=tmp_path / "dense")
    assert torch.equal(logits(loaded(tmp_path / "dense")), expected)
    before = stored_bytes(tmp_path / "model")
    compress(
        tmp_path / "model",
        output=tmp_path / "small",
        keep=0.6,
        bits=(4, 8),
        include=("*self_attn*", "lm_head"),
        calibration="none",
        prefer="size",
    )
    after = stored_bytes(tmp_path / "small")
    experts = {name for name in before if name.endswith(("_blocks", "_scales"))}
    assert len(experts) == 8
    assert all(after[name] == before[name] for name in experts)
    small = loaded(tmp_path / "small")
    assert small.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 9)
    assert torch.equal(logits(open_runnable(tmp_path / "small").module), logits(small))
    restore(tmp_path / "small", output=tmp_path / "restored")
    torch.testing.assert_close(logits(loaded(tmp_path / "restored")), logits(small), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [{"keep": 0.08, "bits": 16, "prefer": "speed"}, {"bits": 3, "prefer": "size"}])
def test_experts_in_mxfp4_become_layers(asked: dict[str, Any], tmp_path: Path) -> None:
    """Each is decoded by itself, and compressed as the numbers that it means."""
    source = Source(stored.gpt_oss, stored.mxfp4, stored.MXFP4, stored.is_experts)
    means = source.made(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model").checkpoint
    whole = load_file(means / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    for number, matrix in enumerate(whole):
        for first, role in enumerate(("gate_proj", "up_proj")):
            own = checkpoint.read(f"model.layers.0.mlp.experts.{number}.{role}.weight")
            assert torch.equal(own, matrix.T[first::2])
    report = compress(
        tmp_path / "model", output=tmp_path / "small", include=["*.experts.*"], calibration="none", **asked
    )
    assert all(plan.rank is not None for plan in report.plan.layers)
    small = loaded(tmp_path / "small")
    restore(tmp_path / "small", output=tmp_path / "restored")
    torch.testing.assert_close(logits(loaded(tmp_path / "restored")), logits(small), rtol=1e-4, atol=1e-5)
    assert (
        load_file(tmp_path / "restored" / "model.safetensors").keys() == load_file(means / "model.safetensors").keys()
    )


def test_all_layers_compressed_leave_nothing_of_the_source(tmp_path: Path) -> None:
    SOURCES["qwen3-moe-fp8"].made(tmp_path / "model")
    made = compress(tmp_path / "model", output=tmp_path / "small", bits=3, calibration="none", prefer="size")
    assert all(layer.rank is not None for layer in made.plan.layers)
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert "source_quantization" not in said
    assert not {name for name in load_file(tmp_path / "small" / "model.safetensors") if "scale_inv" in name}


def test_it_is_calibrated_and_evaluated(tmp_path: Path) -> None:
    source = SOURCES["llama-fp8-tensor"]
    means = source.made(tmp_path / "model")
    tokens = {"input_ids": torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))}
    made = compress(
        tmp_path / "model",
        output=tmp_path / "small",
        keep=0.7,
        bits=(4, 8),
        calibration=tokens,
        data=tokens,
        prefer="size",
        effort="fast",
        timing_settings=TimingSettings(most_repeats=7),
    )
    assert made.evaluation is not None
    alike = compressor.evaluate(means, data=tokens, timing_settings=TimingSettings(most_repeats=7))
    assert made.evaluation.baseline == pytest.approx(alike.compressed, rel=1e-6)


def test_inspect_sees_the_layers(source: Source, tmp_path: Path) -> None:
    means = source.made(tmp_path / "model")
    found, alike = inspect(tmp_path / "model"), inspect(means)
    known = {each.layer.name: each for each in alike.layers}
    assert {each.layer.name for each in found.layers} == known.keys()
    for each in found.layers:
        assert replace(each.layer, stored=None) == known[each.layer.name].layer
        assert each.singular_values == known[each.layer.name].singular_values
    assert found.weight_bytes < alike.weight_bytes
    assert found.parameters == alike.parameters


def test_plan_chooses_what_compress_makes(tmp_path: Path) -> None:
    SOURCES["llama-gptq"].made(tmp_path / "model")
    asked: Any = {"bits": 4, "calibration": "none", "prefer": "size"}
    planned = plan(tmp_path / "model", **asked)
    made = compress(tmp_path / "model", output=tmp_path / "small", **asked)
    assert planned.layers
    assert [(each.name, each.form, each.rank) for each in planned.layers] == [
        (each.name, each.form, each.rank) for each in made.plan.layers
    ]


def test_a_file_without_its_folder_says_itself_how_it_is_read(tmp_path: Path) -> None:
    source = SOURCES["llama-fp8-rows"]
    source.made(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").rename(tmp_path / "weights.safetensors")
    compress(weights, output=tmp_path / "small.safetensors", keep=0.8, bits=(3, 16), calibration="none", prefer="size")
    (tmp_path / "model" / "model.safetensors").write_bytes((tmp_path / "small.safetensors").read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["quantization_config"]
    restore(tmp_path / "small.safetensors", output=tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert not [name for name, each in dense.items() if each.dtype.itemsize == 1 or "scale" in name]


def test_a_share_is_of_what_the_source_takes(tmp_path: Path) -> None:
    SOURCES["llama-fp8-rows"].made(tmp_path / "model", torch.bfloat16)
    given = plan(tmp_path / "model", keep=0.5, bits=16, form="plain", calibration="none", prefer="size")
    for layer in given.layers:
        assert layer.parameters <= layer.parameters_before
        assert layer.name == "lm_head" or layer.parameters_before < 0.6 * layer.shape[0] * layer.shape[1]
    (tmp_path / "plan.json").write_text(json.dumps(given.to_dict()))
    made = compress(tmp_path / "model", output=tmp_path / "small", plan=tmp_path / "plan.json", calibration="none")
    assert made.plan.eligible_after == given.eligible_after


def test_a_fine_tune_of_a_quantized_base(tmp_path: Path) -> None:
    means = SOURCES["llama-gptq"].made(tmp_path / "base")
    shutil.copytree(means, tmp_path / "tuned")
    tuned, generator = load_file(means / "model.safetensors"), torch.Generator().manual_seed(5)
    for name, each in tuned.items():
        if stored.is_linear(name):
            factors = (torch.randn(side, 4, generator=generator) for side in each.shape)
            each.add_(torch.einsum("ir,jr->ij", *factors), alpha=0.02)
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "difference.safetensors", keep=0.5)
    restore(tmp_path / "difference.safetensors", base=tmp_path / "base", output=tmp_path / "restored")
    restored = load_file(tmp_path / "restored" / "model.safetensors")
    assert restored.keys() == tuned.keys()
    for name, each in tuned.items():
        torch.testing.assert_close(restored[name], each, rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "restored" / "config.json").read_text())


@pytest.mark.parametrize(("method", "remedy"), [("aqlm", ""), ("auto-round", ", or write it with .* auto_gptq")])
def test_a_method_that_is_not_read_is_named(method: str, remedy: str, tmp_path: Path) -> None:
    SOURCES["llama-fp8-rows"].made(tmp_path / "model")
    twin = tmp_path / "model-means"
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(BadInput, match=rf"is quantized already \({method}\); give the original{remedy}$"):
        compress(twin, output=tmp_path / "small", keep=0.5)
