"""What each verb returns and writes is what `tests/frozen/` recorded, one file per case.

A case is a function that builds its inputs from fixed seeds in a folder, writes below `folder / "out"`, and returns the
result. The record holds the result as a document and the content of each written file: dtype, shape and digest of each
tensor, and each document without what changes from run to run. Digests and exact numbers are compared only in the
environment of the record (`tests/frozen/environment.json`); elsewhere numbers may differ by one part in a thousand.

To record an intended change, which the diff of the commit then shows:

    python -m tests.test_frozen_outputs --record [CASE ...]
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import compressor
from tests.measured import without_times

pytestmark = pytest.mark.frozen

FROZEN = Path(__file__).parent / "frozen"
SLOW = ("-calibrated", "-max-drop")
MOST_SHOWN = 40  # lines of a failure
NUMBERS = re.compile(r"\[[-+.\de,\s]+\]")  # lists of numbers, which a record holds in one line
Case = Callable[[Path], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add a function to the table of cases, under its name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


# Inputs. NumPy draws the weights in float64, so that they depend on no release of torch or transformers.

NETWORKS = """
from torch import nn


def perceptron():
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 5, stride=2, padding=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )
"""
TEXT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "num_labels": 4,
}  # fmt: skip
LLAMA = ("llama", "LlamaForCausalLM", TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": False})
TIED = ("llama", "LlamaForCausalLM", TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True})
BERT = ("bert", "BertForMaskedLM", TEXT)
VIT = ("vit", "ViTForImageClassification", IMAGE)
SEED = 5
RECIPE = """
optimizer: sgd
learning_rate: 0.9
momentum: 0.0
weight_decay: 0.5
batch_size: 1
steps: 200
schedule: constant
sequence_length: 1
"""


def network(name: str) -> nn.Module:
    """One of `NETWORKS` with weights whose singular values fall."""
    namespace: dict[str, Any] = {}
    exec(NETWORKS, namespace)
    return filled(namespace[name]())


def filled(module: nn.Module) -> nn.Module:
    """The module with random parameters: singular values that fall by a sixth each, scales near one, small biases.

    Kernels of five by five fall that fast as matrices of (outputs and columns) x (inputs and rows), in which a spatial
    pair is better than a channel pair.
    """
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            shape = tuple(parameter.shape)
            if len(shape) < 2:
                values = (not name.endswith("bias")) + 0.1 * generator.standard_normal(shape)
            elif shape[2:] == (5, 5):
                d_out, d_in, height, width = shape
                matrix = falling(d_out * width, d_in * height, generator)
                values = matrix.reshape(d_out, width, d_in, height).transpose(0, 2, 3, 1)
            else:
                values = falling(shape[0], math.prod(shape[1:]), generator).reshape(shape)
            parameter.copy_(torch.from_numpy(values))
    return module.eval()


def falling(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    rank = min(rows, columns)
    left, right = generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns))
    return 1.5 * (left * (5 / 6) ** np.arange(rank)) @ right / math.sqrt(columns)


def changed(module: nn.Module, seed: int) -> nn.Module:
    """The module with a change of rank two in every matrix, like a fine-tune."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            if parameter.dim() == 2:
                left, right = (generator.standard_normal((size, 2)) for size in parameter.shape)
                parameter.add_(torch.from_numpy(0.05 * left @ right.T))
    return module


def started_file(folder: Path) -> Path:
    """The perceptron as a seed draws it, with a change of rank two in every matrix."""
    namespace: dict[str, Any] = {}
    exec(NETWORKS, namespace)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        module = changed(namespace["perceptron"](), seed=7)
    path = folder / "started.safetensors"
    save_file(module.state_dict(), path, metadata={"format": "pt"})
    return path


def weight_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(network(name).state_dict(), path, metadata={"format": "pt"})
    return path


def factory(folder: Path, name: str) -> str:
    """`name` of `NETWORKS`, in the form that the command line takes."""
    path = folder / "networks.py"
    path.write_text(NETWORKS)
    return f"{path}:{name}"


