"""What every verb writes, in every form and container, is the model when it is loaded as its users load it.

The layers have rank two, so that nothing is lost: all outputs are those of the dense model. Where layers are quantized
too, they are those of the module that is compressed in memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import compress, export, merge, restore
from compressor.forms import FORMS
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan
from tests.forms.diagonal import DIAGONAL, ROOT
from tests.lowrank.started import GPT2, KINDS, SEED, Kinds, gpt2, trained
from tests.lowrank.started import planned as planned_from_start

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
RANK = 2
SHARD = 4000
FULL_MODEL = 10**9

# The layers of each form, by their names in the checkpoint.
OWN_CODE: dict[str, dict[str, str]] = {
    "plain": {"square": "plain", "tall": "plain"},
    "pivoted": {"square": "pivoted", "tall": "pivoted"},
    "channel": {"channel": "channel"},
    "spatial": {"spatial": "spatial"},
    "grouped": {"grouped": "grouped"},
    "transposed": {"back": "channel"},
    "tied": {"words": "plain"},
    "parameter": {"rnn.weight_ih_l0": "plain", "rnn.weight_hh_l0": "pivoted"},
    "diagonal": {"square": "diagonal", "tall": "root diagonal", "rnn.weight_ih_l0": "diagonal"},
    "quantized": {
        "square": "pivoted@8",
        "tall": "plain@8",
        "channel": "dense@8",
        "spatial": "spatial@8",
        "grouped": "grouped@8",
        "back": "channel@8",
        "rnn.weight_hh_l0": "plain@6",
        "words": "dense@8",
    },
}
BLOCK, STAGE = "transformer.h.0", "resnet.encoder.stages.0.layers.0.layer"
GROUPED_STAGE = "regnet.encoder.stages.0.layers.0.layer"
TRANSFORMERS: dict[str, dict[str, str]] = {
    "plain": {f"{BLOCK}.attn.c_proj": "plain", f"{BLOCK}.mlp.c_fc": "plain"},  # the first is square
    "pivoted": {f"{BLOCK}.attn.c_proj": "pivoted", f"{BLOCK}.mlp.c_fc": "pivoted"},
    "tied": {"transformer.wte": "plain"},
    "channel": {f"{STAGE}.0.convolution": "channel"},
    "spatial": {f"{STAGE}.0.convolution": "spatial", f"{STAGE}.1.convolution": "channel"},
    "grouped": {f"{GROUPED_STAGE}.1.convolution": "grouped"},
    "diagonal": {f"{BLOCK}.attn.c_proj": "diagonal", f"{BLOCK}.mlp.c_fc": "root diagonal"},
    "quantized": {
        f"{BLOCK}.attn.c_proj": "plain@8",
        f"{BLOCK}.mlp.c_fc": "pivoted@8",
        f"{BLOCK}.mlp.c_proj": "dense@4g32",
        "transformer.wte": "dense@8",
    },
}

# What is summed as whole matrices, and is dense afterwards.
SUMMED_DENSE = ("quantized", "grouped")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms that the package does not have are registered like its own."""
    for form in (DIAGONAL, ROOT):
        monkeypatch.setitem(FORMS, form.name, form)


def lowered(weight: Tensor, form: str) -> Tensor:
    """A weight of the same shape and of rank two in a form."""
    if form.startswith("spatial"):
        d_out, c, k_h, k_w = weight.shape
        pair = (torch.randn(d_out, RANK, k_w), torch.randn(RANK, c, k_h))
        return torch.einsum("orj,rci->ocij", *pair).contiguous() * 0.2
    sides = weight.flatten(1).shape
    return (torch.randn(sides[0], RANK) @ torch.randn(RANK, sides[1])).reshape(weight.shape) * 0.2


def made_low(model: nn.Module, forms: dict[str, str]) -> nn.Module:
    for name, form in forms.items():
        place, _, last = name.rpartition(".")
        owner, parameter = (
            (model.get_submodule(place), last) if "weight" in last else (model.get_submodule(name), "weight")
        )
        getattr(owner, parameter).data = lowered(getattr(owner, parameter), form)
    return model.eval()


