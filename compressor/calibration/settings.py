"""Every knob of calibration, of the search over plans, and of the refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from compressor.arguments import as_count
from compressor.choices import Effort
from compressor.errors import BadInput
from compressor.factorize import FactorizationSettings


@dataclass(frozen=True)
class RefinementSettings:
    """How factors are fitted to outputs of the dense model, those of a block by default, by Adam (Kingma and Ba, ICLR
    2015).

    A few passes over a hundred examples are all that a block can take before it overfits them.
    """

    passes: int = 8
    """Passes over the fit examples."""

    steps: int = 16
    """Steps in a pass at least, where there are as many fit examples; never more than one example needs."""

    learning_rate: float = 1e-2
    """Learning rate of the first step, relative to the root mean square of each tensor; it falls linearly to zero over
    the passes."""

    scales_learning_rate: float = 3e-3
    """The same of the scales of quantized layers, which were searched for: at the rate of factors most passes lose
    more, and are undone."""

    learning_rate_cut: float = 0.3
    """Factor on the learning rates after a pass that did not lower the holdout error; that pass is undone."""

    rounding: bool = True
    """Fit how the weights of quantized layers are rounded too, by signed gradient steps (AutoRound, Cheng et al., EMNLP
    2024), and not their scales and zero points alone."""

    rounding_reach: float = 1.0
    """How far these steps go together, in distances of integers; they shrink linearly to zero."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of Adam's two moments: the second forgets faster than by default, for there are about a hundred steps."""

    def __post_init__(self) -> None:
        for name in ("passes", "steps"):
            as_count(getattr(self, name), name, least=1)


@dataclass(frozen=True)
class EndToEndSettings:
    """How all layers of a model are fitted together to the dense model's predictions, where some are quantized.

    A causal language model continues pieces of the fit examples to many more texts, for a few are soon overfitted.
    """

    fitting: RefinementSettings = RefinementSettings(passes=2, steps=64, learning_rate=1e-3, rounding_reach=2.0)
    """How they are fitted to the fit examples and these texts."""

    texts: int = 10
    """Texts that are written for each fit example, or fewer where a forward on all of them would take more
    multiplications than the examples that a model makes unasked may take; 0 leaves all that out."""

    prompts: int = 8
    """The piece that a text begins with is the length of an example divided by this."""

    most_weights: int = 2**27
    """Most weights of the layers that are fitted: they are in memory together, with the state of the optimizer."""

    def __post_init__(self) -> None:
        for name, least in (("texts", 0), ("prompts", 1), ("most_weights", 0)):
            as_count(getattr(self, name), name, least=least)


