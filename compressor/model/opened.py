"""A model that was opened, from a file, a folder, the hub or memory: the one front door of all verbs."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.data import Preprocessing, load_preprocessing
from compressor.data.preprocessing import preprocessing_of
from compressor.encodings import encoded_in, encoded_names, is_of_gguf, read_checkpoint, words_of_gguf
from compressor.errors import BadInput
from compressor.formatting import format_shape
from compressor.initial import InitialWeights, is_record, read_kept
from compressor.io import (
    Checkpoint,
    RemoteModel,
    TensorInfo,
    hub_model,
    local_model,
    open_checkpoint,
    refuse_adapter,
    refuse_fp8,
)
from compressor.lowrank import (
    METADATA_KEY,
    Rewriting,
    StoredPair,
    decoded_checkpoint,
    dense_infos,
    formed_checkpoint,
    formed_layers,
    initial_given,
    is_compressed_tensors,
    merge_record,
    multiplied_checkpoint,
    needs_initial,
    product_in,
    spec_of,
    stored_infos,
    stored_pairs,
    unbatched_checkpoint,
    widened,
    with_effective_weights,
)
from compressor.lowrank.restoring import restored_module
from compressor.model.build import build_model, load_transformers
from compressor.model.load import fill
from compressor.model.streaming import NotStreamed, streamed_module, streamed_transformers, whole
from compressor.model.training import training_recipe
from compressor.network import (
    Architecture,
    Layer,
    StoredAs,
    architecture_mismatch,
    find_layers,
    module_architecture,
    separable_experts,
    transformers_architecture,
    with_separate_experts,
    with_ties,
)
from compressor.network.attention import has_attention
from compressor.planning import Plan
from compressor.recipe import TrainingRecipe
from compressor.torch_state import uncompiled

logger = logging.getLogger(__name__)

ModelLike = str | Path | nn.Module
Factory = str | Callable[[], nn.Module]
CompressedModel = Literal["refused", "as stored", "as dense"]
"""What becomes of a model that is compressed already."""
InitialSource = str | Path | nn.Module | Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | InitialWeights
"""A checkpoint, the untrained module, its state, or a function that returns this."""


@dataclass(frozen=True)
class LayerSelection:
    """Which layers are eligible: globs, or regular expressions after `re:`, and whether embeddings are among them."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """An opened model: its tensors, its architecture and layers, its training, and the network itself.

    Opening reads no weights. The network is loaded when `module` or `streamed` is first asked for, and only once, also
    for copies that `dataclasses.replace` makes of the model. Layers that are stored as what training wrote are dense:
    their weights are formed when they are read. `initial` are the weights that training started from, where they are
    known.
    """

    name: str
    checkpoint: Checkpoint
    architecture: Architecture | None
    layers: tuple[Layer, ...]
    factory: Factory | None
    _network: _Network = field(repr=False)
    _find_recipe: Callable[[], TrainingRecipe] = field(repr=False)
    initial: InitialWeights | None = None

    def __repr__(self) -> str:
        eligible = sum(layer.eligible for layer in self.layers)
        return f"<Model {self.name}: {eligible} of {len(self.layers)} layers eligible, {self.checkpoint!r}>"

    @property
    def module(self) -> nn.Module:
        """The network with its weights: the module that was given, or what its folder or `factory` builds.

        Raises `BadInput` when the architecture is not known, or the weights do not fit.
        """
        return self._network.whole()

    @property
    def with_separate_experts(self) -> nn.Module:
        """`module` with one linear layer for every matrix of its experts, whose weights it shares.

        It is `module` itself for a network without fused experts. Evaluation needs the speed of `module`, which stays
        as it is.
        """
        if self.in_memory and self.architecture is not None:
            return self.architecture.module
        return self._network.apart()

    @property
    def streamed(self) -> nn.Module:
        """`with_separate_experts` with its blocks read from the files when they run: never whole in memory.

        It is `with_separate_experts` itself where that is in memory already, or cannot be read by blocks. For
        calibration, which runs a block many times; every other run reads all blocks anew.
        """
        return self.with_separate_experts if self.in_memory else self._network.by_block(self.name, self._kept)

    @property
    def files(self) -> ModelFiles | None:
        """What other processes read it from; None of a module, and where a function in this process builds it.

        None also of a model whose pairs are seen as dense layers, or that has other tensors than its folder, which
        another process would not see.
        """
        source = self.checkpoint.source
        seen_here = self.squeezes or bool(self._network.changed)
        if source is None or not isinstance(self.factory, str | None) or seen_here:
            return None
        factory = self.factory
        if factory is not None and factory.rpartition(":")[0].endswith(".py"):
            factory = str(Path(factory).absolute())
        return ModelFiles(Path(source).absolute(), factory, self._kept)

    def sent(self) -> SentModel:
        """What another process opens it from, of a model that has `files`."""
        assert self.files is not None
        return SentModel(self.files, self.name, self.digest, self.layers, self.recipe, self.initial)

    @property
    def _kept(self) -> frozenset[str]:
        """Parameters that stay in memory where the blocks do not.

        What its own code multiplies with has to be one and the same tensor all the time.
        """
        return frozenset(f"{layer.module}.{layer.parameter}" for layer in self.layers if layer.kind == "parameter")

    def let_go(self) -> None:
        """Let go of `module` where `streamed` does without it; it is loaded again when it is asked for."""
        self._network.let_go(self.name)

    @property
    def recipe(self) -> TrainingRecipe:
        """How it was trained, as far as that is known."""
        return self._find_recipe()

    @property
    def in_memory(self) -> bool:
        """Whether it was given as a module."""
        return self.checkpoint.source is None

    @cached_property
    def squeezes(self) -> bool:
        """Whether it has pairs that are seen as dense layers."""
        return any(product_in(self.checkpoint, name) is not None for name in self.checkpoint.tensors)

    @property
    def stored(self) -> list[TensorInfo]:
        """The tensors that its files hold."""
        return stored_infos(self.checkpoint)

    def lies_on(self, device: torch.device) -> bool:
        """Whether the network is loaded and on a device, as a whole or in part."""
        known = self.with_separate_experts if self.in_memory else self._network.known
        return known is not None and any(each.device == device for each in known.parameters())

    @cached_property
    def pairs(self) -> Mapping[str, StoredPair]:
        """The layers that are stored as low-rank pairs, by name."""
        return stored_pairs(self.checkpoint)

    @cached_property
    def formed(self) -> tuple[str, ...]:
        """The layers that are stored as what training wrote, whose weights are formed when they are read."""
        return formed_layers(self.checkpoint)

    @cached_property
    def decoded(self) -> tuple[str, ...]:
        """The tensors that others quantized, whose values are decoded when they are read."""
        return encoded_names(self.checkpoint)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What prepares data for it."""
        folder = self.checkpoint.directory
        if folder is not None and self.checkpoint.config is not None:
            return load_preprocessing(folder)
        return preprocessing_of(None if self.architecture is None else self.architecture.module)

    @cached_property
    def has_attention(self) -> bool:
        """Whether it has attention layers, by its configuration or the usual names of their weights."""
        return has_attention(self.checkpoint.config or {}, self.checkpoint.tensors)

    @cached_property
    def digest(self) -> str | None:
        """The SHA-256 of the checkpoint, which reads all of it; None of a module in memory."""
        return None if self.in_memory else self.checkpoint.digest()

    def rewriting(self, plan: Plan) -> Rewriting:
        """The checkpoint as a plan rewrites it."""
        return Rewriting(self.checkpoint, self.recipe, self.layers, plan, initial=self.initial)

    def with_tensors(self, checkpoint: Checkpoint, name: str, changed: Collection[str]) -> Model:
        """The same network with other values of some of its tensors, which a checkpoint has under the same names."""
        network = _Network(checkpoint, self.architecture, self.factory, None, changed=changed)
        return replace(self, name=name, checkpoint=checkpoint, _network=network)

    @property
    def numbers(self) -> int:
        """The numbers that the files hold; of what others quantized those that it stands for."""
        encoded = [each for name in self.decoded if (each := encoded_in(self.checkpoint, name)) is not None]
        stored = sum(info.elements for each in encoded for info in each.infos)
        return sum(info.elements for info in self.stored) - stored + sum(math.prod(each.shape) for each in encoded)

    @property
    def needs_initial(self) -> bool:
        """Whether its weights cannot be formed without the initial ones that it names."""
        return needs_initial(self.checkpoint)

    def with_ties(self) -> Model:
        """The same with the names that its tied tensors have in the architecture, and not in the file."""
        return replace(self, checkpoint=with_ties(self.checkpoint, self.architecture))

    def require_runnable(self) -> None:
        """Raise `BadInput` for weights that cannot be run, because nothing says what model they are of."""
        if not self.in_memory:
            _require_architecture(self.checkpoint, self.factory)