def model_folder(path: Path, model: tuple[str, str, dict[str, Any]], *, fine_tuned: bool = False) -> Path:
    """A transformers folder with its own short config.json: what transformers writes differs between releases."""
    kind, architecture, sizes = model
    module: Any = filled(getattr(transformers, architecture)(transformers.AutoConfig.for_model(kind, **sizes)))
    (changed(module, 1) if fine_tuned else module).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    config = {"model_type": kind, "architectures": [architecture], "dtype": "float32", **sizes}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def examples(folder: Path, model: nn.Module, *shape: int, seed: int = 7) -> Path:
    """A file of random inputs of this shape, each with the class that the model gives it."""
    path = folder / f"data-{seed}.npz"
    inputs = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    with torch.no_grad():
        found = model(inputs)
    np.savez(path, inputs=inputs.numpy(), labels=getattr(found, "logits", found).argmax(-1).numpy())
    return path


def image_examples(folder: Path, *, seed: int = 7) -> Path:
    model = transformers.ViTForImageClassification.from_pretrained(folder / "vit").eval()
    return examples(folder, model, 64, 1, 8, 8, seed=seed)


def token_examples(folder: Path) -> Path:
    np.savez(folder / "tokens.npz", input_ids=np.random.default_rng(7).integers(3, 40, (24, 16)))
    return folder / "tokens.npz"


# The cases.


@case
def compress_file_keep(folder: Path) -> Any:
    return compressor.compress(weight_file(folder, "perceptron"), output=folder / "out/a.safetensors", keep=0.5)


@case
def compress_file_tolerance(folder: Path) -> Any:
    source = weight_file(folder, "perceptron")
    return compressor.compress(source, output=folder / "out/a.safetensors", tolerance=0.2, exclude="4")


@case
def compress_file_max_size(folder: Path) -> Any:
    return compressor.compress(weight_file(folder, "perceptron"), output=folder / "out/a.safetensors", max_size=8000)


@case
def compress_file_plan(folder: Path) -> Any:
    source = weight_file(folder, "perceptron")
    plan = folder / "plan.json"
    plan.write_text(json.dumps(compressor.plan(source, keep=0.6).to_dict()))
    return compressor.compress(source, output=folder / "out/a.safetensors", plan=plan)


@case
def compress_file_window_rule(folder: Path) -> Any:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return compressor.compress(weight_file(folder, "perceptron"), output=folder / "out/a.safetensors", recipe=recipe)


@case
def compress_file_from_seed(folder: Path) -> Any:
    source, build = started_file(folder), factory(folder, "perceptron")
    given: dict[str, Any] = {"keep": 0.3, "calibration": "none", "prefer": "size"}
    return compressor.compress(source, output=folder / "out/a.safetensors", factory=build, initial=SEED, **given)


@case
def compress_file_bits(folder: Path) -> Any:
    source = weight_file(folder, "perceptron")
    return compressor.compress(source, output=folder / "out/a.safetensors", keep=0.3, bits="auto")


@case
def compress_folder_bits(folder: Path) -> Any:
    source = model_folder(folder / "llama", LLAMA)
    return compressor.compress(source, output=folder / "out/small", bits=4, calibration="none")


@case
def compress_file_bits_calibrated(folder: Path) -> Any:
    source, build = weight_file(folder, "perceptron"), factory(folder, "perceptron")
    calibration = examples(folder, network("perceptron"), 48, 20)
    return compressor.compress(
        source, output=folder / "out/a.safetensors", keep=0.2, factory=build, calibration=calibration
    )


@case
def compress_folder_bits_calibrated(folder: Path) -> Any:
    source = model_folder(folder / "bert", BERT)
    return compressor.compress(
        source, output=folder / "out/small", keep=0.3, calibration=token_examples(folder), effort="balanced"
    )


@case
def compress_torch_file(folder: Path) -> Any:
    torch.save({"epoch": 3, "state_dict": network("perceptron").state_dict()}, folder / "model.pt")
    return compressor.compress(folder / "model.pt", output=folder / "out/a.safetensors", keep=0.5)


@case
def compress_convolutions(folder: Path) -> Any:
    source = weight_file(folder, "convolutions")
    build = factory(folder, "convolutions")
    return compressor.compress(source, output=folder / "out/a.safetensors", keep=0.3, factory=build, calibration="none")


@case
def compress_file_calibrated(folder: Path) -> Any:
    source, build = weight_file(folder, "convolutions"), factory(folder, "convolutions")
    calibration, data = (examples(folder, network("convolutions"), 48, 3, 8, 8, seed=seed) for seed in (7, 8))
    return compressor.compress(
        source,
        output=folder / "out/a.safetensors",
        keep=0.4,
        factory=build,
        calibration=calibration,
        data=data,
        bits=16,
    )


@case
def compress_module(folder: Path) -> Any:
    return compressor.compress(network("perceptron"), keep=0.5, prefer="size")


