"""Adapters of mixtures of experts: PEFT stacks the pairs of the experts, and base and adapter are the fine-tune."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor import BadInput, compress, export, plan
from compressor.api.fine_tune import finish_adapter
from compressor.api.write import written
from compressor.fine_tuning import adapter_of_file
from compressor.fine_tuning.adapter import adapter_artifact
from compressor.io import Target, open_checkpoint
from compressor.lowrank import StoredErrors
from compressor.model import open_model

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # names in the file that are not those of the modules
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 4}),
    # a dense layer whose matrices are called as those of the experts
    "qwen3": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]}),
    # biases, and an expert for all tokens
    "qwen2": ("Qwen2Moe", {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4}),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 4}),
    "deepseek": (
        "DeepseekV3",
        {
            **{"moe_intermediate_size": 24, "intermediate_size": 40, "n_routed_experts": 4, "first_k_dense_replace": 1},
            **{"n_group": 2, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 8},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
    ),
    # a family that PEFT has no names for
    "phi": ("Phimoe", {"intermediate_size": 40, "num_local_experts": 4}),
}


def _gate_and_up(name: str) -> int:
    return 2 if ".experts." in name and any(role in name for role in ("w1", "w3", "gate_proj", "up_proj")) else 0


def _some_experts(name: str) -> int:
    """Two experts by ranks of their own, all others as they were; attention by another rank."""
    expert = 1 if ".experts.1." in name else 3 if ".experts.2." in name and ("w1" in name or "gate" in name) else 0
    return 4 if ".q_" in name else expert


def _everything(name: str) -> int:
    return 2


CHANGES = {"gate and up": _gate_and_up, "some experts": _some_experts, "everything": _everything}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        name, own = FAMILIES[family]
        if not (folder / family).exists():
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**SIZES, **own)
            getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder / family)
        return folder / family

    return base


def tuned_from(base: Path, folder: Path, rank: Callable[[str], int]) -> Path:
    """A copy with matrices changed by the rank that their names say, and vectors by anything where it says any."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if (r := rank(name)) and tensor.dim() == 2:
            left, right = (
                torch.randn(*sides, generator=generator) for sides in ((len(tensor), r), (r, tensor.shape[1]))
            )
            tensor.add_(0.05 * left @ right)
        elif r:
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    assert isinstance(result, torch.Tensor)
    return result.double()


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def distance(base: Path, adapter: Path, tuned: Path) -> float:
    """The error of the logits of base and adapter, relative to what the fine-tuning changed."""
    adapted = logits(peft.PeftModel.from_pretrained(load(base), adapter))
    change = logits(load(tuned)) - logits(load(base))
    return float((adapted - logits(load(tuned))).norm() / change.norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter_are_the_fine_tune(
    family: str, change: str, bases: Callable[[str], Path], *, tmp_path: Path
) -> None:
    tuned = tuned_from(bases(family), tmp_path / "tuned", CHANGES[change])
    report = compress(tuned, base=bases(family), output=tmp_path / "adapter", tolerance=1e-3)
    assert distance(bases(family), tmp_path / "adapter", tuned) < 1e-5
    assert report.bytes.after < 0.5 * report.bytes.before
    assert report.fine_tune is not None
    assert report.fine_tune.verified_with == peft.__version__
    # Experts have the names of the file, which are the only ones that vLLM knows.
    stored = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if ".experts." in name]
    in_file = load_file(tuned / "model.safetensors")
    assert stored
    assert all(name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight" in in_file for name in stored)


@pytest.mark.filterwarnings("ignore")
def test_sizes_are_kept_with_one_rank_for_all_experts(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """By --keep the ranks of experts would differ; PEFT stacks them, so that they must not."""
    base = bases("mixtral")
    tuned = tuned_from(base, tmp_path / "tuned", lambda name: 1 + len(name) % 5 if "experts" in name else 0)
    small = compress(tuned, base=base, output=tmp_path / "a", keep=0.1)
    assert small.plan.eligible_after <= 0.1 * small.plan.eligible_before
    ranks = {layer.rank for layer in small.plan.layers if layer.name.endswith("layers.0.block_sparse_moe.experts.0.w1")}
    assert len(ranks) == 1
    size = compress(tuned, base=base, output=tmp_path / "b", max_size=60_000).bytes.after
    assert size <= 60_000
    for name, error in (("a", 0.9), ("b", 0.5)):
        assert distance(base, tmp_path / name, tuned) < error


@pytest.mark.filterwarnings("ignore")
def test_a_plan_with_ranks_of_its_own_is_padded(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    tuned = tuned_from(base, tmp_path / "tuned", _some_experts)
    document = plan(tuned, base=base, tolerance=1e-3).to_dict()
    for layer, rank in zip(document["layers"], (2, 3, 4, 5), strict=False):
        layer["rank"] = max(rank, layer["rank"])
    (tmp_path / "plan.json").write_text(json.dumps(document))
    compress(tuned, base=base, output=tmp_path / "adapter", plan=tmp_path / "plan.json")
    assert distance(base, tmp_path / "adapter", tuned) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_pairs_of_any_ranks_become_an_adapter(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("qwen2")
    tuned = tuned_from(base, tmp_path / "tuned", _some_experts)
    compress(tuned, base=base, output=tmp_path / "pairs.safetensors", tolerance=1e-3)
    export(tmp_path / "pairs.safetensors", to="lora", base=base, output=tmp_path / "adapter")
    assert distance(base, tmp_path / "adapter", tuned) < 1e-5


def test_what_no_pair_can_hold_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    full = tuned_from(base, tmp_path / "full", lambda name: 32 if "experts.0.w1" in name else 0)
    with pytest.raises(BadInput, match=r"PEFT holds experts as pairs alone.*`keep`, or write factor pairs") as caught:
        compress(full, base=base, output=tmp_path / "adapter", tolerance=1e-3)
    assert "\n" not in str(caught.value)
    some = tuned_from(base, tmp_path / "some", _some_experts)
    with pytest.raises(BadInput, match="PEFT holds experts as pairs alone"):
        compress(some, base=base, output=tmp_path / "adapter", tolerance=1e-3, exclude=("*.w1",))
    assert {path.name for path in tmp_path.iterdir()} == {"full", "some"}
    compress(full, base=base, output=tmp_path / "pairs.safetensors", tolerance=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_loads_as_something_else_is_not_written(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("mixtral")
    tuned = tuned_from(base, tmp_path / "tuned", _everything)
    pairs = tmp_path / "pairs.safetensors"
    compress(tuned, base=base, output=pairs, tolerance=1e-3)
    adapter = adapter_of_file(open_checkpoint(pairs), open_model(base))

    def write(name: str, **entries: Any) -> str | None:
        errors, target = StoredErrors(), Target(tmp_path / name, "folder", ())
        spoilt = replace(adapter, config={**adapter.config, **entries})
        with written(adapter_artifact(spoilt, torch.device("cpu"), errors), target) as made:
            return finish_adapter(made, adapter, name=name, errors=errors.of)

    gate_and_up = [name for name in adapter.config["target_parameters"] if "down_proj" not in name]
    cases: dict[str, dict[str, Any]] = {
        "scale": {"lora_alpha": 77},
        "modules": {"target_modules": []},
        "saved": {"modules_to_save": None},
        "nested": {"target_parameters": gate_and_up},
        "rank": {"r": 9},
    }
    assert write("good") == peft.__version__
    for name, entries in cases.items():
        with pytest.raises(BadInput, match=r"PEFT 0\S* loads its adapter, but not the change of|PEFT cannot load"):
            write(name, **entries)
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "pairs.safetensors", "good"}


@pytest.mark.filterwarnings("ignore")
def test_without_peft_the_adapter_is_said_to_be_untried(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuned_from(bases("olmoe"), tmp_path / "tuned", _some_experts)
    monkeypatch.setitem(sys.modules, "peft", None)
    report = compress(tuned, base=bases("olmoe"), output=tmp_path / "adapter", tolerance=1e-3)
    assert report.fine_tune is not None
    assert report.fine_tune.verified_with is None
    assert "without being loaded by PEFT" in (tmp_path / "adapter" / "README.md").read_text()
