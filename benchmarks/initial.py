"""What is left to store of a network once its random initialization is a seed: quality against size, and when it pays.

    OMP_NUM_THREADS=1 python benchmarks/initial.py [--parts PART ...] [--networks NAME ...] [--optimizers NAME ...]
                                                   [--seeds 42 ...] [--quick --output FILE]

Trains the networks of initial_networks.py with five optimizers from three seeds, and takes the reference models with
theirs. The parts:

- `without data` and `calibrated`: accuracy and loss on the test split at 50 to 2 % of the 16-bit bytes of the linear
  and convolutional layers, with the seed and without. `without data` also takes the seed with `bits="auto"`, and rounds
  these layers to 4, 3, and 2 bits, to the nearest, in groups of 64 with a 16-bit scale and offset each. `calibrated`
  takes 128 examples, in three draws for the vision transformers with AdamW and one draw for the others.
- `references`: the same of the models of model_cards/.
- `layers`: of each layer the share exp(-K) of the start that the recipe predicts, the one fitted by least squares, what
  training wrote as a share of the norm, and the 99 % energy ranks of the matrix and of what training wrote.
- `search`: what `initial="auto"` finds of these models and how long that takes, and what of twenty with seeds that it
  does not try.
- `length`: one network trained for 1 to 200 epochs.

Cells are kept one by one in benchmarks/results/initial.json, and those that are there are not measured again: an
interrupted run goes on. Trained networks are kept in benchmarks/models/initial. Prints the tables of
benchmarks/README.md and draws benchmarks/results/initial.svg.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import transformers
from initial_networks import BUILDERS, OPTIMIZERS, Optimizer, calibration_batches, quality, trained
from quality import SUBJECTS, opened
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, TrainingRecipe, compress, inspect
from compressor.evaluation import measure_quality
from compressor.lowrank import as_matrix
from compressor.measure import singular_values
from compressor.measure.effective_rank import energy_rank
from compressor.measure.memory_window import forgetting_exponent
from compressor.model import load_model, open_model
from compressor.network import Layer
from compressor.recipe import find_recipe

mpl.use("Agg")
from matplotlib import pyplot as plt
from pictures import MARKERS, SMALLER, save

RESULT = Path(__file__).parent / "results" / "initial.json"
MODELS = Path(__file__).parent / "models" / "initial"
SEEDS = (42, 1337, 9973)
EPOCHS = 40
SHARES = (0.5, 0.25, 0.1, 0.05, 0.02)
CALIBRATED_SHARES = (0.5, 0.25, 0.2, 0.1, 0.05, 0.02)
BITS = (4, 3, 2)
GROUP = 64
DRAWS = (0, 1, 2)
OUTSIDE = tuple(range(1_000_003, 1_000_023))
LENGTHS = (1, 3, 10, 30, 100, 200)
LENGTH_OF = ("convolutions", "Adam")
CARD = "as its card says"
DRAWN_OFTEN = (("vision transformer", "AdamW"), ("digits-vit", CARD))
REFERENCES = ("digits-mlp", "digits-resnet", "digits-vit", "stdlib-llama")


@dataclass(frozen=True)
class Subject:
    """A trained network with the initialization that it started from.

    `test` gives accuracy (of language models None) and loss in nats of a model, and `calibration` are batches of the
    training split for a seed.
    """

    name: str
    optimizer: str
    seed: int
    epochs: int | None
    model: nn.Module
    build: Callable[[], nn.Module]
    recipe: TrainingRecipe
    test: Callable[[nn.Module], tuple[float | None, float]]
    calibration: Callable[[int], Sequence[Any]]

    @property
    def about(self) -> dict[str, Any]:
        return {"network": self.name, "optimizer": self.optimizer, "seed": self.seed, "epochs": self.epochs}

    def initial(self) -> dict[str, Tensor]:
        """The state that training started from."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.build().state_dict()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in open_model(self.model).layers if layer.eligible)


