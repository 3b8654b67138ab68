"""ONNX through the dynamo exporter: any batch size, any sequence length, and every pair still two nodes."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput, CompressorError
from compressor.exporting.onnx_integers import OPSET, dense_weights, quantized_matrices, with_integers
from compressor.io import Artifact
from compressor.measure import image_size
from compressor.model import Model
from compressor.model.example_inputs import architecture_of, example_inputs

# Relative to the largest output: more than rounding makes of it in float32, so another function was exported.
LARGEST_DIFFERENCE = 1e-3

# A protocol buffer ends here; larger weights would have to lie beside it.
LARGEST_FILE = 2**31 - 2**20

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Sizes of the inputs that are traced; two and more, because the exporter takes one for a constant.
_BATCH, _SEQUENCE = 2, 7


def require_onnx() -> None:
    """Raise `BadInput` where the libraries that write and check ONNX are not installed."""
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise BadInput(
                f"writing ONNX needs {name}, which is not installed",
                remedy="pip install 'compressor[onnx]'",
            ) from error


def traced_inputs(model: Model, input_shape: Sequence[int] | None) -> dict[str, Tensor]:
    """Inputs by name to trace a model with: of a transformers model by its kind, else one tensor `input`.

    `input_shape` is that of one example of a module that does not say its own. Raises `BadInput` where the inputs are
    not known, or the shape is not that of the model.
    """
    module = architecture_of(model)
    config: Any = getattr(module, "config", None)
    named = getattr(module, "main_input_name", None) if config is not None else "input"
    if getattr(config, "is_encoder_decoder", False) or named not in ("input", "input_ids", "pixel_values"):
        what = f"{type(module).__name__} takes inputs that this exporter cannot make"
        raise BadInput(what, remedy="export it with `to='dense'`, and from there with its own exporter")
    size = None if config is None else image_size(config, model.checkpoint.directory)
    _require_fitting(input_shape, named, channels=getattr(config, "num_channels", None), image_size=size)
    generator = torch.Generator().manual_seed(0)
    try:
        inputs = example_inputs(model, _BATCH, generator=generator, length=_SEQUENCE, shape=input_shape)
    except BadInput as error:
        remedy = "say it without the batch, such as `input_shape` 3x224x224"
        raise BadInput("the shape of an input is not known", option="input_shape", remedy=remedy) from error
    return inputs | ({"attention_mask": torch.ones_like(inputs["input_ids"])} if named == "input_ids" else {})


def _require_fitting(
    input_shape: Sequence[int] | None, named: str, *, channels: object, image_size: tuple[int, int] | None
) -> None:
    """Raise `BadInput` for a shape that a transformers model does not take: its own is in its folder."""
    if input_shape is None or named == "input":
        return
    if named == "input_ids":
        raise BadInput(
            "`input_shape` is not for text, which has any length", option="input_shape", remedy="leave it out"
        )
    own = None if image_size is None else (channels, *image_size)
    if own is not None and tuple(input_shape) != own:
        asked, taken = ("x".join(map(str, shape)) for shape in (input_shape, own))
        raise BadInput(
            f"`input_shape` {asked} is not that of the model, {taken}", option="input_shape", remedy="leave it out"
        )
    if len(input_shape) != 3 or input_shape[0] != channels:
        what = f"`input_shape` {'x'.join(map(str, input_shape))} is not that of an image of {channels} channels"
        raise BadInput(what, remedy=f"say it as {channels}xHEIGHTxWIDTH")


class _Function(nn.Module):
    """A model as a function of one tensor: of what a transformers model puts out the logits, or else the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return _tensor_of(self.model(input))


class _TextFunction(_Function):
    """A text model as a function of tokens and their mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return _tensor_of(self.model(input_ids=input_ids, attention_mask=attention_mask))


def _tensor_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    logits = result.get("logits") if isinstance(result, Mapping) else None
    chosen: Tensor = logits if logits is not None else result[0]
    return chosen


def onnx_artifact(model: nn.Module, inputs: Mapping[str, Tensor]) -> Artifact:
    """The ONNX file of a model in float32, in which quantized weights are integers.

    The model is changed: made float32, and its cache is turned off. Writing the file raises `BadInput` for a model that
    the exporter cannot trace or that is too large for one file.
    """
    return Artifact("file", infos=(), tensors=lambda: iter(()), metadata={}, write=partial(_write_onnx, model, inputs))


def _write_onnx(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
    if 4 * weights > LARGEST_FILE:
        raise BadInput(
            f"{4 * weights / 1e9:.1f} GB of float32 weights do not fit into one ONNX file",
            remedy="keep less of the model, or export it with `to='dense'`",
        )
    nn.Module.float(model).eval()  # transformers' own refuses a model that it calls quantized
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
    dynamic = [_dynamic_axes(name) for name in inputs]
    matrices = quantized_matrices(model)
    with _quiet(), dense_weights(model, matrices):
        try:
            program = torch.onnx.export(
                _wrapped(model, inputs),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(inputs),
                output_names=["logits" if config is not None else "output"],
                verbose=False,
                opset_version=OPSET if matrices else None,
            )
            assert program is not None
            exported = with_integers(_without_traces(program.model_proto), matrices.values()).SerializeToString()
        except Exception as error:  # the exporter has an exception of its own for each of its steps
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise BadInput(
                f"torch cannot export {type(model).__name__} to ONNX: {reason}",
                remedy="export it with `to='dense'`, and from there with its own exporter",
            ) from error
    path.write_bytes(exported)


def _wrapped(model: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    return _TextFunction(model) if "input_ids" in inputs else _Function(model)


def _without_traces(model: Any) -> Any:
    """The ONNX model without the exporter's notes: stack traces with this machine's paths, longer than the weights."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _dynamic_axes(name: str) -> dict[int, Any]:
    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if name in ("input_ids", "attention_mask"):
        axes[1] = torch.export.Dim("sequence")
    return axes


@torch.no_grad()
def largest_difference(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> float:
    """The largest absolute difference between onnxruntime and torch, on inputs of other sizes than those traced.

    Raises `CompressorError` where onnxruntime computes something else.
    """
    import onnxruntime

    wrapped = _wrapped(model, inputs)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    one = {name: value[:1] for name, value in inputs.items()}
    for other in (dict(inputs), one, {name: _resized(name, value) for name, value in inputs.items()}):
        expected = wrapped(*other.values())
        [found] = session.run(None, {name: value.numpy() for name, value in other.items()})
        difference = float((torch.from_numpy(found) - expected).abs().max())
        largest = max(largest, difference)
        if not difference <= LARGEST_DIFFERENCE * max(1.0, float(expected.abs().max())):
            raise CompressorError(f"onnxruntime computes other outputs than torch: they differ by {difference:.3g}")
    return largest


def _resized(name: str, value: Tensor) -> Tensor:
    """The same input for a batch of three, and longer if it is text."""
    more = value[[0, 1, 0]]
    if name in ("input_ids", "attention_mask"):
        more = torch.cat([more, more.flip(1)[:, :4]], dim=1)
    if name == "attention_mask":
        more = more.clone()
        more[1, -3:] = 0
    return more


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own words off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
