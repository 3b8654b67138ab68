"""Folders with their own code: the same logits where this package cannot be imported, and loud without their code."""

from __future__ import annotations

import ast
import builtins
import json
import symtable
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from compressor import BadInput, compress, export, restore
from compressor.cli.run import run
from compressor.errors import CompressorError
from compressor.exporting.remote import remote_code
from compressor.forms import FORMS, PLAIN
from tests.warm import Warm

WITHOUT_THIS_PACKAGE = """
import sys
class Blocked:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "compressor":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def remote_llama(small_llama: Path) -> Path:
    folder = small_llama.parent / "remote"
    exported = export(small_llama, to="hf-remote", output=folder)
    assert exported.layers > 0
    assert exported.bytes.after == pytest.approx(exported.bytes.before, rel=0.01)
    return folder


@pytest.mark.slow
def test_the_card_needs_no_more_than_the_folder(small_llama: Path, remote_llama: Path, warm: Warm) -> None:
    said = (remote_llama / "README.md").read_text()
    assert "import compressor" in (small_llama / "README.md").read_text()
    assert "import compressor" not in said
    [code] = [block.split("```")[0] for block in said.split("```python\n")[1:]]
    result = warm.run(WITHOUT_THIS_PACKAGE + code, folder=remote_llama.parent)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_logits_are_bit_equal_where_this_package_is_not(
    small_llama: Path, remote_llama: Path, tmp_path: Path, *, warm: Warm
) -> None:
    tied = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60, n_positions=32)
    )
    tied.save_pretrained(tmp_path / "gpt2")
    compress(
        tmp_path / "gpt2", output=tmp_path / "gpt2-small", keep=0.6, calibration="none", embeddings=True, prefer="size"
    )
    export(tmp_path / "gpt2-small", to="hf-remote", output=tmp_path / "gpt2-remote")
    tokens = torch.randint(3, 60, (2, 7))
    pairs = [(small_llama, remote_llama), (tmp_path / "gpt2-small", tmp_path / "gpt2-remote")]
    with torch.no_grad():
        expected = [transformers.AutoModelForCausalLM.from_pretrained(ours).eval()(tokens).logits for ours, _ in pairs]
    torch.save((tokens, expected), tmp_path / "expected.pt")
    code = f"""
import torch, transformers
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
for folder, logits in zip({[str(theirs) for _, theirs in pairs]}, expected):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits), folder
    assert model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 9)
try:
    transformers.AutoModelForCausalLM.from_pretrained({str(remote_llama)!r}, trust_remote_code=False)
except RuntimeError as error:
    assert "mismatch" in str(error).lower()
else:
    raise AssertionError("the dense architecture took the factors for its own")
