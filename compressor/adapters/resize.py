"""An adapter at smaller ranks: each module is the best pair of its rank, and the tensors are written as they come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.adapters.dialect import Dialect, FactorNames, WrittenModule
from compressor.adapters.dialects import DIALECTS
from compressor.adapters.module import Adapter, AdapterModule, Stored, is_magnitude, require_small
from compressor.choices import AdapterDialect
from compressor.engine import Engine, InProcess
from compressor.errors import BadInput
from compressor.factorize import FactorPair, KroneckerProduct, KroneckerSVD, Product, ProductSVD
from compressor.io import Artifact, Document, TensorInfo, require_in_range
from compressor.measure import Spectrum

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of what a module adds, its scale included."""

    module: AdapterModule
    values: Spectrum


@dataclass(frozen=True)
class ModuleChange:
    """What became of a module: the energy of what it added, and what of that is dropped.

    The energy is the squared Frobenius norm, the scale of the module included.
    """

    name: str
    energy: float
    dropped: float

    @property
    def error(self) -> float:
        """The relative error of what it adds, in the Frobenius norm."""
        return math.sqrt(self.dropped / self.energy) if self.energy > 0 else 0.0


@dataclass(frozen=True)
class _Resized:
    """What is written of a module."""

    tensors: tuple[tuple[str, Tensor], ...]
    change: ModuleChange


def module_spectrum(module: AdapterModule) -> ModuleSpectrum:
    """The singular values of what a module adds."""
    return _spectrum(module, module.factors.read().svd())


def adapter_spectra(
    adapter: Adapter, engine: Engine | None = None, done: Callable[[int], None] | None = None
) -> tuple[ModuleSpectrum, ...]:
    """The singular values of every module, one after another; `done` is told how many are known."""
    found = list[ModuleSpectrum]()
    for spectrum in (engine or InProcess()).map(module_spectrum, adapter.modules):
        found.append(spectrum)
        if done is not None:
            done(len(found))
    return tuple(found)


def written_modules(adapter: Adapter, ranks: Sequence[int], dialect: AdapterDialect) -> tuple[WrittenModule, ...]:
    """The modules as they are to be written, at ranks in their order."""
    found = []
    for module, rank in zip(adapter.modules, ranks, strict=True):
        kept = module.kept_as_it_is(rank)
        # In other names only pairs can be kept; what else there is becomes one of its full rank.
        kept = kept and module.factors.is_stored and (module.factors.is_pair or dialect == adapter.dialect)
        of_factors = module.factors.rank if kept else min(rank, module.rank)
        if not kept and module.factors.is_stored and not module.factors.is_pair:
            # A few numbers can stand for it.
            require_small(module.shape, of_factors, str(module.name), remedy="leave it in the names that it has")
        found.append(WrittenModule(module, of_factors, kept, module.scaled.alpha_at(of_factors)))
    return tuple(_with_one_alpha(found, adapter) if dialect == "kohya" else found)


def _with_one_alpha(modules: Sequence[WrittenModule], adapter: Adapter) -> Iterator[WrittenModule]:
    """Modules whose factors are computed anew with the alpha that most had, where the ranks would give them several.

    diffusers (0.42) does not find the alpha of an attention layer in a file of kohya's scripts if modules differ in it.
    """
    before = Counter(
        each.module.scaled.alpha_at(each.module.factors.rank) for each in modules if each.module.factors.is_pair
    )
    common, _ = before.most_common(1)[0] if before else (0.0, 0)
    several = len({each.alpha for each in modules}) > 1
    for each in modules:
        unstored = adapter.dialect == "kohya" and each.module.alpha is None
        own = each.as_it_is or unstored or each.alpha * common <= 0
        yield each if own or not several else replace(each, alpha=common)


def resized_artifact(
    adapter: Adapter,
    ranks: Sequence[int],
    *,
    dialect: AdapterDialect | None = None,
    engine: Engine | None = None,
    done: Callable[[ModuleChange], None] | None = None,
) -> Artifact:
    """The adapter at these ranks, in its own names or those of another dialect.

    `done` is told what became of each module as it is written.

    Raises:
        BadInput: the dialect cannot hold the adapter.
    """
    target = DIALECTS[dialect or adapter.dialect]
    _require_holdable(adapter, target)
    modules = written_modules(adapter, ranks, target.name)
    jobs = [_Job(each, target, adapter) for each in modules]
    described = target.described(adapter, modules)
    own_name = adapter.checkpoint.files[0].name if adapter.checkpoint.files else WEIGHTS
    keeps_name = target.name == adapter.dialect != "peft" and own_name.endswith(".safetensors")
    others = adapter.others if target.name == adapter.dialect else ()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from ((each.name, each.tensor.read()) for each in others)
        for resized in (engine or InProcess()).map(_resized, jobs):
            yield from resized.tensors
            if done is not None:
                done(resized.change)

    documents: dict[str, Document] = dict(described.documents)
    return Artifact(
        form=written_as(adapter, target.name),
        infos=[*(each.info for each in others), *(info for job in jobs for info in job.infos)],
        tensors=tensors,
        metadata=described.metadata,
        weight_file=own_name if keeps_name else WEIGHTS,
        companions_of=adapter.checkpoint if target.name == adapter.dialect else None,
        documents=lambda: documents,
    )


def written_as(adapter: Adapter, dialect: AdapterDialect) -> Literal["file", "folder"]:
    """Whether an adapter in a dialect is written as a folder: PEFT's always, and others if read from one."""
    if dialect == "peft" or (adapter.checkpoint.folder is not None and dialect == adapter.dialect):
        return "folder"
    return "file"


