"""From one matrix, and a metric where there is one, to integers and scales."""

from compressor.quantize.gptq import gptq
from compressor.quantize.nearest import quantize_to_nearest
from compressor.quantize.packing import pack, packed_width, unpack
from compressor.quantize.quantization import Quantization, QuantizedMatrix, quantizations, scale_dtype
from compressor.quantize.settings import QuantizationSettings
from compressor.quantize.simulated import SimulatedMatrix, Simulation

__all__ = [
    "Quantization",
    "QuantizationSettings",
    "QuantizedMatrix",
    "SimulatedMatrix",
    "Simulation",
    "gptq",
    "pack",
    "packed_width",
    "quantizations",
    "quantize_to_nearest",
    "scale_dtype",
    "unpack",
]
