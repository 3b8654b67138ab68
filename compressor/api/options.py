"""What can be asked of each verb: every option once, with its help, its default and how it is read.

The flags and the help of the command line, the signatures and docstrings of the Python functions, the command that
repeats a run and the reference page come from these dataclasses. Type checkers see what each may be made from: the
keyword arguments of its verb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import MISSING
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compressor.api.kinds import (
    CALIBRATION_DATA,
    CALLED,
    COUNTS,
    DATA,
    DEVICE,
    DEVICE_PROFILE,
    DROP,
    ENGINE,
    EXPLORED,
    FACTORY,
    INITIAL,
    INITIAL_SOURCE,
    METRIC,
    MODEL,
    NUMBERS,
    PATH,
    PATTERNS,
    PLAN,
    PROGRESS,
    RATIO,
    RECIPE,
    SAVED_MODEL,
    SEVERAL_DATA,
    SHAPE,
    SHARE,
    SIZE,
    SWITCH,
    TEXT,
    WIDTHS,
    choice,
    count,
    settings,
)
from compressor.api.option import Example, Options, option, options
from compressor.choices import Effort, ExportTarget, FormRequest, Head, MergeMode, NoData, Preference, Split
from compressor.errors import BadInput

if TYPE_CHECKING:
    from typing import Unpack

    from torch import nn
    from torch.utils.data import Dataset

    from compressor.api.keywords import (
        ArchiveKeywords,
        CompressKeywords,
        DiagnoseKeywords,
        EvaluateKeywords,
        ExploreKeywords,
        ExportKeywords,
        InspectKeywords,
        MergeKeywords,
        PlanKeywords,
        RestoreKeywords,
    )
    from compressor.calibration import CalibrationSettings
    from compressor.data import CustomMetric
    from compressor.evaluation import TimingSettings
    from compressor.latency import DeviceProfile
    from compressor.model import Factory, InitialSource, ModelLike
    from compressor.planning import Plan, PlanningSettings
    from compressor.progress import Progress
    from compressor.recipe import TrainingRecipe

    # Tensors, arrays, pairs, mappings, loaders and texts are all iterable.
    DataLike = str | Path | Iterable[Any] | Dataset[Any]
    InitialLike = int | InitialSource
    RecipeLike = TrainingRecipe | str | Path | Mapping[str, Any] | Sequence[TrainingRecipe | str | Path]

# The groups of the help, in this order; what a command is mostly called with, and what only it has, come before them.
SOURCE, BUDGET, SPEED, CALIBRATION, LAYERS, TRAINING, RUNNING, OUTPUT, GENERAL = PANELS = (
    "Model and data",
    "Budget",
    "Speed",
    "Calibration",
    "Layers",
    "Training recipe",
    "Running",
    "Output",
    "General",
)

KINDS_OF_DATA = "text, jsonl, csv, npz or safetensors file, image folder, builtin:digits, builtin:stdlib"


@options
class HubOptions(Options):
    """Which version of a model of the hub is meant."""

    revision: str | None = option(
        "Branch, tag or commit of a model of the hub.", TEXT, metavar="REVISION", panel=SOURCE
    )


@options
class ArchitectureOptions(Options):
    """Who builds an architecture that transformers does not know."""

    factory: Factory | None = option(
        "A function that builds an architecture that is not in transformers: package.module:function or "
        "file.py:function.",
        FACTORY,
        flag="--model",
        panel=SOURCE,
    )


@options
class TrainingOptions(Options):
    """How the model was trained."""

    recipe: tuple[TrainingRecipe | Path, ...] = option(
        "How the model was trained: hyperparameters in YAML or JSON, a model card, or a trainer's file.",
        RECIPE,
        (),
        panel=TRAINING,
        default_text="files beside the model",
    )


@options
class InitialOptions(Options):
    """Where the training started."""

    initial: InitialLike | None = option(
        "The weights that training started from, so that only what it wrote is stored: the seed that was set right "
        "before the model was built, or a checkpoint of the initial model or of an early step; auto searches for the "
        "seed, in about half a minute. In Python also the untrained module, its state dict, or a function that returns "
        "either. Layers that do not correlate with it, or gain nothing, take a form without it.",
        INITIAL,
        panel=TRAINING,
    )


@options
class StoredInitialOptions(Options):
    """The initial weights that a compressed model names."""

    initial: InitialSource | None = option(
        "The initial weights of a model that was compressed to what training added to those of a checkpoint, which it "
        "names. A model that was compressed with a seed needs none.",
        INITIAL_SOURCE,
        panel=SOURCE,
    )


@options
class StoredBaseOptions(Options):
    """The base of a stored difference."""

    base: str | Path | None = option(
        "The model that a fine-tune, stored as what it adds to it, started from.", SAVED_MODEL, panel=SOURCE
    )


@options
class LayerOptions(Options):
    """Which layers are compressed."""

    include: tuple[str, ...] = option("Only these layers: globs, or re:EXPRESSION.", PATTERNS, (), panel=LAYERS)
    exclude: tuple[str, ...] = option("Not these layers.", PATTERNS, (), panel=LAYERS)


@options
class EmbeddingOptions(LayerOptions):
    """Whether embeddings are among these layers."""

    embeddings: bool = option("Embeddings too, each with the output head tied to it.", SWITCH, False, panel=LAYERS)


@options
class FormOptions(EmbeddingOptions):
    """How pairs are stored."""

    form: FormRequest = option(
        "How pairs are stored: pivoted is smaller, plain is faster.", choice(FormRequest), "auto", panel=LAYERS
    )


@options
class DataOptions(Options):
    """What the model is measured on."""

    data: DataLike | None = option(f"Measure the cost on this: {KINDS_OF_DATA}.", DATA, panel=SOURCE)
    data_samples: int | None = option(
        "Examples, or windows of text, to measure on, evenly spaced.", count(1), default_text="all", panel=SOURCE
    )
    tokenizer: Callable[..., Any] | None = option(
        "What makes tokens of texts, for a loaded module or instead of the folder's own: called as those of "
        "transformers.",
        CALLED,
        only_python=True,
    )
    processor: Callable[..., Any] | None = option(
        "What makes inputs of images, for a loaded module or instead of the folder's own: an image processor of "
        "transformers, or a processor that has one and a tokenizer.",
        CALLED,
        only_python=True,
    )


@options
class MetricOptions(DataOptions):
    """What the model is measured on, and by what."""

    metric: Callable[[nn.Module, Iterable[Any]], float] | None = option(
        "Measure the model by this instead of accuracy or perplexity: a function of a model and an iterable of batches "
        "that returns a number. The batches are as the loader makes them, on the model's device; `max_drop` is then in "
        "its unit.",
        METRIC,
        only_python=True,
    )
    higher_is_better: bool = option("Whether a higher value of `metric` is better.", SWITCH, True, only_python=True)

    @property
    def custom_metric(self) -> CustomMetric | None:
        """The metric with its direction, where one was given."""
        if self.metric is None:
            return None
        from compressor.data import CustomMetric

        return CustomMetric(self.metric, self.higher_is_better)

    def check_metric(self) -> None:
        """Raise `BadInput` for a metric without data, or a direction without a metric."""
        if self.metric is not None and self.data is None:
            what = "`metric` is measured on data, and none was given"
            raise BadInput(what, option="metric", remedy="pass `data=DATA`")
        if self.metric is None and "higher_is_better" in self.given:
            what = "`higher_is_better` is about `metric`, and none was given"
            raise BadInput(what, option="higher_is_better", remedy="pass `metric`, or leave it out")


@options
class ProgressOptions(Options):
    """Who is told how far the work is."""

    progress: Progress | None = option(
        "Called with the name of a step, how many of its parts are done, and how many there are.",
        PROGRESS,
        only_python=True,
        repeatable=False,
    )


@options
class RunOptions(ProgressOptions):
    """Where the work is done, and who is told how far it is."""

    device: str = option(
        "auto, cpu, cuda or cuda:N, or another accelerator by its name in PyTorch, such as xpu.",
        DEVICE,
        "auto",
        panel=RUNNING,
        repeatable=False,
    )


@options
class WorkOptions(Options):
    """Where a run keeps what it has done."""

    work_dir: Path | None = option(
        "Keep what is done in this folder, so that the same command goes on from there when it was interrupted; "
        "removed when all is done.",
        PATH,
        metavar="DIR",
        panel=RUNNING,
        repeatable=False,
    )


@options
class EngineOptions(RunOptions):
    """Where independent jobs run."""

    engine: str | None = option(
        "Measure and factorize layers, and take the moments of calibration, in worker processes of this machine, or on "
        "the machines of a Ray cluster, which have the files of the model at the same paths. The result is the same, "
        "but moments are equal to rounding where this process has several threads, and `max_drop` tries as many sizes "
        "at a time as there are workers.",
        ENGINE,
        default_text="in this process",
        panel=RUNNING,
        repeatable=False,
    )


@options
class OverwriteOptions(Options):
    """Whether outputs are replaced."""

    overwrite: bool = option(
        "Replace outputs that exist: files, and model folders that hold nothing else.",
        SWITCH,
        False,
        panel=OUTPUT,
        repeatable=False,
    )


@options
class OutputOptions(OverwriteOptions):
    """Where the model is written."""

    output: Path | None = option(
        "File or folder to write.",
        PATH,
        short="-o",
        default_text="a name beside the model",
        panel=OUTPUT,
        repeatable=False,
    )
    max_shard_size: int = option("Largest weight file of an output.", SIZE, "5GB", panel=OUTPUT)


@options
class RankOptions(Options):
    """How much of an adapter is kept."""

    rank: int | None = option("Of an adapter: the largest rank of each module.", count(1), panel=BUDGET)
    energy: float | None = option(
        "Of an adapter: the share of the energy, the sum of squared singular values, that each module keeps, such as "
        "0.9 or 90%.",
        SHARE,
        panel=BUDGET,
    )


@options
class BudgetOptions(RankOptions):
    """How much is removed: one of them, or a size with `max_latency`, and beside either of these a `max_drop`."""

    keep: float | None = option(
        "Share of the size to keep, such as 0.6 or 60%. The size is that of the eligible layers in 16 bits; of layers "
        "that are low-rank already, it is what they store.",
        SHARE,
        panel=BUDGET,
    )
    max_size: int | None = option("Size of the weight files, such as 40MB.", SIZE, panel=BUDGET)
    max_latency: float | None = option(
        "Time of a forward at every batch size, as a ratio to the dense model's, such as 0.7x or 70%; with `keep` or "
        "`max_size` a second limit.",
        RATIO,
        panel=BUDGET,
    )
    max_drop: float | None = option(
        "The smallest model that is at most this much worse on `data`: in accuracy, where 0.01 or 1% is one point, or "
        "in perplexity, where 0.5 is an increase by so much. One standard error is added to a measured drop. Factors "
        "are refined for the last candidates only. With `keep`, `max_size` or `max_latency`, what these give is "
        "refused where it is worse.",
        DROP,
        panel=BUDGET,
    )
    tolerance: float | None = option("Relative error per layer, such as 0.05 or 5%.", SHARE, panel=BUDGET)
    plan: Plan | Path | None = option("The ranks of an edited 'compress plan' file.", PLAN, panel=BUDGET)


@options
class BitsOptions(Options):
    """In how many bits numbers may be stored."""

    bits: tuple[int, ...] | None = option(
        "Bits in which the numbers of a layer may be stored beside its own: 8, 4, or several such as 8,4; auto: any "
        "from 2 to 8; 16: none. What loses least for its bytes is chosen, dense or as a pair. One width without a "
        "size: every layer in it.",
        WIDTHS,
        default_text="auto with calibration data, else 16",
        panel=BUDGET,
    )

    def widths(self, *, calibrated: bool) -> tuple[int, ...]:
        """The bits that are allowed: those that were asked for, else any with calibration data and 16 without."""
        if self.bits is not None:
            return self.bits
        return () if calibrated else (16,)

    @property
    def only_width(self) -> int | None:
        """The only width below 16 that is asked for; None where none or several are."""
        return self.bits[0] if self.bits is not None and len(self.bits) == 1 and self.bits[0] < 16 else None


@options
class BatchOptions(Options):
    """At which batch sizes a model is to be fast."""

    batch: tuple[int, ...] = option("Batch sizes that are timed and planned for.", COUNTS, "1,32", panel=SPEED)


@options
class SpeedOptions(BatchOptions):
    """Whether a model is to be fast or small, and on what."""

    prefer: Preference | None = option(
        "speed: in every layer the fastest form, and only where it is faster than dense. size: the smallest form.",
        choice(Preference),
        default_text="size of files and where bits below 16 are allowed, else speed",
        panel=SPEED,
    )
    target_device: DeviceProfile | str | None = option(
        "Plan for this device instead of the one at hand, by its data sheet: h100, a100, l4, cpu, ...",
        DEVICE_PROFILE,
        panel=SPEED,
    )
    rank_multiple: int | None = option(
        "Ranks are multiples of this.",
        count(1),
        default_text="for speed what the device likes, else 1",
        panel=SPEED,
    )

    def check_speed(self) -> None:
        """Raise `BadInput` where what is asked about speed contradicts itself."""
        if self.prefer == "size" and self.target_device is not None:
            what = "`target_device` and `prefer='size'` contradict each other"
            raise BadInput(what, option="target_device", remedy="leave one of them out")


# What is asked about calibration data, by their options.
CALIBRATION_DETAILS = frozenset({"effort", "calibration_samples", "calibration_length", "seed", "calibration_settings"})


@options
class CalibrationOptions(Options):
    """Data by which ranks and factors are chosen so that the loss changes least."""

    calibration: DataLike | None = option(
        "Choose ranks and factors by their effect on the loss on these data: the same kinds as `data`, and the "
        "training split of built-in ones; or `self`, examples that the model makes itself; or `none`. Needs the "
        "model's architecture.",
        CALIBRATION_DATA,
        default_text="self for causal language models and image models of which a size is asked, else none",
        panel=CALIBRATION,
    )
    calibration_samples: int | None = option(
        "Examples, or windows of text, to calibrate on.",
        count(2),
        panel=CALIBRATION,
        default_text="128; 192 that the model makes itself; all batches of a loader",
    )
    calibration_length: int | None = option(
        "Tokens per window of calibration text.", count(1), panel=CALIBRATION, default_text="the model's own"
    )
    effort: Effort = option(
        "How much work calibration does: fast measures the layers and shares the size once; balanced tries several "
        "shares and compensates each layer for those before it; best measures again where that helps, and fits all "
        "factors of a block to the dense one's outputs.",
        choice(Effort),
        "best",
        panel=CALIBRATION,
    )
    seed: int = option(
        "Random seed of the targets sampled during calibration, and of examples that the model makes itself.",
        count(0, 2**64 - 1),
        0,
        panel=CALIBRATION,
    )
    calibration_cache: Path | None = option(
        "Keep examples, moments, and decompositions in this folder: another size, form, or preference of the same "
        "model at the same effort starts from them, and needs no data; balanced and best are alike here.",
        PATH,
        metavar="DIR",
        panel=CALIBRATION,
    )
    calibration_settings: CalibrationSettings | None = option(
        "Every knob of calibration and of the search over plans, in place of `effort`.",
        settings("CalibrationSettings"),
        only_python=True,
    )

    @property
    def calibrates(self) -> bool:
        """Whether data to calibrate on were given, or are to be made."""
        return self.calibration is not None and not self._is("none")

    @property
    def calibrates_itself(self) -> bool:
        """Whether the model is to make its own examples."""
        return self._is("self")

    def _is(self, word: NoData) -> bool:
        return isinstance(self.calibration, str) and self.calibration == word


@options
class ThresholdOptions(Options):
    """By which thresholds ranks are chosen."""

    planning_settings: PlanningSettings | None = option(
        "The thresholds by which ranks are chosen.", settings("PlanningSettings"), only_python=True
    )


@options
class TimingOptions(Options):
    """How often forwards are timed."""

    timing_settings: TimingSettings | None = option(
        "How often forwards are timed.", settings("TimingSettings"), only_python=True, repeatable=False
    )


@options
class BaseOptions(Options):
    """The model that a fine-tune started from."""

    base: ModelLike | None = option(
        "The model that MODEL was fine-tuned from: compress the difference, not the weights. A folder gives a LoRA "
        "adapter, and with `bits` a file. Of an adapter its base, on which `calibration` or `max_drop` measures.",
        MODEL,
        metavar="ORIGINAL",
        panel=SOURCE,
    )


@options
class PlanOptions(
    EngineOptions,
    FormOptions,
    ArchitectureOptions,
    CalibrationOptions,
    ThresholdOptions,
    TimingOptions,
    MetricOptions,
    InitialOptions,
    TrainingOptions,
    SpeedOptions,
    BitsOptions,
    BudgetOptions,
    BaseOptions,
    HubOptions,
):
    """What can be asked of `plan`."""

    verb = "plan"
    main: ClassVar[Sequence[str]] = ("keep", "max_size", "max_drop", "calibration", "data")
    examples: ClassVar[Sequence[Example]] = (
        Example("plan model/ --keep 0.6 -o plan.json", "ranks for 60 % of the size, to edit"),
        Example("model/ --plan plan.json -o small/", "apply the edited file"),
    )
    alternatives = ("keep", "max_size", "max_latency", "max_drop", "tolerance", "plan", "rank", "energy")

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[PlanKeywords]) -> None: ...

    def check(self) -> None:
        self._check_budgets()
        self._check_plan()
        if self.calibration_settings is not None and "effort" in self.given:
            what = "`effort` stands for calibration settings, and `calibration_settings` were given too"
            raise BadInput(what, option="effort", remedy="leave one of them out")
        if self.base is not None:
            self._check_base()
        self.check_speed()
        self._check_needs()
        self.check_metric()

    @classmethod
    def replaced_by(cls, given: Set[str]) -> Set[str]:
        beside = {"max_latency", "max_drop"}  # which may stand beside a size
        sizes = set(cls.alternatives) - beside
        alone = {"tolerance", "plan", "rank", "energy"}
        if given & alone:
            return frozenset(cls.alternatives)
        return sizes if given & sizes else alone if given & beside else frozenset()

    @property
    def may_calibrate_itself(self) -> bool:
        """Whether the model may make its own examples unasked: where a size is asked for, and no plan.

        A search for the smallest size within a drop alone calibrates once for each size that it tries, and measures
        what is lost. Every layer in 8 bits loses next to nothing, rounded to nearest too.
        """
        few_bits = self._states_width and self.only_width != 8
        sized = bool({"keep", "max_size", "max_latency"} & self.given) or few_bits
        return self.calibration is None and self.base is None and sized

    @property
    def _states_width(self) -> bool:
        """Whether the one width that is asked for says how much of every layer is kept."""
        return self.only_width is not None and not set(self.alternatives) & self.given

    def _check_budgets(self) -> None:
        given = [name for name in self.alternatives if name in self.given]
        alone = [name for name in given if name not in ("max_latency", "max_drop")]
        if len(alone) > 1 or (len(given) > 1 and {"tolerance", "plan", "rank", "energy"} & set(given)):
            several = alone if len(alone) > 1 else given
            names = " and ".join(f"`{name}`" for name in several)
            number = ("two", "three", "four", "five", "six")[len(several) - 2]
            raise BadInput(f"{names} are {number} budgets", option=several[0], remedy="ask for one of them")
        if self.prefer == "size" and self.max_latency is not None:
            what = "`max_latency` and `prefer='size'` contradict each other"
            raise BadInput(what, option="max_latency", remedy="leave one of them out")

    def _check_plan(self) -> None:
        """What a plan states itself."""
        if self.plan is None:
            return
        of_ranks = dict.fromkeys(("prefer", "target_device", "rank_multiple"), "ranks")
        for name, stated in {"form": "forms", "bits": "bits", **of_ranks}.items():
            if name in self.given:
                value = getattr(self, name)
                shown = f"`{name}={value!r}`" if isinstance(value, str | int) else f"`{name}`"
                what = f"`plan` and {shown} contradict each other"
                raise BadInput(what, option="plan", remedy=f"state the {stated} in the plan")

    def _check_needs(self) -> None:
        if self._is("none") and self.calibration_cache is not None:
            what = "`calibration_cache` and `calibration='none'` contradict each other"
            raise BadInput(what, option="calibration_cache", remedy="leave one of them out")
        if not self.calibrates and not self.may_calibrate_itself and self.calibration_cache is None:
            for name in sorted(CALIBRATION_DETAILS):
                if name in self.given:
                    what = f"`{name}` is about calibration data, and none were given"
                    raise BadInput(what, option=name, remedy="pass `calibration=DATA`, or leave it out")
        if self.max_drop is not None and self.data is None:
            what = "`max_drop` is measured on data, and none was given"
            raise BadInput(what, option="max_drop", remedy="pass `data=DATA`")
        if self.data_samples is not None and self.data is None:
            what = "`data_samples` is about data, and none were given"
            raise BadInput(what, option="data_samples", remedy="pass `data=DATA`, or leave it out")
        must_calibrate = self.calibrates or self.calibration_cache is not None
        asked = bool({"keep", "max_size", "max_latency", "max_drop", "plan"} & self.given) or self._states_width
        if must_calibrate and not asked:
            raise BadInput(
                "calibration shares a size among the layers, and none was asked for",
                option="calibration",
                remedy="ask for one with `keep` or `max_size`, for a `max_drop`, or give a `plan`",
            )

    def _check_base(self) -> None:
        """What does not apply to differences to a base."""
        for name in _NOT_FOR_DIFFERENCES:
            if name in self.given and not (name == "form" and self.form != "pivoted"):
                shown = f"`{name}={getattr(self, name)!r}`" if name == "form" else f"`{name}`"
                what = f"{shown} is not for differences to a base"
                remedy = f"leave out {shown}, or `base`"
                raise BadInput(what, option=name, remedy=remedy)


_NOT_FOR_DIFFERENCES = (
    *("planning_settings", "form", "embeddings", "max_shard_size"),
    *("prefer", "batch", "target_device", "max_latency", "rank_multiple", "work_dir", "engine", "initial"),
)


@options
class CompressOptions(WorkOptions, OutputOptions, PlanOptions):
    """What can be asked of `compress`."""

    verb = "compress"
    main: ClassVar[Sequence[str]] = (*PlanOptions.main, "output")
    examples: ClassVar[Sequence[Example]] = (
        Example("model/ --keep 60% -o small/", "60 % of the size"),
        Example("model/ --keep 30% --calibration texts.txt", "far smaller: chosen by the loss on some texts"),
        Example("model/ --max-drop 0.5 --data texts.txt", "the smallest with a perplexity at most 0.5 higher"),
        Example("weights.pt --max-size 1MB", "the weights of any network"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[CompressKeywords]) -> None: ...

    allow_miss: bool = option(
        "Write the model, with a warning, even where the reported data show a larger drop than `max_drop`.",
        SWITCH,
        False,
        panel=BUDGET,
    )
    push_to: str | None = option(
        "Send the written folder to the Hugging Face hub; a repository made for it is private, and weights of one are "
        "replaced only with `overwrite`.",
        TEXT,
        metavar="ORG/NAME",
        panel=OUTPUT,
        repeatable=False,
    )
    dry_run: bool = option("Say what would be done; write no model.", SWITCH, False, panel=OUTPUT, repeatable=False)

    def check(self) -> None:
        super().check()
        if self.allow_miss and self.max_drop is None:
            what = "`allow_miss` is about `max_drop`, and none was given"
            raise BadInput(what, option="allow_miss", remedy="pass `max_drop`, or leave it out")
        if self.push_to is not None and self.dry_run:
            what = "`push_to` and `dry_run` contradict each other"
            raise BadInput(what, option="push_to", remedy="leave one of them out")
        self._check_apart()

    def _check_apart(self) -> None:
        """Refuse folders that lie in one another: what is kept there is checked, and removed, as a whole."""
        asked = {name: getattr(self, name) for name in ("work_dir", "calibration_cache", "output")}
        places = {name: path.resolve() for name, path in asked.items() if path is not None}
        for name, other in combinations(places, 2):
            if places[name].is_relative_to(places[other]) or places[other].is_relative_to(places[name]):
                what = f"`{name}` and `{other}` are one folder, or one is in the other"
                raise BadInput(what, option=name, remedy="give folders apart from each other")


@options
class InspectOptions(
    EngineOptions,
    EmbeddingOptions,
    ArchitectureOptions,
    ThresholdOptions,
    InitialOptions,
    TrainingOptions,
    HubOptions,
):
    """What can be asked of `inspect`."""

    verb = "inspect"
    also: ClassVar[Sequence[str]] = ("list", "list-layers", "layers", "info", "show", "ranks", "summary")
    examples: ClassVar[Sequence[Example]] = (
        Example("inspect model/", "how low the rank of each layer is"),
        Example("inspect weights.pt --recipe train.yaml", "and what training left of its start"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[InspectKeywords]) -> None: ...

    epsilon: float = option("Relative residual at which the memory window ends, such as 0.1 or 10%.", SHARE, 0.1)
    bits: tuple[int, ...] | None = option(
        "Measure what each layer loses in so many bits too: 8, 4, or several such as 8,4; auto: any from 2 to 8.",
        WIDTHS,
    )

    def check(self) -> None:
        if not 0 < self.epsilon < 1:
            what = f"`epsilon` {self.epsilon:g} is out of range"
            raise BadInput(what, option="epsilon", remedy="give a number between 0 and 1")


@options
class EvaluateOptions(
    RunOptions, TimingOptions, BatchOptions, StoredInitialOptions, StoredBaseOptions, ArchitectureOptions, MetricOptions
):
    """What can be asked of `evaluate`."""

    verb = "evaluate"
    also: ClassVar[Sequence[str]] = ("eval", "measure", "benchmark", "compare", "test")
    main: ClassVar[Sequence[str]] = ("data", "baseline")
    examples: ClassVar[Sequence[Example]] = (
        Example("evaluate small/ --baseline model/ --data texts.txt", "quality, size, and time of both"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[EvaluateKeywords]) -> None: ...

    data: DataLike = option(f"What to measure on: {KINDS_OF_DATA}.", DATA, MISSING)
    baseline: ModelLike | None = option("The model to compare with.", MODEL, metavar="ORIGINAL")
    split: Split = option("Which part of builtin data.", choice(Split), "test")

    def check(self) -> None:
        self.check_metric()


@options
class ArchiveOptions(ProgressOptions, OverwriteOptions, ArchitectureOptions, InitialOptions, TrainingOptions):
    """What can be asked of `archive`."""

    verb = "archive"
    main: ClassVar[Sequence[str]] = ("output", "tolerance")
    examples: ClassVar[Sequence[Example]] = (
        Example("archive run/checkpoint-* -o archive/", "the checkpoints of a run, as changes"),
        Example("restore archive/ --checkpoint checkpoint-20 -o old.safetensors", "one of them again"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[ArchiveKeywords]) -> None: ...

    output: Path = option("Folder to write.", PATH, MISSING, short="-o", repeatable=False)
    tolerance: float = option(
        "Largest relative error of each tensor of each checkpoint, such as 0.001 or 0.1%; 0 keeps every bit.",
        SHARE,
        0.001,
    )

    def check(self) -> None:
        if not 0 <= self.tolerance < 1:
            what = f"`tolerance` {self.tolerance:g} is out of range"
            raise BadInput(what, option="tolerance", remedy="give a number from 0 to below 1, such as 0.001")


@options
class RestoreOptions(ProgressOptions, OutputOptions, StoredInitialOptions, StoredBaseOptions, ArchitectureOptions):
    """What can be asked of `restore`."""

    verb = "restore"
    also: ClassVar[Sequence[str]] = ("decompress", "expand", "unpack", "extract")
    main: ClassVar[Sequence[str]] = ("output",)
    examples: ClassVar[Sequence[Example]] = (
        Example("restore small/ -o dense/", "a checkpoint that the original code loads"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[RestoreKeywords]) -> None: ...

    checkpoint: str | None = option(
        "Which checkpoint of an archive, by its name.", TEXT, metavar="NAME", repeatable=False
    )


@options
class ExportOptions(ProgressOptions, OutputOptions, StoredInitialOptions, StoredBaseOptions, ArchitectureOptions):
    """What can be asked of `export`."""

    verb = "export"
    also: ClassVar[Sequence[str]] = ("convert", "save")
    main: ClassVar[Sequence[str]] = ("to", "output")
    examples: ClassVar[Sequence[Example]] = (
        Example("export small/ --to hf-remote -o served/", "for transformers, without this package"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[ExportKeywords]) -> None: ...

    to: ExportTarget = option(
        "dense: any engine. hf-remote: transformers with trust_remote_code. onnx: any onnxruntime. gguf: llama.cpp. "
        "lora: a PEFT adapter of the difference to `base`. peft, kohya, diffusers: a LoRA adapter in other names.",
        choice(ExportTarget),
        MISSING,
    )
    input_shape: tuple[int, ...] | None = option("With onnx and `factory`, the shape of one example.", SHAPE)


@options
class DiagnoseOptions(RunOptions, LayerOptions, ArchitectureOptions, InitialOptions, TrainingOptions, DataOptions):
    """What can be asked of `diagnose`."""

    verb = "diagnose"
    examples: ClassVar[Sequence[Example]] = (
        Example("diagnose model/ --data texts.txt", "its weights beside the gradient of the loss"),
        Example("diagnose run/checkpoint-30 --series run -o ranks.svg", "how ranks evolved in a run"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[DiagnoseKeywords]) -> None: ...

    data: DataLike | None = option(
        f"What the model was trained on, to compare weights with the gradient of the loss: {KINDS_OF_DATA}.", DATA
    )
    series: Path | None = option(
        "Checkpoints of the same run, files or folders whose names tell their step: how ranks evolved.",
        PATH,
        metavar="DIR",
    )


@options
class ExploreOptions(ProgressOptions, OverwriteOptions):
    """What can be asked of `explore`."""

    verb = "explore"
    main: ClassVar[Sequence[str]] = ("output",)
    examples: ClassVar[Sequence[Example]] = (
        Example("explore --recipe model/ -o page.html", "a page that opens on a model's training"),
    )

    if TYPE_CHECKING:

        def __init__(self, *, output: str | Path | None = None, **given: Unpack[ExploreKeywords]) -> None: ...

    output: Path = option("The page to write.", PATH, "explorer.html", short="-o", metavar="FILE.html", positional=True)
    recipe: Any = option(
        "Open it on these hyperparameters, or on a model's and its layers.",
        EXPLORED,
        metavar="FILE|MODEL",
    )


@options
class MergeOptions(RankOptions, RunOptions, OutputOptions, ArchitectureOptions):
    """What can be asked of `merge`."""

    verb = "merge"
    also: ClassVar[Sequence[str]] = ("combine", "add")
    main: ClassVar[Sequence[str]] = ("output",)
    examples: ClassVar[Sequence[Example]] = (
        Example("merge a.safetensors b.safetensors --mode sum -o both.safetensors", "the weights of two networks"),
    )

    if TYPE_CHECKING:

        def __init__(self, **given: Unpack[MergeKeywords]) -> None: ...

    output: Path = option("File or folder to write.", PATH, MISSING, short="-o", repeatable=False)
    mode: MergeMode | None = option(
        "sum: add the weights, for weight decay and nearly orthogonal inputs. concat: side by side, safe. Adapters are "
        "added.",
        choice(MergeMode),
        default_text="sum of adapters; of networks it must be given",
    )
    weights: tuple[float, ...] = option(
        "Of adapters: what each counts, in their order.", NUMBERS, (), default_text="1 each"
    )
    keep: float | None = option("Of adapters: the fraction of the numbers of all of them to keep.", SHARE, panel=BUDGET)
    max_size: int | None = option("Of adapters: size of the weight file.", SIZE, panel=BUDGET)
    head: Head = option(
        "With concat, whether the outputs are added or put one after the other.", choice(Head), "shared"
    )
    base: str | Path | None = option(
        "With sum, the model that all were fine-tuned from: what each changed in it is added.", SAVED_MODEL
    )
    data: tuple[DataLike, ...] = option(
        "Each network's data, once for each and in their order: measure interference and quality on it.",
        SEVERAL_DATA,
        (),
    )
    data_samples: int | None = option(
        "Examples, or windows of text, to measure on, evenly spaced.", count(1), default_text="all"
    )
    max_drop: float | None = option(
        "Write nothing if a task loses more: in accuracy, where 0.01 or 1% is one point, or in perplexity.", DROP
    )

    @property
    def adapter_budget(self) -> Mapping[str, float]:
        """The budgets that are asked of merged adapters."""
        return {name: getattr(self, name) for name in ("rank", "energy", "keep", "max_size") if name in self.given}

    def check(self) -> None:
        if len(self.adapter_budget) > 1:
            names = " and ".join(f"`{name}`" for name in self.adapter_budget)
            option = next(iter(self.adapter_budget))
            raise BadInput(f"{names} are several budgets", option=option, remedy="ask for one of them")
        if self.mode == "sum" and self.head == "separate":
            what, remedy = "a sum has one head", "leave out `head`, or merge with `mode='concat'`"
            raise BadInput(what, option="head", remedy=remedy)
        if self.mode == "concat" and self.base is not None:
            what = "`base` and `mode='concat'` contradict each other"
            raise BadInput(what, option="base", remedy="merge fine-tunes with `mode='sum'`")
        if self.max_drop is not None and not self.data:
            remedy = "give `data` once for each network, in order"
            raise BadInput("`max_drop` needs to measure", option="max_drop", remedy=remedy)
        if self.max_drop is not None and not self.max_drop >= 0:
            what = f"`max_drop` {self.max_drop:g} is out of range"
            raise BadInput(what, option="max_drop", remedy="give a number from 0 on, such as 0.01")


VERBS: tuple[type[Options], ...] = (
    CompressOptions,
    InspectOptions,
    PlanOptions,
    EvaluateOptions,
    RestoreOptions,
    ExportOptions,
    DiagnoseOptions,
    MergeOptions,
    ArchiveOptions,
    ExploreOptions,
)
