"""torchao: weight-only int8 and int4, and int4 with HQQ, saved by `torch.save` as its pages say.

Without a GPU its int4 runs in the layout of PyTorch's kernels for CPUs, which torchao counts among its prototypes, and
in float16. int8 is dequantized and run in float32: torchao multiplies with the integers before it scales, which exceeds
the range of float16 where inputs are large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import run
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm
from transformers import AutoModelForCausalLM

DTYPE = torch.float16
FILE = "pytorch_model.bin"


def in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def quantized(folder: Path, windows: Tensor, output: Path, *, config: AOBaseConfig) -> Callable[[], nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    quantize_(model, config, in_blocks)
    output.mkdir(parents=True)
    torch.save(model.state_dict(), output / FILE)

    def load() -> nn.Module:
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
        again.load_state_dict(torch.load(output / FILE), assign=True)
        return in_float32(again) if isinstance(config, Int8WeightOnlyConfig) else again

    return load


def in_float32(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, Int8Tensor):
            module.weight = nn.Parameter(module.weight.dequantize(torch.float32), requires_grad=False)
    return model.float()


def sizes(folder: Path) -> dict[str, int]:
    """How many bytes each tensor of a state dict takes; those of torchao are made of several."""
    return {name: nbytes(tensor) for name, tensor in torch.load(folder / FILE).items()}


def nbytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def int4(group_size: int, algorithm: Int4ChooseQParamsAlgorithm) -> AOBaseConfig:
    return PrototypeInt4WeightOnlyConfig(group_size=group_size, int4_choose_qparams_algorithm=algorithm)


METHODS = {
    name: partial(quantized, config=config)
    for name, config in {
        "int8": Int8WeightOnlyConfig(),
        "int4 g128": int4(128, Int4ChooseQParamsAlgorithm.TINYGEMM),
        "int4 g32": int4(32, Int4ChooseQParamsAlgorithm.TINYGEMM),
        "int4 HQQ g128": int4(128, Int4ChooseQParamsAlgorithm.HQQ),
        "int4 HQQ g32": int4(32, Int4ChooseQParamsAlgorithm.HQQ),
    }.items()
}

if __name__ == "__main__":
    run(METHODS, ("torchao",), sizes)
