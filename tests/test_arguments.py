"""Arguments of the Python interface: every way of writing a value is taken, and what is none is refused in a line."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import compressor
from compressor import BadInput, Compression, compress
from compressor.arguments import as_count, as_number, as_patterns, as_size, require_copyable
from compressor.cli.run import run


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))


def ranks(compression: Compression) -> list[int | None]:
    return [layer.rank for layer in compression.plan.layers]


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_number_is_the_same_however_it_is_written(value: float) -> None:
    for written in (value, str(value), np.float32(value), np.array(value), torch.tensor(value, dtype=torch.float64)):
        assert as_number(written, "keep") == value
    assert as_number(f"{value}%", "keep", percent=True) == value / 100


@pytest.mark.parametrize("value", [True, "", "half", "50%", [0.5], {}, object(), np.zeros(2), torch.zeros(2), 10**400])
def test_what_is_no_number_is_refused_by_the_name_of_its_option(value: Any) -> None:
    with pytest.raises(BadInput, match=r"^`tolerance` .* is not a number; give one such as") as caught:
        as_number(value, "tolerance")
    assert caught.value.option == "tolerance"
    assert len(str(caught.value)) < 200


@given(st.integers(2, 10**6))
def test_a_count_is_the_same_however_it_is_written(count: int) -> None:
    for written in (count, float(count), np.int64(count), torch.tensor(count)):
        assert (as_count(written, "samples", least=2), type(as_count(written, "samples", least=2))) == (count, int)


@pytest.mark.parametrize("value", [0, 1, -3, 2.5, float("nan"), float("inf"), 2**64, 10**4000])
def test_what_is_no_count_in_range_is_refused(value: Any) -> None:
    with pytest.raises(BadInput, match=r"^`samples` .* is out of range; give a whole number from 2 to 9$") as caught:
        as_count(value, "samples", least=2, most=9)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [True, "4", None])
def test_what_is_no_number_is_no_count(value: Any) -> None:
    with pytest.raises(BadInput, match=r"^`samples` .* is not a number; give a whole number from 2 to 9$"):
        as_count(value, "samples", least=2, most=9)


def test_a_text_is_one_pattern_and_not_its_letters() -> None:
    assert as_patterns("01", "include") == as_patterns(["01"], "include") == ("01",)
    assert as_patterns((), "include") == as_patterns(None, "include") == ()
    values: list[Any] = [5, [1], [""], [None], {"a": 1}.items()]
    for value in values:
        with pytest.raises(BadInput, match=r"`include` .* holds something else than patterns"):
            as_patterns(value, "include")


@pytest.mark.parametrize("keep", [0.5, np.float32(0.5), np.float64(0.5), "0.5", "50%", torch.tensor(0.5)])
def test_keep_in_every_form_gives_the_same_plan(keep: Any) -> None:
    compression = compress(build(), keep=keep, prefer="size")
    assert ranks(compression) == ranks(compress(build(), keep=0.5, prefer="size"))
    assert compression.plan.to_dict()["budget"] == {"kind": "keep", "value": 0.5}
    json.dumps(compression.to_dict())


def test_percent_at_the_shell(tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "model.pt")
    assert run([str(tmp_path / "model.pt"), "--keep", "60%", "-q", "-o", str(tmp_path / "a.safetensors")]) == 0
    assert run([str(tmp_path / "model.pt"), "--keep", "0.6", "-q", "-o", str(tmp_path / "b.safetensors")]) == 0
    first, second = (compressor.open_checkpoint(tmp_path / f"{name}.safetensors").tensors for name in "ab")
    assert first == second


def test_one_pattern_of_digits_is_not_several(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="`include` 01 matches no layer"):
        compress(build(), keep=0.5, include="01", prefer="size")
    assert len(compress(build(), keep=0.9, include="2", prefer="size").plan.layers) == 1


def batches(width: int) -> list[torch.Tensor]:
    return [torch.randn(4, width) for _ in range(3)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "foo"}, "`form` 'foo' does not exist; use one of auto, plain, pivoted"),
        ({"calibration": batches(16), "calibration_samples": 0}, "`calibration_samples` 0 is out of range"),
        ({"data": "builtin:digits", "data_samples": 0}, "`data_samples` 0 is out of range"),
        ({"seed": 2**64}, "`seed` 18446744073709551616 is out of range"),
        ({"seed": -1}, "`seed` -1 is out of range"),
        ({"keep": None, "max_size": 0}, "`max_size` 0 is out of range"),
        ({"keep": None, "max_size": [1]}, r"`max_size` \[1\] is out of range"),
        ({"max_shard_size": 0.5}, r"`max_shard_size` 0\.5 is out of range"),
        ({"recipe": 5}, "`recipe` is of type int; give a TrainingRecipe"),
        ({"factory": 5}, "`factory` is of type int; give a function"),
        ({"keep": None, "plan": 5}, "`plan` is of type int; give a plan"),
        ({"data": [1]}, "the data yields int; yield tensors, pairs, or mappings of tensors"),
        ({"output": 5}, "`output` is of type int; give the path"),
        ({"progress": 3}, "`progress` is of type int; give a function of a step"),
        (
            {"calibration": 5},
            "`calibration` is of type int; give a path, tensors or arrays",
        ),
        ({"keep": "a lot"}, "`keep` 'a lot' is not a number"),
        ({"keep": 0}, "`keep` 0 is out of range"),
        ({"calibration": batches(10)}, r"Sequential does not accept this data \(inputs \(1, 10\)\)"),
        (
            {"calibration": [*batches(16), *batches(10)]},
            r"Sequential does not take calibration batches of inputs \(4, 10\)",
        ),
        (
            {"calibration": [torch.ones(4, 16, dtype=torch.long)] * 2},
            r"Sequential does not accept this data \(inputs \(1, 16\)\).* same dtype",
        ),
    ],
)
def test_a_bad_value_is_refused_in_the_words_of_python(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        compress(build(), prefer="size", **{"keep": 0.5, **options})
    assert "--" not in str(caught.value)


def test_the_largest_seed_is_taken() -> None:
    assert (
        compress(
            build(), keep=0.5, calibration=batches(16), seed=2**64 - 1, effort="balanced", prefer="size", bits=16
        ).model
        is not None
    )


class Locked(nn.Module):
    """A module that holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build()
        self.lock = threading.Lock()


