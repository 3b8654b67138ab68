"""Large layers are decomposed when they are measured, and factorized from what was kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import compress, plan
from compressor.engine import Journal, Run
from compressor.errors import BadInput
from compressor.factorize import decompose
from compressor.initial import InitialWeights
from compressor.lowrank import KeptDecompositions, Rewriting, rewritten_tensors
from compressor.lowrank.rewriting import rewritten_factors
from compressor.measure import EPSILON, Precision
from compressor.model import Decomposing, inspect_layers, open_model
from compressor.planning import Budget, LayerPlan, Plan

SIDE = Precision().side
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    shapes = {"wide": (SIDE, SIDE + 40), "tall": (SIDE + 40, SIDE), "small": (40, 50)}
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, path)
    return path


def test_a_large_layer_is_factorized_as_well_as_by_lapack_in_float64(model: Path, tmp_path: Path) -> None:
    small = compress(model, output=tmp_path / "small.safetensors", keep=0.5, form="plain")
    assert [layer.rank for layer in small.plan.layers] == [
        layer.rank for layer in plan(model, keep=0.5, form="plain").layers
    ]
    before, after = load_file(model), load_file(tmp_path / "small.safetensors")
    pairs = [layer for layer in small.plan.layers if layer.rank is not None]
    assert {"wide", "tall"} <= {layer.name for layer in pairs}
    for layer in pairs:
        weight = before[f"{layer.name}.weight"].double()
        error = weight - after[f"{layer.name}.up.weight"].double() @ after[f"{layer.name}.down.weight"].double()
        least = torch.linalg.svdvals(weight)[layer.rank :].square().sum().sqrt()
        assert float(error.norm() / least) == pytest.approx(1, abs=1e-6)
        assert layer.error == pytest.approx(float(error.norm() / weight.norm()), rel=1e-5)


def test_what_is_kept_is_what_was_measured_and_large(model: Path) -> None:
    kept = KeptDecompositions(Journal())
    subject = open_model(model)
    inspected = inspect_layers(subject, EPSILON, Run(torch.device("cpu")), decomposing=Decomposing(Precision(), kept))
    assert {layer.layer.name: layer.layer.name in kept for layer in inspected} == {
        "wide": True,
        "tall": True,
        "small": False,
    }
    for layer in inspected:
        found = kept.get(layer.layer.name)
        assert (found is None) == (layer.layer.name == "small")
        if found is not None:
            assert layer.singular_values == tuple(found.values.tolist())
            assert found.basis.dtype == torch.float32


class Full(Journal):
    """A journal on a disk without room."""

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        raise BadInput(f"no room for {name}", remedy="free some")


def test_what_does_not_fit_in_the_room_is_not_kept() -> None:
    found = decompose(torch.randn(4, 5), None)
    kept = KeptDecompositions(Journal(), room=2 * found.basis.nbytes)
    for name in ("a", "b", "c"):
        kept.put(name, found)
    assert [name for name in ("a", "b", "c") if name in kept] == ["a", "b"]


def test_without_room_a_layer_is_decomposed_again(caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptDecompositions(Full())
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            kept.put(name, decompose(torch.randn(4, 5), None))
    assert kept.get("a") is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("room", [1.5 * SIDE**2 * 4, 0])
def test_the_same_numbers_are_stored_with_and_without_room(model: Path, room: float) -> None:
    subject, run, chosen = open_model(model), Run(torch.device("cpu")), plan(model, keep=0.5)
    found = []
    for space in (None, int(room)):
        kept = KeptDecompositions(Journal(), space)
        inspect_layers(subject, EPSILON, run, decomposing=Decomposing(Precision(), kept))
        rewriting = Rewriting(subject.checkpoint, subject.recipe, subject.layers, chosen, decompositions=kept)
        found.append(dict(rewritten_tensors(rewriting, run, lambda *_: None)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_what_training_wrote_in_a_large_layer_is_factorized_as_well_as_in_float64(form: str) -> None:
    def build() -> nn.Linear:
        return nn.Linear(SIDE + 40, SIDE)

    initial = InitialWeights.from_seed(build, 0)
    model, generator = build(), torch.Generator().manual_seed(1)
    sizes = torch.logspace(0, -3, SIDE)
    change = torch.randn(SIDE, SIDE, generator=generator) * sizes @ torch.randn(SIDE, SIDE + 40, generator=generator)
    start = initial.read("weight")
    assert start is not None
    with torch.no_grad():
        model.weight.copy_(0.9 * start + 1e-3 * change)
    subject = replace(open_model(model), initial=initial)
    kept = KeptDecompositions(Journal())
    [found] = inspect_layers(subject, EPSILON, Run(CPU), decomposing=Decomposing(Precision(), kept))
    assert found.start is not None
    written = model.weight.detach().double() - found.start.share * start.double()
    exact = torch.linalg.svdvals(written)
    values = torch.tensor(found.own_values[f"initial+{form}"], dtype=torch.float64)
    torch.testing.assert_close(values, exact, rtol=1e-4, atol=1e-7)
    layer = LayerPlan("", (0, 0), "", 60, f"initial+{form}", 0, 0.0, "", share=found.start.share)
    rewriting = replace(subject.rewriting(Plan("", None, Budget("plan"), (layer,))), decompositions=kept)
    [(_, _, factors)] = rewritten_factors(rewriting, Run(CPU))
    least = float(exact[60:].square().sum().sqrt() / model.weight.detach().double().norm())
    assert factors.error == pytest.approx(least, rel=1e-4)
