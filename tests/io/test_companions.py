"""What a model consists of goes along with new weights, and nothing else: nothing hidden, and nothing that is run."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compressor.errors import BadInput
from compressor.io import companions, copy_companions, portable_config, staged_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(source: Path, out: Path) -> dict[str, bytes]:
    with staged_folder(out, overwrite=False) as folder:
        copy_companions(source, folder)
    return contents(out)


def test_a_folder_gets_what_a_model_consists_of_and_the_rest_is_named(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(model_folder)
    with caplog.at_level(logging.WARNING):
        written = copied(model_folder, tmp_path / "out")
    kept = {
        "config.json",
        "tokenizer.json",
        "README.md",
        "merges.txt",
        "1_Pooling/config.json",
        "1_Pooling/words/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }
    assert written.keys() == kept
    assert all(written[name] == before[name] for name in kept)
    assert not any(entry.is_symlink() for entry in (tmp_path / "out").rglob("*"))
    not_copied = {each.name: each.reason for each in companions(model_folder).not_copied}
    assert not_copied == {
        ".git": "hidden",
        "1_Pooling/.cache": "hidden",
        "2_Dense/pytorch_model.bin": "pickles, which run code when they are loaded",
        "3_Dense": "with weights of its own that are no safetensors",
        "onnx": "with weights of its own that are no safetensors",
        "checkpoint-500": "checkpoints of the training",
        "again": "a link to a folder",
        "gone.json": "a broken link or no regular file",
        "secret.json": "a link out of the model folder",
        "latest.json": "not known as part of a model",
        "trainer_state.json": "of the training; the card has its contents",
        "training_args.bin": "pickles, which run code when they are loaded",
    }
    assert all(name in caplog.text for name in not_copied)
    assert contents(model_folder) == before


@pytest.mark.parametrize(
    "name", [".env", ".netrc", ".git-credentials", ".config.json", ".model.safetensors", "credentials.json", "id_rsa"]
)
def test_secrets_never_go_along_and_are_named(tmp_path: Path, model_folder: Path, name: str) -> None:
    for place in (model_folder, model_folder / "1_Pooling"):
        (place / name).write_text("secret of mine")
    written = copied(model_folder, tmp_path / "out")
    assert not any(b"secret of mine" in content for content in written.values())
    not_copied = [each.name for each in companions(model_folder).not_copied]
    assert name in not_copied
    assert f"1_Pooling/{name}" in not_copied


@pytest.mark.parametrize(
    "name",
    [
        *("modeling_mine.py", "custom_generate/generate.py", "1_Pooling/mine.py", "handler.py", "lib.so", "setup.sh"),
        *("training_args.bin", "tokenizer.pkl", "vectorizer.joblib"),
    ],
)
def test_nothing_that_is_run_goes_along(tmp_path: Path, model_folder: Path, name: str) -> None:
    (model_folder / name).parent.mkdir(exist_ok=True)
    (model_folder / name).write_text("print('run')")
    assert name not in copied(model_folder, tmp_path / "out")
    not_copied = [each.name for each in companions(model_folder).not_copied]
    assert name in not_copied or name.partition("/")[0] in not_copied


CODE = [
    {"auto_map": {"AutoModel": "modeling_mine.Mine", "AutoTokenizer": ["other/repository--tokenization.Theirs", None]}},
    {"text_config": {"auto_map": {"AutoConfig": "configuration_mine.Mine"}}},
    {"custom_pipelines": {"mine": {"impl": "pipeline.Mine", "pt": ["AutoModel"]}}},
]


@pytest.mark.parametrize("named", CODE)
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"]
)
def test_configurations_go_along_without_the_code_that_they_name(
    tmp_path: Path, model_folder: Path, named: dict[str, Any], *, name: str
) -> None:
    # Escapes in a file mean the same to whoever reads it.
    text = json.dumps({"kept": [1, {"a": "é"}]} | named).replace("auto_map", r"auto\u005fmap")
    (model_folder / name).write_text(text)
    written = json.loads(copied(model_folder, tmp_path / "out")[name])
    assert written["kept"] == [1, {"a": "é"}]
    assert "auto_map" not in str(written)
    assert "custom_pipelines" not in str(written)
    assert any(each.name.endswith(f" in {name}") for each in companions(model_folder).not_copied)


json_values = st.recursive(
    st.none() | st.integers(0, 2) | st.sampled_from(["auto_map", "mine.Mine"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["auto_map", "custom_pipelines", "a", "b"]), inner),
    max_leaves=6,
)


@settings(max_examples=30)  # the machine may be busy
@given(st.dictionaries(st.sampled_from(["auto_map", "a"]), json_values))
def test_a_written_configuration_names_no_code_but_our_own(
    config: dict[str, Any],
) -> None:
    assert not {"auto_map", "custom_pipelines"} & keys_of(portable_config(config))
    own = {"AutoModel": "modeling_lowrank.LowRankBertModel"}
    written = portable_config(config, code=own)
    assert written.pop("auto_map") == own
    assert not {"auto_map", "custom_pipelines"} & keys_of(written)


def keys_of(value: Any) -> set[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(keys_of, inner))


def test_configurations_go_along_without_paths_of_the_machine(tmp_path: Path, model_folder: Path) -> None:
    given = {
        "_name_or_path": "/home/me/run",
        "text_config": {"_name_or_path": "/home/me/text", "activation": "/"},
        "parts": [{"special_tokens_map_file": "/home/me/.cache/special_tokens_map.json", "name_or_path": "org/name"}],
        "unk_token": "/home",
    }
    expected = {
        "_name_or_path": "run",
        "text_config": {"_name_or_path": "text", "activation": "/"},
        "parts": [{"special_tokens_map_file": "special_tokens_map.json", "name_or_path": "org/name"}],
        "unk_token": "/home",
    }
    for name in ("tokenizer_config.json", "generation_config.json"):
        (model_folder / name).write_text(json.dumps(given))
        assert json.loads(copied(model_folder, tmp_path / f"out of {name}")[name]) == expected
    assert portable_config(given) == expected


def test_a_written_configuration_names_no_weight_file_of_the_original() -> None:
    given = {"model_type": "bert", "transformers_weights": "fine-tuned.safetensors"}
    assert portable_config(given) == {"model_type": "bert"}


def test_sentence_transformers_modules_go_along_where_they_are_the_librarys_own(
    tmp_path: Path, model_folder: Path
) -> None:
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    (model_folder / "modules.json").write_text(json.dumps(modules))
    assert "modules.json" in copied(model_folder, tmp_path / "out")
    modules.append({"idx": 1, "path": "1_Pooling", "type": "mine.Pooling"})
    (model_folder / "modules.json").write_text(json.dumps(modules))
    assert "modules.json" not in copied(model_folder, tmp_path / "other")


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_a_companion_that_cannot_be_read_is_bad_input_and_leaves_nothing(
    tmp_path: Path, model_folder: Path, name: str, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable, opened = model_folder / name, Path.open

    def refused(self: Path, *given: Any, **named: Any) -> Any:
        # Permissions do not stop the superuser.
        if self == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(BadInput, match=f"{name}: may not be read"):
        copied(model_folder, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "secret"}


def test_files_of_a_hugging_face_cache_are_copied_through_their_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "123", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    save_file({"w": torch.ones(1)}, snapshot / "model.safetensors")
    (snapshot / "config.json").symlink_to(Path("../../blobs/abc"))
    assert copied(snapshot, tmp_path / "out") == {"config.json": b"{}"}


@pytest.mark.parametrize(
    "name", ["LICENSE", "license.txt", "LICENSE-APACHE", "NOTICE", "tokenizer.model.v3", "spiece.model"]
)
def test_licenses_and_vocabularies_go_along(tmp_path: Path, model_folder: Path, name: str) -> None:
    (model_folder / name).write_text("text")
    assert copied(model_folder, tmp_path / "out")[name] == b"text"