@cache
def own_code(form: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return made_low(Kinds(), OWN_CODE[form])


@cache
def of_transformers(form: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if form in ("channel", "spatial"):
        sizes: Any = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 3}
        config = transformers.ResNetConfig(num_channels=3, **sizes)
        return made_low(transformers.ResNetForImageClassification(config), TRANSFORMERS[form])
    if form == "grouped":
        sizes = {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "x", "num_labels": 3}
        config = transformers.RegNetConfig(num_channels=3, groups_width=4, **sizes)
        return made_low(transformers.RegNetForImageClassification(config), TRANSFORMERS[form])
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=8, **special)
    return made_low(transformers.GPT2LMHeadModel(config), TRANSFORMERS[form])


def planned(forms: dict[str, str]) -> Plan:
    ranks = {name: 0 if form.startswith("dense@") else RANK for name, form in forms.items()}
    layers = tuple(LayerPlan(name, (0, 0), "", ranks[name], form, 0, 0.0, "") for name, form in forms.items())
    return Plan("", None, Budget("plan"), layers)


@cache
def expected_of(form: str, seed: int = 0, *, transformer: bool = False) -> Any:
    """The model whose outputs those of everything that is written are."""
    dense = of_transformers(form, seed) if transformer else own_code(form, seed)
    if form != "quantized":
        return dense
    small: Any = compress(dense, embeddings=True, plan=planned((TRANSFORMERS if transformer else OWN_CODE)[form])).model
    found, exact = outputs(small), outputs(dense)
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()
    return small


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if isinstance(model, transformers.ResNetPreTrainedModel | transformers.RegNetPreTrainedModel):
        return model.eval()(torch.rand(2, 3, 16, 16, generator=generator)).logits
    tokens = torch.randint(0, 24, (3, 6), generator=generator)
    found = model.eval()(tokens)
    return found if isinstance(found, Tensor) else found.logits


def same(model: nn.Module, expected: nn.Module) -> None:
    assert type(model).__name__.removeprefix("LowRank") == type(expected).__name__
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-3, atol=1e-4)


def low_rank(model: nn.Module) -> int:
    pairs = {kind.__name__ for form in FORMS.values() for kind in form.classes}  # also those of exported code
    return sum(type(each).__name__ in pairs or hasattr(each, "parametrizations") for each in model.modules())


def saved(state: dict[str, Tensor], place: Path, container: str) -> Path:
    """A state dict in a container that somebody's own code reads and writes."""
    apart = {name: tensor.clone() for name, tensor in state.items() if name != "head.weight"}
    if container == "torch file":
        torch.save(state, place.with_suffix(".pt"))
        return place.with_suffix(".pt")
    if container == "file":
        save_file(apart, place.with_suffix(".safetensors"))
        return place.with_suffix(".safetensors")
    place.mkdir()
    names = list(apart)
    if container == "folder":
        save_file(apart, place / "model.safetensors")
        return place
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: apart[name] for name in inside}, place / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def dense_state(place: Path) -> dict[str, Tensor]:
    if place.suffix == ".pt":
        return torch.load(place, weights_only=True)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def own_code_from(place: Path) -> nn.Module:
    """The user's own code with a state that was written for it; the tied name may be left out."""
    model = Kinds().eval()
    missing, unexpected = model.load_state_dict(dense_state(place), strict=False)
    assert (set(missing) - {"head.weight"}, unexpected) == (set(), [])
    return model


FILES = ("file", "torch file", "folder", "sharded folder")


@pytest.mark.parametrize("form", OWN_CODE)
def test_own_code_as_a_module(form: str, tmp_path: Path) -> None:
    dense, forms, expected = own_code(form), OWN_CODE[form], expected_of(form)
    small = compress(dense, embeddings=True, plan=planned(forms)).model
    assert small is not None
    assert low_rank(small) > 0
    same(small, expected)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    loaded = load_model(tmp_path / "small.pt", Kinds)
    assert low_rank(loaded) == low_rank(small)
    same(loaded, expected)
    for factory in (None, Kinds):
        for verb in (restore, lambda *given, **named: export(*given, to="dense", **named)):
            written = verb(tmp_path / "small.pt", output=tmp_path / "dense.pt", factory=factory, overwrite=True)
            twin = Kinds()
            # A head tied to a quantized embedding has no tensors, so a state dict does not say that it is.
            lacking = ["head.weight"] if form == "quantized" else []
            missing, unexpected = twin.load_state_dict(torch.load(written.output, weights_only=True), strict=False)
            assert (missing, unexpected) == (lacking, [])
            same(twin, expected)


