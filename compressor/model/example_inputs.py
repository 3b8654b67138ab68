"""Random inputs of the names, shapes and dtypes that a model takes: what it can be run on where nobody gave data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from inspect import Parameter, signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.measure import image_size
from compressor.model.opened import Model

# Tokens of an example where the caller does not say how many.
DEFAULT_LENGTH = 128

# Sides of images that are tried on a model that does not say its own: usual ones, and those of small networks.
SIDES = (32, 28, 64, 96, 128, 224, 256, 299, 384, 16, 8)

META = torch.device("meta")
REMEDY = "give `data` or `calibration` with what its forward takes"


def example_inputs(
    model: Model,
    count: int,
    *,
    generator: torch.Generator,
    length: int | None = None,
    shape: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Random inputs for a model that can be run, by the names that its forward has.

    Token ids are uniform over the vocabulary without its special tokens, and images are uniform noise in the
    normalization of the model's own preprocessing. The inputs of a module that is not a transformers model are derived
    from its first layer, and tried in a forward on the meta device: no weights are read.

    Args:
        model: The model.
        count: Number of examples.
        generator: Random numbers on the CPU.
        length: Number of tokens or positions; by default 128, or as many as the model takes if these are fewer.
        shape: The shape of one example of the main input, where it is known, without the batch.

    Returns:
        The inputs by name, on the CPU: `input_ids` (count, length), with `decoder_input_ids` of an encoder-decoder;
        `pixel_values` (count, channels, height, width); of other modules one `input`.

    Raises:
        BadInput: the inputs cannot be known without data.

    Example:
        >>> inputs = example_inputs(open_model("model/"), 8, generator=torch.Generator().manual_seed(0))
    """
    module = architecture_of(model)
    if not is_transformer(module):
        return {"input": _of_module(module, count, generator=generator, length=length, shape=shape)}
    config: Any = module.config
    named = getattr(module, "main_input_name", None)
    length = most_tokens(model) if length is None else min(length, most_tokens(model, length))
    if named == "input_ids":
        inputs = {"input_ids": random_tokens(model, (count, length), generator=generator)}
    elif named == "pixel_values" and isinstance(getattr(config, "num_channels", None), int):
        size = tuple(shape)[-2:] if shape else _image_size(model, module)
        inputs = {"pixel_values": _noise(model, (count, config.num_channels, *size), generator)}
    elif named == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        frames = (count, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {"input_features": torch.randn(frames, generator=generator)}
    else:
        raise unknown_inputs(module, f"of {named}")
    if getattr(config, "is_encoder_decoder", False):
        longest = getattr(config, "max_target_positions", None) or length
        decoder = random_tokens(model, (count, min(length, longest)), generator=generator, decoder=True)
        decoder[:, 0] = first_decoder_token(config)
        inputs["decoder_input_ids"] = decoder
    return inputs


def architecture_of(model: Model) -> Any:
    """The module tree of a model, without its weights where nobody needs them yet."""
    return model.module if model.architecture is None else model.architecture.module


def is_transformer(module: nn.Module) -> bool:
    """Whether a module is one of transformers."""
    return getattr(module, "config", None) is not None and hasattr(module, "main_input_name")


def unknown_inputs(module: nn.Module, which: str) -> BadInput:
    """The error that says that nobody but the user knows what the model takes."""
    return BadInput(f"{type(module).__name__} takes inputs {which}, which cannot be made without data", remedy=REMEDY)


def most_tokens(model: Model, longest: int = DEFAULT_LENGTH) -> int:
    """The number of tokens that a model takes at once, at most `longest`."""
    module = architecture_of(model)
    own = model.preprocessing.sequence_length
    if own is not None:
        # Positions of RoBERTa and its kin begin behind that of the padding.
        tables = (
            each for name, each in module.named_modules() if "position" in name and isinstance(each, nn.Embedding)
        )
        own -= max((each.padding_idx + 1 for each in tables if each.padding_idx is not None), default=0)
    return longest if own is None else min(longest, own)


def ordinary_tokens(model: Model, *, decoder: bool = False) -> Tensor:
    """The ids of a vocabulary but its special ones; of all where all are special. `decoder` asks for the decoder's."""
    module = architecture_of(model)
    config = module.config
    side = getattr(config, "decoder" if decoder else "encoder", None)
    text: Any = side if hasattr(side, "vocab_size") else getattr(config, "text_config", None) or config
    table = None if decoder else module.get_input_embeddings()
    size = min(text.vocab_size, getattr(table, "num_embeddings", text.vocab_size))
    special = set(_special_tokens(model, text))
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    return ordinary if len(ordinary) else torch.arange(size)


def random_tokens(model: Model, shape: tuple[int, ...], *, generator: torch.Generator, decoder: bool = False) -> Tensor:
    """Ids drawn uniformly from the vocabulary without its special tokens."""
    ordinary = ordinary_tokens(model, decoder=decoder)
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]