@dataclass(frozen=True)
class SentModel:
    """What another process opens the same model from: its files, and what was found of it here."""

    files: ModelFiles
    name: str
    digest: str | None
    layers: tuple[Layer, ...]
    recipe: TrainingRecipe
    initial: InitialWeights | None

    def opened(self) -> Model:
        """The model in another process."""
        opened = self.files.opened()
        found = replace(
            opened, name=self.name, layers=self.layers, initial=self.initial, _find_recipe=lambda: self.recipe
        )
        vars(found)["digest"] = self.digest  # the cached property, which would read the whole checkpoint
        return found


@dataclass(frozen=True)
class ModelFiles:
    """Files that any process reads a model from that sees them: what builds it, and parameters that stay in memory."""

    source: Path
    factory: str | None
    kept: frozenset[str]

    def streamed(self) -> nn.Module:
        """The network as `Model.streamed` has it."""
        opened = self.opened()
        return opened._network.by_block(opened.name, self.kept)

    def opened(self) -> Model:
        """The model, whose layers are not looked for."""
        return open_runnable(self.source, self.factory)


def open_model(
    model: ModelLike | RemoteModel,
    *,
    recipe: Sequence[TrainingRecipe | Path] = (),
    factory: Factory | None = None,
    select: LayerSelection | None = None,
    revision: str | None = None,
    compressed: CompressedModel = "refused",
) -> Model:
    """Open a trained model and list its matrices.

    `recipe` is what the user states of the training, the most trusted first, and `factory` builds the architecture of
    weights that are not a transformers model's. `revision` is of a model of the hub. Weights of a module that are
    computed from others become parameters in a copy of it. The pairs of a model that is compressed already are seen as
    they are stored, or as the dense layers that they stand for, or it is refused.

    Raises `BadInput` for a model that cannot be read, is an adapter, is quantized, or does not fit its architecture,
    and for a recipe or a pattern that cannot be used.
    """
    given = model if isinstance(model, RemoteModel) else uncompiled(local_model(model, revision))
    if isinstance(given, nn.Module):
        given = with_effective_weights(given)
    # Each expert's matrices are layers of their own in memory too, as they are in the files of such models.
    separate = with_separate_experts(given) if isinstance(given, nn.Module) else given
    checkpoint = unbatched_checkpoint(read_checkpoint(separate))
    refuse_adapter(checkpoint)
    checkpoint = decoded_checkpoint(checkpoint, packed=compressed == "as stored")
    refuse_fp8(checkpoint)
    _refuse_quantized(checkpoint, packed=compressed == "as stored")
    if compressed != "as stored":
        _refuse_compressed(checkpoint, pairs=compressed == "as dense")
    stored = checkpoint
    checkpoint = formed_checkpoint(checkpoint)
    if compressed == "as dense":
        checkpoint = multiplied_checkpoint(checkpoint)
    if isinstance(given, nn.Module) and isinstance(separate, nn.Module):
        architecture: Architecture | None = module_architecture(separate)
        checkpoint = _with_fused(checkpoint, given)
    else:
        architecture = fitting_architecture(checkpoint, factory)
        checkpoint = _with_separate_experts(checkpoint, architecture)
    chosen = select or LayerSelection()
    layers = find_layers(
        checkpoint, architecture, include=chosen.include, exclude=chosen.exclude, embeddings=chosen.embeddings
    )
    layers = tuple(_with_pair(layer, checkpoint) for layer in layers)
    opened = _opened(given, checkpoint, architecture=architecture, layers=layers, factory=factory, recipe=recipe)
    if opened.squeezes:
        opened._network.stored = stored
    if recipe:
        opened.recipe  # noqa: B018 - a bad one is refused before any work
    return opened