@dataclass(frozen=True)
class _Job:
    """A module that is to be written, with the names that its tensors get."""

    written: WrittenModule
    dialect: Dialect
    adapter: Adapter

    @property
    def nbytes(self) -> int:
        """What it takes in memory: its factors as they are stored, and a few times in float64."""
        return 4 * torch.float64.itemsize * self.written.module.numbers

    @property
    def _same(self) -> bool:
        return self.dialect.name == self.adapter.dialect

    @property
    def names(self) -> FactorNames:
        return self.dialect.names(self.written.module, self.adapter)

    @property
    def _kept(self) -> tuple[tuple[str, Stored], ...]:
        """The tensors that go along as they are, by the names that they get."""
        module = self.written.module
        beside = tuple((each.name, each) for each in module.beside)
        if not self.written.as_it_is:
            return beside
        if self._same:
            return (*((each.name, each) for each in module.factors.tensors), *beside)
        down, up = module.factors.tensors
        return ((self.names.down, down), (self.names.up, up))

    @property
    def _alpha(self) -> Tensor | None:
        """The alpha that makes the scale what it was, where the dialect has a tensor for it."""
        module, name = self.written.module, self.names.alpha
        if name is None or (self._same and module.alpha is None):
            return None
        if self._same and self.written.as_it_is and module.alpha is not None:
            return module.alpha.read()
        alpha = torch.tensor(self.written.alpha, dtype=torch.float64)
        dtype = module.dtype if module.alpha is None else module.alpha.tensor.dtype
        if not dtype.is_floating_point or alpha.to(dtype).double() != alpha:
            dtype = torch.float32
        return alpha.to(dtype)

    @property
    def infos(self) -> list[TensorInfo]:
        """Name, shape, and dtype of what is written."""
        module, rank = self.written.module, self.written.rank
        infos = [TensorInfo(name, each.shape, each.tensor.dtype) for name, each in self._kept]
        if not self.written.as_it_is:
            infos.append(TensorInfo(self.names.down, module.down_shape(rank), module.dtype))
            infos.append(TensorInfo(self.names.up, module.up_shape(rank), module.dtype))
        alpha = self._alpha
        if alpha is not None and self.names.alpha is not None:
            infos.append(TensorInfo(self.names.alpha, tuple(alpha.shape), alpha.dtype))
        return infos


def _resized(job: _Job) -> _Resized:
    """The tensors of a module."""
    module, rank = job.written.module, job.written.rank
    tensors = [(name, each.read()) for name, each in job._kept]
    product = module.factors.read()
    if job.written.as_it_is:
        change = _kept(module, product)
    else:
        if product.rank <= rank:  # not truncated
            change, pair = _kept(module, product), product.pair()
        else:
            svd = product.svd()
            change, pair = module_change(_spectrum(module, svd), rank), svd.even_pair(rank)
        # Times the scale that is meant over the one that alpha will stand for.
        ratio = module.scaled.alpha_at(rank) / job.written.alpha if job.written.alpha else 1.0
        tensors += _as_stored(module, job.names, pair.scaled(ratio))
    if (alpha := job._alpha) is not None and job.names.alpha is not None:
        tensors.append((job.names.alpha, alpha))
    return _Resized(tuple(tensors), change)


def _kept(module: AdapterModule, product: Product | KroneckerProduct) -> ModuleChange:
    return ModuleChange(str(module.name), (module.scale * product.norm) ** 2, 0.0)


def module_change(spectrum: ModuleSpectrum, rank: int | None) -> ModuleChange:
    """What a rank makes of a module; None leaves it as it is."""
    energies = spectrum.values**2
    dropped = 0.0 if rank is None else float(energies[rank:].sum())
    return ModuleChange(str(spectrum.module.name), float(energies.sum()), dropped)


def _spectrum(module: AdapterModule, svd: ProductSVD | KroneckerSVD) -> ModuleSpectrum:
    return ModuleSpectrum(module, abs(module.scale) * svd.spectrum)


def _as_stored(module: AdapterModule, names: FactorNames, pair: FactorPair) -> list[tuple[str, Tensor]]:
    """The factors in the shapes and the dtype of the file."""
    rank = pair.rank
    stored = ((names.down, pair.down, module.down_shape(rank)), (names.up, pair.up, module.up_shape(rank)))
    return [(name, require_in_range(name, factor.to(module.dtype).reshape(shape))) for name, factor, shape in stored]


def _require_holdable(adapter: Adapter, target: Dialect) -> None:
    """Refuse to write in other names what only the adapter's own can hold."""
    if target.name == adapter.dialect:
        return
    remedy = "leave it in the names that it has"
    where = adapter.checkpoint.source
    if adapter.others:
        names = [each.name for each in adapter.others]
        what = f"holds {len(names)} tensors beside the factors ({names[0][:80]}), which only its own names can hold"
        raise BadInput(what, where=where, option="to", remedy=remedy)
    for module in adapter.modules:
        if module.beside:
            what = "is of DoRA" if is_magnitude(module.beside[0].name) else "has biases beside its factors"
            raise BadInput(f"{what}, which only its own names can hold", where=where, option="to", remedy=remedy)
        if module.kind == "embedding":
            what = f"changes the embedding {str(module.name)[:80]}, which only PEFT has"
            raise BadInput(what, where=where, option="to", remedy=remedy)


def relative_error(changes: Sequence[ModuleChange]) -> float:
    """The relative error of all updates together, in the Frobenius norm."""
    energy = sum(each.energy for each in changes)
    return math.sqrt(sum(each.dropped for each in changes) / energy) if energy > 0 else 0.0
