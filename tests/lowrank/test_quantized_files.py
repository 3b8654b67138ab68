"""Quantized layers in files and folders: read as they were written, by us and by transformers without us."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, evaluate, export, inspect, load_model, merge, restore
from compressor.io import open_checkpoint
from compressor.lowrank import stored_pairs
from tests.exporting.conftest import tiny_llama
from tests.lowrank.quantized import Forms, quantized
from tests.lowrank.test_transformers_folders import tiny_models
from tests.warm import Warm

BITS: Forms = {
    "*q_proj": ("dense@4g32", 0),
    "*k_proj": ("dense@8", 0),
    "*o_proj": ("dense@3g32", 0),
    "*up_proj": ("dense@6", 0),
    "*down_proj": ("dense@5g32", 0),
}
BOTH: Forms = {
    "*q_proj": ("plain@4g32", 12),
    "*k_proj": ("pivoted@8", 5),
    "*o_proj": ("plain", 8),
    "*up_proj": ("dense@2g32z", 0),
    "*gate_proj": ("dense@2g32", 6),
    "*down_proj": ("dense@5g32", 0),
}
TOKENS = torch.arange(3, 20)[None]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(TOKENS).logits
    return found


def llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    model = tiny_llama(hidden_size=64, intermediate_size=96, **changes).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_alone_load_in_transformers_without_this_package(dtype: torch.dtype, tmp_path: Path, warm: Warm) -> None:
    in_memory = logits(quantized(llama(tmp_path / "dense", dtype), BITS, tmp_path / "small"))
    restore(tmp_path / "small", output=tmp_path / "restored")
    code = """
import sys, torch, transformers
torch.set_num_threads(1)
model, loaded = transformers.AutoModelForCausalLM.from_pretrained("small", output_loading_info=True)
assert not any(loaded.values()), loaded
with torch.no_grad():
    torch.save(model(torch.arange(3, 20)[None]).logits, "logits.pt")
