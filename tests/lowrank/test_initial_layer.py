"""Models stored as what training wrote: dense wherever they are loaded, and refused where their start is another."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import compress, export, restore
from compressor.engine import InProcess, ProcessPool, Run
from compressor.errors import BadInput, CompressorError
from compressor.forms import InitialLayer
from compressor.initial import InitialWeights
from compressor.io import open_checkpoint
from compressor.lowrank import (
    METADATA_KEY,
    LowRankSpec,
    compressed_artifact,
    formed,
    formed_checkpoint,
    formed_layers,
    require_read_back,
    rewritten_module,
    spec_of,
    start_matrix,
    stored_pairs,
    with_factors,
)
from compressor.lowrank.rewriting import filled_layer, rewritten_factors
from compressor.model import inspect_layers, load_model
from compressor.planning import LayerPlan
from tests.lowrank.started import GPT2, KINDS, Kinds, gpt2, opened, outputs, planned, rewriting_of, trained, write

torch.set_num_threads(1)
CPU = torch.device("cpu")


def close(model: Any, expected: Any) -> None:
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-4, atol=1e-5)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Any, Path]:
    """A network, and the small file of it."""
    model, initial = trained(Kinds)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    errors = write(rewriting_of(opened(tmp_path / "dense.pt", initial, Kinds), KINDS), tmp_path / "small.safetensors")
    assert errors.keys() == KINDS.keys()
    assert max(errors.values()) < 1e-6
    return model, tmp_path / "small.safetensors"


def changed(path: Path, **record: Any) -> Path:
    """A copy of a file whose record says something else."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    said = json.loads(metadata[METADATA_KEY])
    for key, value in record.items():
        said["initial"][key] = value
    to = path.with_name("changed.safetensors")
    save_file(load_file(path), to, {**metadata, METADATA_KEY: json.dumps(said)})
    return to


def test_a_file_is_loaded_as_the_dense_model(small: tuple[Any, Path]) -> None:
    model, path = small
    loaded = load_model(path, Kinds)
    close(loaded, model)
    assert not any(isinstance(each, InitialLayer) for each in loaded.modules())
    assert loaded.head.weight is loaded.words.weight
    assert {name: each.shape for name, each in loaded.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }


@pytest.mark.slow
def test_two_processes_measure_and_write_the_same(tmp_path: Path) -> None:
    model, initial = trained(Kinds)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    subject = opened(tmp_path / "dense.pt", initial, Kinds)
    rewriting = rewriting_of(subject, KINDS)
    with ProcessPool(2) as pool:
        found = [inspect_layers(subject, 0.1, Run(CPU, engine=engine)) for engine in (InProcess(), pool)]
        write(rewriting, tmp_path / "here.safetensors")
        write(rewriting, tmp_path / "pool.safetensors", engine=pool)
    assert found[0] == found[1]
    assert "initial+plain" in {form for each in found[0] for form in each.own_values}
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "pool.safetensors").read_bytes()


def test_the_random_generator_is_left_as_it_is(small: tuple[Any, Path]) -> None:
    network = Kinds()
    before = torch.get_rng_state()
    load_model(small[1], lambda: network)
    assert torch.equal(before, torch.get_rng_state())


def test_the_file_holds_the_factors_and_a_record_alone(small: tuple[Any, Path]) -> None:
    _, path = small
    stored = load_file(path)
    assert stored["rnn.weight_hh_l0"].shape == (0, 64, 16)
    assert not any(name.startswith("rnn.weight_hh_l0.") for name in stored)
    assert stored["tall.down.weight"].shape == (2, 16)
    spec = spec_of(open_checkpoint(path))
    assert spec.from_initial.keys() == KINDS.keys()
    assert spec.without_initial() == LowRankSpec({})
    assert spec.initial is not None
    assert spec.initial.draws is not None
    assert not stored_pairs(open_checkpoint(path))


def test_whoever_opens_it_sees_dense_tensors(small: tuple[Any, Path]) -> None:
    model, path = small
    dense = formed_checkpoint(open_checkpoint(path))
    assert set(formed_layers(dense)) == KINDS.keys()
    state = {name: each for name, each in model.state_dict().items() if name != "head.weight"}
    assert dense.tensors.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(dense.read(name), tensor, rtol=1e-5, atol=1e-6)
    assert spec_of(dense) == LowRankSpec({})