@pytest.mark.parametrize("container", FILES)
@pytest.mark.parametrize("form", OWN_CODE)
def test_own_code_in_files(form: str, container: str, tmp_path: Path) -> None:
    dense, expected = own_code(form), expected_of(form)
    shard = SHARD if container == "sharded folder" else FULL_MODEL
    place = saved(dense.state_dict(), tmp_path / "dense", container)
    ending = "" if place.is_dir() else ".safetensors"
    given: Any = {"embeddings": True, "plan": planned(OWN_CODE[form]), "factory": Kinds, "max_shard_size": shard}
    small = Path(str(compress(place, output=tmp_path / f"small{ending}", **given).output))
    loaded = load_model(small, Kinds)
    assert low_rank(loaded) > 0
    same(loaded, expected)
    again = tmp_path / f"again{place.suffix}"
    for factory in (None, Kinds):
        options: Any = {"output": again, "factory": factory, "max_shard_size": shard, "overwrite": True}
        same(own_code_from(Path(restore(small, **options).output)), expected)
        same(own_code_from(Path(export(small, to="dense", **options).output)), expected)
    for folder in (small, again):
        assert (folder / "model.safetensors.index.json").is_file() == (container == "sharded folder")


@cache
def from_seed(transformer: bool = False) -> Any:
    """A network whose matrices are a share of what a seed draws, and of rank two beside it."""
    return trained(gpt2 if transformer else Kinds)[0]


FROM_SEED: dict[str, Any] = {"embeddings": True, "plan": planned_from_start(KINDS), "initial": SEED, "factory": Kinds}


def test_what_training_wrote_as_a_module(tmp_path: Path) -> None:
    dense = from_seed()
    small = compress(dense, **FROM_SEED).model
    assert small is not None
    assert {type(each) for each in small.modules()} == {type(each) for each in dense.modules()}
    same(small, dense)
    small = compress(dense, output=tmp_path / "small.safetensors", **FROM_SEED).output
    same(load_model(str(small), Kinds), dense)


@pytest.mark.parametrize("container", FILES)
def test_what_training_wrote_in_files(container: str, tmp_path: Path) -> None:
    dense, shard = from_seed(), 1000 if container == "sharded folder" else FULL_MODEL
    place = saved(dense.state_dict(), tmp_path / "dense", container)
    ending = "" if place.is_dir() else ".safetensors"
    small = Path(str(compress(place, output=tmp_path / f"small{ending}", max_shard_size=shard, **FROM_SEED).output))
    assert sum(each.numel() for each in dense_state(small).values()) < sum(each.numel() for each in dense.parameters())
    same(load_model(small, Kinds), dense)
    again = tmp_path / f"again{place.suffix}"
    for factory in (None, Kinds):
        options: Any = {"output": again, "factory": factory, "max_shard_size": shard, "overwrite": True}
        same(own_code_from(Path(restore(small, **options).output)), dense)
        same(own_code_from(Path(export(small, to="dense", **options).output)), dense)
    for folder in (small, again):
        assert (folder / "model.safetensors.index.json").is_file() == (container == "sharded folder")
    merge([small, small], base=small, output=tmp_path / f"merged{ending}", mode="sum", factory=Kinds)
    same(load_model(tmp_path / f"merged{ending}", Kinds), dense)


def merged_state(models: list[nn.Module], base: nn.Module) -> nn.Module:
    """The sum of what each model was trained by on top of the base, added up in memory."""
    result, states = copy.deepcopy(base), [model.state_dict() for model in (*models, base)]
    state = {
        name: sum(each[name].double() for each in states[:-1]) - (len(models) - 1) * tensor.double()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }
    result.load_state_dict(state)
    return result


