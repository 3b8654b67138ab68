"""Tensors kept on disk during calibration: activations, gradients, and each layer's metric and decomposition in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.calibration.examples import Part
from compressor.engine import Journal
from compressor.factorize import Decomposition, GroupedMetric, Metric, TiedMetric
from compressor.measure import Spectrum
from compressor.measure.moments import InputSums, PackedSum
from compressor.measure.scale import power_of_two_on_device
from compressor.measure.triangle import packed_triangle, unpacked_triangle
from compressor.planning import LayerPlan
from compressor.torch_state import brought_to, in_float64


class _Ahead:
    """Reads the batch that comes next of each kind while the device computes, where batches are asked for in order."""

    def __init__(self, read: Callable[[str], dict[str, Tensor]], most_kinds: int = 4) -> None:
        self._read, self._most_kinds = read, most_kinds
        self._reader = ThreadPoolExecutor(1)
        self._begun: dict[str, Future[dict[str, Tensor]]] = {}
        self._next: dict[str, str] = {}

    def read(self, kind: str, name: str, then: str | None) -> dict[str, Tensor]:
        """The tensors of a name; those of `then` are read meanwhile if this name was the one to come next."""
        in_order = self._next.pop(kind, None) == name
        begun = self._begun.pop(name, None)
        found = self._read(name) if begun is None else begun.result()
        if then is not None:
            self._next[kind] = then
            if in_order:
                self._begun[then] = self._reader.submit(self._read, then)
        # Of kinds that nobody goes on with, a few are kept.
        while len(self._next) > self._most_kinds:
            del self._next[next(iter(self._next))]
        while len(self._begun) > self._most_kinds:
            del self._begun[next(iter(self._begun))]
        return found

    def forget(self, name: str) -> None:
        """Let go of what was read of a name, which is written anew, once nothing reads it any more."""
        begun = self._begun.pop(name, None)
        if begun is not None:
            wait([begun])


def _read_for(device: torch.device, journal: Journal, name: str) -> dict[str, Tensor]:
    """The tensors of a name in memory that a GPU copies from while it computes."""
    found = journal.read(name)
    return {key: each.pin_memory() for key, each in found.items()} if device.type == "cuda" else found


class _Folder:
    """Named tensors of a journal, read on a device; batches one ahead where that is an accelerator."""

    def __init__(self, journal: Journal, device: torch.device) -> None:
        self._journal, self.device = journal, device
        self._ahead = None if device.type == "cpu" else _Ahead(partial(_read_for, device, journal))

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, in place of those of that name."""
        if self._ahead is not None:
            self._ahead.forget(name)
        self._journal.write(name, tensors)

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a name, on the device. KeyError for one that was never written."""
        # safetensors knows some devices by name, PyTorch all of them
        return {key: brought_to(self.device, tensor) for key, tensor in self._journal.read(name).items()}

    def read_batch(self, kind: str, batch: int) -> dict[str, Tensor]:
        """The tensors of a batch of a kind, likewise."""
        name, then = f"{kind}-{batch}", f"{kind}-{batch + 1}"
        if self._ahead is None:
            return self.read(name)
        found = self._ahead.read(kind, name, then if self._journal.holds(then) else None)
        return {key: brought_to(self.device, tensor) for key, tensor in found.items()}

    def read_on_cpu(self, name: str) -> dict[str, Tensor]:
        """The tensors of a name, on the CPU. KeyError for one that was never written."""
        return self._journal.read(name)

    def holds(self, name: str) -> bool:
        """Whether there are tensors of a name."""
        return self._journal.holds(name)

    def take(self, name: str, other: _Folder) -> None:
        """Move the tensors of a name here from another folder on the same disk, if they are there and not here."""
        if not self.holds(name):
            self._journal.take(name, other._journal)

    def drop(self, name: str) -> None:
        """Remove the tensors of a name."""
        if self._ahead is not None:
            self._ahead.forget(name)
        self._journal.drop(name)


@dataclass(frozen=True)
class CachedBatches:
    """For each batch some tensors in order, of one kind."""

    _folder: _Folder
    _kind: str

    def write(self, batch: int, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a batch, in place of those before."""
        self._folder.write(f"{self._kind}-{batch}", {str(place): each for place, each in enumerate(tensors)})

    def holds(self, batch: int) -> bool:
        """Whether there are tensors of a batch."""
        return self._folder.holds(f"{self._kind}-{batch}")

    def take(self, batch: int, other: CachedBatches) -> None:
        """Move the tensors of a batch here from a cache on the same disk, if they are there and not here."""
        self._folder.take(f"{self._kind}-{batch}", other._folder)

    def drop(self, batch: int) -> None:
        """Remove the tensors of a batch."""
        self._folder.drop(f"{self._kind}-{batch}")

    def read(self, batch: int) -> tuple[Tensor, ...]:
        """The tensors of a batch, on the device. KeyError where there are none."""
        tensors = self._folder.read_batch(self._kind, batch)
        return tuple(tensors[str(place)] for place in range(len(tensors)))


