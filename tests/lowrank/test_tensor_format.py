"""Low-rank layers in a file are recognized by their tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.forms import FORMS, MARKERS, DenseWeight, StoredPairShape
from compressor.io import TensorInfo, open_checkpoint
from compressor.lowrank import stored_pairs
from compressor.network import Kind
from tests.forms.diagonal import DiagonalForm


class WideForm(DiagonalForm):
    """A form of matrices with a tensor of three sides."""

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        return [*super().infos(weight, rank, dtype)[:2], TensorInfo(self.names[2], (1, 1, rank), dtype)]

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        scale = self.names[2]
        return super().read(kind, {**shapes, scale: shapes[scale][2:]})


@pytest.mark.parametrize(
    ("kind", "factors", "form", "dense"),
    [
        ("linear", {"down.weight": (2, 5), "up.weight": (7, 2)}, "plain", (7, 5)),
        ("transposed linear", {"down.weight": (2, 5), "up.weight": (7, 2)}, "plain", (5, 7)),
        ("linear", {"down.weight": (2, 5), "up.weight": (5, 2), "order": (7,)}, "pivoted", (7, 5)),
        ("embedding", {"down.weight": (9, 2), "up.weight": (5, 2)}, "plain", (9, 5)),
        ("convolution", {"down.weight": (2, 5, 3), "up.weight": (7, 2, 1)}, "channel", (7, 5, 3)),
        ("convolution", {"down.weight": (2, 5, 3, 1), "up.weight": (7, 2, 1, 3)}, "spatial", (7, 5, 3, 3)),
        ("transposed convolution", {"down.weight": (5, 2, 1), "up.weight": (2, 7, 3)}, "channel", (5, 7, 3)),
        ("linear", {"down.weight": (2, 5), "up.weight": (7, 2), "scale3": (1, 1, 2)}, "wide", (7, 5)),
        ("transposed linear", {"down.weight": (2, 5), "up.weight": (7, 2), "scale3": (1, 1, 2)}, "wide", (5, 7)),
    ],
)
def test_a_layer_of_any_form_and_kind_is_recognized(
    kind: Kind,
    factors: dict[str, tuple[int, ...]],
    form: str,
    *,
    dense: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FORMS, "wide", WideForm(name="wide", names=("down.weight", "up.weight", "scale3"), power=3))
    tensors = {f"fc.{name}": torch.ones(shape) for name, shape in factors.items()}
    save_file({"fc.weight": torch.empty(MARKERS[kind]), **tensors}, tmp_path / "small.safetensors")
    [pair] = stored_pairs(open_checkpoint(tmp_path / "small.safetensors")).values()
    assert (pair.kind, pair.form, pair.rank, pair.tensor_shape) == (kind, form, 2, dense)
