"""New processes without the seconds of their imports: forks of one that has imported PyTorch and transformers only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

# One for each process of tests, started when it is first asked.
WARM = pytest.StashKey["Warm"]()

# Each line that it reads asks for a fork, which leaves the loop and ends as `python -c CODE ARGUMENTS` would.
SERVER = """
import json, os, sys
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

assert not any(name.partition(".")[0] == "compressor" for name in sys.modules)
print("ready", flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

asked = json.loads(line)
for number, path in enumerate((os.devnull, asked["stdout"], asked["stderr"])):
    file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
    os.dup2(file, number)
    os.close(file)
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.argv = ["-c", *asked["arguments"]]
exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


class Warm:
    """A process that has imported PyTorch and transformers, offline, with a home of its own; runs code in forks."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": self._folder.name}
        self._server: subprocess.Popen[str] | None = None

    def run(
        self,
        code: str,
        *arguments: str,
        folder: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> subprocess.CompletedProcess[str]:
        """Run code in a process that nothing ran in before, and give what it wrote and its exit status."""
        command, environment = [sys.executable, "-c", code, *arguments], {**environment, **self._offline}
        if sys.platform != "linux":  # where a process with the system's libraries loaded must not be forked
            return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        server = self._started()
        written = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in written:
            path.write_bytes(b"")
        asked = {
            "code": code, "arguments": arguments, "folder": str(folder or Path.cwd()), "environment": environment,
            "stdout": str(written[0]), "stderr": str(written[1]),
        }  # fmt: skip
        print(json.dumps(asked), file=server.stdin, flush=True)
        assert server.stdout is not None
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(path.read_text() for path in written))

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            errors = Path(self._folder.name, "errors")
            with errors.open("wb") as file:
                self._server = subprocess.Popen(
                    [sys.executable, "-c", SERVER], env={**os.environ, **self._offline},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                )  # fmt: skip
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == "ready\n", errors.read_text()
        return self._server

    def close(self) -> None:
        if self._server is not None:
            with self._server:
                assert self._server.stdin is not None
                self._server.stdin.close()
        self._folder.cleanup()
