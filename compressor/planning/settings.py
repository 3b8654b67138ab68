"""The thresholds by which ranks are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.arguments import as_count
from compressor.errors import BadInput
from compressor.forms import FORMS


@dataclass(frozen=True)
class PlanningSettings:
    """Thresholds for choosing ranks and sizes, in Python alone: for ablations and experiments.

    Example:
        >>> compressor.plan("model/", planning_settings=compressor.PlanningSettings(safe_tolerance=0.02))
    """

    safe_tolerance: float = 0.05
    """Relative Frobenius error per layer with neither a budget, nor a training recipe that decides, nor data."""

    window_rule_tolerance: float = 0.1
    """Relative Frobenius error that the window rule allows a layer besides the edge of its surviving start."""

    largest_surviving_share: float = math.exp(-2)
    """Share of the initialization that may survive for the window rule to decide.

    Of the networks in benchmarks/theory.py, all trained with plain SGD, perceptrons stood the rule at every share, but
    those with normalization layers lost up to 87 points of accuracy where more than this share survived: what they
    learned was below the edge of the start.
    """

    excluded_forms: tuple[str, ...] = ()
    """Names of forms with errors of their own, such as "spatial", that are not to be chosen where they lose less."""

    least_start_gain: float = 0.01
    """Share by which the relative error of what training wrote must at some rank be below that of the layer itself
    for the layer to be stored as what training wrote: where nothing is gained, no layer is to need its start."""

    least_quantized_start_gain: float = 0.1
    """The same for quantized layers: as what training wrote they are dense once they are loaded, and others do not read
    them, while the same form of the layer itself stays integers in memory."""

    least_started_loss: float = 0.1
    """Share of the mean loss at an even share that a layer's own counts as at least, without data, where it is below
    that because of what is known of its start (`comparable`).

    Chosen by the validation split of the networks of benchmarks/initial.py, whose tables are of the test split. From
    .05 to .2 little changes; at 0 perceptrons trained by SGD lose two to four points of accuracy at 5 % of their size,
    and at .3 a residual network loses thirty.
    """

    most_started_loss: float = 0.5
    """Share of the loss predicted without initial weights that a plan with them may be predicted to lose, without data,
    to be taken. No network is to need its seed for less than a prediction by weights alone can tell.

    Of the networks of benchmarks/initial.py those that gain are at .33 at most, at any size; a language model of whose
    norm training wrote 98 % is at .78 at least, and a perceptron that forgot its start at .96.
    """

    widths: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    """Bits that `bits="auto"` stands for."""

    pair_widths: tuple[int, ...] = (8, 6, 5, 4)
    """Of the bits that are allowed those that the factors of a pair may have."""

    embedding_widths: tuple[int, ...] = (8, 4)
    """Of the bits that are allowed those that the rows of an embedding may have, where embeddings are asked for."""

    least_kernel_rank: int = 128
    """The rank from which on quantized factors have ranks that kernels for integers take: multiples of 16 in 8 bits,
    and in fewer multiples of 32 that fall into groups of a size they take. Smaller ones would change by too much."""

    uniform_widths: tuple[int, ...] = (8, 4)
    """Bits in which the same model with all its layers alike is measured beside what was asked for."""

    least_layer_saving: float = 0.05
    """Share of its bytes that a layer must save to be factorized: two small products are slower than a large one."""

    least_time_saving: float = 0.03
    """Share of its time that a layer must save in every workload to be factorized, where speed is asked for."""

    most_loss_for_speed: float = 4.0
    """How many times the predicted loss of a plan of the same size may be that of one for speed before it is warned of.
    """

    least_file_saving: float = 0.05
    """Share of their bytes that the weight files must save where no budget was given."""

    most_trials: int = 7
    """Sizes that a search by drop in quality measures at most, besides the dense model, where it tries them one after
    another; where it tries several at a time, as many rounds as narrow the range as much."""

    most_refined: int = 3
    """Of these sizes how many are measured once more with refined factors at most, where factors are refined: the
    smallest that passed, and the next smaller ones as long as they pass."""

    drop_resolution: float = 0.02
    """Relative width of the bracket at which that search ends: the largest size that failed beside the smallest that
    passed."""

    drop_margin: float = 1 / 8
    """Share of the bracket's width by which each trial keeps from its ends, so that every trial narrows it."""

    largest_first_keep: float = 0.95
    """Fraction of the parameters that the first trial keeps at most: the dense model passes trivially."""

    def rounds(self, at_once: int) -> int:
        """In how many rounds at most a search tries so many sizes at a time."""
        return math.ceil(self.most_trials / math.log2(1 + at_once))

    def __post_init__(self) -> None:
        as_count(self.most_trials, "most_trials", least=1)
        as_count(self.most_refined, "most_refined", least=1)
        for name in ("widths", "pair_widths", "embedding_widths", "uniform_widths"):
            if not set(getattr(self, name)) <= set(range(2, 9)):
                raise BadInput(f"`{name}` is {getattr(self, name)!r}", option=name, remedy="give a tuple of 2 to 8")
        known = [form.name for form in FORMS.values() if form.has_own_errors]
        if not set(self.excluded_forms) <= set(known):
            what = f"`excluded_forms` is {self.excluded_forms!r}"
            raise BadInput(what, option="excluded_forms", remedy=f"give a tuple of some of: {', '.join(known)}")


PLANNING = PlanningSettings()
