"""The command for a GPU, with a tiny model on the CPU: what its parts give, and that a failure leaves the others."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

MODULES = ("gpu", "device_profile", "latency", "latency_layers", "latency_models", "latency_networks")
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu  # type: ignore[import-not-found]

    yield gpu
    for name in (*MODULES, "latency_timing", "latency_variants", "quantized_latency"):
        sys.modules.pop(name, None)


def job(gpu: ModuleType, folder: Path, *, seconds: float = 600) -> Any:
    return gpu.Job(CPU, gpu.TINY, gpu.Timekeeper(time.monotonic() + seconds), folder)


def test_all_parts(gpu: ModuleType, tmp_path: Path) -> None:
    kept: list[str] = []
    assert gpu.measured_parts(job(gpu, tmp_path), lambda document: kept.append(json.dumps(document)))
    document = json.loads(kept[-1])
    assert gpu.PARTS.keys() <= document.keys()
    assert not document.keys() & {"errors", "out of time"}
    assert document["tests"]["passed"] > 0
    rows = [*document["calibration"], *document["more effort"]]
    assert [(row["effort"], row["blocks"]) for row in rows] == [
        (effort, blocks) for effort in ("fast", "balanced", "best") for blocks in (1, 2, gpu.TINY.llama.whole)
    ]
    for few, many, whole in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert whole["extrapolated"]
        line = many["seconds"] + 2 * (many["seconds"] - few["seconds"])
        assert whole["seconds"] == pytest.approx(line, abs=0.1)
    assert {row["workload"] for row in document["generation"]} == {"prefill", "decode"}
    assert all(row["tokens a second"].keys() >= {"dense", "plain"} for row in document["generation"])
    assert len(document["integers"]) == 18
    assert all(row["relative error"] < 2**-7 for row in document["integers"])
    assert [row["same bytes"] for row in document["repeatable"]] == [True, True]


def test_a_part_that_fails_leaves_the_others(gpu: ModuleType, tmp_path: Path) -> None:
    def rows(_: Any) -> Iterator[dict[str, int]]:
        yield {"row": 1}
        raise ZeroDivisionError

    def endless(_: Any) -> dict[str, int]:
        while True:
            time.sleep(0.01)

    kept: list[dict[str, Any]] = []
    assert not gpu.measured_parts(job(gpu, tmp_path, seconds=0.5), kept.append, {"rows": rows, "endless": endless})
    assert kept[-1]["rows"] == [{"row": 1}]
    assert "ZeroDivisionError" in kept[-1]["errors"]["rows"]
    assert kept[-1]["out of time"] == ["endless"]