print("equal")
"""
    ran = warm.run(WITHOUT_THIS_PACKAGE + code)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.endswith("equal\n")


@pytest.mark.slow
def test_the_harness_scores_it(remote_llama: Path, tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("lm_eval")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    tokenizer.save_pretrained(remote_llama)
    documents = [{"text": f"w{i} w{i + 1}", "choices": [f" w{i + 2}", f" w{i + 3}"], "label": i % 2} for i in range(4)]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "local_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    arguments = ["--model", "hf", "--tasks", "local_words", "--include_path", str(tmp_path), "--device", "cpu"]
    arguments += ["--model_args", f"pretrained={remote_llama},trust_remote_code=True"]
    arguments += ["--output_path", str(tmp_path / "scores.json")]
    code = "import runpy; runpy.run_module('lm_eval', run_name='__main__')"
    ran = warm.run(WITHOUT_THIS_PACKAGE + code, *arguments)
    assert ran.returncode == 0, ran.stderr[-2000:]
    [scores] = tmp_path.glob("scores*.json")
    assert 0 <= json.loads(scores.read_text())["results"]["local_words"]["acc,none"] <= 1


def test_it_becomes_dense_again(small_llama: Path, remote_llama: Path, tmp_path: Path) -> None:
    restore(remote_llama, output=tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config == json.loads((small_llama.parent / "dense" / "config.json").read_text())
    assert not list((tmp_path / "dense").glob("*.py"))


def test_the_code_needs_nothing_of_this_package() -> None:
    code = remote_code("LlamaForCausalLM", "LlamaConfig")
    assert "import compressor" not in code
    assert "from compressor" not in code
    tree = ast.parse(code)
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports_of(tree)}
    own = {"collections", "functools", "logging", "typing"}
    assert {str(name).partition(".")[0] for name in imported} <= {"torch", "transformers", *own}
    # Nothing is used, not even inside a function that is seldom called, that the module does not have.
    namespace: dict[str, Any] = {"__name__": "modeling_lowrank"}
    exec(compile(tree, "modeling_lowrank.py", "exec"), namespace)
    scope = symtable.symtable(code, "modeling_lowrank.py", "exec")
    used = {name for part in scopes(scope) for name in globals_of(part)}
    assert {"torch", "nn", "put_pair"} <= used
    assert used <= set(namespace) | set(dir(builtins))


def needing_more(dense: nn.Module, rank: int) -> nn.Module:
    raise BadInput(f"{dense} cannot have rank {rank}")


def test_code_that_needs_this_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "needing", replace(PLAIN, name="needing", build=needing_more))
    with pytest.raises(CompressorError, match="cannot stand alone: it needs BadInput"):
        remote_code("LlamaForCausalLM", "LlamaConfig")


def imports_of(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def scopes(scope: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield scope
    for child in scope.get_children():
        yield from scopes(child)


def globals_of(scope: symtable.SymbolTable) -> list[str]:
    return [each.get_name() for each in scope.get_symbols() if each.is_global() and each.is_referenced()]


def test_what_cannot_be_exported_so(small_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no transformers folder with low-rank layers"):
        export(small_llama.parent / "dense", to="hf-remote", output=tmp_path / "out")
    with pytest.raises(BadInput, match="no transformers folder with low-rank layers"):
        export(small_llama / "model.safetensors", to="hf-remote", output=tmp_path / "out")
    with pytest.raises(BadInput, match="`to` 'tflite' does not exist"):
        export(small_llama, to="tflite", output=tmp_path / "out")  # type: ignore[arg-type]
    config = json.loads((small_llama / "config.json").read_text())
    config["quantization_config"]["experts"] = ["model.layers.0.mlp"]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "model.safetensors").write_bytes((small_llama / "model.safetensors").read_bytes())
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"experts.*`to='dense'`"):
        export(strange, to="hf-remote", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM", "LlamaModel"]}, "does not name one architecture"),
        ({"architectures": "LlamaForCausalLM"}, "does not name one architecture"),
        ({"architectures": []}, "does not name one architecture"),
        ({"architectures": [7]}, "does not name one architecture"),
        ({"architectures": ["AutoConfig"]}, "has no model AutoConfig"),
        ({"architectures": ["os"]}, "has no model os"),
        ({"model_type": "unheard-of"}, "cannot read it"),
        ({"model_type": ["llama"]}, "cannot read it"),
        ({"layers": ["model.layers.0.mlp.up_proj"]}, "does not say which layers are low-rank"),
        ({"layers": {"a": {"rank": "3", "form": "plain", "kind": "linear"}}}, "a: '3' is not a rank"),
        ({"layers": {"a": {"rank": 3, "form": "diagonal", "kind": "linear"}}}, "a: there is no low-rank form"),
        (
            {"format_version": 99},
            "low-rank format 99, and this version of compressor reads formats up to 4: upgrade it",
        ),
    ],
)
def test_a_broken_configuration_is_one_line(
    small_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, changes: dict[str, Any], words: str
) -> None:
    config = json.loads((small_llama / "config.json").read_text())
    for key, value in changes.items():
        (config if key in config else config["quantization_config"])[key] = value
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((small_llama / "model.safetensors").read_bytes())
    (broken / "config.json").write_text(json.dumps(config))
    assert run(["export", str(broken), "--to", "hf-remote", "-o", str(tmp_path / "out"), "-q"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert str(broken / "config.json") in line
    assert not (tmp_path / "out").exists()
