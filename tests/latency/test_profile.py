"""What a profile predicts follows from its constants and its grids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor import BadInput
from compressor.latency import SHIPPED, Convolution, DeviceProfile, MatrixProduct, shipped_profile
from compressor.latency.profile import Corrections, Steps, footprint, is_unfolded, whole_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPUS = tuple(name for name in SHIPPED if name != "cpu")


@pytest.mark.parametrize("name", GPUS)
@given(st.tuples(st.integers(1, 4096), st.integers(1, 8192), st.integers(1, 8192)), st.sampled_from(DTYPES))
def test_larger_products_take_as_long_at_least(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, columns = sizes

    def seconds(rows: int, inner: int, columns: int) -> float:
        kernel = MatrixProduct(rows=rows, inner=inner, columns=columns, itemsize=dtype.itemsize)
        return float(SHIPPED[name].seconds(kernel, dtype))

    least = seconds(rows, inner, columns)
    assert least >= 5e-6
    assert seconds(2 * rows, inner, columns) >= least
    assert seconds(rows, 2 * inner, columns) >= least
    assert seconds(rows, inner, 2 * columns) >= least


@given(st.integers(1, 512), st.integers(16, 4096), st.integers(16, 4096))
def test_twice_as_large_products_take_longer_on_the_measured_cpu(rows: int, inner: int, columns: int) -> None:
    def seconds(inner: int, columns: int) -> float:
        kernel = MatrixProduct(rows=rows, inner=inner, columns=columns, itemsize=4)
        return float(SHIPPED["cpu"].seconds(kernel, torch.float32))

    assert seconds(4 * inner, 4 * columns) > seconds(inner, columns)


def test_a_gpu_computes_whole_tiles_and_reads_what_there_is() -> None:
    def seconds(rows: int, columns: int) -> float:
        kernel = MatrixProduct(rows=rows, inner=4096, columns=columns, itemsize=2)
        return float(SHIPPED["h100"].seconds(kernel, torch.bfloat16))

    assert seconds(4096, 1025) == seconds(4096, 1088) > seconds(4096, 1024)
    assert seconds(1, 4001) < seconds(1, 4032)


@pytest.mark.parametrize(
    ("width", "multiple"), [(None, 64), (4096, 64), (512, 64), (256, 32), (64, 8), (16, 2), (4, 1)]
)
def test_ranks_on_a_gpu_are_multiples_of_its_tiles_in_wide_layers(width: int | None, multiple: int) -> None:
    assert {SHIPPED[name].rank_multiple("linear", torch.bfloat16, width=width) for name in GPUS} == {multiple}


def test_convolutions_on_the_measured_cpu_have_ranks_in_blocks() -> None:
    assert SHIPPED["cpu"].rank_multiple("convolution", torch.float32) == 16
    assert SHIPPED["cpu"].rank_multiple("transposed convolution", torch.bfloat16) == 16


@given(st.integers(0, 10_000))
def test_widths_are_those_of_whole_steps(width: int) -> None:
    assert Steps().width(width) == width
    assert whole_tiles(64).width(width) == -(-width // 64) * 64
    dear = Steps(16, (0, 15, 16), (0.0, 46.0, 16.0))
    assert dear.width(width // 16 * 16) == width // 16 * 16
    assert dear.width(width // 16 * 16 + 15) == width // 16 * 16 + 46


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=6), st.floats(0.5, 200), st.floats(0.5, 2000))
def test_corrections_are_those_of_the_grid_and_between_them_elsewhere(
    factors: list[float], first: float, second: float
) -> None:
    grid = Corrections(((1.0, 100.0), (1.0, 10.0, 1000.0)), tuple(factors))
    for number, (a, b) in enumerate((a, b) for a in grid.axes[0] for b in grid.axes[1]):
        assert float(grid.at((a, b))) == pytest.approx(factors[number])
    assert min(factors) * (1 - 1e-9) <= float(grid.at((first, second))) <= max(factors) * (1 + 1e-9)
    assert float(grid.at((10.0, 1.0))) == pytest.approx((factors[0] * factors[3]) ** 0.5)
    many = np.array([first, 1.0])
    assert np.asarray(grid.at((many, second))).tolist() == [float(grid.at((a, second))) for a in many]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_comes_back_from_its_document(name: str) -> None:
    profile = SHIPPED[name]
    document = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    again = DeviceProfile.from_dict(document)
    assert again.to_dict() == profile.to_dict()
    kernel = MatrixProduct(rows=32, inner=100, columns=np.arange(1, 200), itemsize=2)
    np.testing.assert_array_equal(again.seconds(kernel, torch.bfloat16), profile.seconds(kernel, torch.bfloat16))


def test_an_unknown_device_is_told_with_the_known_ones() -> None:
    assert shipped_profile("h100").name == "h100"
    with pytest.raises(BadInput, match="h100, h200"):
        shipped_profile("abacus")


def test_a_dtype_that_is_not_known_is_as_fast_as_the_widest_known() -> None:
    profile = SHIPPED["h100"]
    assert profile.of(torch.complex64) == profile.dtypes["float64"]


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [((1, 1), "point"), ((3, 3), "area"), ((3, 1), "column"), ((1, 3), "row"), ((5,), "row"), ((1,), "point")],
)
def test_footprints_of_kernels(kernel: tuple[int, ...], expected: str) -> None:
    assert footprint(kernel) == expected


@pytest.mark.parametrize("batch", [1, 2, 8, 16])
@pytest.mark.parametrize("channels", [16, 104, 105, 400])
@pytest.mark.parametrize("geometry", [(1, 1), (3, 1), (3, 2), (1, 2), (5, 1)])
def test_convolutions_that_pytorch_unfolds(batch: int, channels: int, geometry: tuple[int, int]) -> None:
    side, stride = geometry
    dense = nn.Conv2d(channels, 8, side, stride=stride, padding=side // 2)
    x = torch.empty(batch, channels, 14, 14)
    arguments = (dense.weight, None, dense.stride, dense.padding, dense.dilation, False, (0, 0), 1)
    chosen = torch._C._select_conv_backend(x, *arguments)
    out = (14 // stride, 14 // stride)
    kernel = Convolution(
        batch=batch,
        in_channels=channels,
        out_channels=8,
        kernel=(side, side),
        in_size=(14, 14),
        out_size=out,
        itemsize=4,
    )
    assert bool(is_unfolded(kernel, torch.get_num_threads())) == (chosen == torch._C._ConvBackend.Slow2d)
