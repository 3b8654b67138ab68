"""AutoRound at 8, 4, 3 and 2 bits: its presets, and its recipe for two bits with groups of 32, in its own format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from auto_round import AutoRound
from measuring import run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantized(
    folder: Path, windows: Tensor, output: Path, *, bits: int, group_size: int, iterations: int
) -> Callable[[], nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    batches = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows.split(1)]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=group_size,
        sym=True,
        dataset=batches,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        iters=iterations,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(output), format="auto_round")
    written = next(path.parent for path in sorted(output.rglob("*.safetensors")))
    return lambda: AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, device_map="cpu")


METHODS = {
    f"W{bits}A16 g{group_size}": partial(quantized, bits=bits, group_size=group_size, iterations=200)
    for bits, group_size in ((8, 128), (4, 128), (3, 128), (2, 128), (2, 32))
}

if __name__ == "__main__":
    run(METHODS, ("auto-round",))