def first_decoder_token(config: Any) -> int:
    """The token that the decoder of an encoder-decoder begins with."""
    own = (getattr(config, "decoder_start_token_id", None), getattr(config, "bos_token_id", None), 0)
    return next(token for token in own if isinstance(token, int))


def _special_tokens(model: Model, config: Any) -> Iterator[int]:
    for settings in (config, getattr(architecture_of(model), "generation_config", None)):
        for name, value in vars(settings).items() if settings is not None else ():
            if name.endswith("_token_id"):
                yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    try:
        yield from getattr(model.preprocessing.tokenizer, "all_special_ids", ())
    except BadInput:  # one that cannot be loaded, which nobody asked for
        return


def _noise(model: Model, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform noise in the normalization of the model's images."""
    processor: Any = model.preprocessing.image_processor
    pixels = torch.rand(shape, generator=generator)
    try:
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    except BadInput:
        return pixels
    if not getattr(processor, "do_normalize", False) or mean is None or std is None:
        return pixels
    mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (mean, std))
    return (pixels - mean) / std


def _image_size(model: Model, module: nn.Module) -> tuple[int, int]:
    known = image_size(module.config, model.checkpoint.directory)
    if known is not None:
        return known
    channels = int(module.config.num_channels)  # type: ignore[union-attr,arg-type]
    sizes = ((channels, side, side) for side in _sides(module))
    _, *size = _first_accepted(module, sizes, torch.float32)
    return size[0], size[1]


def _of_module(
    module: nn.Module, count: int, *, generator: torch.Generator, length: int | None, shape: Sequence[int] | None
) -> Tensor:
    """The one input of a module that is not a transformers model."""
    named = signature(module.forward).parameters.values()
    varying = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    needed = [each.name for each in named if each.default is Parameter.empty and each.kind not in varying]
    if len(needed) > 1:
        raise unknown_inputs(module, f"{', '.join(needed)}")
    first = next((layer for layer in module.modules() if _kind_of_input(layer)), None)
    if isinstance(first, nn.Embedding):
        size = tuple(shape) if shape else _first_accepted(module, [(length or DEFAULT_LENGTH,)], torch.int64)
        return torch.randint(first.num_embeddings, (count, *size), generator=generator)
    if shape:
        return torch.rand(count, *shape, generator=generator)
    if first is None:
        raise unknown_inputs(module, "of an unknown shape")
    size = _first_accepted(module, _shapes(module, first, length or DEFAULT_LENGTH), torch.float32)
    return torch.rand(count, *size, generator=generator)


_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def _kind_of_input(layer: nn.Module) -> bool:
    """Whether a layer says of what shape its inputs are."""
    known = (nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, *_CONVOLUTIONS)
    # Layers of other classes that stand for linear ones say it too; their parts come after them.
    return isinstance(layer, known) or isinstance(getattr(layer, "in_features", None), int)


def _shapes(module: nn.Module, first: Any, length: int) -> Iterator[tuple[int, ...]]:
    """Shapes of an example that the first layer would take, the likeliest first."""
    if isinstance(first, nn.RNNBase | nn.MultiheadAttention):
        if first.batch_first:  # else the first dimension of the inputs may be that of the examples or not
            yield length, first.input_size if isinstance(first, nn.RNNBase) else first.embed_dim
        return
    dimensions = next((number for kind, number in _CONVOLUTIONS.items() if isinstance(first, kind)), None)
    if dimensions is not None:
        sides = (length, *_sides(module)) if dimensions == 1 else _sides(module)
        yield from ((first.in_channels, *(side,) * dimensions) for side in sides)
        return
    yield (first.in_features,)
    yield length, first.in_features


def _sides(module: nn.Module) -> Sequence[int]:
    """Sides of images to try; a first convolution of large steps is that of a network for large images."""
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    large = first is not None and first.kernel_size[0] >= 7 and first.stride[0] >= 2
    return (224, *SIDES) if large else SIDES


def _first_accepted(module: nn.Module, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> tuple[int, ...]:
    """The first shape of an example on which the module runs on the meta device."""
    try:
        running = on_meta(module)
    except Exception as error:  # whatever copying the caller's own attributes raises
        raise unknown_inputs(module, "of an unknown shape") from error
    for shape in shapes:
        try:
            with torch.no_grad(), META:
                running(torch.empty(2, *shape, dtype=dtype))
        except Exception as error:  # whatever a module raises, it does not take this shape
            if "meta" not in str(error):  # else it looks at values, which the meta device does not have
                continue
        return shape
    raise unknown_inputs(module, "of an unknown shape")


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module without values, in evaluation mode."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    memo: dict[int, Any] = {}
    for _, tensor in tensors:
        empty = torch.empty_like(tensor, device=META)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).eval()