def trained_here(network: str, name: str, seed: int, *, epochs: int) -> Subject:
    """A network of initial_networks.py, which is trained once and kept."""
    optimizer: Optimizer = OPTIMIZERS[name]
    kept = MODELS / f"{network}, {name}, {epochs} epochs, seed {seed}.safetensors"
    if kept.exists():
        model = BUILDERS[network]()
        model.load_state_dict(load_file(kept))
    else:
        model = trained(network, optimizer, seed=seed, epochs=epochs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
    recipe = optimizer.recipe(model, epochs)
    return Subject(network, name, seed, epochs, model.eval(), BUILDERS[network], recipe, quality, calibration_batches)


def reference(name: str) -> Subject:
    """A model of model_cards/, with the seed and the function that its training script draws it with."""
    subject = SUBJECTS[name]
    folder = subject.weights if subject.weights.is_dir() else subject.weights.parent
    spec = importlib.util.spec_from_file_location(f"train_{folder.name}".replace("-", "_"), folder / "train.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    train, test = opened(name, "train", None), opened(name, "test", subject.test_examples)

    def batches(seed: int) -> list[Mapping[str, Tensor]]:
        chosen = torch.randperm(train.count, generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = chosen[: subject.calibration_examples]
        return [train.read(chosen[start : start + 16]).inputs for start in range(0, len(chosen), 16)]

    def tested(model: nn.Module) -> tuple[float | None, float]:
        found = measure_quality(model, test)
        assert found.loss is not None
        return (found.value if found.metric == "accuracy" else None), found.loss

    return Subject(
        name,
        CARD,
        0,
        None,
        load_model(subject.weights, subject.factory).eval(),
        script.build_model,
        find_recipe(subject.weights),
        tested,
        batches,
    )


def compressed(
    subject: Subject, share: float, *, initial: bool, draw: int | None, bits: Literal["auto", "16"] = "16"
) -> nn.Module:
    """The network at a share of the 16-bit bytes of its linear and convolutional layers, with its seed or not.

    Calibrated on a draw of the training examples, or without data.
    """
    unasked = replace(subject.recipe, seed=None)  # a seed that the recipe states is tried too
    given: dict[str, Any] = {"keep": share, "prefer": "size", "recipe": unasked, "bits": bits}
    if initial:
        given |= {"initial": subject.seed, "factory": subject.build}
    given |= {"calibration": "none"} if draw is None else {"calibration": subject.calibration(draw), "seed": draw}
    small = compress(subject.model, **given).model
    assert small is not None
    return small


@torch.no_grad()
def rounded(subject: Subject, bits: int) -> tuple[nn.Module, float]:
    """Each group of `GROUP` weights of a row rounded to `2^bits` evenly spaced values from its least to its largest.

    And the share of the 16-bit bytes that this takes, with two 16-bit numbers a group.
    """
    model, dense, stored = copy.deepcopy(subject.model), 0, 0.0
    for layer in subject.layers:
        weight = getattr(model.get_submodule(layer.module), layer.parameter)
        rows = weight.reshape(weight.shape[0], -1)
        parts = []
        for group in rows.split(GROUP, 1):
            least, largest = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
            step = ((largest - least) / (2**bits - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
            parts.append(least + ((group - least) / step).round() * step)
            stored += group.numel() * bits / 16 + 2 * len(group)
        weight.copy_(torch.cat(parts, 1).reshape(weight.shape))
        dense += weight.numel()
    return model, stored / dense


def layer_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """Per layer: the predicted and the fitted share of the start, what training wrote, and the 99 % energy ranks."""
    initial = subject.initial()
    state = subject.model.state_dict()
    for layer in subject.layers:
        name = f"{layer.module}.{layer.parameter}"
        matrix, start = (as_matrix(layer, each[name]).double() for each in (state, initial))
        fitted = float((matrix * start).sum() / start.square().sum())
        written = matrix - fitted * start
        exponent, unknown = forgetting_exponent(subject.recipe.of_parameter(layer.tensor))
        correlation = fitted * float(start.norm() / matrix.norm())
        yield {
            "layer": layer.name,
            "shape": list(layer.shape),
            "predicted": None if unknown or exponent is None else math.exp(-exponent),
            "fitted": fitted,
            "z": correlation * math.sqrt(matrix.numel()),
            "written": float(written.norm() / matrix.norm()),
            "rank": energy_rank(singular_values(matrix)),
            "written_rank": energy_rank(singular_values(written)),
        }


class Results:
    """The file of results: its cells by what they are of, each written as it is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

    def lacks(self, **cell: Any) -> bool:
        return not any(cell.items() <= row.items() for row in self.rows)

    def put(self, row: Mapping[str, Any]) -> None:
        sys.stderr.write(f"{dict(row)}\n")
        self.rows.append(dict(row))
        self.path.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")

    @property
    def document(self) -> dict[str, Any]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {"versions": versions | {"transformers": transformers.__version__}, "rows": self.rows}


@dataclass(frozen=True)
class Source:
    """A subject that is trained or loaded only if a cell of it is missing."""

    about: Mapping[str, Any]
    make: Callable[[], Subject]

    @cached_property
    def subject(self) -> Subject:
        return self.make()


def measure_sizes(results: Results, source: Source, *, draw: int | None = None) -> None:
    """Quality of the dense model and at every size, with and without the initial weights."""
    if results.lacks(**source.about, kind="dense"):
        accuracy, loss = source.subject.test(source.subject.model)
        results.put({**source.about, "kind": "dense", "accuracy": accuracy, "loss": loss})
    drawn = {} if draw is None else {"draw": draw}
    for share in SHARES if draw is None else CALIBRATED_SHARES:
        for initial in (False, True):
            kind = {"kind": "size", "calibrated": draw is not None, **drawn, "initial": initial, "share": share}
            cell = {**source.about, **kind}
            if not results.lacks(**cell):
                continue
            results.put(cell | _measured(source.subject, partial(compressed, share=share, initial=initial, draw=draw)))


def measure_sizes_in_bits(results: Results, source: Source) -> None:
    """Quality at every size without data, from the seed, where the numbers may also be stored in fewer bits."""
    for share in SHARES:
        cell = {**source.about, "kind": "size in bits", "share": share}
        if results.lacks(**cell):
            small = partial(compressed, share=share, initial=True, draw=None, bits="auto")
            results.put(cell | _measured(source.subject, small))


def _measured(subject: Subject, compress: Callable[[Subject], nn.Module]) -> dict[str, Any]:
    """The quality of what a subject becomes, and what that takes; why it is refused, where it is."""
    started = time.process_time()
    try:
        model = compress(subject)
    except BadInput as refused:
        return {"refused": str(refused)}
    seconds = time.process_time() - started
    accuracy, loss = subject.test(model)
    return {"accuracy": accuracy, "loss": loss, "cpu_seconds": round(seconds, 2)}


def measure_search(results: Results, source: Source) -> None:
    """What the search finds of a model whose seed it is not told, and how long that takes."""
    cell = {**source.about, "kind": "search"}
    if not results.lacks(**cell):
        return
    subject, started = source.subject, time.process_time()
    asked = {"factory": subject.build, "recipe": replace(subject.recipe, seed=None)}
    found = inspect(subject.model, initial="auto", **asked).initial
    assert found is not None
    assert found.search is not None
    own = {"found": found.seed, "z": found.search.z, "next_best": found.search.next_best, "tried": found.search.tried}
    times = {"seconds": found.search.seconds, "cpu_seconds": time.process_time() - started}
    results.put(cell | own | {name: round(each, 2) for name, each in times.items()})


def measure_rounding(results: Results, source: Source) -> None:
    for bits in BITS:
        cell = {**source.about, "kind": "rounding", "bits": bits}
        if results.lacks(**cell):
            model, share = rounded(source.subject, bits)
            accuracy, loss = source.subject.test(model)
            results.put(cell | {"share": share, "accuracy": accuracy, "loss": loss})


def measure_layers(results: Results, source: Source) -> None:
    if results.lacks(**source.about, kind="layer"):
        for row in layer_rows(source.subject):
            results.put({**source.about, "kind": "layer", **row})


def without_data(results: Results, asked: argparse.Namespace) -> None:
    for source in sources(asked):
        measure_sizes(results, source)
        measure_sizes_in_bits(results, source)
        measure_rounding(results, source)


def calibrated(results: Results, asked: argparse.Namespace) -> None:
    for source in [*reference_sources(asked), *sources(asked)]:
        often = (source.about["network"], source.about["optimizer"]) in DRAWN_OFTEN
        for draw in asked.draws if often else asked.draws[:1]:
            measure_sizes(results, source, draw=draw)


def search(results: Results, asked: argparse.Namespace) -> None:
    for source in [*reference_sources(asked), *sources(asked)]:
        measure_search(results, source)
    for seed in OUTSIDE[: asked.outside]:
        measure_search(results, source_of("perceptron", "Adam", seed, epochs=1))


def references(results: Results, asked: argparse.Namespace) -> None:
    for source in reference_sources(asked):
        measure_sizes(results, source)
        measure_rounding(results, source)


def layers(results: Results, asked: argparse.Namespace) -> None:
    for source in [*sources(asked), *reference_sources(asked)]:
        measure_layers(results, source)


def length(results: Results, asked: argparse.Namespace) -> None:
    network, optimizer = LENGTH_OF
    for epochs in asked.lengths:
        for seed in asked.seeds:
            source = source_of(network, optimizer, seed, epochs=epochs)
            measure_sizes(results, source)
            measure_layers(results, source)


MEASURE: dict[str, Callable[[Results, argparse.Namespace], None]] = {
    "without data": without_data,
    "references": references,
    "calibrated": calibrated,
    "layers": layers,
    "search": search,
    "length": length,
}


def source_of(network: str, optimizer: str, seed: int, *, epochs: int) -> Source:
    about = {"network": network, "optimizer": optimizer, "seed": seed, "epochs": epochs}
    return Source(about, lambda: trained_here(network, optimizer, seed, epochs=epochs))


def sources(asked: argparse.Namespace) -> list[Source]:
    return [
        source_of(network, optimizer, seed, epochs=asked.epochs)
        for seed in asked.seeds
        for network in asked.networks
        if network in BUILDERS
        for optimizer in asked.optimizers
    ]


def reference_sources(asked: argparse.Namespace) -> list[Source]:
    about = {"optimizer": CARD, "seed": 0, "epochs": None}
    return [
        Source({"network": name, **about}, lambda name=name: reference(name))  # type: ignore[misc]
        for name in asked.networks
        if name in REFERENCES
    ]


def without_data_table(document: Mapping[str, Any]) -> str:
    """Accuracy on the test split without data, medians over the seeds; loss where there is no accuracy."""
    return _sizes_table(document["rows"], calibrated=False, cell=_quality)


def calibrated_table(document: Mapping[str, Any]) -> str:
    """Loss over the dense network's on the test split with calibration, medians over the seeds."""
    return _sizes_table(document["rows"], calibrated=True, cell=_loss_over_dense)


def _sizes_table(
    rows: Sequence[dict[str, Any]], *, calibrated: bool, cell: Callable[[Sequence[dict[str, Any]], Dense], str]
) -> str:
    shares = CALIBRATED_SHARES if calibrated else SHARES
    bits = () if calibrated else BITS
    heads = ["network", "trained with", "stored", "dense", *(f"{share:.0%}" for share in shares)]
    lines = [_line([*heads, *(f"int{each}" for each in bits)]), "|---" * (len(heads) + len(bits)) + "|"]
    for network, optimizer in _models(rows, "size"):
        own = _rows(rows, network=network, optimizer=optimizer, epochs=_epochs(network))
        dense = {row["seed"]: row for row in own if row["kind"] == "dense"}
        for initial in (False, True):
            sized = _rows(own, kind="size", calibrated=calibrated, initial=initial)
            if not sized:
                continue
            cells = [cell(_rows(sized, share=share), dense) for share in shares]
            rounding = [cell(_rows(own, kind="rounding", bits=each), dense) if not initial else "" for each in bits]
            first = [network, optimizer, "W", _quality(list(dense.values()), dense)]
            lines.append(_line([*(["", "", "from the seed", ""] if initial else first), *cells, *rounding]))
        in_bits = [] if calibrated else _rows(own, kind="size in bits")
        if in_bits:
            cells = [cell(_rows(in_bits, share=share), dense) for share in shares]
            lines.append(_line(["", "", "the same in fewer bits", "", *cells, *("" for _ in bits)]))
    return "\n".join(lines)


Dense = Mapping[int, Mapping[str, Any]]


def _quality(rows: Sequence[Mapping[str, Any]], dense: Dense) -> str:
    done = [row for row in rows if "refused" not in row]
    if not rows or not done:
        return "-" if rows else ""
    if done[0]["accuracy"] is None:
        return f"{statistics.median(row['loss'] for row in done):.2f} nats"
    return f"{100 * statistics.median(row['accuracy'] for row in done):.1f}"


def _loss_over_dense(rows: Sequence[Mapping[str, Any]], dense: Dense) -> str:
    done = [row for row in rows if "refused" not in row]
    if not rows or not done:
        return "-" if rows else ""
    return f"{statistics.median(row['loss'] - dense[row['seed']]['loss'] for row in done):.3f}"


def layers_table(document: Mapping[str, Any]) -> str:
    """Predicted and fitted share of the start, what training wrote, and ranks, per network; medians over the seeds."""
    lines = [
        "| network | trained with | exp(-K) | fitted (least to most) | of the norm training wrote | largest layer "
        "| 99 % energy rank of W | of what training wrote |",
        "|---" * 8 + "|",
    ]
    for network, optimizer in _models(document["rows"], "layer"):
        rows = _rows(document["rows"], kind="layer", network=network, optimizer=optimizer, epochs=_epochs(network))
        predicted = [row["predicted"] for row in rows if row["predicted"] is not None]
        largest = max(math.prod(row["shape"]) for row in rows)
        name = next(row["layer"] for row in rows if math.prod(row["shape"]) == largest)
        own = _rows(rows, layer=name)
        fitted = [row["fitted"] for row in rows]
        lines.append(
            _line(
                [
                    network,
                    optimizer,
                    f"{statistics.median(predicted):.3f}" if predicted else "unknown",
                    f"{statistics.median(fitted):.3f} ({min(fitted):.3f} to {max(fitted):.3f})",
                    f"{statistics.median(row['written'] for row in rows):.2f}",
                    " x ".join(map(str, own[0]["shape"])),
                    f"{statistics.median(row['rank'] for row in own):.0f}",
                    f"{statistics.median(row['written_rank'] for row in own):.0f}",
                ]
            )
        )
    return "\n".join(lines)


def length_table(document: Mapping[str, Any]) -> str:
    """How the gain falls as training gets longer: medians over the seeds."""
    rows = _rows(document["rows"], network=LENGTH_OF[0], optimizer=LENGTH_OF[1])
    shares = (0.1, 0.05, 0.02)
    lines = [
        _line(
            [
                "epochs",
                "dense",
                *(f"{share:.0%}, W / from the seed" for share in shares),
                "of the norm training wrote",
                "99 % energy rank of W, of what training wrote",
            ]
        ),
        "|---" * 7 + "|",
    ]
    for epochs in sorted({row["epochs"] for row in rows}):
        own = _rows(rows, epochs=epochs)
        layers = _rows(own, kind="layer")
        if not layers:
            continue
        largest = [row for row in layers if row["shape"] == max((each["shape"] for each in layers), key=math.prod)]
        cells = [
            " / ".join(
                _quality(_rows(own, kind="size", calibrated=False, initial=initial, share=share), {})
                for initial in (False, True)
            )
            for share in shares
        ]
        ranks = [statistics.median(row[key] for row in largest) for key in ("rank", "written_rank")]
        written = f"{statistics.median(row['written'] for row in layers):.2f}"
        dense = _quality(_rows(own, kind="dense"), {})
        lines.append(_line([str(epochs), dense, *cells, written, f"{ranks[0]:.0f}, {ranks[1]:.0f}"]))
    return "\n".join(lines)


def search_table(document: Mapping[str, Any]) -> str:
    """What the search found: how many of each network's seeds, the least z, and the most seconds of one processor."""
    lines = ["| network | seeds | found | least z of these | most CPU seconds |", "|---" * 5 + "|"]
    rows = _rows(document["rows"], kind="search")
    groups = [
        (name, [row for row in rows if row["network"] == name and row["seed"] not in OUTSIDE]) for name in _names(rows)
    ]
    groups.append(("seeds that are not tried", [row for row in rows if row["seed"] in OUTSIDE]))
    for name, own in groups:
        if not own:
            continue
        found = [row for row in own if row["found"] is not None]
        wrong = [row for row in found if row["found"] != row["seed"]]
        least = f"{min(row['z'] for row in found):.0f}" if found else ""
        count = f"{len(found)}" + (f", {len(wrong)} of them another" if wrong else "")
        lines.append(_line([name, str(len(own)), count, least, f"{max(row['cpu_seconds'] for row in own):.1f}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rows(rows: Sequence[dict[str, Any]], **cell: Any) -> list[dict[str, Any]]:
    return [row for row in rows if cell.items() <= row.items()]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [*BUILDERS, *REFERENCES]
    return sorted({row["network"] for row in rows}, key=known.index)


def _models(rows: Sequence[dict[str, Any]], kind: str) -> list[tuple[str, str]]:
    """Networks and their optimizers, in a fixed order."""
    own = _rows(rows, kind=kind)
    order = [*OPTIMIZERS, CARD]
    return [
        (network, optimizer)
        for network in _names(own)
        for optimizer in order
        if _rows(own, network=network, optimizer=optimizer, epochs=_epochs(network))
    ]


def _epochs(network: str) -> int | None:
    return EPOCHS if network in BUILDERS else None


def draw(document: Mapping[str, Any], output: Path) -> None:
    """Accuracy against size without data, a panel a network, a color an optimizer; the last is over the length."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.4))
    colors = dict(zip(OPTIMIZERS, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677"), strict=True))
    rows = _rows(document["rows"], kind="size", calibrated=False)
    for axes, network in zip(panels.flat, BUILDERS, strict=False):
        for (optimizer, color), marker in zip(colors.items(), MARKERS, strict=True):
            for initial in (False, True):
                own = _rows(rows, network=network, optimizer=optimizer, epochs=EPOCHS, initial=initial)
                points = _medians(own, "share")
                style = {"linestyle": "-" if initial else ":", "marker": marker, "markersize": 5}
                label = optimizer if initial else None
                axes.plot([100 * x for x in points], list(points.values()), color=color, label=label, **style)
        axes.set(title=network, xscale="log", xlabel=f"% of the 16-bit bytes of the layers ({SMALLER})", ylim=(0, 102))
        axes.set_xticks([100 * share for share in SHARES], [f"{100 * share:g}" for share in SHARES])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(visible=True, color="0.9")
        axes.set_ylabel("accuracy on the test split, %")
    last = panels[1][1]
    shares = zip((0.1, 0.05, 0.02), ("#4477aa", "#228833", "#ee6677"), MARKERS, strict=False)
    for share, color, marker in shares:
        for initial in (False, True):
            own = _rows(rows, network=LENGTH_OF[0], optimizer=LENGTH_OF[1], initial=initial, share=share)
            points = _medians([row for row in own if row["epochs"] in LENGTHS], "epochs")
            style = {"linestyle": "-" if initial else ":", "marker": marker, "markersize": 5}
            label = f"{share:.0%} of the bytes" if initial else None
            last.plot(list(points), list(points.values()), color=color, label=label, **style)
    last.set(title=f"{LENGTH_OF[0]}, {LENGTH_OF[1]}, by length", xscale="log", xlabel="epochs", ylim=(0, 102))
    last.set_xticks(LENGTHS, list(map(str, LENGTHS)))
    last.minorticks_off()
    last.grid(visible=True, color="0.9")
    last.set_ylabel("accuracy on the test split, %")
    last.legend(frameon=False, fontsize=8)
    panels[0][0].plot([], [], color="0.4", linestyle="-", label="with the initial weights")
    panels[0][0].plot([], [], color="0.4", linestyle=":", label="without")
    panels[0][0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    save(figure, output)


def _medians(rows: Sequence[Mapping[str, Any]], key: str) -> dict[float, float]:
    """Median accuracy in percent by the value of a key, in order."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row.get("accuracy") is not None:
            found.setdefault(row[key], []).append(100 * row["accuracy"])
    return {x: statistics.median(found[x]) for x in sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=MEASURE, default=list(MEASURE))
    parser.add_argument("--networks", nargs="+", choices=[*BUILDERS, *REFERENCES], default=[*BUILDERS, *REFERENCES])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed, the perceptron and digits-vit, two lengths")
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    asked.epochs, asked.lengths, asked.outside, asked.draws = EPOCHS, LENGTHS, len(OUTSIDE), DRAWS
    if asked.quick:
        asked.networks, asked.optimizers, asked.seeds = ["perceptron", "digits-vit"], ["SGD, momentum"], [SEEDS[0]]
        asked.lengths, asked.outside, asked.draws = LENGTHS[:2], 1, DRAWS[:1]
    torch.set_num_threads(1)
    results = Results(asked.output)
    for part in asked.parts:
        MEASURE[part](results, asked)
    for table in (without_data_table, calibrated_table, layers_table, search_table, length_table):
        sys.stdout.write(f"{table(results.document)}\n\n")
    draw(results.document, asked.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
