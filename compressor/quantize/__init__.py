"""From one matrix, and a metric where there is one, to integers and scales."""

from compressor.quantize.gptq import SimulatedMatrix, gptq, simulated
from compressor.quantize.nearest import quantize_to_nearest
from compressor.quantize.packing import pack, packed_width, unpack
from compressor.quantize.quantization import Quantization, QuantizedMatrix, quantizations, scale_dtype
from compressor.quantize.settings import QuantizationSettings

__all__ = [
    "Quantization",
    "QuantizationSettings",
    "QuantizedMatrix",
    "SimulatedMatrix",
    "gptq",
    "pack",
    "packed_width",
    "quantizations",
    "quantize_to_nearest",
    "scale_dtype",
    "simulated",
    "unpack",
]