@case
def compress_module_calibrated(folder: Path) -> Any:
    data = np.random.default_rng(7).standard_normal((6, 8, 20)).astype(np.float32)
    return compressor.compress(
        network("perceptron"), keep=0.5, calibration=list(torch.from_numpy(data)), prefer="size", bits=16
    )


@case
def compress_module_max_drop(folder: Path) -> Any:
    model = network("perceptron")
    calibration, data = (examples(folder, model, 200, 20, seed=seed) for seed in (7, 8))
    return compressor.compress(
        model,
        max_drop=0.1,
        data=data,
        calibration=calibration,
        effort="balanced",
        allow_miss=True,
        prefer="size",
        bits=16,
    )


@case
def compress_folder_llama(folder: Path) -> Any:
    return compressor.compress(
        model_folder(folder / "llama", LLAMA), output=folder / "out/small", keep=0.6, calibration="none", prefer="size"
    )


@case
def compress_folder_tied_sharded(folder: Path) -> Any:
    source = model_folder(folder / "tied", TIED)
    return compressor.compress(
        source,
        output=folder / "out/small",
        keep=0.6,
        calibration="none",
        embeddings=True,
        max_shard_size="16KB",
        prefer="size",
    )


@case
def compress_folder_bert_calibrated(folder: Path) -> Any:
    source = model_folder(folder / "bert", BERT)
    return compressor.compress(
        source,
        output=folder / "out/small",
        keep=0.6,
        calibration=token_examples(folder),
        effort="balanced",
        prefer="size",
        bits=16,
    )


@case
def compress_folder_vit_calibrated(folder: Path) -> Any:
    source = model_folder(folder / "vit", VIT)
    calibration, data = (image_examples(folder, seed=seed) for seed in (7, 8))
    return compressor.compress(
        source, output=folder / "out/small", keep=0.4, calibration=calibration, data=data, prefer="size", bits=16
    )


@case
def compress_folder_vit_max_drop(folder: Path) -> Any:
    source = model_folder(folder / "vit", VIT)
    data = image_examples(folder)
    return compressor.compress(
        source, output=folder / "out/small", max_drop=0.5, data=data, allow_miss=True, prefer="size"
    )


@case
def compress_to_adapter(folder: Path) -> Any:
    pytest.importorskip("peft")
    base, tuned = model_folder(folder / "base", LLAMA), model_folder(folder / "tuned", LLAMA, fine_tuned=True)
    return compressor.compress(tuned, base=base, output=folder / "out/adapter", tolerance=0.01)


@case
def compress_to_pairs(folder: Path) -> Any:
    base, tuned = model_folder(folder / "base", LLAMA), model_folder(folder / "tuned", LLAMA, fine_tuned=True)
    return compressor.compress(tuned, base=base, output=folder / "out/pairs.safetensors", keep=0.2)


@case
def compress_to_few_bits_beside_base(folder: Path) -> Any:
    base, tuned = model_folder(folder / "base", LLAMA), model_folder(folder / "tuned", LLAMA, fine_tuned=True)
    return compressor.compress(tuned, base=base, output=folder / "out/small.safetensors", bits="8,4", tolerance=0.1)


@case
def compress_module_beside_base(folder: Path) -> Any:
    tuned = changed(network("perceptron"), 1)
    return compressor.compress(tuned, base=network("perceptron"), tolerance=0.01)


@case
def merge_sum(folder: Path) -> Any:
    return compressor.merge(fine_tunes(folder), output=folder / "out/a.safetensors", mode="sum")


@case
def merge_sum_with_base(folder: Path) -> Any:
    base = weight_file(folder, "perceptron")
    data = examples(folder, network("perceptron"), 64, 20)
    return compressor.merge(
        fine_tunes(folder),
        output=folder / "out/a.safetensors",
        mode="sum",
        base=base,
        data=[data, data],
        factory=factory(folder, "perceptron"),
    )


@case
def merge_concat(folder: Path) -> Any:
    first, second = fine_tunes(folder)
    compressor.compress(second, output=folder / "small.safetensors", keep=0.5)
    models = [first, folder / "small.safetensors"]
    return compressor.merge(models, output=folder / "out/a.safetensors", mode="concat", head="separate")


def fine_tunes(folder: Path) -> list[Path]:
    """Two fine-tunes of the perceptron."""
    paths = [folder / "first.safetensors", folder / "second.safetensors"]
    for seed, path in enumerate(paths, start=1):
        save_file(changed(network("perceptron"), seed).state_dict(), path, metadata={"format": "pt"})
    return paths


