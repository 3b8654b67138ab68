"""The variants of modules all compute the same, in tiny sizes, and the tables show them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import module_variants  # type: ignore[import-not-found]

    yield module_variants
    sys.path.remove(folder)
    for name in ("module_variants", "fused_up"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("part", ["layers", "models"])
def test_every_variant_is_compared_and_shown(benchmark: ModuleType, part: str) -> None:
    with torch.inference_mode():
        rows = benchmark.PARTS[part](torch.device("cpu"), benchmark.QUICK)
    shown = benchmark.TABLES[part]({part: rows})
    assert len(shown.splitlines()) == len(rows) + 2
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert {"plain, by modules", "plain", "pivoted, by modules", "pivoted"} < row["ratios"].keys()
        assert all(name in shown for name in row["ratios"]) or part == "layers"


def test_a_variant_that_computes_something_else_is_refused(benchmark: ModuleType) -> None:
    x = torch.randn(3, 4)
    same, other = benchmark.Variant("same", lambda x: x + 1), benchmark.Variant("other", lambda x: x + 1.001)
    benchmark.require_same([same, same], x)
    with pytest.raises(AssertionError, match="other is off"):
        benchmark.require_same([same, other], x)


COMPARISON = """
import torch
from fused_up import up_in_order

torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for rows, rank, d_out in ((1, 5, 18), (3, 300, 700), (8, 16, 40), (2, 7, 7)):
        left, up = torch.randn(rows, rank).to(dtype), (torch.randn(d_out - rank, rank) / rank**0.5).to(dtype)
        order = torch.randperm(d_out).int()
        y = up_in_order(left, up, order)
        exact = torch.cat([left.double(), left.double() @ up.double().t()], dim=-1)[:, order.long()].to(dtype)
        torch.testing.assert_close(y, exact)
        assert torch.equal(y[:, order < rank], exact[:, order < rank])
        print("compared")
"""


def test_the_fused_kernel_computes_what_two_of_pytorch_do() -> None:
    """In a process of its own: Triton has to know of its interpreter before anything imports it."""
    pytest.importorskip("triton")
    folder = Path(__file__).parents[2] / "benchmarks"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPARISON], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("compared") == 12
