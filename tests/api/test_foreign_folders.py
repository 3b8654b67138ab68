"""Of a folder that others filled nothing runs, nothing of the machine is told, and no markup comes into our texts."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import transformers

from compressor import Compression, compress, export, restore
from compressor.cli.run import run
from compressor.report import write_report

pytestmark = pytest.mark.slow

HTML = "<img src=x onerror=alert(1)>"
CARD = f"""---
base_model: "{HTML}"
license: "<script>alert(2)</script>"
license_name: "<b>free</b>"
pipeline_tag: "<i>x</i>"
tags: ["<u>tag</u>", kept-tag]
datasets: ["<s>d</s>"]
---
# Mine

## Training hyperparameters

- lr_scheduler_type: <s>cosine</s>
- learning_rate: 0.1
- optimizer: [click](http://evil.example)
"""
FOREIGN_CODE = {
    "auto_map": {"AutoModelForCausalLM": "modeling_theirs.Theirs", "AutoTokenizer": ["org/repo--tok.Theirs", None]},
    "custom_pipelines": {"theirs": {"impl": "pipeline.Theirs"}},
}


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=60, max_position_embeddings=16, **special)
    return transformers.LlamaForCausalLM(config)


class Written(NamedTuple):
    home: Path
    compression: Compression


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Everything that is written of a folder with foreign code, secrets and markup, all by absolute paths."""
    home = tmp_path_factory.mktemp("machine")
    model = llama()
    model.save_pretrained(home / "dense")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    fast.save_pretrained(home / "dense")
    draw = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (home / name).write_text(" ".join(f"w{draw.randrange(60)}" for _ in range(600)))
    (home / "recipe.json").write_text(json.dumps({"optimizer": "sgd", "weight_decay": 0.01, "batch_size": 4}))
    dense = home / "dense"
    (dense / "README.md").write_text(CARD)
    for name in ("config.json", "tokenizer_config.json"):
        (dense / name).write_text(json.dumps(json.loads((dense / name).read_text()) | FOREIGN_CODE))
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"_name_or_path": str(dense)}))
    for name in ("modeling_theirs.py", "custom_generate/generate.py", ".env", ".git/config", "training_args.bin"):
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text("secret or code of theirs")
    compression = compress(
        dense,
        output=home / "small",
        keep=0.6,
        data=str(home / "a.txt"),
        data_samples=8,
        calibration=str(home / "b.txt"),
        calibration_samples=8,
        effort="balanced",
        recipe=str(home / "recipe.json"),
        prefer="size",
        bits=16,
    )
    write_report(compression, home / "report.html", overwrite=False)
    export(home / "small", to="hf-remote", output=home / "remote")
    restore(home / "small", output=home / "back")
    model.model.layers[0].mlp.up_proj.weight.data += torch.ones(48, 1) @ torch.rand(1, 32)
    model.save_pretrained(home / "tuned")
    compress(home / "tuned", base=dense, output=home / "adapter", keep=0.5)
    asked = ["--keep", "0.6", "--calibration", "none", "--prefer", "size"]
    assert run(["plan", str(dense), *asked, "-o", str(home / "plan.json"), "-q", "--json"]) == 0
    return Written(home, compression)


FOLDERS = ("small", "remote", "back", "adapter")


def files_of(written: Written) -> Mapping[str, bytes]:
    everything = [path for name in FOLDERS for path in (written.home / name).rglob("*") if path.is_file()]
    everything += [written.home / "report.html", written.home / "plan.json"]
    return {str(path.relative_to(written.home)): path.read_bytes() for path in everything}


def test_no_file_tells_a_path_of_the_machine(written: Written) -> None:
    place = str(written.home).encode()
    assert not [name for name, content in files_of(written).items() if place in content]
    assert json.loads(files_of(written)["small/compression.json"])["source"] == "dense"


def test_nothing_that_others_wrote_runs(written: Written) -> None:
    files = files_of(written)
    assert not [name for name, content in files.items() if b"code of theirs" in content]
    assert [name for name in files if name.endswith(".py")] == ["remote/modeling_lowrank.py"]
    for name, content in files.items():
        if name.endswith(".json"):
            assert "theirs" not in content.decode().lower(), name
    config = json.loads(files["remote/config.json"])
    classes = set(config["auto_map"].values())
    assert classes == {"modeling_lowrank.LowRankLlamaConfig", "modeling_lowrank.LowRankLlamaForCausalLM"}
    assert "auto_map" not in json.loads(files["small/config.json"])


def test_what_did_not_go_along_is_named_in_the_result(written: Written) -> None:
    named = {each["name"] for each in written.compression.to_dict()["not_copied"]}
    assert named == {
        *("modeling_theirs.py", "custom_generate", ".env", ".git", "training_args.bin"),
        *(f"{key} in {name}" for key in FOREIGN_CODE for name in ("config.json", "tokenizer_config.json")),
    }


@pytest.mark.parametrize("name", ["small", "remote", "back"])
def test_fields_of_a_foreign_card_are_no_markup_in_ours(written: Written, name: str) -> None:
    card = (written.home / name / "README.md").read_text()
    ours, _, theirs = card.partition("## Card of `dense`")
    assert "# Mine" in theirs
    assert "<" not in ours
    assert "](" not in ours
    assert "evil" not in ours
    assert "- learning_rate: 0.1" in ours
    assert "- kept-tag" in ours


def test_the_tokenizer_and_the_model_still_load(written: Written) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(written.home / "small")
    model = transformers.AutoModelForCausalLM.from_pretrained(written.home / "small")
    tokens = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(tokens).logits).all()