@pytest.mark.parametrize("container", ["file", "sharded folder"])
@pytest.mark.parametrize("form", OWN_CODE)
def test_own_code_merged(form: str, container: str, tmp_path: Path) -> None:
    models, forms = [own_code(form, seed) for seed in range(3)], OWN_CODE[form]
    given: Any = {"embeddings": True, "plan": planned(forms), "factory": Kinds}
    ending = "" if container == "sharded folder" else ".safetensors"
    dense, parts = [], []
    for seed, model in enumerate(models):
        dense.append(saved(model.state_dict(), tmp_path / f"dense{seed}", container))
        parts.append(Path(str(compress(dense[-1], output=tmp_path / f"small{seed}{ending}", **given).output)))
    output = tmp_path / f"merged{ending}"
    options: Any = {"output": output, "mode": "sum", "factory": Kinds, "max_shard_size": SHARD, "overwrite": True}
    models = [own_code_from(Path(restore(part, output=tmp_path / f"of {part.name}").output)) for part in parts]
    merge(parts[1:], base=dense[0], **options)
    same(load_model(output, Kinds), merged_state(models[1:], own_code(form)))
    merge(parts[1:], base=parts[0], **options)
    loaded, expected = load_model(output, Kinds), merged_state(models[1:], models[0])
    assert (low_rank(loaded) > 0) == (form not in SUMMED_DENSE)
    same(loaded, expected)
    if form in SUMMED_DENSE:
        return
    again = tmp_path / f"again{ending}"
    same(own_code_from(Path(restore(output, output=again).output)), expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """The folders of a transformers model, dense and compressed."""

    @cache
    def of(form: str, shard: int, seed: int = 0) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp(form)
        of_transformers(form, seed).save_pretrained(place / "dense", max_shard_size=shard)
        plan = planned(TRANSFORMERS[form])
        compress(place / "dense", output=place / "small", embeddings=True, plan=plan, max_shard_size=shard)
        for folder in (place / "dense", place / "small"):
            assert (folder / "model.safetensors.index.json").is_file() == (shard == SHARD)
        return place / "dense", place / "small"

    return of


def load(folder: Path, form: str, **named: Any) -> Any:
    """The model as transformers loads it, all of its weights found."""
    auto = transformers.AutoModelForCausalLM
    if form in ("channel", "spatial", "grouped"):
        auto = transformers.AutoModelForImageClassification
    model, said = auto.from_pretrained(folder, output_loading_info=True, **named)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


CONTAINERS = pytest.mark.parametrize("shard", [FULL_MODEL, SHARD], ids=["folder", "sharded folder"])


@pytest.mark.parametrize("form", TRANSFORMERS)
def test_transformers_as_a_module(form: str, tmp_path: Path) -> None:
    dense, expected = of_transformers(form), expected_of(form, transformer=True)
    small: Any = compress(dense, embeddings=True, plan=planned(TRANSFORMERS[form])).model
    same(small, expected)
    for shard, name in ((FULL_MODEL, "whole"), (SHARD, "sharded")):
        small.save_pretrained(tmp_path / name, max_shard_size=shard)
        loaded = load(tmp_path / name, form)
        assert low_rank(loaded) == low_rank(small) > 0
        same(loaded, expected)
        same(load(Path(restore(tmp_path / name, output=tmp_path / f"{name}-dense").output), form), expected)


@CONTAINERS
@pytest.mark.parametrize("form", TRANSFORMERS)
def test_transformers_folders(form: str, shard: int, folders: Any, *, tmp_path: Path) -> None:
    expected, (_, small) = expected_of(form, transformer=True), folders(form, shard)
    loaded = load(small, form)
    assert low_rank(loaded) > 0
    same(loaded, expected)
    loaded.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    same(load(tmp_path / "saved", form), expected)
    same(load(Path(restore(small, output=tmp_path / "dense", max_shard_size=shard).output), form), expected)
    exported = export(small, to="dense", output=tmp_path / "exported", max_shard_size=shard).output
    same(load(Path(exported), form), expected)
    remote = export(small, to="hf-remote", output=tmp_path / "remote", max_shard_size=shard).output
    with_code = load(Path(remote), form, trust_remote_code=True)
    assert type(with_code).__name__.startswith("LowRank")
    same(with_code, expected)


@CONTAINERS
def test_what_training_wrote_in_transformers_folders(shard: int, tmp_path: Path) -> None:
    dense = from_seed(transformer=True)
    given: Any = {"embeddings": True, "plan": planned_from_start(GPT2), "initial": SEED, "max_shard_size": shard}
    same(compress(dense, **given).model, dense)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=shard)
    small = Path(str(compress(tmp_path / "dense", output=tmp_path / "small", **given).output))
    assert (small / "model.safetensors.index.json").is_file() == (shard == SHARD)
    loaded = load(small, "plain")
    assert low_rank(loaded) == 0
    same(loaded, dense)
    loaded.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    same(load(tmp_path / "saved", "plain"), dense)
    same(load(Path(restore(small, output=tmp_path / "again", max_shard_size=shard).output), "plain"), dense)
    exported = export(small, to="dense", output=tmp_path / "exported", max_shard_size=shard).output
    same(load(Path(exported), "plain"), dense)