assert "compressed_tensors" in sys.modules and "compressor" not in sys.modules
"""
    ran = warm.run(code, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = torch.load(tmp_path / "logits.pt")
    assert torch.equal(found, logits(load_model(tmp_path / "restored")))
    # Ours are multiplied by kernels of integers, which round the products otherwise.
    torch.testing.assert_close(found, in_memory, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("forms", [BITS, BOTH], ids=["bits", "pairs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_folder_loads_generates_and_saves(forms: Forms, dtype: torch.dtype, tmp_path: Path) -> None:
    in_memory = quantized(llama(tmp_path / "dense", dtype), forms, tmp_path / "small", shard_size=30_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    expected = logits(in_memory)
    loaded = load_model(tmp_path / "small")
    assert torch.equal(logits(loaded), expected)
    assert loaded.dtype == dtype
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, TOKENS.shape[1] + 3)
    for name, model in {"loaded": loaded, "in memory": in_memory}.items():
        model.save_pretrained(tmp_path / name)
        assert torch.equal(logits(load_model(tmp_path / name)), expected)
        ours, theirs = (
            json.loads((tmp_path / each / "config.json").read_text())["quantization_config"] for each in ("small", name)
        )
        assert {key: each for key, each in theirs.items() if key != "dense"} == ours
    if forms is BOTH:
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("gpt2", "*c_fc"), ("mixtral", "*experts.*")])
def test_layers_that_compressed_tensors_has_no_place_for_load_with_us(name: str, layers: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = tiny_models()[name]
    dense.save_pretrained(tmp_path / "dense")
    in_memory = quantized(tmp_path / "dense", {layers: ("dense@8", 0)}, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressor"
    loaded = type(dense).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(in_memory))
    loaded.save_pretrained(tmp_path / "again")
    restore(tmp_path / "again", output=tmp_path / "restored")
    restored = type(dense).from_pretrained(tmp_path / "restored")
    torch.testing.assert_close(logits(restored), logits(in_memory), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", [("dense@8", 0), ("dense@2g32", 5), ("plain@8", 9)], ids=str)
def test_a_head_goes_with_the_quantized_embedding_that_it_is_tied_to(form: tuple[str, int], tmp_path: Path) -> None:
    dense = llama(tmp_path / "dense", tie_word_embeddings=True)
    in_memory = quantized(dense, {"*embed_tokens": form}, tmp_path / "small")
    expected = logits(in_memory)
    assert not any("lm_head" in name for name in load_file(tmp_path / "small" / "model.safetensors"))
    in_memory.save_pretrained(tmp_path / "again")
    for name in ("small", "again"):
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected)
    assert torch.equal(logits(copy.deepcopy(in_memory)), expected)
    restore(tmp_path / "again", output=tmp_path / "restored")
    restored = load_model(tmp_path / "restored")
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    torch.testing.assert_close(logits(restored), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved_again", [False, True])
def test_floats_come_back(saved_again: bool, tmp_path: Path) -> None:
    in_memory = quantized(llama(tmp_path / "dense"), BOTH, tmp_path / "small")
    folder = tmp_path / "small"
    if saved_again:  # without our metadata
        in_memory.save_pretrained(folder := tmp_path / "again")
    assert stored_pairs(open_checkpoint(folder)) == stored_pairs(open_checkpoint(tmp_path / "small"))
    restored = restore(folder, output=tmp_path / "restored")
    assert len(restored.layers) == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), logits(in_memory), rtol=0, atol=1e-5)
    if not saved_again:
        export(folder, to="dense", output=tmp_path / "dense again")
        exported = load_file(tmp_path / "dense again" / "model.safetensors")
        assert all(torch.equal(exported[name], each) for name, each in model.state_dict().items() if name in exported)


def test_no_code_goes_along_with_what_compressed_tensors_loads(tmp_path: Path) -> None:
    quantized(llama(tmp_path / "dense"), BITS, tmp_path / "small")
    with pytest.raises(BadInput, match="needs no code"):
        export(tmp_path / "small", to="hf-remote", output=tmp_path / "remote")


REMOTE = """
import sys, torch, transformers
class Blocked:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "compressor":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
for folder, (logits, size) in torch.load(sys.argv[1]).items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(torch.arange(3, 20)[None]).logits, logits), folder
    assert sum(each.nbytes for each in (*model.parameters(), *model.buffers())) == size
    model.generate(torch.arange(3, 20)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.save_pretrained(folder + "-again")
print("equal")
"""


@pytest.mark.slow
def test_integers_bring_their_code_along(tmp_path: Path, warm: Warm) -> None:
    """Pairs, corrections, zero points, and a quantized embedding with the head tied to it; in memory as integers."""
    expected = {}
    for name, form, dtype in (("whole", "dense@8", torch.bfloat16), ("pair", "plain@8", torch.float32)):
        dense = llama(tmp_path / name, dtype, tie_word_embeddings=True)
        forms = {**BOTH, "*embed_tokens": (form, 0 if name == "whole" else 9)}
        quantized(dense, forms, tmp_path / f"{name}-small")
        remote = export(tmp_path / f"{name}-small", to="hf-remote", output=tmp_path / f"{name}-remote").output
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-small")
        outputs = logits(loaded)  # before it is measured: kernels bring integers into their own order
        expected[remote] = outputs, sum(each.nbytes for each in (*loaded.parameters(), *loaded.buffers()))
    torch.save(expected, tmp_path / "expected.pt")
    ran = warm.run(REMOTE, str(tmp_path / "expected.pt"))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.endswith("equal\n")
    for remote, (outputs, _) in expected.items():
        for folder in (remote, f"{remote}-again"):
            restored = load_model(restore(folder, output=f"{folder}-dense").output)
            rounding = 1e-5 if outputs.dtype == torch.float32 else 0.02
            torch.testing.assert_close(logits(restored), outputs, rtol=rounding, atol=rounding)


def test_merging_reads_the_matrices_that_integers_stand_for(tmp_path: Path) -> None:
    quantized(llama(tmp_path / "dense"), BOTH, tmp_path / "small")
    dense = tmp_path / "dense"
    merge([tmp_path / "small", dense], base=dense, mode="sum", output=tmp_path / "merged")
    restore(tmp_path / "small", output=tmp_path / "restored")
    expected, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("restored", "merged"))
    assert {name: each.shape for name, each in merged.items()} == {name: each.shape for name, each in expected.items()}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_folder_in_few_bits_is_not_compressed_again(tmp_path: Path) -> None:
    quantized(llama(tmp_path / "dense"), BITS, tmp_path / "small")
    for verb in (partial(compress, output=tmp_path / "again", keep=0.5, calibration="none"), inspect):
        with pytest.raises(BadInput, match="quantized already"):
            verb(tmp_path / "small")


def test_of_a_folder_with_pairs_too_what_has_few_bits_stays(tmp_path: Path) -> None:
    quantized(llama(tmp_path / "dense"), BOTH, tmp_path / "small")
    result = compress(tmp_path / "small", output=tmp_path / "again", keep=0.5, calibration="none")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "small"))
    integers = {name for name in theirs if name.endswith(("_packed", "_scale", "_zero_point"))}
    assert integers
    assert all(torch.equal(ours[name], theirs[name]) for name in integers)
    assert any("bits already" in str(layer.skip) for layer in result.skipped)
    assert torch.isfinite(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"))).all()


@pytest.mark.parametrize("forms", [BITS, BOTH], ids=["bits", "pairs"])
def test_a_quantized_folder_is_measured(forms: Forms, tmp_path: Path) -> None:
    expected = logits(quantized(llama(tmp_path / "dense"), forms, tmp_path / "small"))
    loss = nn.functional.cross_entropy(expected[0, :-1], TOKENS[0, 1:])
    measured = evaluate(tmp_path / "small", data=[{"input_ids": TOKENS, "labels": TOKENS}])
    assert measured.compressed_loss == pytest.approx(float(loss), rel=1e-5)


class Network(nn.Module):
    """A layer of each kind, at sizes that quantize."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(50, 64)
        self.rnn = nn.GRU(64, 40, batch_first=True)
        self.conv = nn.Conv1d(40, 48, 3, padding=1)
        self.wide = nn.Conv1d(48, 64, 3, padding=1)
        self.fc = nn.Linear(64, 50)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.table(tokens))
        wide = self.wide(self.conv(hidden.transpose(1, 2)).relu()).transpose(1, 2)
        found: Tensor = self.fc(wide) + self.head(wide)
        return found


