"""Other sizes: what the allocation itself gives at each, with a command that asks for it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import compress
from compressor.cli.run import run
from compressor.planning.size import plan_by_size
from compressor.report.other_sizes import command_for, other_sizes
from tests.report.many_layers import many_layers


def test_every_size_is_what_its_share_is_allocated() -> None:
    result = many_layers(12)
    found = other_sizes(result)
    assert found is not None
    eligible = sum(m.layer.parameters for m in result.measured)
    beside = result.bytes.after - 2 * result.plan.eligible_after
    assert [each.bytes for each in found.sizes] == sorted(each.bytes for each in found.sizes)
    assert sum(found.counts) == 12
    for each in found.sizes:
        plans = plan_by_size(result.measured, int(each.keep * eligible), "plain", unit="parameters")
        assert plans is not None
        stored = 2 * sum(plan.parameters for plan in plans) + beside
        # A share has four decimals.
        assert stored == pytest.approx(each.bytes, abs=2 * (1e-4 * eligible + 96))
        assert each.command == f"compress model --output small --keep {each.keep:g}" or each.this
    assert found.sizes[-1].loss == 0
    assert {kind.ranks for kind in found.sizes[-1].kinds} == {"full"}


def test_the_size_that_was_made_is_one_of_them() -> None:
    result = many_layers(12)
    found = other_sizes(result)
    assert found is not None
    made = found.sizes[found.made]
    assert (made.bytes, made.command) == (result.bytes.after, result.command)
    assert result.plan.calibration is not None
    assert made.loss == result.plan.calibration.predicted_loss
    ranks = [layer.truncated_to for layer in result.plan.layers if layer.truncated_to is not None]
    lows = [int(kind.ranks.split()[0]) for kind in made.kinds]
    assert min(lows) == min(ranks)


def test_a_size_at_which_nothing_is_stored_is_asked_for_by_a_share_above_zero() -> None:
    result = many_layers(4)
    assert result.curve is not None
    vars(result)["curve"] = replace(result.curve, parameters=(0, *result.curve.parameters[1:]))
    found = other_sizes(result)
    assert found is not None
    assert min(each.keep for each in found.sizes) == 1e-4


def test_there_are_none_where_nothing_was_measured() -> None:
    assert other_sizes(replace(many_layers(4), measured=())) is None


def test_without_data_they_have_the_errors_of_the_layers() -> None:
    result = compress(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)), keep=0.6, prefer="size")
    found = other_sizes(result)
    assert found is not None
    assert found.sizes[found.made].loss == pytest.approx(result.losses.error)
    assert found.sizes[0].command == f"keep={found.sizes[0].keep:g}"
    made = found.sizes[found.made]
    assert made.command.startswith("keep=")
    assert float(made.command.removeprefix("keep=")) == pytest.approx(made.keep, abs=1e-4)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("compress 'my model' --max-size 40MB --data x", "compress 'my model' --data x --keep 0.25"),
        ("compress m --max-drop 0.01 --keep 0.5 --bits 8", "compress m --max-drop 0.01 --bits 8 --keep 0.25"),
        ("compress m --max-size 4MB --max-latency 0.8", "compress m --max-latency 0.8 --keep 0.25"),
        ("compress m --max-drop 0.01 --allow-miss --data x", "compress m --data x --keep 0.25"),
        ("compress m --allow-miss --max-drop=1% --keep=0.5", "compress m --allow-miss --max-drop=1% --keep 0.25"),
        ("compress m --plan p.json --max-drop 0.01", "compress m --max-drop 0.01 --keep 0.25"),
        ("compress m --bits 4", "compress m --bits 4 --keep 0.25"),
        ("compress m --keep=0.5", "compress m --keep 0.25"),
        ("compress m --keep 0.5 # and in Python metric", "compress m --keep 0.25 # and in Python metric"),
        ("compress 'a # b' --keep 0.5 # and in Python metric", "compress 'a # b' --keep 0.25 # and in Python metric"),
        ("""compress 'it'"'"'s --keep' --keep 0.5""", """compress 'it'"'"'s --keep' --keep 0.25"""),
        ("", "keep=0.25"),
    ],
)
def test_a_command_gets_the_size_in_place_of_its_own_budget(command: str, expected: str) -> None:
    assert command_for(command, 0.25) == expected
    assert shlex.split(command_for(command, 0.25))


@pytest.mark.parametrize(
    ("output", "other"),
    [
        ("a/small.safetensors", "small-0.25.safetensors"),
        ("models/small v1.5", "'small v1.5-0.25'"),
    ],
)
def test_another_size_has_another_output(output: str, other: str) -> None:
    expected = f"compress m --keep 0.25 --output {other} # and in Python metric"
    for named in ("", f" --output '{output}'", f" -o '{output}'", f" --output='{output}'"):
        assert command_for(f"compress m{named} --keep 0.5 # and in Python metric", 0.25, output) == expected


@pytest.mark.slow
def test_the_command_of_another_size_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit beside the size, and where the output of this one is there."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(60, 24)
    save_file({"x": x, "y": module(x).argmax(1)}, "data.safetensors")
    save_file(module.state_dict(), "model.safetensors")
    Path("net.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))\n"
    )
    result = compress(
        "model.safetensors", keep=0.6, max_drop=1.0, data="data.safetensors", factory="net.py:net", prefer="size"
    )
    found = other_sizes(result)
    assert found is not None
    words = shlex.split(next(each.command for each in found.sizes if 0.3 < each.keep < 0.5))
    assert "--max-drop" in words
    assert words[0] == "compress"
    assert run(words[1:]) == 0
    assert len(list(tmp_path.glob("model-compressed*.safetensors"))) == 2