def small_folder(folder: Path) -> Path:
    compressor.compress(
        model_folder(folder / "llama", LLAMA), output=folder / "small", keep=0.6, calibration="none", prefer="size"
    )
    return folder / "small"


@case
def restore_file(folder: Path) -> Any:
    compressor.compress(weight_file(folder, "convolutions"), output=folder / "small.safetensors", keep=0.3)
    return compressor.restore(folder / "small.safetensors", output=folder / "out/model.pt")


@case
def restore_file_from_seed(folder: Path) -> Any:
    compress_file_from_seed(folder)
    shutil.move(folder / "out/a.safetensors", folder / "small.safetensors")
    return compressor.restore(folder / "small.safetensors", output=folder / "out/model.safetensors")


@case
def restore_folder(folder: Path) -> Any:
    return compressor.restore(small_folder(folder), output=folder / "out/dense")


@case
def export_dense_from_pairs(folder: Path) -> Any:
    base, tuned = model_folder(folder / "base", LLAMA), model_folder(folder / "tuned", LLAMA, fine_tuned=True)
    compressor.compress(tuned, base=base, output=folder / "pairs.safetensors", tolerance=0.01)
    return compressor.export(folder / "pairs.safetensors", to="dense", base=base, output=folder / "out/dense")


@case
def export_lora(folder: Path) -> Any:
    pytest.importorskip("peft")
    base, tuned = model_folder(folder / "base", LLAMA), model_folder(folder / "tuned", LLAMA, fine_tuned=True)
    compressor.compress(tuned, base=base, output=folder / "pairs.safetensors", tolerance=0.01)
    return compressor.export(folder / "pairs.safetensors", to="lora", base=base, output=folder / "out/adapter")


@case
def export_remote(folder: Path) -> Any:
    return compressor.export(small_folder(folder), to="hf-remote", output=folder / "out/remote")


@case
def plan_document(folder: Path) -> Any:
    return compressor.plan(model_folder(folder / "vit", VIT), keep=0.6, calibration="none", prefer="size")


@case
def inspect_document(folder: Path) -> Any:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return compressor.inspect(weight_file(folder, "perceptron"), recipe=recipe)


@case
def diagnose_document(folder: Path) -> Any:
    model = network("perceptron")
    return compressor.diagnose(model, data=examples(folder, model, 64, 20))


@case
def evaluate_document(folder: Path) -> Any:
    model = network("perceptron")
    data = examples(folder, model, 64, 20)
    return compressor.evaluate(changed(network("perceptron"), 1), baseline=model, data=data)


# The recorder.

# Values that change from run to run or between installations: only their presence is recorded.
VOLATILE_KEYS = re.compile(r"seconds|latency|peak_memory_bytes|needs|verified_with")
VERSION = re.compile(r"\b\d+\.\d+\.\d+[\w.+]*")  # "torch 2.13.0+cpu" in a model card


