"""Whatever is in a file, reading a recipe from it gives a recipe or says that the input is bad."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.errors import BadInput
from compressor.recipe import (
    TrainingRecipe,
    read_deepspeed_config,
    read_model_card,
    read_recipe,
    read_recipe_file,
    read_timm_args,
    read_trainer_state,
    read_training_args,
)

# pickletools decodes the escapes of damaged text as it finds them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

READERS: list[Callable[[Path], TrainingRecipe]] = [
    read_deepspeed_config,
    read_model_card,
    read_recipe,
    read_recipe_file,
    read_timm_args,
    read_trainer_state,
    read_training_args,
]
# Names that some reader looks for, so that the values behind them are looked at.
# fmt: off
NAMES = [
    *(entry.name for entry in fields(TrainingRecipe)),
    "opt", "lr", "sched", "momentum", "epochs", "warmup_epochs", "min_lr", "batch_size",
    "grad_accum_steps", "world_size", "distributed", "train_batch_size", "optimizer", "scheduler",
    "type", "params", "total_num_steps", "warmup_num_steps", "warmup_max_lr", "adam_w_mode",
    "global_step", "max_steps", "epoch", "log_history", "learning_rate", "total_train_batch_size",
    "lr_scheduler_type", "lr_scheduler_warmup_steps", "lr_scheduler_warmup_ratio", "training_steps",
    "num_epochs",
]
# fmt: on

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 0, 1, "auto", "sgd", "cosine", "1e999", "nan", "0x10", "momentum=x"])
    | st.floats()
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), values, max_size=8)

fuzzed = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def read_with_all(path: Path) -> None:
    for read in READERS:
        with contextlib.suppress(BadInput):
            assert isinstance(read(path), TrainingRecipe)


@given(st.binary(max_size=300))
@fuzzed
def test_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    read_with_all(path)


@given(st.text(alphabet="{}[]&*!:-#'\"\n |>%@0123456789.eExX_abcnaninf~", max_size=80))
@fuzzed
def test_text_of_yaml_and_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    read_with_all(path)


@pytest.mark.slow
@given(documents)
@fuzzed
def test_documents(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps(document))
    read_with_all(path)
    path.write_text(yaml.safe_dump(document))
    read_with_all(path)


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=30) | st.floats() | st.integers(), max_size=10))
@fuzzed
def test_cards(tmp_path: Path, items: dict[str, Any]) -> None:
    path = tmp_path / "README.md"
    lines = "\n".join(f"- {name}: {value}" for name, value in items.items())
    path.write_text(f"### Training hyperparameters\n\n{lines}\n", errors="replace")
    read_with_all(path)


class Arguments:
    """Stands for training arguments of any version and origin."""


@pytest.mark.slow
@given(
    state=st.dictionaries(
        st.sampled_from([*NAMES, "optim", "optim_args", "per_device_train_batch_size", "_n_gpu", "max_length"]),
        values,
        max_size=10,
    ),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    protocol=st.sampled_from([0, 2, 4, 5]),
    zipped=st.booleans(),
)
@fuzzed
def test_pickles_and_damaged_pickles(
    tmp_path: Path, state: dict[str, Any], damage: list[tuple[int, int]], *, protocol: int, zipped: bool
) -> None:
    arguments = Arguments()
    arguments.__dict__.update(state)
    content = bytearray(pickle.dumps(arguments, protocol))
    for position, byte in damage:
        content[position % len(content)] = byte
    path = tmp_path / "training_args.bin"
    path.write_bytes(content)
    if zipped:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", bytes(content))
        path.write_bytes(stream.getvalue())
    with contextlib.suppress(BadInput):
        assert isinstance(read_training_args(path), TrainingRecipe)


def test_number_of_thousands_of_digits_in_a_pickle(tmp_path: Path) -> None:
    arguments = Arguments()
    arguments.__dict__.update(learning_rate=1 << 20_000)
    path = tmp_path / "training_args.bin"
    path.write_bytes(pickle.dumps(arguments))
    with pytest.raises(BadInput, match="learning_rate"):
        read_training_args(path)


@pytest.mark.slow
@given(documents)
@fuzzed
def test_dictionaries(document: dict[str, Any]) -> None:
    with contextlib.suppress(BadInput):
        recipe = TrainingRecipe.from_dict(document, source="somewhere")
        assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe


HOSTILE = {
    "deep-json": "[" * 20_000,
    "deep-yaml": "{a: " * 3_000,
    "aliases": "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, x]\n" for i in range(40)),
    "doubling": "b0: &b0 [x]\n"
    + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40))
    + "learning_rate: *b39\n",
    "date": "learning_rate: 2001-99-99\n",
    "hexadecimal": f"learning_rate: 0x{'f' * 9000}\n",
    "python-object": "learning_rate: !!python/object/apply:os.system ['false']\n",
    "unhashable-key": "? [a]\n: 1\n",
    "recursive": "learning_rate: &a [*a]\n",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_documents(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_recipe(path)
    assert len(str(caught.value)) < 1000
    read_with_all(path)
