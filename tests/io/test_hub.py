"""Models of the hub, through huggingface_hub itself, talking to a hub of the same protocol on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file

import compressor
from compressor.cli.run import run
from compressor.errors import BadInput, CompressorError
from compressor.io import hub_model, local_model

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: repositories, their trees and files; and what it sends to one."""

    files: dict[str, bytes]
    asked: list[str]
    served: dict[str, int]
    gives_parts: bool
    commits: list[list[dict[str, Any]]]
    created: list[dict[str, Any]]
    refuses_commits: bool
    pushed_to: tuple[str, ...]

    def log_message(self, *_: object) -> None: ...

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_right"
            self.answer({"type": "user", "name": "me"} if known else {"error": "who?"}, 200 if known else 401)
        elif path.startswith("/api/models/org/gated"):
            self.answer({}, 403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif path.startswith("/api/models/org/name/revision/"):
            revision = path.rpartition("/")[2]
            if revision in COMMITS:
                self.answer({"id": "org/name", "sha": COMMITS[revision], "siblings": []})
            else:
                self.answer({}, 404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
        elif path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self.answer(tree)
        elif path == "/api/models/me/small/tree/main":
            self.answer([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.pushed_to])
        elif path.startswith("/org/name/resolve/"):
            commit, _, name = path.removeprefix("/org/name/resolve/").partition("/")
            content, status = self.files[name], 200
            said = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if asked is not None and self.gives_parts:
                part, status = content[int(asked[1]) : int(asked[2]) + 1], 206
                said["Content_Range"] = f"bytes {asked[1]}-{asked[2]}/{len(content)}"
            else:
                part = content
            if self.command == "GET":
                self.served[name] = self.served.get(name, 0) + len(part)
            self.answer(part, status, **said)
        else:
            self.answer({}, 404, X_Error_Code="RepoNotFound", X_Error_Message="no such repository")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/small", "name": "me/small", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path and not self.refuses_commits:
            self.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer(
                {"success": True, "commitUrl": "https://huggingface.co/me/small/commit/1", "commitOid": "1" * 40}
            )
        else:
            self.answer({"error": "forbidden"}, 403)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that has org/name, with an empty cache to fetch it into; the working directory is empty too."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file({"a.weight": torch.randn(16, 3) @ torch.randn(3, 16), "a.bias": torch.zeros(16)}, weights)
    card = "---\nlicense: mit\nbase_model: org/start\n---\n# The original\n"
    files = {
        "model.safetensors": weights.read_bytes(),
        "README.md": card.encode(),
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"the same again",
        "onnx/model.safetensors": b"another format",
        "modeling_evil.py": b"raise SystemExit",
    }
    state = {"files": files, "asked": [], "commits": [], "created": [], "refuses_commits": False, "pushed_to": ()}
    state |= {"served": {}, "gives_parts": True}
    handler = type("OwnHub", (Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_of_the_hub_is_read_and_compressed_to_where_one_works(hub: type[Hub]) -> None:
    small = compressor.compress("org/name", keep=0.5, prefer="size")
    assert (small.source, small.output) == ("org/name", "name-compressed")
    assert small.command == "compress org/name --keep 0.5 --prefer size"
    assert sorted(path.name for path in Path("name-compressed").iterdir()) == [
        "README.md",
        "compression.json",
        "model.safetensors",
        "options.yaml",
        "tokenizer.json",
    ]
    assert [path.name for path in Path().iterdir()] == ["name-compressed"]
    card = ModelCard.load("name-compressed/README.md")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == ("org/name", "quantized", "mit")
    assert f"commit {COMMITS['main']}" in card.text
    # What that model was fine-tuned from is a fact of its training, and stays one.
    assert compressor.inspect("org/name").recipe.base_model == "org/start"
    dense = compressor.restore("name-compressed", output="dense").output
    assert compressor.inspect(dense).recipe.base_model == "org/start"


def test_only_weights_in_safetensors_and_what_goes_with_them_are_fetched_and_only_once(hub: type[Hub]) -> None:
    folder = local_model("org/name")
    assert hub_model(folder) == ("org/name", COMMITS["main"])
    assert sorted(path.name for path in folder.rglob("*")) == ["README.md", "model.safetensors", "tokenizer.json"]
    fetched = [path for path in hub.asked if "/resolve/" in path]
    hub.asked.clear()
    assert local_model("org/name") == folder
    assert fetched
    assert not [path for path in hub.asked if "/resolve/" in path]


def test_a_revision_is_the_one_that_is_read(hub: type[Hub]) -> None:
    assert hub_model(local_model("org/name", "v2")) == ("org/name", COMMITS["v2"])
    assert compressor.plan("org/name", revision="v2", keep=0.5, prefer="size").source == "org/name"
    assert run(["inspect", "org/name", "--revision", "v2", "-q"]) == 0
    with pytest.raises(BadInput, match="`revision` v2 is of models of the hub"):
        compressor.compress(torch.nn.Linear(4, 4), revision="v2", prefer="size")


def test_without_the_network_the_cache_is_what_there_is(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_model("org/name")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_model("org/name") == folder
    assert compressor.open_checkpoint("org/name").tensors["a.weight"].shape == (16, 16)
    for revision, words in ((None, "unset HF_HUB_OFFLINE"), ("v2", "of revision v2 in the cache")):
        name = "org/name" if revision else "org/other"
        with pytest.raises(BadInput, match=words):
            local_model(name, revision)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["org/absent"], "no such file or folder, and no such model on the hub"),
        (["org/gated"], "is a gated model"),
        (["org/name", "--revision", "v9"], "has no revision 'v9'"),
        (["models/typing-slip.safetensors"], "no such file or folder; check the path"),
        (["org/na--me"], "no name of the hub"),
    ],
)
def test_what_the_hub_has_not_is_said_in_one_line(
    hub: type[Hub], capsys: pytest.CaptureFixture[str], arguments: list[str], *, words: str
) -> None:
    assert run([*arguments, "--keep", "0.5", "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert not list(Path().iterdir())


def test_a_hub_that_does_not_answer_and_a_model_without_safetensors(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(BadInput, match="has no safetensors on the hub"):
        local_model("org/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="the hub cannot be asked for it"):
        local_model("org/elsewhere")


def parts_of_a_model(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a model in shards: a layer, an embedding that is not measured, and a norm."""
    torch.manual_seed(1)
    tensors = {
        "fc.weight": torch.randn(48, 3) @ torch.randn(3, 40),
        "emb.weight": torch.randn(500, 40),
        "norm.weight": torch.ones(40),
        "out.weight": torch.randn(30, 48),
    }
    placed = {name: names[number % len(names)] for number, name in enumerate(tensors)}
    for file in names:
        save_file({name: each for name, each in tensors.items() if placed[name] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": placed}).encode()
    indices = {"model.safetensors.index.json": index} if len(names) > 1 else {}
    return {**indices, **{file: (folder / file).read_bytes() for file in names}}


@pytest.mark.parametrize(
    "names",
    [("model.safetensors",), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")],
    ids=["file", "shards"],
)
def test_inspection_reads_headers_and_what_it_measures_and_keeps_no_weights(
    hub: type[Hub], tmp_path: Path, names: tuple[str, ...]
) -> None:
    del hub.files["model.safetensors"]
    hub.files |= parts_of_a_model(tmp_path, names)
    found = compressor.inspect("org/name")
    served = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    headers = sum(8 + int.from_bytes(hub.files[name][:8], "little") for name in names)
    # The first bytes of a file are looked at for what often lies in the place of one.
    looks = 2 * 512 * len(names)
    measured = 4 * (48 * 40 + 30 * 48)
    assert measured + headers <= sum(served.values()) <= measured + headers + looks
    assert found.source == "org/name"
    assert found.weight_bytes == sum(len(hub.files[name]) for name in names)
    folder = next((tmp_path / "cache").glob("models--org--name/snapshots/*"))
    assert not list(folder.glob("*.safetensors"))
    for name in names:
        (tmp_path / "whole" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).write_bytes(hub.files[name])
    if len(names) > 1:
        index = "model.safetensors.index.json"
        (tmp_path / "whole" / index).write_bytes(hub.files[index])
    expected = compressor.inspect(tmp_path / "whole")
    assert [each.singular_values for each in found.layers] == [each.singular_values for each in expected.layers]


def test_only_what_is_included_is_read(hub: type[Hub], tmp_path: Path) -> None:
    hub.files |= parts_of_a_model(tmp_path, ("model.safetensors",))
    compressor.inspect("org/name", include=["out"])
    assert hub.served["model.safetensors"] < 4 * 30 * 48 + 2000


def test_a_model_that_the_cache_has_is_read_there(hub: type[Hub]) -> None:
    local_model("org/name")
    hub.served.clear()
    assert compressor.inspect("org/name").source == "org/name"
    assert not hub.served


def test_what_was_inspected_is_fetched_where_it_is_compressed(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    compressor.inspect("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="no whole copy in the cache"):
        compressor.inspect("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert compressor.compress("org/name", keep=0.5, prefer="size").source == "org/name"


def test_a_hub_that_gives_whole_files_alone_is_refused(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    hub.gives_parts = False
    assert run(["inspect", "org/name", "-q"]) == 2
    assert "org/name/model.safetensors: is not given in parts" in capsys.readouterr().err


def test_a_path_that_exists_is_never_a_name_of_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    place = Path("org/name")
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(hub.files["model.safetensors"])
    assert local_model("org/name") == "org/name"
    assert compressor.compress("org/name", keep=0.5, prefer="size").output == str(
        Path.cwd() / "org" / "name-compressed"
    )
    assert hub.asked == []


def test_the_finished_folder_is_pushed_as_it_is_and_privately(hub: type[Hub], capsys: Any) -> None:
    hub.pushed_to = ("model-00001-of-00002.safetensors", "notes.txt", "onnx/model.safetensors", "sub/pytorch_model.bin")
    assert (
        run(["org/name", "--keep", "0.5", "--prefer", "size", "--push-to", "me/small", "-o", "small", "--overwrite"])
        == 0
    )
    assert "https://huggingface.co/me/small/commit/1" in capsys.readouterr().out
    [created] = hub.created
    assert created["name"] == "small"
    assert created.get("private") or created.get("visibility") == "private"
    [commit] = hub.commits
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit if line["key"] == "file"
    }
    written = {path.name: path.read_bytes() for path in Path("small").iterdir()}
    assert sent == written
    # Of what was there before only the weights beside the new ones go: a loader might prefer them.
    gone = [line["value"]["path"] for line in commit if line["key"] == "deletedFile"]
    assert gone == ["model-00001-of-00002.safetensors"]
    assert 'load_model("me/small"' in written["README.md"].decode()


def test_an_adapter_is_pushed_as_a_folder_is(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained("start")
    hub.files.clear()
    hub.files.update({name: (Path("start") / name).read_bytes() for name in ("config.json", "model.safetensors")})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.add_(torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1]))
    model.save_pretrained("tuned")
    asked = ["tuned", "--base", "org/name", "--keep", "0.3", "-o", "adapter", "--push-to", "me/small"]
    assert run(asked) == 0
    assert "https://huggingface.co/me/small/commit/1" in capsys.readouterr().out
    [commit] = hub.commits
    sent = {line["value"]["path"] for line in commit if line["key"] == "file"}
    assert sent == {path.name for path in Path("adapter").iterdir()} >= {"adapter_config.json"}


def test_a_push_that_cannot_work_is_refused_before_the_work(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "work" / "file.safetensors").write_bytes(hub.files["model.safetensors"])
    before = sorted(Path().iterdir())
    for model, push_to, words in (
        ("file.safetensors", "me/small", "sends a model folder"),
        ("org/name", "a/b/c", "no name of the hub"),
        ("org/name", "", "`push_to` is empty"),
    ):
        with pytest.raises(BadInput, match=words):
            compressor.compress(model, keep=0.5, prefer="size", push_to=push_to)
    with pytest.raises(BadInput, match="contradict"):
        compressor.compress("org/name", keep=0.5, prefer="size", push_to="me/small", dry_run=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadInput, match="does not answer as it should"):
        compressor.compress("org/name", keep=0.5, prefer="size", push_to="me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="unset HF_HUB_OFFLINE"):
        compressor.compress("org/name", keep=0.5, prefer="size", push_to="me/small")
    assert sorted(Path().iterdir()) == before
    assert hub.created == []


@pytest.mark.parametrize("there", ["model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "small.gguf"])
def test_weights_of_a_repository_are_replaced_only_where_that_is_asked(hub: type[Hub], there: str) -> None:
    hub.pushed_to = ("README.md", there)
    for push_to in ("me/small", "small"):
        with pytest.raises(BadInput, match=f"would replace weights that are there .{there}.*`overwrite`"):
            compressor.compress("org/name", keep=0.5, prefer="size", push_to=push_to)
    assert (hub.commits, hub.created, list(Path().iterdir())) == ([], [], [])


def test_the_model_that_is_compressed_is_never_what_is_pushed_to(hub: type[Hub]) -> None:
    for push_to in ("org/name", "Org/Name"):
        with pytest.raises(BadInput, match="would replace the model that is compressed"):
            compressor.compress("org/name", keep=0.5, prefer="size", push_to=push_to, overwrite=True)
    assert (hub.commits, hub.created, list(Path().iterdir())) == ([], [], [])


def test_weights_that_came_while_the_work_was_done_stay(hub: type[Hub]) -> None:
    def another_pushes(*_: object) -> None:
        hub.pushed_to = ("model.safetensors",)

    with pytest.raises(CompressorError, match="not pushed to me/small: it has got weights in the meantime"):
        compressor.compress(
            "org/name", keep=0.5, prefer="size", push_to="me/small", output="small", progress=another_pushes
        )
    assert hub.commits == []
    assert Path("small", "model.safetensors").exists()


def test_what_could_not_be_pushed_was_written_nevertheless(hub: type[Hub]) -> None:
    hub.refuses_commits = True
    with pytest.raises(CompressorError, match="small was written, but not pushed to me/small") as caught:
        compressor.compress("org/name", keep=0.5, prefer="size", push_to="me/small", output="small")
    assert caught.value.exit_status == 1
    assert (Path("small") / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["diagnose", "org/name"],
        ["explore", "--recipe", "org/name", "-o", "page.html"],
        ["merge", "org/name", "org/name", "-o", "both", "--mode", "sum"],
        ["plan", "org/name", "--keep", "0.5", "-o", "plan.json"],
    ],
)
def test_every_command_that_takes_a_model_takes_one_of_the_hub(hub: type[Hub], arguments: list[str]) -> None:
    assert run([*arguments, "-q"]) == 0
    assert [path for path in hub.asked if path.endswith("/model.safetensors")]
