"""A device is measured once in each dtype, and a file that cannot be used is measured anew."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from compressor.engine import Run
from compressor.latency import device_profile
from compressor.latency.cache import default_folder
from tests.latency.fake import FakeDevice

RUN = Run(torch.device("cpu"))


def test_each_dtype_is_measured_once(tmp_path: Path) -> None:
    first = FakeDevice()
    profile = device_profile(RUN, [torch.float32], convolutions=False, folder=tmp_path, timer=first)
    assert {dtype for _, dtype in first.timed} == {torch.float32}
    [path] = tmp_path.iterdir()

    again = FakeDevice()
    assert device_profile(RUN, [torch.float32], convolutions=False, folder=tmp_path, timer=again) == profile
    assert not again.timed

    further = FakeDevice(bandwidth=1e9)
    both = device_profile(RUN, [torch.float32, torch.bfloat16], convolutions=False, folder=tmp_path, timer=further)
    assert both.dtypes["float32"] == profile.dtypes["float32"]
    assert both.dtypes["bfloat16"].products.bandwidth < profile.dtypes["float32"].products.bandwidth
    assert list(tmp_path.iterdir()) == [path]

    images = FakeDevice()
    assert device_profile(RUN, [torch.float32], folder=tmp_path, timer=images).dtypes["float32"].convolutions
    assert images.timed


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"version": 0}),
        lambda text: json.dumps(json.loads(text) | {"name": "abacus"}),
        lambda text: json.dumps(json.loads(text) | {"dtypes": {"float32": {}}}),
        lambda text: json.dumps(json.loads(text) | {"dtypes": 3}),
        lambda text: json.dumps(json.loads(text) | {"further": 3}),
    ],
)
def test_a_file_that_cannot_be_used_is_measured_anew_with_one_line(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    first = device_profile(RUN, [torch.float32], convolutions=False, folder=tmp_path, timer=FakeDevice())
    [path] = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    device = FakeDevice()
    with caplog.at_level(logging.WARNING):
        again = device_profile(RUN, [torch.float32], convolutions=False, folder=tmp_path, timer=device)
    assert device.timed
    assert again == first
    [record] = caplog.records
    assert record.getMessage().count(str(path)) == 1
    assert "\n" not in record.getMessage()


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    profile = device_profile(RUN, [torch.float32], convolutions=False, folder=tmp_path / "file", timer=FakeDevice())
    assert profile.measured
    assert "not kept" in caplog.text


def test_profiles_are_kept_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "compressor" / "devices"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "compressor" / "devices"
