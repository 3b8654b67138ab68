"""What fine-tuning added, in a few bits: base and integers are the fine-tune, in the bytes that were counted."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, evaluate, export, merge, restore
from compressor.cli.run import run
from compressor.lowrank import METADATA_KEY
from compressor.planning import Budget, LayerPlan, Plan
from tests.lowrank.started import Kinds

torch.set_num_threads(1)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40))


def fine_tuned(start: nn.Module, size: float = 0.02) -> nn.Module:
    """A copy whose tensors have changed, matrices mostly by a low rank."""
    generator = torch.Generator().manual_seed(1)
    tuned = copy.deepcopy(start)
    with torch.no_grad():
        for tensor in tuned.parameters():
            change = 0.3 * torch.randn(tensor.shape, generator=generator)
            if tensor.dim() == 2:
                ranks = [torch.randn(side, 3, generator=generator) for side in tensor.shape]
                change = change + ranks[0] @ ranks[1].T
            tensor.add_(size * change.to(tensor))
    return tuned


def saved(module: nn.Module, path: Path) -> Path:
    save_file(module.state_dict(), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    start = network()
    return saved(start, tmp_path / "start.safetensors"), saved(fine_tuned(start), tmp_path / "tuned.safetensors")


def numbers_of(stored: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """What the stored integers of a tensor stand for, by the page that describes the file, in float64."""
    packed, scales = stored[f"{name}_packed"].numpy(), stored[f"{name}_scale"].double()
    shape = [int(side) for side in stored[f"{name}_shape"]]
    ordered = np.unpackbits(packed.astype("<i4").view(np.uint8), axis=1, bitorder="little")[:, : shape[1] * bits]
    digits = ordered.reshape(shape[0], shape[1], bits).astype(np.int64)
    integers = torch.from_numpy((digits << np.arange(bits)).sum(-1) - (1 << (bits - 1))).double()
    return (integers.view(shape[0], scales.shape[1], -1) * scales.unsqueeze(2)).view(shape)


def record_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        return dict(json.loads(opened.metadata()[METADATA_KEY]))


def edited_plan(tuned: Path, base: Path, place: Path, *layers: dict[str, Any]) -> Path:
    """The plan that the command writes, with its layers edited by hand."""
    assert run(["plan", str(tuned), "--base", str(base), "--bits", "4", "-o", str(place), "-q"]) == 0
    plan = json.loads(place.read_text())
    for entry, changes in zip(plan["layers"], layers, strict=True):
        assert entry["bits"] == 4
        entry.update(changes)
    place.write_text(json.dumps(plan))
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_and_integers_are_the_fine_tune_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = network().to(dtype)
    base = saved(start, tmp_path / "start.safetensors")
    tuned = saved(fine_tuned(start), tmp_path / "tuned.safetensors")
    plan = edited_plan(
        *(tuned, base, tmp_path / "plan.json"),
        {"bits": 3, "group_size": 32, "rank": 2},
        {"form": "plain", "bits": 8, "rank": 3},
    )
    report = compress(tuned, base=base, output=tmp_path / "small.safetensors", plan=plan)
    stored, first = load_file(tmp_path / "small.safetensors"), load_file(base)
    assert report.bytes.after == (tmp_path / "small.safetensors").stat().st_size
    assert record_of(tmp_path / "small.safetensors")["format_version"] == 3
    export(tmp_path / "small.safetensors", to="dense", base=base, output=tmp_path / "dense.safetensors")
    dense, tensors = load_file(tmp_path / "dense.safetensors"), load_file(tuned)
    for name, bits in (("0", 3), ("2", None)):
        pair = [numbers_of(stored, f"{name}.{factor}.weight", 8) for factor in ("up", "down")]
        change = pair[0] @ pair[1] + (0 if bits is None else numbers_of(stored, f"{name}.weight", bits))
        assert torch.equal(dense[f"{name}.weight"], (first[f"{name}.weight"].double() + change).to(dtype))
        assert torch.equal(dense[f"{name}.bias"], tensors[f"{name}.bias"])
    assert {tensor.dtype for tensor in dense.values()} == {dtype}
    for layer in report.plan.layers:
        added = tensors[f"{layer.name}.weight"].double() - first[f"{layer.name}.weight"].double()
        found = dense[f"{layer.name}.weight"].double() - first[f"{layer.name}.weight"].double()
        rounding = float((tensors[f"{layer.name}.weight"].double() * torch.finfo(dtype).eps).norm() / added.norm())
        assert layer.error == pytest.approx(float((found - added).norm() / added.norm()), abs=rounding + 1e-6)


@pytest.mark.parametrize("asked", [{"bits": 4}, {"bits": "8,4,3", "keep": 0.15}, {"bits": "auto", "tolerance": 0.1}])
def test_what_is_asked_for_is_met(asked: dict[str, Any], files: tuple[Path, Path]) -> None:
    report = compress(files[1], base=files[0], **asked)
    assert report.output == str(files[1].with_name("tuned-difference.safetensors"))
    assert report.bytes.after == Path(str(report.output)).stat().st_size
    assert report.fine_tune is not None
    assert report.fine_tune.written_as == "quantized layers"
    widths = {layer.bits for layer in report.plan.layers}
    if "keep" in asked:
        assert report.plan.eligible_after <= asked["keep"] * report.plan.eligible_before
        assert widths <= {3, 4, 8, 16}
    elif "tolerance" in asked:
        assert max(layer.error for layer in report.plan.layers) <= asked["tolerance"]
    else:
        assert widths == {4}
        assert report.parameters.after == report.parameters.before
    assert "quantized layers beside" in " ".join(str(report).split())


def test_a_module_computes_what_the_files_do(files: tuple[Path, Path], tmp_path: Path) -> None:
    modules = []
    for path in files:
        modules.append(network())
        modules[-1].load_state_dict(load_file(path))
    start, tuned = modules
    asked: Any = {"bits": "8,4,3", "keep": 0.2}
    small = compress(tuned, base=start, **asked).model
    compress(files[1], base=files[0], output=tmp_path / "small.safetensors", **asked)
    export(tmp_path / "small.safetensors", to="dense", base=files[0], output=tmp_path / "dense.safetensors")
    dense = network()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert small is not None
    inputs = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(small(inputs), dense(inputs), rtol=0, atol=1e-5)


FORMS = {
    "square": ("plain@8", 5),
    "tall": ("plain", 5),
    "channel": ("dense@8", 0),
    "spatial": ("channel@8", 3),
    "back": ("channel@8", 3),
    "rnn.weight_ih_l0": ("dense@8", 0),
    "rnn.weight_hh_l0": ("plain@6", 4),
}


def test_layers_of_every_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Kinds().eval()
    tuned = fine_tuned(start, size=0.1).eval()
    layers = [LayerPlan(name, (0, 0), "", rank, form, 0, 0.0, "") for name, (form, rank) in FORMS.items()]
    plan = Plan("", None, Budget("plan"), tuple(layers))
    files = []
    for module, name in ((start, "start"), (tuned, "tuned")):
        state = {name: each for name, each in module.state_dict().items() if name != "head.weight"}
        save_file(state, tmp_path / f"{name}.safetensors")
        files.append(tmp_path / f"{name}.safetensors")
    report = compress(files[1], base=files[0], plan=plan, factory=Kinds)
    assert report.bytes.after == Path(str(report.output)).stat().st_size
    dense = Kinds().eval()
    restored = load_file(str(restore(str(report.output), base=files[0]).output))
    assert dense.load_state_dict(restored, strict=False) == (["head.weight"], [])
    small = compress(tuned, base=start, plan=plan).model
    assert small is not None
    tokens = torch.arange(18).view(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens), dense(tokens), rtol=0, atol=1e-5)
        assert (small(tokens) - start(tokens)).norm() > 0.1 * (tuned(tokens) - start(tokens)).norm()


def test_small_changes_of_float32_keep_their_digits(tmp_path: Path) -> None:
    """Scales below the normal numbers of float16."""
    torch.manual_seed(0)
    start = network()
    base = saved(start, tmp_path / "start.safetensors")
    tuned = saved(fine_tuned(start, size=1e-5), tmp_path / "tuned.safetensors")
    report = compress(tuned, base=base, output=tmp_path / "small.safetensors", bits=8)
    scales = {name: each for name, each in load_file(str(report.output)).items() if name.endswith("scale")}
    assert max(float(each.abs().max()) for each in scales.values()) < torch.finfo(torch.float16).smallest_normal
    assert max(layer.error for layer in report.plan.layers) < 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        **{"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    torch.manual_seed(0)
    start = transformers.LlamaForCausalLM(config)
    start.save_pretrained(place / "base")
    tuned = copy.deepcopy(start).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=2e-3)
    tokens = torch.randint(3, 48, (8, 4, 12), generator=torch.Generator().manual_seed(2))
    for batch in tokens:
        optimizer.zero_grad()
        tuned(batch, labels=batch).loss.backward()
        optimizer.step()
    tuned.save_pretrained(place / "tuned")
    return place / "base", place / "tuned"


def squared_error(folder: Path, *, of: Path, base: Path) -> float:
    """The squared error of all differences of the linear layers beside their squared size."""
    found, exact, first = (load_file(each / "model.safetensors") for each in (folder, of, base))
    names = [name for name in exact if name.endswith("_proj.weight")]
    lost = sum(float((found[name] - exact[name]).double().square().sum()) for name in names)
    return lost / sum(float((exact[name] - first[name]).double().square().sum()) for name in names)


@pytest.mark.slow
def test_few_bits_with_ranks_lose_less_than_ranks_of_16_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    errors, sizes = {}, {}
    for bits in ("16", "8,4,3,2"):
        pairs = tmp_path / f"{bits}.safetensors"
        report = compress(tuned, base=base, output=pairs, bits=bits, keep=0.12)
        export(pairs, to="dense", base=base, output=tmp_path / bits)
        sizes[bits] = pairs.stat().st_size
        errors[bits] = squared_error(tmp_path / bits, of=tuned, base=base)
    assert {layer.form.partition("@")[0] for layer in report.plan.layers} >= {"dense"}
    assert sizes["8,4,3,2"] < sizes["16"] + 4096  # what the header says of more tensors
    assert errors["8,4,3,2"] < 0.5 * errors["16"]


@pytest.mark.slow
def test_a_folder_with_bits_gives_a_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    report = compress(tuned, base=base, bits=3, output=tmp_path / "small.safetensors")
    assert report.bytes.after == (tmp_path / "small.safetensors").stat().st_size
    restore(tmp_path / "small.safetensors", base=base, output=tmp_path / "dense")
    model, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not said["missing_keys"]
    tokens = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        exact, first = (
            transformers.AutoModelForCausalLM.from_pretrained(each)(tokens).logits for each in (tuned, base)
        )
        assert (model(tokens).logits - exact).norm() < 0.5 * (first - exact).norm()
    examples = [{"input_ids": tokens, "labels": tokens}]
    found, dense = (
        evaluate(each, data=examples, **given)
        for each, given in ((tmp_path / "small.safetensors", {"base": base}), (tmp_path / "dense", {}))
    )
    assert found.compressed_loss == dense.compressed_loss
    with pytest.raises(BadInput, match="LoRA has no integers"):
        export(tmp_path / "small.safetensors", to="lora", base=base, output=tmp_path / "adapter")
    with pytest.raises(BadInput, match="would be a LoRA adapter"):
        compress(tuned, base=base, bits=3, output=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_every_verb_reads_it_beside_its_base(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = files
    small = str(compress(tuned, base=base, bits="8,4", keep=0.3).output)
    written = {
        name: load_file(str(verb(small, base=base, output=tmp_path / f"{name}.safetensors").output))
        for name, verb in (("restored", restore), ("exported", partial(export, to="dense")))
    }
    assert all(torch.equal(written["exported"][name], each) for name, each in written["restored"].items())
    inputs = torch.randn(12, 64)
    data = (inputs, torch.arange(12) % 40)
    found = evaluate(small, base=base, data=data, factory=network)
    dense = evaluate(tmp_path / "restored.safetensors", data=data, factory=network)
    assert found.compressed_loss == dense.compressed_loss
    assert found.compressed_loss != evaluate(base, data=data, factory=network).compressed_loss
    merge([small, tuned], base=base, mode="sum", output=tmp_path / "merged.safetensors")
    merged, first, other = (load_file(each) for each in (tmp_path / "merged.safetensors", base, tuned))
    for name, each in merged.items():
        expected = written["restored"][name].double() + other[name].double() - first[name].double()
        torch.testing.assert_close(each, expected.float(), rtol=0, atol=1e-6)


def test_a_base_goes_with_a_difference_and_with_nothing_else(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = files
    small = str(compress(tuned, base=base, bits=4).output)
    data: Any = (torch.randn(4, 64), torch.arange(4))
    output = tmp_path / "out.safetensors"
    for verb in (
        partial(restore, output=output),
        partial(evaluate, data=data, factory=network),
        lambda model: merge([model, tuned], mode="sum", output=output),
    ):
        with pytest.raises(BadInput, match="name the base"):
            verb(small)
    for verb in (partial(restore, output=output), partial(evaluate, data=data, factory=network)):
        with pytest.raises(BadInput, match="no difference to a base"):
            verb(tuned, base=base)
        with pytest.raises(BadInput, match="is not the base of"):
            verb(small, base=tuned)
    assert not output.exists()


def test_what_cannot_be_is_refused_in_a_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = files
    wide = saved(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40)), tmp_path / "wide.safetensors")
    plan = edited_plan(tuned, base, tmp_path / "plan.json", {"form": "pivoted", "rank": 2}, {})
    output = str(tmp_path / "small.safetensors")
    for arguments, words in (
        (["--base", str(wide), "--bits", "4"], "is 48 x 64, and in its base 48 x 32"),
        (["--base", str(tmp_path / "none.safetensors"), "--bits", "4"], "none.safetensors"),
        (["--base", str(base), "--plan", str(plan)], "is to be pivoted@4"),
        (["--base", str(base), "--bits", "4", "--embeddings"], "not for differences to a base"),
    ):
        capsys.readouterr()
        assert run([str(tuned), *arguments, "-o", output, "-q"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    assert not Path(output).exists()


@pytest.mark.parametrize("said", ["float3", 16, "int8", "nn", ["float32"]])
def test_a_dtype_that_does_not_exist_is_refused(said: object, files: tuple[Path, Path], tmp_path: Path) -> None:
    small = Path(str(compress(files[1], base=files[0], bits=4).output))
    tensors, record = load_file(small), record_of(small)
    record["dtypes"]["0"] = said
    save_file(tensors, tmp_path / "broken.safetensors", metadata={METADATA_KEY: json.dumps(record)})
    with pytest.raises(BadInput, match=r"the dtype .* of 0 does not exist"):
        export(tmp_path / "broken.safetensors", to="dense", base=files[0], output=tmp_path / "dense.safetensors")