def _with_pair(layer: Layer, checkpoint: Checkpoint) -> Layer:
    """The layer with what it is stored as; a pair whose rank cannot be lowered is left alone, for that reason."""
    if (encoded := encoded_in(checkpoint, layer.tensor)) is not None:
        numbers = -(-encoded.nbytes // encoded.dtype.itemsize)
        return replace(layer, stored=StoredAs(None, None, numbers, encoded.nbytes, encoded.decoder.words))
    if (words := words_of_gguf(checkpoint, layer.tensor)) is not None:
        # What is written of it is dense.
        nbytes = checkpoint.tensors[layer.tensor].nbytes
        return replace(layer, stored=StoredAs(None, None, layer.parameters, nbytes, words))
    pair = product_in(checkpoint, layer.tensor)
    return layer if pair is None else replace(layer, stored=pair.stored_as, skip=layer.skip or pair.obstacle)


def open_runnable(
    model: ModelLike,
    factory: Factory | None = None,
    *,
    revision: str | None = None,
    initial: InitialSource | None = None,
) -> Model:
    """Open a model to run it or to read its tensors, dense or compressed; its layers are not looked for.

    A module stays as it is. `initial` are the weights that what training wrote is added to, where a compressed model
    names a checkpoint. Raises `BadInput` for a model that cannot be read, where initial weights are missing or are not
    those that it was compressed with, and for a `factory` that fails.
    """
    given = uncompiled(local_model(model, revision))
    start = None if initial is None else given_initial(initial, factory=factory)
    stored = unbatched_checkpoint(read_checkpoint(given))
    checkpoint = formed_checkpoint(decoded_checkpoint(stored, packed=True), start)
    architecture = None
    if isinstance(given, nn.Module):
        architecture = module_architecture(given)
    elif factory is not None:
        architecture = module_architecture(widened(build_model(factory), checkpoint))
    opened = _opened(given, checkpoint, architecture=architecture, layers=(), factory=factory, recipe=())
    opened._network.initial = start
    return opened


def load_model(model: ModelLike, factory: Factory | None = None, *, initial: InitialSource | None = None) -> nn.Module:
    """Load a model to run, dense or compressed: a checkpoint's weights in the architecture of its folder or factory.

    For a file of concatenated networks the layers of the factory's architecture are widened as they are in the file.

    Args:
        model: A weight file, a model folder, or a module, which is returned as it is.
        factory: The function that builds the architecture, or its name, as in "package.module:function" or
            "file.py:function"; for weights without a transformers folder.
        initial: The initial weights, for a model that was compressed to what training added to those of a checkpoint: a
            file, a folder, the name of a model of the hub, a module, a state dict, or a function that returns one.

    Returns:
        The module.

    Raises:
        BadInput: the architecture is unknown, the weights do not fit it, or initial weights are missing or others.

    Example:
        >>> model = compressor.load_model("small.safetensors", build_model).eval()
    """
    return open_runnable(model, factory, initial=initial).module


def _opened(
    given: str | Path | nn.Module | RemoteModel,
    checkpoint: Checkpoint,
    *,
    architecture: Architecture | None,
    layers: tuple[Layer, ...],
    factory: Factory | None,
    recipe: Sequence[TrainingRecipe | Path],
) -> Model:
    name = type(given).__name__ if isinstance(given, nn.Module) else str(given)
    if checkpoint.source is not None and hub_model(checkpoint.source) is not None:
        name = checkpoint.name
    network = _Network(checkpoint, architecture, factory, given if isinstance(given, nn.Module) else None)
    find_recipe = partial(training_recipe, checkpoint, recipe)
    return Model(name, checkpoint, architecture, layers, factory, network, functools.cache(find_recipe))


@dataclass
class _Network:
    """The network of a model, loaded once: whole, or by blocks as long as nobody asked for all of it.

    What a factory built is one module, which is whole from the first time on that it is asked for.
    """

    checkpoint: Checkpoint
    architecture: Architecture | None
    factory: Factory | None
    loaded: nn.Module | None
    separate: nn.Module | None = None
    blocks: nn.Module | None = None
    initial: InitialWeights | None = None
    changed: Collection[str] = ()
    """The tensors that are not those of the files of its folder."""
    stored: Checkpoint | None = None
    """The same with its pairs as they are stored, where the checkpoint has dense layers in their places."""

    @property
    def known(self) -> nn.Module | None:
        """What was asked for so far, with separate experts where these were."""
        return self.separate or self.blocks

    def whole(self) -> nn.Module:
        """All of it in memory, with the pairs that its files hold."""
        if self.loaded is None and self.stored is not None:
            architecture = None if self.factory is None else module_architecture(build_model(self.factory))
            self.loaded = _loaded(self.stored, architecture, self.factory)
        if self.loaded is None and self.blocks is not None and self.factory is not None:
            self.loaded = whole(self.blocks)
        if self.loaded is None:
            with initial_given(self.initial):
                self.loaded = _loaded(self.checkpoint, self.architecture, self.factory)
            if self.factory is None and self.changed:
                _put(self.loaded, self.checkpoint, self.architecture, names=self.changed)
        return self.loaded

    def apart(self) -> nn.Module:
        """The same with separate experts, and with dense layers in the places of pairs."""
        if self.separate is None and self.stored is not None:
            self.separate = self._multiplied()
        if self.separate is None:
            self.separate = with_separate_experts(self.whole())
        return self.separate

    def _multiplied(self) -> nn.Module:
        """The network with dense layers in the places of pairs, in memory."""
        assert self.stored is not None
        if self.factory is not None:
            return fill(widened(build_model(self.factory), self.checkpoint), self.checkpoint)
        loaded, architecture = _loaded(self.stored, None, None), known_architecture(self.checkpoint, None)
        assert architecture is not None, "transformers has just built it"
        return with_separate_experts(restored_module(loaded, architecture.module))

    def by_block(self, name: str, kept: Collection[str]) -> nn.Module:
        """Its blocks read when they run, with separate experts; the parameters that are `kept` are in memory."""
        if self.loaded is None:
            self._find_blocks(name, kept)
        return self.apart() if self.blocks is None else self.blocks

    def let_go(self, name: str) -> None:
        """Forget what was loaded whole, where its blocks are another module."""
        if self.checkpoint.source is not None and self.factory is None and self.loaded is not None:
            self._find_blocks(name, ())
            if self.blocks is not None:
                self.loaded = self.separate = None

    def _find_blocks(self, name: str, kept: Collection[str]) -> None:
        if self.blocks is None:
            try:
                self.blocks = _by_block(self.checkpoint, self.architecture, self.factory, kept=kept)
            except NotStreamed as reason:
                logger.info("%s is loaded whole: %s", name, reason)


def _by_block(
    checkpoint: Checkpoint, architecture: Architecture | None, factory: Factory | None, *, kept: Collection[str]
) -> nn.Module:
    _require_architecture(checkpoint, factory)
    if stored_pairs(checkpoint) or formed_layers(checkpoint):
        raise NotStreamed("it is compressed already")
    if factory is not None:
        assert architecture is not None
        return streamed_module(architecture, checkpoint, kept=kept)
    assert checkpoint.folder is not None
    return streamed_transformers(checkpoint, checkpoint.folder)


def _loaded(checkpoint: Checkpoint, architecture: Architecture | None, factory: Factory | None) -> nn.Module:
    """The network of some files; a `factory` has built its architecture already, which gets the weights."""
    _require_architecture(checkpoint, factory)
    if factory is not None:
        assert architecture is not None
        return fill(architecture.module, checkpoint)
    assert checkpoint.folder is not None
    if is_of_gguf(checkpoint):
        return load_transformers(checkpoint.folder, dict(checkpoint.stream()))
    return load_transformers(checkpoint.folder)


@torch.no_grad()
def _put(
    module: nn.Module, checkpoint: Checkpoint, architecture: Architecture | None, *, names: Collection[str]
) -> None:
    """Copy some tensors of a checkpoint into the network that was loaded from a folder."""
    state = dict(module.state_dict(keep_vars=True))
    for name in names:
        in_module = name if architecture is None else architecture.module_name(name)
        if in_module not in state:
            raise BadInput(
                f"{name} is no tensor of the model by itself, so it cannot be put into it",
                where=checkpoint.source,
                remedy="write the fine-tune with 'compress export FILE --to dense --base ORIGINAL' first",
            )
        state[in_module].copy_(checkpoint.read(name))


def _require_architecture(checkpoint: Checkpoint, factory: Factory | None) -> None:
    if factory is None and checkpoint.folder is not None and checkpoint.config is None:
        raise BadInput(
            "has no config.json, which says what model it is",
            where=checkpoint.source,
            remedy="add it, or pass `factory='file.py:function'` or package.module:function that builds the model",
        )
    if factory is None and checkpoint.folder is None:
        raise BadInput(
            "running it needs its architecture",
            where=checkpoint.source,
            remedy="pass `factory='file.py:function'` or package.module:function that builds it, or a model folder",
        )


def _refuse_quantized(checkpoint: Checkpoint, *, packed: bool) -> None:
    """Refuse a model that others quantized, unless integers that are `packed` may be opened."""
    quantization = (checkpoint.config or {}).get("quantization_config")
    if quantization is None or encoded_names(checkpoint):
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method == METADATA_KEY:
        return
    what = f"is quantized already ({method if isinstance(method, str) else 'by an unknown method'})"
    remedy = "give the original"
    if method == "auto-round":
        remedy = "give the original, or write it with auto-round in the format auto_gptq"
    if is_compressed_tensors(checkpoint.config):
        if packed:
            return
        remedy = "give the original, or bring it back with 'compress restore MODEL'"
    raise BadInput(what, where=checkpoint.source, remedy=remedy)


def _refuse_compressed(checkpoint: Checkpoint, *, pairs: bool) -> None:
    """Refuse a model that is compressed already, but for the pairs of files where these are taken."""
    what, spec = None, spec_of(checkpoint)
    if spec.from_initial:
        what = "is compressed already, to what training wrote on its initialization"
    elif any(layer.share is not None for layer in spec.layers.values()):
        what = "is compressed already, to what is added to another model"
    elif stored_pairs(checkpoint) and not (pairs and checkpoint.source is not None):
        what = "is compressed already"
    if what is not None:
        remedy = "give the original, or bring it back with 'compress restore MODEL'"
        raise BadInput(what, where=checkpoint.source, remedy=remedy)


def known_architecture(checkpoint: Checkpoint, factory: Factory | None) -> Architecture | None:
    """The architecture behind a checkpoint as it is known, whether or not it fits."""
    if factory is not None:
        # Layers that networks side by side make wider than the architecture's were not initialized by it.
        untrained = merge_record(checkpoint) == {}
        return module_architecture(widened(build_model(factory), checkpoint), untrained=untrained)
    if checkpoint.config is None or checkpoint.directory is None:
        return None
    return transformers_architecture(checkpoint.directory)


def fitting_architecture(checkpoint: Checkpoint, factory: Factory | None) -> Architecture | None:
    """The module tree behind a checkpoint, from the user's own code or from transformers, if there is one.

    Raises `BadInput` where it does not fit the tensors and ought to.
    """
    architecture = known_architecture(checkpoint, factory)
    mismatch = None if architecture is None else _mismatch(checkpoint, architecture)
    if mismatch is None:
        return architecture
    if factory is not None:
        raise BadInput(
            f"the model that `factory` builds does not fit: {mismatch}",
            where=checkpoint.source,
            option="factory",
            remedy="use the function that builds the model that was trained",
        )
    if checkpoint.folder is not None:
        raise _of_another_model(checkpoint, mismatch)
    logger.warning("the config.json beside %s belongs to another model and is not used", checkpoint.source)
    return None


def _with_separate_experts(checkpoint: Checkpoint, architecture: Architecture | None) -> Checkpoint:
    """The checkpoint with each matrix of the experts by itself that its files hold in one tensor for all of a block.

    Raises `BadInput` where such a tensor does not have the shape that it has in the model.
    """
    if architecture is None:
        return checkpoint
    shared = {name for alias in checkpoint.aliases.items() for name in alias}
    found = {name: architecture.stack(name) for name in checkpoint.tensors if name not in shared}
    stacks = [stack for stack in found.values() if stack is not None]
    if not stacks:
        return checkpoint
    for stack in stacks:
        shape = checkpoint.tensors[stack.tensor].shape
        if not stack.fits(shape):
            what = f"{stack.tensor} is {format_shape(shape)} in the file, and the model has {stack.count} experts"
            raise _of_another_model(checkpoint, what)
    apart = checkpoint.taken_apart(stacks).stacked(stacks, checkpoint)
    if (mismatch := architecture_mismatch(apart, architecture)) is not None:
        raise _of_another_model(checkpoint, mismatch)
    return apart


def _with_fused(checkpoint: Checkpoint, module: nn.Module) -> Checkpoint:
    """The checkpoint of a module with separate experts, which knows those that the files of `module` have together."""
    layouts = separable_experts(module)
    stacks = [stack for place, layout in layouts.items() if not layout.apart_in_files for stack in layout.stacks(place)]
    if not stacks:
        return checkpoint
    return checkpoint.stacked(stacks, open_checkpoint(module))


def _of_another_model(checkpoint: Checkpoint, mismatch: str) -> BadInput:
    return BadInput(
        f"config.json does not belong to these weights: {mismatch}",
        where=checkpoint.source,
        remedy="put the model's own config.json there",
    )


def _mismatch(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    """In what the dense tensors that a checkpoint holds, or its pairs stand for, do not fit an architecture."""
    dense = {name: info for name, (info, _) in dense_infos(checkpoint, stored_pairs(checkpoint)).items()}
    return architecture_mismatch(replace(checkpoint, tensors=dense), architecture)


def given_initial(
    source: InitialSource, *, factory: Factory | None = None, like: Model | None = None
) -> InitialWeights:
    """The initial weights that are given.

    Args:
        source: A file, a folder, the name of a model of the hub, what a training run kept of its start, a module, a
            state dict, or a function that returns one.
        factory: What builds the architecture, for the names that tensors have in it.
        like: A model that has the same names for them, where it is open already.

    Raises:
        BadInput: they cannot be read.
    """
    try:
        if isinstance(source, InitialWeights):
            return source
        if isinstance(source, nn.Module):
            return InitialWeights.from_checkpoint(with_separate_experts(uncompiled(source)))
        if not isinstance(source, str | Path):
            return InitialWeights.from_state(source)
        if is_record(source):
            numbers = None if like is None else like.checkpoint.elements
            return read_kept(source, numbers)
        checkpoint = decoded_checkpoint(read_checkpoint(local_model(source)))
        architecture = like.architecture if like is not None else known_architecture(checkpoint, factory)
        return InitialWeights.from_checkpoint(checkpoint, architecture)
    except BadInput as error:
        error.option = error.option or "initial"
        if isinstance(source, str) and Path(source).name == source and not Path(source).exists():
            remedy = "give a seed (a whole number), auto, a file, a folder, or the name of a model of the hub"
            raise BadInput(error.what, where=error.where, option=error.option, remedy=remedy) from error
        raise