class ActivationCache:
    """What the walks through a model leave for each other, in a journal: by default on disk until the object goes.

    What does not depend on a size is in the journal `moments`, which may be another one: metrics and decompositions.
    """

    def __init__(self, device: torch.device, journal: Journal | None = None, moments: Journal | None = None) -> None:
        self.journal = Journal() if journal is None else journal
        self.moments = self.journal if moments is None else moments
        self._folder, self._of_moments = _Folder(self.journal, device), _Folder(self.moments, device)

    def dense(self, part: Part, segment: int) -> CachedBatches:
        """New outputs of a segment of the dense model."""
        return CachedBatches(self._folder, f"dense-{part}-{segment}")

    def predictions(self, part: Part) -> CachedBatches:
        """What the divergence from the dense model's predictions depends on."""
        return CachedBatches(self._folder, f"predictions-{part}")

    def compressed(self, part: Part, walk: str, segment: int) -> CachedBatches:
        """Inputs of a segment of the compressed model, in a walk of that name."""
        return CachedBatches(self._folder, f"{walk}/compressed-{part}-{segment}")

    def gradients(self, segment: int) -> CachedBatches:
        """Gradients of the loss at the inputs of a segment, of the fit batches."""
        return CachedBatches(self._folder, f"gradients-{segment}")

    def write_boundary(self, segment: int, moments: Sequence[Tensor]) -> None:
        """Keep the second moments of the gradients at the new outputs of a segment."""
        tensors = {
            f"{place}.{key}": tensor for place, each in enumerate(moments) for key, tensor in _stored(each).items()
        }
        self._of_moments.write(f"boundary-{segment}", tensors)

    def has_boundary(self, segment: int) -> bool:
        """Whether there are second moments of the gradients at the new outputs of a segment."""
        return CachedBatches(self._of_moments, "boundary").holds(segment)

    def boundary(self, segment: int) -> tuple[Tensor, ...]:
        """The second moments of the gradients at the new outputs of a segment."""
        tensors = self._of_moments.read(f"boundary-{segment}")
        count = sum(key.endswith(".lower") for key in tensors)
        return tuple(_moment(tensors, f"{place}.") for place in range(count))

    def write_inputs(self, segment: int, sums: InputSums) -> None:
        """Keep the sums of the inputs of a segment's layers over the examples that are not run backward.

        Products about the mean, which the rounding to float32 thus does not depend on.
        """
        tensors: dict[str, Tensor] = {}
        for names, each in sums.items():
            key = "\n".join(sorted(names))
            about_mean = _stored(each.product - _of_mean(each.total, each.count))
            tensors |= {f"{what}\n{key}": tensor for what, tensor in about_mean.items()}
            tensors |= {f"total\n{key}": each.total, f"count\n{key}": torch.tensor(each.count)}
        self._folder.write(f"inputs-{segment}", tensors)

    def has_inputs(self, segment: int) -> bool:
        """Whether the sums of the inputs of a segment's layers are kept."""
        return self._folder.holds(f"inputs-{segment}")

    def inputs(self, segment: int) -> InputSums:
        """The sums of the inputs of a segment's layers."""
        tensors = self._folder.read(f"inputs-{segment}")
        found: dict[frozenset[str], PackedSum] = {}
        for key in [key.partition("\n")[2] for key in tensors if key.startswith("count\n")]:
            total, count = tensors[f"total\n{key}"], int(tensors[f"count\n{key}"])
            about_mean = _moment({what: tensors[f"{what}\n{key}"] for what in ("lower", "scale")}, "")
            found[frozenset(key.split("\n"))] = PackedSum.of(about_mean + _of_mean(total, count), total, count)
        return found

    def drop_inputs(self, segment: int) -> None:
        """Remove the sums of the inputs of a segment's layers."""
        self._folder.drop(f"inputs-{segment}")

    def metrics(self) -> CachedMetrics:
        """Metrics by layer, of which there are none yet."""
        return CachedMetrics(self._of_moments)

    def decompositions(self) -> CachedDecompositions:
        """Decompositions by layer, those that the journal has."""
        return CachedDecompositions(self._of_moments)