def recorded(run: Case) -> dict[str, Any]:
    """What a case returns and each file that it writes, as JSON."""
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        (folder / "out").mkdir()
        result = run(folder)
        found = {"result": result.to_dict()}
        if isinstance(model := getattr(result, "model", None), nn.Module):
            found["module"] = tensors(model.state_dict())
        written = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
        found["files"] = {path.relative_to(folder / "out").as_posix(): content(path) for path in written}
        document: dict[str, Any] = json.loads(json.dumps(without_volatile(found, name)), parse_constant=str)
        return document


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def content(path: Path) -> Any:
    """A file as tensors, as a document or as lines of text; a file of any other kind as the digest of its bytes."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = {key: parsed(text) for key, text in sorted((file.metadata() or {}).items())}
            return {"metadata": metadata, "tensors": tensors({name: file.get_tensor(name) for name in stored(path)})}
    if path.suffix == ".pt":
        return {"tensors": tensors(torch.load(path, weights_only=True))}
    if path.suffix == ".py":
        return "code of the package"  # which the tests of the package cover, and which may change
    if path.suffix == ".json":
        return parsed(path.read_text(encoding="utf-8"))
    if path.suffix in (".md", ".yaml"):
        return path.read_text(encoding="utf-8").splitlines()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file, in the order of their bytes."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def tensors(named: dict[str, Tensor]) -> dict[str, str]:
    """Dtype, shape and sha256 of each tensor, as "float32 24x40 0123...", in order."""
    found = {}
    for name, tensor in named.items():
        digest = hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        dtype, shape = str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape))
        found[name] = f"{dtype} {shape or 'scalar'} {digest}"
    return found


def without_volatile(value: Any, folder: str) -> Any:
    """A document without what was timed, memory, versions and the folder that it was made in."""
    if isinstance(value, dict):
        return {
            key: "VOLATILE" if VOLATILE_KEYS.fullmatch(key) and item is not None else without_volatile(item, folder)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_volatile(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    return VERSION.sub("VERSION", without_times(value.replace(folder, "FOLDER")))


def environment() -> dict[str, str]:
    """What the last bits of a floating-point result depend on, besides the number of threads."""
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        processor += re.findall(r"^(?:vendor_id|cpu family|model)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)[:3]
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "processor": " ".join(processor),
    }


# The comparison.

INEXACT_TEXT = re.compile(r"\b[0-9a-f]{64}\b|\d*\.\d+(e-?\d+)?")  # digests and decimals


def differences(before: Any, after: Any, at: str, *, exact: bool) -> Iterator[str]:
    """One line for each difference: where it is, what was recorded, and what was found."""
    if isinstance(before, dict) and isinstance(after, dict):
        yield from (f"{at} / {key}: missing, was {brief(before[key])}" for key in before if key not in after)
        yield from (f"{at} / {key}: new, is {brief(after[key])}" for key in after if key not in before)
        shared = [key for key in before if key in after]
        if shared != [key for key in after if key in before]:
            yield f"{at}: the keys are in another order, which was {brief(shared)}"
        for key in shared:
            yield from differences(before[key], after[key], f"{at} / {key}", exact=exact)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{at}: {len(after)} entries, were {len(before)}"
        for number, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from differences(old, new, f"{at} / {number}", exact=exact)
    elif not same(before, after, exact=exact):
        yield f"{at}: was {brief(before)}, is {brief(after)}"


def same(before: Any, after: Any, *, exact: bool) -> bool:
    if not exact and isinstance(before, str) and isinstance(after, str):
        return INEXACT_TEXT.sub("#", before) == INEXACT_TEXT.sub("#", after)
    if not exact and isinstance(before, int | float) and isinstance(after, int | float):
        return math.isclose(before, after, rel_tol=1e-3, abs_tol=1e-6)
    return type(before) is type(after) and bool(before == after)


def brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.endswith(SLOW) else name for name in CASES]
)
def test_the_output_is_as_recorded(name: str) -> None:
    before = json.loads((FROZEN / f"{name}.json").read_text(encoding="utf-8"))
    exact = environment() == json.loads((FROZEN / "environment.json").read_text(encoding="utf-8"))
    found = list(differences(before, recorded(CASES[name]), name, exact=exact))
    if found:
        lines = [f"{len(found)} differences from tests/frozen/{name}.json", *found[:MOST_SHOWN]]
        pytest.fail("\n".join(lines), pytrace=False)


def test_a_changed_bit_and_a_changed_key_are_named() -> None:
    weight = torch.ones(2, 3)
    before = {"a.safetensors": {"tensors": tensors({"weight": weight}), "metadata": {"rank": 3}}}
    weight.view(torch.int32)[1, 2] ^= 1
    after = {"a.safetensors": {"tensors": tensors({"weight": weight}), "metadata": {"ranks": 3}}}
    found = list(differences(before, after, "case", exact=True))
    assert [line.split(":")[0] for line in found] == [
        "case / a.safetensors / tensors / weight",
        "case / a.safetensors / metadata / rank",
        "case / a.safetensors / metadata / ranks",
    ]


def test_every_record_is_of_a_case() -> None:
    assert {path.stem for path in FROZEN.glob("*.json")} == {*CASES, "environment"}


def main(arguments: list[str]) -> None:
    if arguments[:1] != ["--record"] or not {*arguments[1:]} <= {*CASES}:
        raise SystemExit(f"usage: python -m tests.test_frozen_outputs --record [CASE ...]\ncases: {', '.join(CASES)}")
    FROZEN.mkdir(exist_ok=True)
    documents = {name: recorded(CASES[name]) for name in arguments[1:] or CASES}
    for name, document in (documents | {"environment": environment()}).items():
        text = json.dumps(document, indent=1, ensure_ascii=False)
        short = NUMBERS.sub(lambda found: re.sub(r"\s+", " ", found[0]), text)
        (FROZEN / f"{name}.json").write_text(short + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