@pytest.mark.parametrize(
    "forms",
    [
        {"rnn*ih*": ("dense@8", 0), "conv": ("dense@4g24", 0), "wide": ("dense@3g24", 4), "fc": ("dense@8", 0)},
        {"rnn*ih*": ("plain@8", 6), "conv": ("channel@8", 5), "wide": ("channel@4g24", 8), "fc": ("plain@4", 7)},
    ],
    ids=["dense", "pairs"],
)
def test_a_file_is_read_with_its_metadata_and_without(forms: Forms, tmp_path: Path) -> None:
    dense = Network()
    own = {name: each for name, each in dense.state_dict().items() if name != "head.weight"}
    save_file(own, tmp_path / "dense.safetensors", metadata={"head.weight": "table.weight"})
    tokens = torch.arange(10)[None]
    in_memory = quantized(tmp_path / "dense.safetensors", forms, tmp_path / "small.safetensors", factory=Network)
    expected = in_memory.eval()(tokens)
    torch.save(in_memory.state_dict(), tmp_path / "state.pt")
    for name in ("small.safetensors", "state.pt"):
        assert torch.equal(load_model(tmp_path / name, Network).eval()(tokens), expected), name
        restore(tmp_path / name, output=tmp_path / f"{name}.pt")
        torch.testing.assert_close(load_model(tmp_path / f"{name}.pt", Network).eval()(tokens), expected)
    pairs = stored_pairs(open_checkpoint(tmp_path / "small.safetensors"))
    assert {name: (pair.form, pair.rank, pair.dtype) for name, pair in pairs.items()} == {
        "rnn.weight_ih_l0": (*forms["rnn*ih*"], torch.float32)
    } | {name: (*forms[name], torch.float32) for name in ("conv", "wide", "fc")}
    of_module = stored_pairs(open_checkpoint(in_memory))
    assert {name: replace(pair, kind=pairs[name].kind) for name, pair in of_module.items()} == pairs