class CachedMetrics(Mapping[str, Metric | TiedMetric]):
    """The metrics of layers by name, each read when it is asked for.

    Moments are kept in float32, in which their products were computed, and only their lower triangles. What the OAS
    shrinkage adds to every eigenvalue, at least float32's precision times the trace, is twice what this rounding moves
    them, so they stay positive definite.
    """

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder
        self._names: dict[str, None] = {}

    def put(self, name: str, metric: Metric | TiedMetric, *, inputs_of: str | None = None) -> None:
        """Keep the metric of a layer, in place of the one before; its inputs with those of another layer, if named."""
        parts = {"": metric} if isinstance(metric, Metric) else {"lookup.": metric.lookup, "head.": metric.head}
        tensors: dict[str, Tensor] = {}
        for prefix, part in parts.items():
            tensors |= {f"{prefix}gradients.{key}": each for key, each in _stored(part.gradients).items()}
            if inputs_of is None:
                tensors |= {f"{prefix}inputs.{key}": each for key, each in _stored(part.inputs).items()}
            if part.mean is not None:
                tensors[f"{prefix}mean"] = part.mean
        if inputs_of is not None:
            tensors["inputs of"] = torch.tensor(list(inputs_of.encode()), dtype=torch.uint8)
        self._folder.write(f"metric/{name}", tensors)
        self._names[name] = None

    def take(self, name: str) -> None:
        """Know the metric of a layer that is kept already."""
        self._names[name] = None

    def are_kept(self, names: Iterable[str]) -> bool:
        """Whether there is a metric of each of some layers."""
        return all(self._folder.holds(f"metric/{name}") for name in names)

    def __getitem__(self, name: str) -> Metric | TiedMetric:
        if name not in self._names:
            raise KeyError(name)
        tensors = self._folder.read(f"metric/{name}")
        if "inputs of" in tensors:
            shared = self._folder.read(f"metric/{bytes(tensors['inputs of'].tolist()).decode()}")
            tensors |= {key: each for key, each in shared.items() if key.startswith("inputs.")}
        if "head.gradients.lower" in tensors:
            return TiedMetric(_metric(tensors, "lookup."), _metric(tensors, "head."))
        return _metric(tensors, "")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class CachedFactors(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of low-rank layers by name, in a journal, each read when it is asked for.

    Those that were not put there are those of `before`.
    """

    def __init__(
        self, device: torch.device, journal: Journal, before: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        self._folder = _Folder(journal, device)
        self._before = {} if before is None else before
        self._names: dict[str, None] = {}

    def put(self, name: str, factors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a layer, in place of those before."""
        self._folder.write(name, {key: each.detach().clone() for key, each in factors.items()})
        self._names[name] = None

    def take(self, name: str) -> None:
        """Know the tensors of a layer that are in the journal already."""
        self._names[name] = None

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        if name not in self._names:
            return self._before[name]
        # Copies: kernels may add up in another order where numbers begin at another address.
        return {key: each.clone() for key, each in self._folder.read(name).items()}

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._before), **self._names})

    def __len__(self) -> int:
        return len(self._before.keys() | self._names.keys())