@pytest.mark.parametrize("name", ["dense.safetensors", "dense.pt"])
def test_it_is_restored_and_exported_to_an_ordinary_file(small: tuple[Any, Path], name: str) -> None:
    model, path = small
    restored = restore(path, output=path.with_name("again-" + name), factory=Kinds)
    assert set(restored.layers) == KINDS.keys()
    exported = export(path, to="dense", output=path.with_name("exported-" + name))
    assert exported.layers == len(KINDS)
    for output in (restored.output, exported.output):
        assert formed_layers(open_checkpoint(output)) == ()
        close(load_model(output, Kinds), model)


def test_a_model_that_is_small_already_is_refused(small: tuple[Any, Path]) -> None:
    with pytest.raises(BadInput, match="compressed already"):
        compress(small[1], output=small[1].with_name("smaller.safetensors"), keep=0.5, factory=Kinds)


def test_another_draw_is_refused_with_its_tensor_and_the_remedy(small: tuple[Any, Path]) -> None:
    draws = spec_of(open_checkpoint(small[1])).initial
    assert draws is not None
    assert draws.draws is not None
    path = changed(small[1], draws=draws.draws.to_dict() | {"seed": 4, "torch": "2.0.0"})
    with pytest.raises(BadInput, match=r"does not draw .*weight.* as PyTorch 2\.0\.0 did.*under PyTorch 2\.0\.0"):
        load_model(path, Kinds)
    path = changed(small[1], draws=draws.draws.to_dict() | {"seed": 4})
    with pytest.raises(BadInput, match=r"weight is not drawn as it was .*if it was changed.*compress restore"):
        load_model(path, Kinds)
    with pytest.raises(BadInput, match="is not drawn as it was"):
        restore(path, output=path.with_name("dense.safetensors"))
    assert not path.with_name("dense.safetensors").exists()


@pytest.mark.parametrize("record", [{"tensors": {}}, {"draws": {}}, {"draws": "all"}, {"tensors": None}])
def test_a_damaged_record_is_refused(small: tuple[Any, Path], record: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="metadata"):
        load_model(changed(small[1], **record), Kinds)


def test_a_record_that_draws_without_end_is_refused_before_it_draws(small: tuple[Any, Path]) -> None:
    record = spec_of(open_checkpoint(small[1])).initial
    assert record is not None
    assert record.draws is not None
    endless = record.draws.to_dict()
    endless["registers"] = [*endless["registers"], [2**37, "float32"]]
    endless["steps"] = [["normal_", len(endless["registers"]) - 1, 0.0, 1.0], *endless["steps"]]
    with pytest.raises(BadInput, match="draws more numbers than the model has"):
        load_model(changed(small[1], draws=endless), Kinds)


@pytest.mark.parametrize("lost", ["tall.down.weight", "tall.weight"])
def test_a_lost_factor_is_refused(small: tuple[Any, Path], lost: str) -> None:
    stored = load_file(small[1])
    with safe_open(small[1], "pt") as file:
        save_file({name: t for name, t in stored.items() if name != lost}, small[1].with_name("x"), file.metadata())
    with pytest.raises(BadInput, match="tall do not fit"):
        load_model(small[1].with_name("x"), Kinds)


def of_checkpoint(initial: InitialWeights, name: str = "initial.pt") -> InitialWeights:
    """The same weights as those of a checkpoint."""
    return replace(initial, source=name, draws=None, checkpoint_name=name, digest="5e" * 32)


def test_a_checkpoint_has_to_be_given_by_name(tmp_path: Path) -> None:
    model, initial = trained(Kinds)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    subject = opened(tmp_path / "dense.pt", of_checkpoint(initial), Kinds)
    write(rewriting_of(subject, KINDS), tmp_path / "small.safetensors")
    with pytest.raises(BadInput, match=r"initial\.pt.*`initial`"):
        load_model(tmp_path / "small.safetensors", Kinds)
    close(load_model(tmp_path / "small.safetensors", Kinds, initial=of_checkpoint(initial)), model)
    other = of_checkpoint(InitialWeights.from_seed(Kinds, 4), "other.pt")
    with pytest.raises(BadInput, match=r"of other\.pt is not what .*give initial\.pt"):
        load_model(tmp_path / "small.safetensors", Kinds, initial=other)