HUGE = torch.tensor([2**40, 2**40])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a matrix in 4 bits with zero points and of a pair in 8."""
    folder = tmp_path_factory.mktemp("quantized")
    forms: Forms = {"*q_proj": ("dense@4g32z", 0), "*k_proj": ("plain@8", 5)}
    quantized(llama(folder / "dense"), forms, folder / "small")
    return folder / "small"


Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{Q}.weight_shape": HUGE}, "do not fit together"),
        ({f"{Q}.weight_shape": torch.tensor([64, 2**62])}, "do not fit together"),
        ({f"{Q}.weight_shape": torch.tensor([64, -64])}, "is no shape"),
        ({f"{Q}.weight_shape": torch.tensor([64])}, "is no shape"),
        ({f"{Q}.weight_shape": torch.tensor([64.0, 64.0])}, "is no shape"),
        ({f"{Q}.weight_shape": torch.zeros(2**20, dtype=torch.int64)}, "is no shape"),
        ({f"{Q}.weight_shape": None}, "weight_shape is missing"),
        ({f"{Q}.weight_scale": None}, "weight_scale is missing"),
        ({f"{Q}.weight_scale": torch.ones(64, 3)}, "do not fit together"),
        ({f"{Q}.weight_scale": torch.ones(64, 0)}, "do not fit together"),
        ({f"{Q}.weight_scale": torch.ones(64)}, "do not fit together"),
        ({f"{Q}.weight_scale": torch.full((64, 2), torch.nan, dtype=torch.float16)}, "not finite"),
        ({f"{Q}.weight_scale": torch.ones(64, 2, dtype=torch.int32)}, "no packed integers"),
        ({f"{Q}.weight_packed": torch.zeros(64, 8, dtype=torch.uint8)}, "no packed integers"),
        ({f"{Q}.weight_packed": torch.zeros(64, 9, dtype=torch.int32)}, "do not fit together"),
        ({f"{Q}.weight_packed": torch.zeros(63, 8, dtype=torch.int32)}, "do not fit together"),
        ({f"{Q}.weight_zero_point": torch.zeros(64, 2, dtype=torch.int32)}, "do not fit together"),
        ({f"{Q}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "another order"),
        ({f"{K}.up.weight_shape": HUGE}, "do not fit together"),
        ({f"{K}.down.weight_packed": None}, "do not fit together"),
        ({f"{K}.weight": torch.empty(0, 4)}, "cannot be told|do not fit together"),
    ],
)
def test_broken_tensors_are_refused_in_a_line(
    changes: dict[str, Tensor | None], words: str, *, good: Path, tmp_path: Path
) -> None:
    tensors = load_file(good / "model.safetensors") | changes
    for metadata in ({"format": "pt"}, open_checkpoint(good).metadata):
        file = tmp_path / f"{len(metadata)}.safetensors"
        save_file({name: each for name, each in tensors.items() if each is not None}, file, metadata=dict(metadata))
        with pytest.raises(BadInput, match=words) as raised:
            restore(file)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("layer", "changes", "words"),
    [
        (Q, {"bits": 99}, "99 bits"),
        (Q, {"bits": 8}, "cannot be told"),
        (Q, {"group_size": 33}, "do not fit together"),
        (Q, {"group_size": 0}, "groups of 0"),
        (Q, {"group_size": 2**70}, "no low-rank form"),
        (Q, {"zero_points": False}, "do not fit together"),
        (Q, {"form": "plain"}, "0 is not a rank"),
        (Q, {"form": "plain", "rank": 1}, "do not fit together"),
        (Q, {"form": "channel", "rank": 1}, "do not fit together"),
        (Q, {"rank": 3}, "do not fit together"),
        (Q, {"kind": "embedding"}, "do not fit together"),
        (K, {"bits": 4}, "cannot be told|do not fit together"),
        (K, {"rank": 6}, "do not fit together"),
    ],
)
def test_a_specification_that_the_tensors_contradict_is_refused(
    layer: str, changes: dict[str, Any], words: str, *, good: Path, tmp_path: Path
) -> None:
    metadata = dict(open_checkpoint(good).metadata)
    record = json.loads(metadata["compressor"])
    record["layers"][layer] |= changes
    metadata["compressor"] = json.dumps(record)
    save_file(load_file(good / "model.safetensors"), tmp_path / "small.safetensors", metadata=metadata)
    with pytest.raises(BadInput, match=words) as raised:
        restore(tmp_path / "small.safetensors")
    assert "\n" not in str(raised.value)