class CachedDecompositions:
    """The decompositions of layers in their metrics by name, each read when it is asked for.

    Of a layer that has a start there are two: that of its matrix, and that of its matrix without the start, which is
    kept under a digest of the start.
    """

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder

    def put(self, name: str, found: Decomposition, start: str = "") -> None:
        """Keep the decomposition of a layer, in place of the one before."""
        self._folder.write(_unit(name, start), found.tensors())

    def get(self, name: str, start: str = "") -> Decomposition:
        """The decomposition of a layer. KeyError where there is none."""
        tensors = self._folder.read_on_cpu(_unit(name, start))
        return Decomposition(tensors["values"].numpy(), brought_to(self._folder.device, tensors["basis"]))

    def has(self, name: str, start: str = "") -> bool:
        """Whether there is a decomposition of a layer."""
        return self._folder.holds(_unit(name, start))

    def add_errors(self, name: str, start: str, found: Mapping[str, Spectrum]) -> None:
        """Keep the errors of a layer in some forms, beside those of other forms."""
        both = {**self.errors(name, start), **found}
        self._folder.write(f"errors of {_unit(name, start)}", {form: torch.tensor(e) for form, e in both.items()})

    def errors(self, name: str, start: str = "") -> dict[str, Spectrum]:
        """The errors of a layer at rank 0, 1, .. in the forms of which they are known."""
        unit = f"errors of {_unit(name, start)}"
        kept = self._folder.read_on_cpu(unit) if self._folder.holds(unit) else {}
        return {form: each.numpy() for form, each in kept.items()}

    def put_quantized(self, plan: LayerPlan, rounds: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a layer that was quantized as planned, in at most so many rounds."""
        self._folder.write(_quantized_unit(plan, rounds), tensors)

    def quantized(self, plan: LayerPlan, rounds: int) -> dict[str, Tensor]:
        """These tensors. KeyError where they were not made."""
        return self._folder.read(_quantized_unit(plan, rounds))

    def has_quantized(self, plan: LayerPlan, rounds: int) -> bool:
        """Whether a layer was quantized so."""
        return self._folder.holds(_quantized_unit(plan, rounds))


def _unit(name: str, start: str) -> str:
    return f"decomposition/{name}/without-{start}" if start else f"decomposition/{name}"


def _quantized_unit(plan: LayerPlan, rounds: int) -> str:
    return f"quantized/{plan.name}/{plan.form}/{plan.rank}/{plan.share}/{rounds}"


def _metric(tensors: Mapping[str, Tensor], prefix: str) -> Metric:
    inputs, gradients = (_moment(tensors, f"{prefix}{side}.") for side in ("inputs", "gradients"))
    kind = Metric if gradients.dim() < 3 else GroupedMetric
    return kind(inputs, gradients, tensors.get(f"{prefix}mean"))


def _of_mean(total: Tensor, count: int) -> Tensor:
    """The sum of outer products that so many vectors of this sum would have if they were all alike."""
    return total.unsqueeze(-1) * total.unsqueeze(-2) / max(count, 1)


def _stored(moment: Tensor) -> dict[str, Tensor]:
    """A moment for a file: a vector as it is, of a symmetric matrix the lower triangle in float32 and its scale."""
    if moment.dim() == 1:
        return {"diagonal": moment}
    # Divided by a power of two, so that no square underflows.
    scale = power_of_two_on_device(moment)
    return {"lower": packed_triangle(moment / scale, torch.float32), "scale": scale}


def _moment(tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """A moment from a file, in float64."""
    if f"{prefix}diagonal" in tensors:
        return tensors[f"{prefix}diagonal"]
    return in_float64(unpacked_triangle(tensors[f"{prefix}lower"])) * tensors[f"{prefix}scale"]