def test_a_module_becomes_one_with_dense_layers_and_the_weights_of_the_file(small: tuple[Any, Path]) -> None:
    model, path = small
    initial = InitialWeights.from_seed(Kinds, 3)
    before = copy.deepcopy(model.state_dict())
    rewriting = rewriting_of(opened(model, initial), KINDS)
    made = rewritten_module(rewriting, model, Run(CPU), done=lambda _name, _error: None)
    assert isinstance(made, Kinds)
    assert {type(each) for each in made.modules()} == {type(each) for each in model.modules()}
    assert made.head.weight is made.words.weight
    for name, tensor in load_model(path, Kinds).state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_what_is_read_back_is_compared(small: tuple[Any, Path]) -> None:
    model, path = small
    rewriting = rewriting_of(opened(model, InitialWeights.from_seed(Kinds, 3)), KINDS)
    require_read_back(path, rewriting)
    require_read_back(path, with_factors(rewriting, Run(CPU)))
    lower = replace(planned(KINDS).layers[0], share=0.8)
    other = replace(rewriting, plan=replace(rewriting.plan, layers=(lower, *rewriting.plan.layers[1:])))
    with pytest.raises(CompressorError, match="read back, words"):
        require_read_back(path, other)


def test_layers_can_be_trained_until_they_are_formed() -> None:
    model, initial = trained(Kinds)
    subject = opened(model, initial)
    rewriting = rewriting_of(subject, {"tall": ("plain", 2), "rnn.weight_ih_l0": ("plain", 2)})
    for layer, plan, factors in rewritten_factors(rewriting, Run(CPU)):
        start = start_matrix(layer, plan.share, initial)
        made = filled_layer(layer, plan, model.get_submodule(layer.module), tensors=factors.tensors, start=start)
        if layer.kind == "linear":
            assert isinstance(made, InitialLayer)
            assert {name for name, _ in made.named_parameters()} == {"down.weight", "up.weight", "bias"}
            made = formed(made)
        assert type(made) is type(model.get_submodule(layer.module))
        torch.testing.assert_close(
            getattr(made, layer.parameter), getattr(model.get_submodule(layer.module), layer.parameter)
        )


def test_a_layer_whose_matrix_is_not_in_memory_leaves_the_bias_of_the_dense_one_alone() -> None:
    model, initial = trained(Kinds)
    rewriting = rewriting_of(opened(model, initial), {"tall": ("plain", 2)})
    [(layer, plan, factors)] = rewritten_factors(rewriting, Run(CPU))
    dense = model.get_submodule("tall")
    bias, memory = dense.bias.detach().clone(), dense.bias.data_ptr()
    dense.weight = nn.Parameter(dense.weight.to("meta"))
    start = start_matrix(layer, plan.share, initial)
    made = filled_layer(layer, plan, dense, tensors=factors.tensors, start=start)
    assert not any(tensor.is_meta for tensor in made.state_dict().values())
    assert dense.bias.data_ptr() == memory
    assert torch.equal(dense.bias, bias)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, InitialWeights, Path]:
    tmp_path = tmp_path_factory.mktemp("gpt2")
    model, initial = trained(gpt2)
    model.save_pretrained(tmp_path / "dense")
    return model, initial, tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [10**9, 4000])
def test_transformers_loads_a_folder_as_the_dense_model(
    folder: tuple[Any, InitialWeights, Path], shard_size: int, tmp_path: Path
) -> None:
    model, initial, path = folder
    write(rewriting_of(opened(path / "dense", initial), GPT2), tmp_path / "small", shard_size)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    close(loaded, model)
    assert getattr(loaded.config, "quantization_config", None) is None
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert {type(each) for each in loaded.modules()} == {type(each) for each in model.modules()}
    loaded.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    close(load_model(tmp_path / "saved"), model)
    close(load_model(tmp_path / "small"), model)
    restore(tmp_path / "small", output=tmp_path / "restored")
    assert "quantization_config" not in json.loads((tmp_path / "restored/config.json").read_text())
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "restored"), model)
    with pytest.raises(BadInput, match=r"4 compressed layers are dense once they are loaded") as refused:
        export(tmp_path / "small", to="hf-remote", output=tmp_path / "remote")
    assert "to='dense'" in str(refused.value.remedy)