def nested(depth: int) -> nn.Module:
    module: nn.Module = nn.Linear(8, 8)
    for _ in range(depth):
        module = nn.Sequential(module)
    return module


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))


def scripted_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "the model is of type NoneType; give a path, org/name"),
    "number": (lambda: 42, "the model is of type int"),
    "empty name": (lambda: "", "the name of the model is empty"),
    "state dict": (
        lambda: build().state_dict(),
        "the model is of type OrderedDict; load the state dict into its module",
    ),
    "class": (lambda: nn.Linear, "the model is of type type"),
    "TorchScript": (lambda: torch.jit.script(build()), "is a TorchScript module, whose layers cannot be replaced"),
    "TorchScript inside": (scripted_inside, "1 is a TorchScript module"),
    "lazy": (lazy, r"0\.weight of Sequential has no shape yet, because its layer is lazy"),
    "not to be copied": (Locked, "Locked cannot be copied .TypeError: cannot pickle '_thread.lock' object"),
    "deep": (lambda: nested(300), "nested too deeply for Python's recursion limit; raise it"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_compressed_is_refused(case: str) -> None:
    make, says = MODELS[case]
    with pytest.raises(BadInput, match=says):
        compress(make(), keep=0.5, prefer="size")


@pytest.mark.parametrize("verb", [compressor.inspect, compressor.diagnose, compressor.open_checkpoint])
@pytest.mark.parametrize("case", ["None", "number", "state dict", "TorchScript", "lazy"])
def test_every_verb_refuses_what_is_no_model(verb: Callable[[Any], Any], case: str) -> None:
    make, says = MODELS[case]
    with pytest.raises(BadInput, match=says):
        verb(make())


def test_whether_a_module_can_be_copied_is_found_out_without_copying_its_weights() -> None:
    class Copied(nn.Parameter):
        def __deepcopy__(self, memo: dict[int, Any]) -> Iterator[None]:
            raise AssertionError

    module = nn.Linear(3, 3)
    module.weight = Copied(torch.ones(3, 3))
    require_copyable(module)
    with pytest.raises(AssertionError):
        copy.deepcopy(module)


def test_nested_modules_are_compressed() -> None:
    assert compress(nested(20), keep=0.5, prefer="size").model is not None


def test_modules_cannot_be_merged(tmp_path: Path) -> None:
    merge: Any = compressor.merge
    with pytest.raises(BadInput, match="one of `models` is of type Sequential; give weight files") as refused:
        merge([build(), build()], mode="sum", output=tmp_path / "out.safetensors")
    assert refused.value.option == "models"


def test_the_explorer_opens_on_no_module(tmp_path: Path) -> None:
    explore: Any = compressor.explore
    with pytest.raises(BadInput, match="`recipe` is of type Sequential; give a TrainingRecipe"):
        explore(tmp_path / "page.html", recipe=build())


@pytest.mark.parametrize(
    ("asked", "option"),
    [({"device": "gpu"}, "device"), ({"output": "o"}, "output"), ({"push_to": "me/it"}, "push_to")],
)
def test_an_error_carries_the_option_that_a_module_cannot_have(asked: dict[str, Any], option: str) -> None:
    with pytest.raises(BadInput) as refused:
        compress(build(), keep=0.5, prefer="size", **asked)
    assert refused.value.option == option


def test_merging_one_text_is_not_merging_its_letters(tmp_path: Path) -> None:
    merge: Any = compressor.merge
    with pytest.raises(BadInput, match="one network is nothing to merge"):
        merge("ab", mode="sum", output=tmp_path / "out")
    with pytest.raises(BadInput, match="`mode` 'mean' does not exist; use one of sum, concat"):
        merge(["a", "b"], mode="mean", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40MB", 40_000_000),
        ("40 mb", 40_000_000),
        ("1.5GiB", 3 * 2**29),
        ("0.1MB", 100_000),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("3MiB", 3 * 2**20),
        ("5GB", 5 * 10**9),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("17", 17),
        ("17B", 17),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert as_size(text, "max_size") == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "0.1B", "1e3", "1,5GB", "5XB", "5 M B", "nan", "inf", "٣MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput, match="not a size"):
        as_size(text, "max_size")


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_bad_input(text: str) -> None:
    try:
        assert as_size(text, "max_size") > 0
    except BadInput:
        return