@CONTAINERS
@pytest.mark.parametrize("form", TRANSFORMERS)
def test_transformers_folders_merged(form: str, shard: int, folders: Any, *, tmp_path: Path) -> None:
    parts = [folders(form, shard, seed)[1] for seed in range(3)]
    merge(parts[1:], base=parts[0], output=tmp_path / "merged", mode="sum", max_shard_size=shard)
    models = [load(Path(restore(part, output=tmp_path / part.parent.name).output), form) for part in parts]
    loaded, expected = load(tmp_path / "merged", form), merged_state(models[1:], models[0])
    assert (low_rank(loaded) > 0) == (form not in SUMMED_DENSE)
    same(loaded, expected)
    if form not in SUMMED_DENSE:
        same(load(Path(restore(tmp_path / "merged", output=tmp_path / "dense").output), form), expected)


def tuned(base: Any, forms: dict[str, str]) -> Any:
    """A fine-tune of some layers by a change of rank two."""
    torch.manual_seed(7)
    model = copy.deepcopy(base)
    for name, form in forms.items():
        weight = model.get_submodule(name).weight
        weight.data += lowered(weight, form)
    return model


@CONTAINERS
@pytest.mark.parametrize("form", ["plain", "channel"])
def test_a_fine_tune_of_a_transformers_folder(form: str, shard: int, folders: Any, *, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, forms = of_transformers(form), TRANSFORMERS[form]
    model, (folder, _) = tuned(base, forms), folders(form, shard)
    model.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    options: Any = {"base": folder, "plan": planned(forms)}
    compress(tmp_path / "tuned", output=tmp_path / "adapter", **options)
    same(peft.PeftModel.from_pretrained(load(folder, form), tmp_path / "adapter").merge_and_unload(), model)
    pairs = str(compress(tmp_path / "tuned", output=tmp_path / "pairs.safetensors", **options).output)
    for _ in range(2):  # the second replaces the first
        given: Any = {"base": folder, "max_shard_size": shard, "overwrite": True}
        dense = export(pairs, to="dense", output=tmp_path / "dense", **given).output
        same(load(Path(dense), form), model)
        lora = export(pairs, to="lora", output=tmp_path / "lora", **given).output
        same(peft.PeftModel.from_pretrained(load(folder, form), lora).merge_and_unload(), model)
    adapted = compress(model, base=base, plan=planned(forms)).model
    assert adapted is not None
    same(adapted, model)


@pytest.mark.parametrize("form", ["plain", "channel"])
def test_a_fine_tune_of_own_code(form: str, tmp_path: Path) -> None:
    base, forms = own_code(form), OWN_CODE[form]
    model = tuned(base, forms)
    files = {"base": base, "tuned": model}
    for name, each in files.items():
        saved(each.state_dict(), tmp_path / name, "file")
    start = tmp_path / "base.safetensors"
    pairs = compress(
        tmp_path / "tuned.safetensors",
        base=start,
        output=tmp_path / "pairs.safetensors",
        plan=planned(forms),
        factory=Kinds,
    ).output
    written = export(str(pairs), to="dense", base=start, output=tmp_path / "dense.safetensors").output
    same(own_code_from(Path(written)), model)