@pytest.mark.slow
def test_beside_pairs_the_configuration_lists_these_alone(
    folder: tuple[Any, InitialWeights, Path], tmp_path: Path
) -> None:
    model, initial, path = folder
    rewriting = rewriting_of(opened(path / "dense", initial), GPT2)
    pair = replace(rewriting.plan.layers[0], name="transformer.h.0.attn.c_attn", form="plain", rank=16, share=None)
    rewriting = replace(rewriting, plan=replace(rewriting.plan, layers=(*rewriting.plan.layers, pair)))
    write(rewriting, tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.config.quantization_config.spec.layers.keys() == {pair.name}
    close(loaded, model)
    loaded.save_pretrained(tmp_path / "saved")
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    export(tmp_path / "small", to="hf-remote", output=tmp_path / "remote")
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "remote", trust_remote_code=True), model)


@pytest.mark.slow
def test_a_folder_names_the_checkpoint_that_it_needs(folder: tuple[Any, InitialWeights, Path], tmp_path: Path) -> None:
    model, initial, path = folder
    write(rewriting_of(opened(path / "dense", of_checkpoint(initial)), GPT2), tmp_path / "small")
    with pytest.raises(BadInput, match=r"initial\.pt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(BadInput, match=r"initial\.pt"):
        load_model(tmp_path / "small")
    close(load_model(tmp_path / "small", initial=of_checkpoint(initial)), model)


def test_a_specification_comes_back_from_its_document(small: tuple[Any, Path]) -> None:
    spec = spec_of(open_checkpoint(small[1]))
    again = LowRankSpec.from_dict(json.loads(json.dumps(spec.to_dict(), sort_keys=True)))
    assert again.to_dict() == spec.to_dict()
    assert again.layers == spec.layers
    renamed = spec.renamed(lambda name: f"model.{name}")
    assert renamed.initial is not None
    assert renamed.initial.tensors.keys() == renamed.from_initial.keys() == {f"model.{name}" for name in KINDS}


@pytest.mark.parametrize(
    "entry",
    [
        {"form": "initial+plain", "rank": -1, "kind": "linear", "share": 0.5},
        {"form": "initial+plain", "rank": 0, "kind": "linear"},
        {"form": "initial+plain", "rank": 0, "kind": "linear", "share": math.inf},
        {"form": "plain", "rank": 0, "kind": "linear"},
    ],
)
def test_a_layer_that_cannot_be_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which layers are low-rank"):
        LowRankSpec.from_dict({"format_version": 2, "layers": {"a": entry}})


def test_a_model_without_such_layers_says_nothing_of_a_start() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    made = compress(model, keep=0.6, prefer="size").plan
    assert made.factorized == 1
    assert "initial" not in json.dumps(made.to_dict())
    spec = LowRankSpec({})
    assert spec.to_dict() == {"format_version": 1, "layers": {}}


def test_the_artifact_says_what_it_will_take(small: tuple[Any, Path]) -> None:
    path = small[1]
    rewriting = rewriting_of(opened(path.with_name("dense.pt"), InitialWeights.from_seed(Kinds, 3), Kinds), KINDS)
    assert compressed_artifact(rewriting, 10**9).bytes == path.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense@4", "plain"])
def test_few_layers_from_the_start_among_others_that_are_stored_in_few_numbers(form: str, tmp_path: Path) -> None:
    """The start of a layer is drawn with those of all before it, whatever became of these."""

    def build() -> Any:
        config = transformers.GPT2Config(n_embd=96, n_layer=2, n_head=2, vocab_size=24, n_positions=8)
        return transformers.GPT2LMHeadModel(config)

    model, initial = trained(build)
    model.save_pretrained(tmp_path / "dense")
    last = "transformer.h.1.mlp.c_proj"
    subject = opened(tmp_path / "dense", initial)
    rewriting = rewriting_of(subject, {last: ("plain", 2)})
    others = tuple(
        LayerPlan(layer.name, (0, 0), "", 2 if form == "plain" else 0, form, 0, 0.0, "")
        for layer in subject.layers
        if layer.eligible and layer.kind != "embedding" and layer.name != last
    )
    assert sum(math.prod(layer.shape) for layer in subject.layers) > 3 * 2**16
    plan = replace(rewriting.plan, layers=(*others, *rewriting.plan.layers))
    write(replace(rewriting, plan=plan), tmp_path / "small")
    expected = model.get_submodule(last).weight
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "small").get_submodule(last).weight
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
    read = formed_checkpoint(open_checkpoint(tmp_path / "small")).read(f"{last}.weight")
    torch.testing.assert_close(read, expected.detach(), rtol=1e-4, atol=1e-5)
