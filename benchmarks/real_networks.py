"""EfficientNet-Lite0, whose package ships its weights and no network (Tan and Le, ICML 2019; the Lite variant, 2020).

Written from the description: no squeeze-and-excitation, ReLU6, stem and head of fixed width; padded as TensorFlow does,
where the weights were trained. Names are those of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

CLASSES = 1000


@dataclass(frozen=True)
class Stage:
    """Blocks in a row: how often, the kernel, the stride of the first, the expansion, and the channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM, HEAD = 32, 1280
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SamePadding(nn.Conv2d):
    """A convolution with as many outputs as inputs over its stride; the odd row of zeros is at the end."""

    def forward(self, x: Tensor) -> Tensor:
        before_and_after = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            whole = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
            before_and_after += [whole // 2, whole - whole // 2]
        return super().forward(nn.functional.pad(x, before_and_after))


def normalization(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Channels are expanded, filtered one by one, and projected; added to the input where it has that shape."""

    def __init__(self, channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = channels * stage.expansion
        self.expands = stage.expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = normalization(wide)
        self._depthwise_conv = SamePadding(wide, wide, stage.kernel, stride, groups=wide, bias=False)
        self._bn1 = normalization(wide)
        self._project_conv = nn.Conv2d(wide, stage.channels, 1, bias=False)
        self._bn2 = normalization(stage.channels)
        self.added = stride == 1 and channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        wide = nn.functional.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow: Tensor = self._bn2(self._project_conv(wide))
        return x + narrow if self.added else narrow


class EfficientNetLite(nn.Module):
    """Images `(N, 3, 224, 224)` to logits of the classes of ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SamePadding(3, STEM, 3, 2, bias=False)
        self._bn0 = normalization(STEM)
        blocks, channels = [], STEM
        for stage in STAGES:
            for number in range(stage.blocks):
                blocks.append(Block(channels, stage, stage.stride if number == 0 else 1))
                channels = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, HEAD, 1, bias=False)
        self._bn1 = normalization(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = nn.functional.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(x.mean((2, 3)))
        return logits


def efficientnet_lite0() -> nn.Module:
    return EfficientNetLite()
