"""The steps that a command will go through, and the seconds that each is expected to take.

Three things are timed before the work starts: a decomposition of the layer in the middle, quantizing it where layers
may be quantized, and the model on one example and on a batch. All else is counting: decompositions cost the product of
the sides and the smaller one, to quantize a matrix that of the sides and their sum, and calibration, compensation and
refinement run the model a number of times that is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from compressor.api.needs import FLOAT32, Footprint
from compressor.calibration import CalibrationData, CalibrationSettings, RefinementSettings
from compressor.calibration.criterion import outputs_of
from compressor.calibration.examples import with_decoder_inputs
from compressor.calibration.fitted_weights import FittedWeight
from compressor.calibration.more_texts import most_texts
from compressor.calibration.refinement import adam
from compressor.calibration.segments import longest_row
from compressor.data import Batch, EvaluationData
from compressor.engine import InProcess, Run, processors
from compressor.errors import BadInput
from compressor.evaluation.cost import TIMING, TimingSettings
from compressor.factorize import FactorizationSettings, GroupedMetric, Metric, grouped_values, product_svd
from compressor.forms import DENSE, FORMS, Approximations, pair_name, pair_of, quantization_of
from compressor.io import Checkpoint
from compressor.lowrank import as_matrix, product_in
from compressor.model import evaluation_mode
from compressor.model.inference import forward_call
from compressor.network import Layer
from compressor.planning import PlanningSettings
from compressor.progress import Step
from compressor.quantize import Quantization, quantize_to_nearest
from compressor.torch_state import in_float64, synchronize

# What a layer's factors cost beside its singular values alone, measured on square matrices of side 1024.
FACTORS_COST = 2.5

# A backward pass costs two forward ones: one product each for the gradients of inputs and of weights.
FORWARD_AND_BACKWARD = 3

# Of a few runs the fastest counts: the first is slow.
ESTIMATE = TimingSettings(warm_ups=0, fewest_repeats=1, most_repeats=5, enough_seconds=0.5)


@dataclass(frozen=True)
class ForwardTime:
    """The seconds of a forward on one example and on a batch of `size`."""

    one: float
    batch: float
    size: int

    def of(self, examples: int) -> float:
        """That of some examples, in batches."""
        return self.of_segments(examples, segments=1)

    def of_segments(self, examples: int, at_once: int | None = None, *, segments: int) -> float:
        """That of all segments of the model, one after another: each of them walks the whole model."""
        at_once = min(examples, at_once or self.size)
        if at_once == 0:
            return 0.0
        return examples / at_once * (self.overhead * segments + self.each * at_once)

    def of_batch(self, size: int) -> float:
        """That of one batch."""
        return self.overhead + self.each * size

    @property
    def each(self) -> float:
        """What an example more costs."""
        return max(0.0, self.batch - self.one) / (self.size - 1) if self.size > 1 else self.one

    @property
    def overhead(self) -> float:
        """What a forward costs beside its examples."""
        return max(0.0, self.one - self.each)


def timed_decompositions(checkpoint: Checkpoint, layers: Sequence[Layer], device: torch.device) -> tuple[float, ...]:
    """The seconds that the singular values of each layer are expected to take, by those of the one in the middle."""
    costs = tuple(map(_multiplications, layers))
    middle = sorted(layers, key=_multiplications)[len(layers) // 2]
    if (pair := product_in(checkpoint, middle.tensor)) is not None:
        factors = pair.factors()
        rate = least_seconds(lambda: product_svd(factors).spectrum, device) / _multiplications(middle)
        return tuple(rate * cost for cost in costs)
    matrix = as_matrix(middle, checkpoint.read(middle.tensor).to(device))
    if not torch.isfinite(matrix).all():
        return costs
    rate = least_seconds(lambda: grouped_values(matrix, middle.groups), device) / _multiplications(middle)
    return tuple(rate * cost for cost in costs)


def _elements(layer: Layer) -> float:
    return float(layer.shape[0] * layer.shape[1])


def _multiplications(layer: Layer) -> float:
    if layer.stored is not None and layer.stored.rank is not None:
        return float(sum(layer.shape) * layer.stored.rank**2)
    return float(layer.shape[0] * layer.shape[1] * min(layer.block_shape))


def _of_sides(layer: Layer, power: int) -> float:
    """The sum of a power of the sides of a layer, or of each of its groups."""
    return float(layer.groups * sum(side**power for side in layer.block_shape))


@dataclass(frozen=True)
class Workers:
    """How many processes of one thread jobs run in at a time, and a forward in one, where workers have the model."""

    count: int = 1
    forward: ForwardTime | None = None

    @classmethod
    def of(cls, run: Run) -> Workers:
        """Those of a run; no more of this machine than it has processors."""
        engine = run.engine
        if isinstance(engine, InProcess):
            return cls()
        on_processors = run.device.type == "cpu" and engine.here == engine.workers
        return cls(min(engine.workers, processors()) if on_processors else engine.workers)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Have as many threads as a worker, where there are some."""
        before = torch.get_num_threads()
        torch.set_num_threads(before if self.count == 1 else 1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class QuantizationWork:
    """How long it takes to quantize all layers once: in one pass, or in the rounds in which they are stored.

    The `errors` of all their forms take as long by themselves, and so does `forming` all weights from their integers,
    forward and backward.
    """

    errors: float
    one_pass: float
    in_rounds: float
    forming: float


def work_on_quantization(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    forms: Mapping[str, Sequence[str]],
    *,
    device: torch.device,
    settings: CalibrationSettings | None,
) -> QuantizationWork | None:
    """By the layer in the middle, in a metric where there are settings of a calibration; None where none is quantized.

    Of the forms of one pair whose errors are found in one way, two are timed.
    """
    quantized = [layer for layer in layers if forms.get(layer.name)]
    if not quantized:
        return None
    middle = sorted(quantized, key=_quantizing)[len(quantized) // 2]
    matrix = in_float64(as_matrix(middle, checkpoint.read(middle.tensor).to(device)))
    if not torch.isfinite(matrix).all():
        return None
    known = FactorizationSettings() if settings is None else settings.factorization
    metric = None if settings is None else _some_metric(middle, matrix)
    own = [pair_of(form) or form for form in forms[middle.name]]
    shares = sum(map(_quantizing, quantized)) / _quantizing(middle)

    fresh = partial(Approximations, weight=middle, matrix=matrix, metric=metric, settings=known)

    def errors(forms: Sequence[str]) -> Callable[[], object]:
        def found() -> None:
            shared = fresh()
            for form in forms:
                shared.errors(FORMS[form])

        return found

    def made(form: str, rounds: int) -> Callable[[], object]:
        asked = replace(known, quantization_rounds=rounds)
        made_in = FORMS[form]
        return lambda: made_in.approximate(middle, matrix, max(1, made_in.least_rank), metric=metric, settings=asked)

    def kind(form: str) -> str:
        few = _quantization(form).bits < known.simulated_bits
        return f"{pair_name(form)}, {'few' if few else 'many'} bits"

    alike = [list(each) for _, each in groupby(sorted(own, key=kind), key=kind)]
    # What all of a kind have in common is computed with the first.
    of_errors = 0.0
    for each in alike:
        first = least_seconds(errors(each[:1]), device)
        more = 0.0 if len(each) == 1 else max(0.0, least_seconds(errors(each[:2]), device) - first)
        of_errors += first + (len(each) - 1) * more
    typical = next((form for form in own if pair_name(form) == DENSE), own[0])
    quantization = _quantization(typical)
    stored = quantize_to_nearest(matrix, quantization.fitted(matrix.shape[1]), scale_dtype=torch.bfloat16)
    rounding = settings is not None and settings.refinement.rounding
    fitted = FittedWeight(stored, rounding=rounding, dtype=torch.float32)
    forming = least_seconds(lambda: fitted().sum().backward(), device)
    return QuantizationWork(
        errors=shares * of_errors,
        one_pass=shares * least_seconds(made(typical, 0), device),
        in_rounds=shares * least_seconds(made(typical, known.quantization_rounds), device),
        forming=forming * sum(map(_elements, quantized)) / _elements(middle),
    )


def _quantizing(layer: Layer) -> float:
    return _elements(layer) * sum(layer.shape)


def _quantization(form: str) -> Quantization:
    found = quantization_of(form)
    assert found is not None
    return found


def _some_metric(layer: Layer, matrix: Tensor) -> Metric:
    """One of the shapes that the layer's own will have."""
    d_out, d_in = layer.block_shape
    if layer.groups > 1:
        blocks = (torch.eye(side).to(matrix).expand(layer.groups, -1, -1) for side in (d_in, d_out))
        return GroupedMetric(*blocks)
    inputs = matrix.new_ones(d_in) if layer.kind == "embedding" else torch.eye(d_in).to(matrix)
    return Metric(inputs, torch.eye(d_out).to(matrix))


@dataclass(frozen=True)
class CalibrationWork:
    """How often and how long calibration runs the model: on examples to `fit`, and on the holdout.

    Compensation takes `groups` of layers that have one input, one after the other, and runs one of `segments` for each
    of them. A step of the refinement takes `optimizing` seconds besides forward and backward.
    The `products` of inputs and of gradients are in forwards, and a decomposition in the metric takes `in_metric` times
    as long as one without. Decompositions for allocations, `quantization`, and slices of the examples are the
    `workers`' jobs.
    """

    fit: int
    holdout: int
    forward: ForwardTime
    groups: int
    segments: int
    optimizing: float
    products: float
    in_metric: float
    settings: CalibrationSettings
    workers: Workers = Workers()
    quantization: QuantizationWork | None = None
    uniform: QuantizationWork | None = None
    uniform_widths: int = 0
    written: int = 0
    tokens: int = 0

    def planning_steps(self, decompositions: float, *, given: bool) -> list[Step]:
        """From a calibrated model to a plan and its factors but for refinement; rounds may be left out."""
        settings, workers, quantization = self.settings, self.workers.count, self.quantization
        rounds = 0 if given else settings.recalibration_rounds
        # Of a budget in which nothing is quantized, an allocation by each exponent.
        parts = tried = 1 if given else len(settings.exponents)
        quantizing, kinds = 0.0, 1
        if quantization is not None and not given:
            # Other penalties, bits alone, one width alone, and ranks alone by each exponent; the best of each kind is
            # compensated where it is close.
            parts, tried, kinds = 2 * parts, 2 * tried + len(settings.truncation_penalties) + 1, 4
        # A layer is decomposed once for all allocations, and in compensation once more, with the best ridge.
        factors = FACTORS_COST * self.in_metric * decompositions
        whole = factors / workers + tried * self._judged * (1 + 1 / self.segments)
        if quantization is not None:
            quantizing = quantization.in_rounds
            once_more = 0.0 if settings.compensate else quantizing
            whole += (quantization.errors + tried * quantization.one_pass + once_more) / workers
        compared = Step("allocate", (whole / parts,) * parts)
        # Both models are run on the holdout, and on some of the fit examples.
        run = self.forward.of_segments(self._of_some.fit + self.holdout, segments=self.segments)
        statistics = (2 + self.products) * run * self.groups / self.segments
        refit = statistics + 2 * factors + quantizing / workers + quantizing
        compensated = _first_certain("compensate", self._by_segment(refit), kinds) if settings.compensate else []
        again = [replace(step, certain=False) for step in (*self._of_some.calibration_steps(), compared)]
        return [compared, *again * rounds, *compensated]

    def refinement_steps(self, *, alone: bool) -> list[Step]:
        """From there to refined factors; of one candidate `alone`, or also of others that are close to it."""
        if not self.settings.refine:
            return []
        settings, some = self.settings.refinement, self._of_some
        passes, fit, holdout = settings.passes, some.fit, self.holdout // self.settings.refit_every
        both, at_once = fit + holdout, max(1, fit // settings.steps)
        run = partial(self.forward.of_segments, segments=self.segments)
        optimizing = self.optimizing * fit / at_once
        one_pass = FORWARD_AND_BACKWARD * run(fit, at_once) + run(holdout) + optimizing
        if self.quantization is not None:
            formed = fit / at_once + holdout / self.forward.size / FORWARD_AND_BACKWARD
            one_pass += self.quantization.forming * formed
        *others, last = self._by_segment(passes * one_pass + 2 * run(both))
        # The last segment is compared with the model's outputs, for which the dense one is run again.
        last += passes * run(both, at_once) / max(1, self.segments - 1)
        if self.quantization is None or not self.written:
            return _first_certain("refine", (*others, last), 1 if alone or self.quantization is None else 4)
        # Of the quantized candidates two are fitted as a whole, and by segments where that gains nothing.
        by_segment = Step("refine", (*others, last), certain=False)
        candidates = 1 if alone else 2
        return [*self._end_to_end_steps(self.quantization, candidates), *[by_segment] * candidates]

    def _end_to_end_steps(self, quantization: QuantizationWork, candidates: int) -> list[Step]:
        """Texts written one token after another, and for each candidate passes over these and the fit examples.

        In a pass segments run forward twice, once more for the backward pass.
        """
        forward, settings = self.forward, self.settings.end_to_end
        parts = math.ceil(self.written / self.settings.self_generated.at_once)
        writing = forward.overhead * self.tokens + forward.each * self.written / parts
        fit = self._of_some.fit + self.written
        at_once = max(1, fit // settings.fitting.steps)
        run = partial(forward.of_segments, fit, segments=self.segments)
        steps = fit / at_once
        formed = quantization.forming * (1 + 1 / FORWARD_AND_BACKWARD)
        one_pass = (FORWARD_AND_BACKWARD + 1) * run(at_once) + steps * (self.optimizing + formed) + self._judged
        costs = (run() + self._judged, *(one_pass,) * settings.fitting.passes)
        return [
            Step("generate", (writing,) * parts, certain=False),
            *[Step("refine end to end", costs, certain=False)] * candidates,
        ]

    def uniform_seconds(self) -> float:
        """What all layers in each of the uniform widths take, rounded to nearest and by GPTQ."""
        quantized = self.uniform.one_pass / self.workers.count if self.uniform is not None else 0.0
        return self.uniform_widths * (quantized + 2 * self._judged) if self.settings.uniform else 0.0

    @property
    def _judged(self) -> float:
        """A forward on the holdout, of a model whose weights may have to be formed for each batch."""
        forming = 0.0 if self.quantization is None else self.quantization.forming / FORWARD_AND_BACKWARD
        return self.forward.of(self.holdout) + forming * self.holdout / self.forward.size

    def calibration_steps(self) -> list[Step]:
        """From the model to the metric of its layers."""
        forward, workers = self.forward, self.workers
        # The segments are found by running the first batch.
        begun = 3 * forward.batch
        slices = min(self.settings.slices, math.ceil(self.fit / forward.size))
        if workers.forward is None or slices < 2:
            run = forward.of(self.fit + self.holdout) + self._inputs(forward)
            return [Step("run", (run + begun,)), Step("calibrate", self._by_segment(self._backward(forward))[::-1])]
        # Each worker takes a slice after the other; what they have found is read in no time.
        there = workers.forward
        sliced = there.of(self.fit) + self._inputs(there) + self._backward(there) + slices * there.batch
        here = forward.of(self.holdout) + begun
        taken = sliced / slices * math.ceil(slices / workers.count)
        return [Step("run", (taken + here,)), Step("calibrate", self._by_segment(0.0))]

    def _backward(self, forward: ForwardTime) -> float:
        share = 1 / self.settings.gradient_every
        return (FORWARD_AND_BACKWARD + self.products) * share * forward.of(self.fit)

    def _inputs(self, forward: ForwardTime) -> float:
        """Half of the products are of inputs, which those examples have too that are not run backward."""
        return self.products / 2 * (1 - 1 / self.settings.gradient_every) * forward.of(self.fit)

    @property
    def _of_some(self) -> CalibrationWork:
        """The same on the fit examples that moments are taken again of, and factors are fitted to."""
        settings = self.settings
        gradients = math.ceil(settings.gradient_every / settings.refit_every)
        return replace(self, fit=self.fit // settings.refit_every, settings=replace(settings, gradient_every=gradients))

    def _by_segment(self, seconds: float) -> tuple[float, ...]:
        """The first of several segments ends where the first block begins, and holds hardly any layer."""
        others = max(1, self.segments - 1)
        return (*(0.0 for _ in range(self.segments - others)), *(seconds / others,) * others)


@dataclass(frozen=True)
class EvaluationWork:
    """How long running the model on data takes."""

    examples: int
    forward: ForwardTime
    timing: TimingSettings = TIMING

    def quality_seconds(self) -> float:
        return self.forward.of(self.examples)

    def step(self) -> Step:
        """Two models compared: the quality and the cost of each, then the time at each batch size."""
        forward = self.forward
        # Arithmetic and memory are counted while the model runs on an example and on a batch.
        each = self.quality_seconds() + forward.one + forward.batch
        sizes = dict.fromkeys(min(size, self.examples) for size in self.timing.batch)
        return Step("evaluate", (each, each, *(_timing_seconds(forward.of_batch(size), self.timing) for size in sizes)))


def _first_certain(name: str, costs: tuple[float, ...], count: int) -> list[Step]:
    """A step that comes once, and up to so many times."""
    return [Step(name, costs, certain=number == 0) for number in range(count)]


def _timing_seconds(forward: float, timing: TimingSettings) -> float:
    """How long it takes to time two models whose forward takes that long."""
    pair = 2 * forward
    repeats = timing.enough_seconds / pair if pair > 0 else math.inf
    return pair * (timing.warm_ups + min(timing.most_repeats, max(timing.fewest_repeats, repeats)))


@dataclass(frozen=True)
class CompressionWork:
    """What `compress` will do, in seconds; with settings for a `search` where data decide on the size.

    Such a search measures several sizes `at_once`, and with calibration plans them too, in workers. What layers take is
    divided among the `workers`. `quantization` is None where nothing may be quantized.
    """

    decompositions: Sequence[float]
    calibration: CalibrationWork | None = None
    deciding: EvaluationWork | None = None
    reported: EvaluationWork | None = None
    search: PlanningSettings | None = None
    at_once: int = 1
    workers: Workers = Workers()
    quantization: QuantizationWork | None = None

    @property
    def factor_seconds(self) -> float:
        """Finding the factors of all layers, where they are not found with the plan."""
        if self.calibration is not None:
            return 0.0
        quantizing = 0.0 if self.quantization is None else self.quantization.in_rounds
        return (FACTORS_COST * sum(self.decompositions) + quantizing) / self.workers.count

    def steps(self, *, given: bool, writes: bool) -> list[Step]:
        """All steps: of a search as many trials as there can be; with a given plan, one allocation."""
        decomposing, workers = sum(self.decompositions), self.workers.count
        measured = [each / workers for each in self.decompositions]
        if self.calibration is None and self.quantization is not None:
            measured = [each + self.quantization.errors / workers / len(measured) for each in measured]
        steps = [Step("measure", tuple(measured))]
        planning, refinement = list[Step](), list[Step]()
        if self.calibration is not None:
            steps += self.calibration.calibration_steps()
            planning = self.calibration.planning_steps(decomposing, given=given)
            refinement = self.calibration.refinement_steps(alone=given or self.search is not None)
        factors = self.factor_seconds
        if self.deciding is None:
            steps += planning + refinement
        else:
            quality = self.deciding.quality_seconds()
            trials = [([*planning, *refinement], quality + factors)]
            if self.search is not None:
                count = self.at_once * self.search.rounds(self.at_once)
                trials = [(planning, quality / self.at_once + factors)] * count
                if planning and self.at_once > 1:  # workers report no steps
                    whole = quality + sum(step.cost for step in planning)
                    trials = [([], whole / self.at_once)] * count
                trials += [(refinement, quality)] * (self.search.most_refined if refinement else 0)
            for number, (before, seconds) in enumerate(trials, start=1):
                trial = [*before, Step("search", (seconds,), number=number)]
                steps += trial if number == 1 else [replace(step, certain=False) for step in trial]
        if writes:
            uniform = 0.0 if self.calibration is None else self.calibration.uniform_seconds()
            steps.append(Step("factorize", (factors + uniform,)))
            if self.reported is not None:
                steps.append(self.reported.step())
        return steps


@dataclass(frozen=True)
class FirstRun:
    """What a forward on one example showed: the blocks, how many inputs layers have in all, and what an example takes.

    Layers that are given one tensor share an input.
    """

    blocks: tuple[str, ...]
    groups: int
    footprint: Footprint


def first_run(
    model: nn.Module, layers: Sequence[Layer], data: CalibrationData, *, device: torch.device
) -> FirstRun | None:
    """Run a model on one example; None where it does not take the data, which is said where they are used."""
    modules = {model.get_submodule(layer.module) for layer in layers if layer.kind not in ("embedding", "parameter")}
    blocks = longest_row(model, layers)
    inputs: dict[nn.Module, Tensor] = {}  # kept, so that an address stands for one tensor
    states: list[int] = []
    inside = dict.fromkeys(blocks or ("",), 0)

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.setdefault(module, arguments[0] if arguments else next(iter(named.values())))

    def note_state(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        state = arguments[0] if arguments else next(iter(named.values()))
        states.append(state.nbytes)

    def note_output(_: nn.Module, __: tuple[Any, ...], output: Any, *, block: str) -> None:
        inside[block] += output.nbytes if isinstance(output, Tensor) else 0

    batch = with_decoder_inputs(data, model).fit[0][:1]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for block in inside:
            whole = model.get_submodule(block)
            if block:
                stack.callback(whole.register_forward_pre_hook(note_state, with_kwargs=True).remove)
            for part in whole.modules():
                stack.callback(part.register_forward_hook(partial(note_output, block=block)).remove)
        outputs = _outputs(model, batch, device)
    if outputs is None:
        return None
    groups = len({id(each) for each in inputs.values()})
    footprint = Footprint(max(states, default=0), max(inside.values()), FLOAT32 * outputs.numel())
    return FirstRun(blocks, groups, footprint)


def _outputs(model: nn.Module, batch: Batch, device: torch.device) -> Tensor | None:
    try:
        with evaluation_mode(device, model):
            return outputs_of(model, batch.inputs)
    except (BadInput, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return None


def work_on_calibration(
    model: nn.Module,
    layers: Sequence[Layer],
    data: CalibrationData,
    *,
    first: FirstRun,
    run: Run,
    settings: CalibrationSettings,
) -> CalibrationWork | None:
    """None where the model does not take the data, which is said where they are used."""
    modules = {model.get_submodule(layer.module) for layer in layers if layer.kind not in ("embedding", "parameter")}
    batch, device, workers = with_decoder_inputs(data, model).fit[0], run.device, Workers.of(run)
    forward = timed_forward(model, batch, device)
    if forward is None:
        return None
    if workers.count > 1:
        with workers.timing():
            workers = replace(workers, forward=timed_forward(model, batch, device))
    factors = [layer.parameters // 2 for layer in layers]
    optimizing = 2 * len(modules) * _optimizer_seconds(factors, device, settings.refinement)
    # Products of vectors with themselves and eigenvectors of these, on both sides of a layer; one where it is square.
    products = sum(_of_sides(layer, 2) / 2 for layer in layers) / sum(map(_elements, layers))
    in_metric = sum(_of_sides(layer, 3) / 2 for layer in layers) / sum(map(_multiplications, layers))
    return CalibrationWork(
        fit=data.examples,
        holdout=data.holdout_examples,
        forward=forward,
        groups=first.groups,
        segments=1 + len(first.blocks),
        optimizing=optimizing,
        products=products,
        in_metric=in_metric,
        settings=settings,
        workers=workers,
        written=texts_to_fit(model, layers, data, device=device, settings=settings),
        tokens=data.tokens // max(1, data.examples),
    )


def texts_to_fit(
    model: nn.Module,
    layers: Sequence[Layer],
    data: CalibrationData,
    *,
    device: torch.device,
    settings: CalibrationSettings,
) -> int:
    """How many texts a model writes, so that quantized layers are fitted together; 0 where that is not done."""
    together = sum(layer.parameters for layer in layers) <= settings.end_to_end.most_weights
    return most_texts(model, data, device=device, settings=settings) if settings.refine and together else 0


def _optimizer_seconds(sizes: Sequence[int], device: torch.device, settings: RefinementSettings) -> float:
    """How long a step of Adam takes for a factor, by one of the size in the middle."""
    factor = torch.ones(sorted(sizes)[len(sizes) // 2], device=device)
    factor.grad = torch.ones_like(factor)
    optimizer = adam([factor], 0.0, settings)
    return least_seconds(optimizer.step, device)


def work_on_data(
    model: nn.Module, data: EvaluationData, device: torch.device, *, timing: TimingSettings = TIMING
) -> EvaluationWork | None:
    """None where the model does not take the data, which is said where they are used."""
    forward = timed_forward(model, data.read(range(min(data.batch_size, data.count))), device)
    return None if forward is None else EvaluationWork(data.count, forward, timing)


def timed_forward(model: nn.Module, batch: Batch, device: torch.device) -> ForwardTime | None:
    """The least of a few forwards on one example, and on the batch; None where it fails."""
    if not batch.inputs:  # only the caller's metric knows how to run the model
        return None
    one = _forward_seconds(model, batch[:1], device)
    whole = None if one is None else _forward_seconds(model, batch, device)
    return None if one is None or whole is None else ForwardTime(one, whole, batch.examples)


def _forward_seconds(model: nn.Module, batch: Batch, device: torch.device) -> float | None:
    try:
        with evaluation_mode(device, model):
            return least_seconds(forward_call(model, batch.inputs), device)
    except (BadInput, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return None


def least_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The least of what a few calls take."""
    found: list[float] = []
    while len(found) < ESTIMATE.most_repeats and sum(found) < ESTIMATE.enough_seconds:
        started = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)