@dataclass(frozen=True)
class SelfGeneratedSettings:
    """How a model makes its own calibration examples, with `calibration="self"`."""

    samples: int = 192
    """Examples that are made by default: some more than of real ones, because nobody has to find them."""

    length: int = 256
    """Most tokens of a text where no length is asked for: what is sampled one token after another takes its time."""

    temperature: float = 1.0
    """Temperature at which tokens are sampled; at 1 as often as the model expects them."""

    unmasking_rounds: int = 16
    """Rounds in which a masked language model fills a text."""

    image_steps: int = 30
    """Steps of Adam that match images to the statistics of batch normalizations."""

    image_learning_rate: float = 0.1
    """Learning rate of these steps, in standard deviations of a pixel."""

    at_once: int = 32
    """Examples that are made at a time: keys and values of texts are in memory, and activations of images."""

    fewest: int = 24
    """Fewest examples that a model makes unasked."""

    most_multiplications: float = 1e12
    """Most multiplications of a forward on all examples that a model makes unasked, on a CPU: calibration takes some
    fifty times as long, a few minutes."""

    most_multiplications_accelerated: float = 1e14
    """The same on other devices."""

    def __post_init__(self) -> None:
        for name in ("unmasking_rounds", "image_steps", "at_once"):
            as_count(getattr(self, name), name, least=1)
        for name in ("samples", "length", "fewest"):
            as_count(getattr(self, name), name, least=2)
        if not self.temperature > 0:
            what = f"`temperature` is {self.temperature!r}"
            raise BadInput(what, option="temperature", remedy="give a positive number, such as 1.0")


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of the calibration, in Python alone: every part can be varied, or switched off to see what it is worth.

    The defaults are those of `effort="best"`; benchmarks/quality.py measures the gain of each part.

    Example:
        >>> settings = compressor.CalibrationSettings(compensate=False)
        >>> compressor.compress("model/", keep=0.6, calibration="corpus.txt", calibration_settings=settings)
    """

    samples: int = 128
    """Examples, or windows of text, that are used by default; of data that come in batches all are."""

    holdout_every: int = 4
    """Every how manyth example is holdout: statistics and factors are fit on the others, and chosen by these."""

    tokens_at_once: int = 2048
    """Tokens whose activations are in memory at a time: long windows make small batches."""

    most_tokens: int = 2**14
    """Of texts with more tokens than this the gradients, the refit, the refinement, and the moments that are taken
    again are of so many: every second batch of fit examples, or every third, and so on. The first moments of the
    inputs are of all."""

    logit_bytes: int = 2**26
    """Bytes of logits, in float32, that are in memory at a time, whatever the vocabulary."""

    kept_weights: int = 2**25
    """Bytes of the weights of blocks that stay in memory after these ran, of a model that is read from files: small
    models are read once, and the blocks of large ones whenever they run."""

    by_segment: bool = True
    """Run the model a block at a time, in the memory of one block; False runs it whole, for comparison."""

    gradient_moments: bool = True
    """Weight the outputs of a layer by the loss gradient's second moment; False counts the error of all outputs
    alike, as SVD-LLM does (Wang et al., ICLR 2025)."""

    slices: int = 8
    """Slices of the fit batches whose sums are formed by themselves and then added up: workers take one each. They are
    the same whatever the number of workers, and so are the digits of the sums."""

    most_classes: int = 4096
    """Of the loss gradient at the outputs of a head with more classes only the diagonal of the second moment is used:
    the whole one would grow with the square of the vocabulary."""

    gradient_every: int = 1
    """Every how manyth batch of fit examples is run backward too, for the moments of the gradients; those of the inputs
    are of all, but for heads of many classes, whose moments are of the same batches. All are run backward where
    embeddings or bare parameters are compressed. A layer that none of these batches reaches stays dense: an expert that
    gets tokens of others alone has no gradients."""

    exponents: tuple[float, ...] = (1.0, 0.5, 0.0)
    """Exponents p tried in the allocation, which minimizes the sum of dropped loss / (total loss)^p over the layers.
    0 trusts the second-order estimate, 1 is relative; the one with the least holdout loss is kept."""

    truncation_penalties: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Factors tried on the predicted loss of truncation, where a layer may be quantized too: the second-order estimate
    is right for rounding and too kind to deep truncation. Quantized layers without truncation and truncated ones that
    are not quantized are tried besides; what has the least holdout loss is kept. With `(math.inf,)` nothing is
    truncated."""

    compensated_within: float = 1.25
    """Of the best mixture of bits and ranks, of bits alone, one width alone, and ranks alone those whose holdout loss
    is at most so many times the least are compensated, and compared again as they would be stored."""

    refined_within: float = 1.1
    """The same of the refinement, which takes longer, by the loss of what is compensated."""

    window_caps: bool = True
    """Try the best allocation again with ranks capped by the window rule, where that rule applies."""

    recalibration_rounds: int = 1
    """How often the moments are taken again, at a model compressed half as far (by the square root of the share kept).
    """

    trust_factor: float = 1.5
    """The second-order estimate is trusted, and no round is run, while predicted and holdout loss differ by less than
    this factor."""

    compensate: bool = True
    """Refit each layer to the original's outputs on the inputs that it gets in the compressed model."""

    refit_every: int = 1
    """Every how manyth batch of fit examples that refit and the refinement are made to, and moments are taken again
    of; the passes of the refinement are compared on every how manyth batch of the holdout too."""

    statistics_bytes: int = 2**30
    """Bytes of moments of inputs that are in memory for that: the experts of a block share walks through it as far as
    their moments have room, and one group of layers has it in any case."""

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Strengths of the ridge tried in that refit, relative to the mean second moment of the inputs; the one with the
    least holdout error is kept, and the layer is left as it is where none lowers it."""

    refine: bool = True
    """Fit the factors, a block at a time, to the dense block's outputs; kept where the holdout loss falls."""

    refinement: RefinementSettings = field(default_factory=RefinementSettings)
    """How they are fitted."""

    end_to_end: EndToEndSettings = field(default_factory=EndToEndSettings)
    """How all layers are then fitted together, where some are quantized."""

    uniform: bool = True
    """Measure what int8 and int4 of the same model lose, rounded to nearest and by GPTQ, for the result to say."""

    self_generated: SelfGeneratedSettings = field(default_factory=SelfGeneratedSettings)
    """How the model makes its own examples, where it is asked to."""

    factorization: FactorizationSettings = field(default_factory=FactorizationSettings)
    """When the factorizations that iterate stop."""

    @property
    def of_moments(self) -> dict[str, Any]:
        """Those that moments and decompositions depend on, by name: all but the search and what follows it."""
        search = (
            "exponents",
            "truncation_penalties",
            "compensated_within",
            "refined_within",
            "window_caps",
            "recalibration_rounds",
            "trust_factor",
            "compensate",
            "ridges",
        )
        later = ("refit_every", "refine", "refinement", "end_to_end", "samples", "statistics_bytes", "uniform")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in (*search, *later)}

    @classmethod
    def of(cls, effort: Effort) -> Self:
        """Those of an effort, whose times and losses benchmarks/effort.py measures.

        `fast` takes the moments, those of the gradients of a quarter of the examples, and makes one allocation, by
        which nothing but bits or ranks has to be chosen on holdout examples, so that few are; the errors of all widths
        are simulated, and no int8 and int4 is run beside it. `balanced` makes an allocation by every exponent and under
        the window rule's caps, and compensates; `best` also recalibrates and refines.
        """
        match effort:
            case "fast":
                return cls(
                    holdout_every=16,
                    gradient_every=4,
                    exponents=(0.0,),
                    truncation_penalties=(2.0,),
                    window_caps=False,
                    recalibration_rounds=0,
                    compensate=False,
                    refine=False,
                    uniform=False,
                    factorization=FactorizationSettings(simulated_bits=2),
                )
            case "balanced":
                return cls(recalibration_rounds=0, refine=False)
            case "best":
                return cls()

    def on(self, tokens: int) -> Self:
        """Those for fit examples of so many tokens, which take every how manyth batch the most tokens ask for."""
        every = math.ceil(tokens / self.most_tokens) or 1
        gradients, refit = (max(every, each) for each in (self.gradient_every, self.refit_every))
        return replace(self, gradient_every=gradients, refit_every=refit)

    def __post_init__(self) -> None:
        for name, least in (
            ("samples", 2),
            ("holdout_every", 2),
            ("tokens_at_once", 1),
            ("most_tokens", 1),
            ("logit_bytes", 1),
            ("kept_weights", 0),
            ("most_classes", 1),
            ("slices", 1),
            ("statistics_bytes", 1),
            ("gradient_every", 1),
            ("refit_every", 1),
            ("recalibration_rounds", 0),
        ):
            as_count(getattr(self, name), name, least=least)
        for name in ("exponents", "truncation_penalties"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or not given:
                raise BadInput(f"`{name}` is {given!r}", option=name, remedy="give one at least, such as (1.0,)")
        if not all(each >= 1 for each in self.truncation_penalties):
            what = f"`truncation_penalties` is {self.truncation_penalties!r}"
            raise BadInput(what, option="truncation_penalties", remedy="give numbers from 1.0 on")


CALIBRATION = CalibrationSettings()
