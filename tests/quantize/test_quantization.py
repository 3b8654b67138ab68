"""Names, sizes, and tensors of quantized matrices."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from compressor.quantize import (
    Quantization,
    QuantizationSettings,
    QuantizedMatrix,
    quantizations,
    quantize_to_nearest,
    scale_dtype,
)

QUANTIZATIONS = st.builds(
    Quantization,
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 200),
    zero_points=st.booleans(),
)


@given(QUANTIZATIONS)
def test_a_quantization_is_read_from_its_name_and_its_fields(quantization: Quantization) -> None:
    assert Quantization.of(quantization.name) == quantization
    assert Quantization.from_dict(quantization.to_dict()) == quantization


def test_names_say_bits_group_size_and_zero_points() -> None:
    assert Quantization(4, 128).name == "4g128"
    assert Quantization(3, 64, zero_points=True).name == "3g64z"
    assert Quantization(8).name == "8"


@pytest.mark.parametrize("name", ["", "1", "9", "16", "4g", "4g0", "4g-1", "g128", "4 g128", "4g128zz", "4g١", "4\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="quantization"):
        Quantization.of(name)


@pytest.mark.parametrize(
    "fields",
    [{}, {"bits": "4"}, {"bits": True}, {"bits": 1}, {"bits": 4, "group_size": 0}, {"bits": 4, "zero_points": 1}],
)
def test_other_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="quantization"):
        Quantization.from_dict(fields)


@pytest.mark.slow
@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 4),
    size=st.integers(1, 40),
    d_out=st.integers(1, 40),
    zero_points=st.booleans(),
)
def test_what_is_stored_has_the_announced_size_and_comes_back(
    *, bits: int, groups: int, size: int, d_out: int, zero_points: bool
) -> None:
    quantization = Quantization(bits, size, zero_points)
    shape = (d_out, groups * size)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    quantized = quantize_to_nearest(matrix, quantization, scale_dtype=torch.bfloat16)

    tensors = quantized.tensors()
    infos = quantization.infos(shape, torch.bfloat16)
    assert [(name, tuple(each.shape), each.dtype) for name, each in tensors.items()] == [
        (info.name, info.shape, info.dtype) for info in infos
    ]
    assert quantization.nbytes(shape) == sum(info.nbytes for info in infos)
    again = QuantizedMatrix.of_tensors(quantization, tensors)
    assert torch.equal(again.product(), quantized.product())


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_reads_the_same_matrix(bits: int, dtype: torch.dtype, zero_points: bool) -> None:
    quantization = Quantization(bits, 12, zero_points)
    matrix = torch.randn(7, 36, generator=torch.Generator().manual_seed(bits)).to(dtype)
    quantized = quantize_to_nearest(matrix, quantization, scale_dtype=dtype)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, group_size=12, strategy="group", symmetric=not zero_points),
    )

    read = PackedQuantizationCompressor.decompress(quantized.tensors(), scheme)["weight"]

    assert read.dtype == dtype
    assert torch.equal(read, quantized.product(dtype))


def test_sizes_are_computed_for_many_shapes_at_once() -> None:
    import numpy as np

    quantization = Quantization(5, 32, zero_points=True)
    sides = np.array([32, 64, 320])
    expected = [quantization.nbytes((11, int(side))) for side in sides]
    assert quantization.nbytes((np.full(3, 11), sides)).tolist() == expected


def test_a_group_size_that_does_not_divide_gives_way_to_the_nearest_divisor() -> None:
    quantization = Quantization.of("4g128")
    assert quantization.fitted(256) == quantization
    assert quantization.fitted(300) == Quantization(4, 150)
    assert quantization.fitted(112) == Quantization(4)
    assert quantization.fitted(257) == Quantization(4)
    assert Quantization.of("4g32").fitted(100) == Quantization(4, 25)
    assert Quantization.of("4g32").fitted(100, settings=QuantizationSettings(smallest_group=30)) == Quantization(4, 50)
    with pytest.raises(ValueError, match="divide"):
        quantization.nbytes((4, 100))


@given(d_out=st.integers(1, 300), d_in=st.integers(1, 1000), bits=st.integers(2, 8))
def test_what_is_tried_fits_and_gets_larger(d_out: int, d_in: int, bits: int) -> None:
    tried = quantizations((d_out, d_in), bits)
    sizes = [each.nbytes((d_out, d_in)) for each in tried]
    assert tried
    assert sizes == sorted(sizes)
    assert len(set(tried)) == len(tried)
    assert {each.bits for each in tried} == {bits}


def test_scales_have_the_dtype_of_a_weight_of_16_bits() -> None:
    assert scale_dtype(torch.bfloat16) == torch.bfloat16
    assert scale_dtype(torch.float16) == scale_dtype(torch.float32) == scale_dtype(torch.float64) == torch.float16


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    quantization = Quantization.of("4g8z")
    tensors = quantize_to_nearest(torch.ones(3, 16), quantization, scale_dtype=torch.float16).tensors()
    for name in ("weight_packed", "weight_scale", "weight_zero_point"):
        with pytest.raises(ValueError, match=name):
            QuantizedMatrix.of_tensors(quantization, {**tensors, name: tensors[name][:0]})
    for shape in ([3], [0, 16], [3, 16, 1]):
        with pytest.raises(ValueError, match="weight_shape"):
            QuantizedMatrix.of_tensors(quantization, {**tensors, "weight_shape": torch.tensor(shape)})
    with pytest.raises(ValueError, match="weight_zero_point"):
        QuantizedMatrix.of_tensors(
            quantization, {**tensors, "weight_zero_point": None} | {"weight_zero_point": torch.zeros(1)}
        )
