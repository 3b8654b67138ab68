"""The commands and files in docs/many-machines.md are ones that their programs take."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.api.options import CompressOptions
from tests.cli.test_parameters import parsed

PAGE = (Path(__file__).parents[1] / "docs" / "many-machines.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """The words of every call of a program, after it; those of a variable stand for a number."""
    entrypoints = [job["spec"]["entrypoint"] for job in map(yaml.safe_load, blocks("yaml"))]
    lines = "\n".join([*blocks("sh"), *entrypoints]).replace("\\\n", " ").splitlines()
    found = [line.partition(f"{program} ")[2] for line in lines if re.search(rf"^(srun .*)?{program} ", line.strip())]
    return [shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)|\$\{?\w+\}?", "1", line.removesuffix("&"))) for line in found]


@pytest.mark.parametrize("words", commands("compress"), ids=lambda words: words[-1])
def test_compress_takes_its_options(words: list[str]) -> None:
    asked: CompressOptions = parsed(CompressOptions, words)
    assert asked.keep is not None
    assert asked.output is not None


def test_all_ways_to_run_are_on_the_page() -> None:
    engines = {parsed(CompressOptions, words).engine for words in commands("compress")}
    assert engines == {None, "processes:4", "processes:8", "ray", "ray:1"}


def test_ray_takes_its_options() -> None:
    start: Any = pytest.importorskip("ray.scripts.scripts").start
    known = {flag for parameter in start.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    calls = commands("ray start")
    assert len(calls) == 2
    for words in calls:
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
    [job] = map(yaml.safe_load, blocks("yaml"))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert {f"--{name}" for group in groups for name in group["rayStartParams"]} <= known


@pytest.mark.parametrize("script", blocks("sh"))
def test_bash_takes_the_scripts(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
