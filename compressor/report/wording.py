"""Recipes, budgets, plans and losses in words: the same in tables, cards and reports."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from compressor.formatting import format_estimate, format_percent, format_size, one_line

if TYPE_CHECKING:
    from compressor.archiving import ArchivedCheckpoint
    from compressor.evaluation import Evaluation
    from compressor.evaluation.uniform import Loss
    from compressor.fine_tuning.correspondence import Correspondence
    from compressor.fine_tuning.difference import BaseShare
    from compressor.io.training_state import LeftOut
    from compressor.planning import Budget, CalibrationResult, DropSearch, LayerPlan, Plan
    from compressor.recipe import TrainingRecipe
    from compressor.results import Archiving, BeforeAfter, Compression, FineTune, Needs


def shortened(name: str, width: int) -> str:
    """The name in at most `width` characters, keeping its first number (the block) and its end, which say most."""
    if len(name) <= width:
        return name
    block = re.search(r"(?<=\.)\d+\.", name)
    if block is not None and len(name) - block.start() < width:
        return "…" + name[block.start() :]
    head = "…" + block[0][:-1] if block is not None else name[: width // 3]
    tail = width - len(head) - 1
    return head + "…" + name[len(name) - tail :] if tail > 0 else name[:width]


def shortened_apart(names: Sequence[str], width: int) -> list[str]:
    """The names in at most `width` characters each, `shortened` such that different names stay different.

    If two would become equal, first their numbers and ends are tried, then longer and longer beginnings; names that are
    still equal are numbered. Different names stay different down to a width of 8.
    """
    short = {name: name for name in names if len(name) <= width}
    beginnings = (partial(_beginning_and_end, beginning=length) for length in range(1, width))
    ways: list[Callable[[str, int], str]] = [shortened, _numbers_and_end, *beginnings]
    for way in ways:
        waiting = {name: way(name, width) for name in names if name not in short}
        if not waiting:
            break
        taken, count = set(short.values()), Counter(waiting.values())
        short |= {name: text for name, text in waiting.items() if count[text] == 1 and text not in taken}
    for name in names:
        number, text = 0, short.get(name, "")
        while name not in short:
            number += 1
            text = shortened(name, width - len(f"~{number}")) + f"~{number}"
            if text not in short.values():
                short[name] = text
    return [short[name] for name in names]


def _numbers_and_end(name: str, width: int) -> str:
    """The numbers among a name's parts, which identify its blocks, and as much of its end as fits."""
    *parts, last = name.split(".")
    numbers = "".join(f"{part}…" for part in parts if part.isdecimal())
    room = width - len(numbers) - 1
    return "…" + numbers + last[max(len(last) - room, 0) :] if room > 0 else shortened(name, width)


def _beginning_and_end(name: str, width: int, *, beginning: int) -> str:
    return name[:beginning] + "…" + name[len(name) - (width - beginning - 1) :]


def needs_words(needs: Needs) -> str:
    """What a compression is expected to take, in a line."""
    words = [f"about {format_size(needs.memory.needed)} of memory"]
    if needs.seconds is not None:
        words.insert(0, needed_time_words(needs))
    if needs.temporary.needed:
        words.append(f"{format_size(needs.temporary.needed)} of temporary files in {needs.temporary.place}")
    if needs.output.needed:
        words.append(f"{format_size(needs.output.needed)} of weight files")
    return ", ".join(words)


def needed_time_words(needs: Needs) -> str:
    """The time that a compression is expected to take."""
    assert needs.seconds is not None
    assert needs.most_seconds is not None
    least, most = format_estimate(needs.seconds), format_estimate(needs.most_seconds)
    return f"about {least}" if least == most else f"about {least} (at most {most})"


def archive_initial_words(archiving: Archiving) -> str:
    """Where the initial weights of an archived run come from, and whether anything is a change from them."""
    if archiving.initial is None:
        return "not known"
    if not archiving.tolerance:
        return f"{archiving.initial}, not used: other processors draw other last bits"
    used = any(each.from_initial for each in archiving.checkpoints)
    return archiving.initial + ("" if used else ", from which no change is smaller")


def archive_window_words(stored: Sequence[ArchivedCheckpoint]) -> str:
    """What the memory window says of the changes between the checkpoints of a run."""
    bounds = [each.rank_bound for each in stored if each.rank_bound is not None]
    if not bounds:
        return "no bound below the full rank is known of what was written between the checkpoints"
    changes = sum(each.bounded for each in stored)
    return f"{changes} changes have at most the rank that was written since: batch size x uses x steps"


def left_out_words(
    left_out: Sequence[LeftOut], weights_at: str, quoted: Callable[[str], str] = repr, *, remedy: bool = True
) -> str:
    """What a checkpoint holds beside the weights that are used, and how to use their average instead."""
    words = ", ".join(f"{each.kind} ({quoted(each.key)}, {format_size(each.bytes)})" for each in left_out)
    average = next((each.key for each in left_out if each.kind.startswith("EMA")), None)
    if average is None:
        return words
    words += f"; used are the raw weights{f' ({quoted(weights_at)})' if weights_at else ''}"
    if not remedy:
        return words
    keys = "".join(f"[{key!r}]" for key in average.split("."))
    return f"{words}: for the average save torch.load(FILE){keys} to a file of its own and give that"


def rank_words(layer: LayerPlan) -> str:
    """The rank of a layer's pair, or of what corrects its quantized matrix; a dash where it has neither."""
    return "-" if layer.rank is None or (layer.rank == 0 and layer.truncated_to is None) else str(layer.rank)


def form_words(layer: LayerPlan) -> str:
    """The form of a layer without how its numbers are quantized, which stands in a column of its own."""
    if layer.rank is None and layer.before is not None:
        return "as it is"
    return layer.form.partition("@")[0]


def bits_words(layer: LayerPlan) -> str:
    """The bits of a layer, with its groups and a z for zero points; a dash where it is not quantized."""
    return "-" if layer.quantization is None else layer.quantization.name


BITS_NOTE = (
    "4g32 is 4 bits with a scale for every 32 inputs, z has zero points too, and - is not quantized; the rank of a"
    " dense layer is that of a correction of its rounding"
)


def quantizes(layers: Iterable[LayerPlan]) -> bool:
    """Whether any of the layers is quantized."""
    return any(layer.quantization is not None for layer in layers)


def error_words(error: float, decimals: int) -> str:
    """A relative error with so many decimals; only an error of zero is shown as zero."""
    least = 10.0**-decimals
    if error == 0:
        return "0"
    return f"<{least:.{decimals}f}" if error < least / 2 else f"{error:.{decimals}f}"


def base_share_words(shares: Mapping[str, BaseShare], *, in_adapter: bool) -> str:
    """How much of the base is left in the layers of a fine-tune; empty where no recipe predicts it."""
    known = [each for each in shares.values() if each.predicted is not None]
    if not known:
        return ""
    predicted = _range_words(each.predicted for each in known if each.predicted is not None)
    fitted, used = (_range_words(values) for values in ((e.fitted for e in known), (e.share for e in known)))
    why = ", as an adapter adds to all of it" if in_adapter else ""
    return f"the recipe predicts that exp(-K) = {predicted} of the base is left; fitted: {fitted}; used: {used}{why}"


def _range_words(values: Iterable[float]) -> str:
    """The least and the largest of some numbers, once where they are the same in six digits."""
    every = sorted(values)
    ends = [f"{every[0]:.6g}", f"{every[-1]:.6g}"]
    return " to ".join(dict.fromkeys(ends))


def rounding_words(share: float) -> str:
    """How much of a difference is rounding; empty below a tenth of a percent."""
    if share < 1e-3:
        return ""
    explained = format_percent(share)
    return f"explains {explained} of the difference of the paired matrices (Frobenius norm), and gets no rank"


def correspondence_words(found: Correspondence) -> str:
    """How the names of a fine-tune are found in its base, and what only one of the two has."""
    parts = []
    if found.prefix != found.prefix_in_base:
        ours, theirs = f"'{found.prefix}'", f"'{found.prefix_in_base}'"
        if not found.prefix:
            parts.append(f"behind {theirs} in the base")
        else:
            parts.append(f"{ours} is {theirs} in the base" if found.prefix_in_base else f"without {ours} in the base")
    if found.only_in_base:
        parts.append(f"{found.only_in_base:,} in the base alone, which stay as they are")
    if found.left_out:
        more = f" and {len(found.left_out) - 1:,} more" if len(found.left_out) > 1 else ""
        parts.append(f"left out: {found.left_out[0]}{more}, which the base lacks")
    return "; ".join(parts)


def added_tokens_words(tokens: BeforeAfter) -> str:
    """That the fine-tune has more tokens than its base."""
    return (
        f"{tokens.after - tokens.before:,} more than the {tokens.before:,} of the base; matrices with a row for each"
        " are stored in full"
    )


def recipe_words(recipe: TrainingRecipe) -> str:
    """The known hyperparameters, in one sentence."""
    known = [
        ("learning rate ", recipe.learning_rate),
        ("weight decay ", recipe.weight_decay),
        ("batch ", recipe.batch_size),
    ]
    optimizer = {None: "optimizer unknown", "sgd": "SGD", "adamw": "AdamW", "adam": "Adam"}
    words = [optimizer.get(recipe.optimizer, str(recipe.optimizer))]
    if recipe.momentum:
        words.append(f"{'Nesterov ' if recipe.nesterov else ''}momentum {recipe.momentum:g}")
    words += [f"{label}{value:g}" for label, value in known if value is not None]
    if recipe.schedule is not None:
        words.append(f"{recipe.schedule} schedule")
    if recipe.total_steps is not None:
        words.append(f"{recipe.total_steps:,} steps")
    elif recipe.epochs is not None:
        words.append(f"{recipe.epochs:g} epochs")
    return "unknown" if words == ["optimizer unknown"] else ", ".join(words)


def recipe_sources(recipe: TrainingRecipe) -> str:
    """Where the hyperparameters were read, each source once."""
    places = list(dict.fromkeys(recipe.sources.values()))
    flags = [place.removeprefix("flag ") for place in places if place.startswith("flag ")]
    files = [place for place in places if not place.startswith("flag ")]
    return ", ".join([*flags, *files])


def budget_words(budget: Budget) -> str:
    """The budget, or what replaces it."""
    first, *further = budget.parts
    limits = (
        f"at most {limit.value:g} lost on data" if limit.kind == "max-drop" else _one_budget_words(limit)
        for limit in further
    )
    return ", and ".join([_one_budget_words(first), *limits])


def squeezed_words(plan: Plan) -> str | None:
    """What is low-rank already, and what sizes are compared with; None where nothing is."""
    if not plan.squeezed:
        return None
    return (
        f"{plan.squeezed} of {len(plan.layers)} eligible layers are low-rank already, and sizes and errors are compared"
        " with what they store now, not with the dense layers"
    )


def _one_budget_words(budget: Budget) -> str:
    value = math.nan if budget.value is None else budget.value
    return {
        "keep": f"keep {value:.4g} of the size of the eligible layers",
        "max-size": f"weight files of at most {format_size(value)}",
        "max-latency": f"at most {value:g}x the time of the dense model",
        "max-drop": f"the smallest model that loses at most {value:g} on data",
        "tolerance": f"relative error of at most {value:g} in every layer",
        "window-rule": "window rule: what training wrote above its initialization",
        "bits": f"every layer in {value:g} bits",
        "plan": "the ranks of a plan",
        "rank": f"rank {value:g} at most in every module",
        "energy": f"{100 * value:.4g} % of the energy of every module",
    }[budget.kind]


def widths_words(compression: Compression) -> str | None:
    """Which bits each layer could take; None where all had 16, or the budget says it."""
    if not compression.bits or compression.plan.budget.kind in ("bits", "plan"):
        return None
    *first, last = map(str, (16, *compression.bits))
    several = f"{', '.join(first)}, or {last}" if len(first) > 1 else f"{first[0]} or {last}"
    return f"in each layer {several}, whichever loses least for its bytes"


def quality_words(metric: str, value: float, higher_is_better: bool | None = None) -> str:
    """A metric in its unit; `higher_is_better` is None for the built-in metrics."""
    return format_percent(value) if metric == "accuracy" and higher_is_better is None else f"{value:.4g}"


def change_words(metric: str, drop: float, higher_is_better: bool | None = None) -> str:
    """A change in quality: a minus is worse for accuracy, a plus for perplexity, either for the caller's own metric."""
    if metric == "accuracy" and higher_is_better is None:
        return f"{-100 * drop + 0.0:+.2f} points"
    return f"{-drop + 0.0:+.4g}" if higher_is_better else f"{drop:+.4g}"


def timed_on(compression: Compression) -> str | None:
    """The device that the model was timed on; None where it was not."""
    if compression.latency:
        return compression.timed_on
    evaluation = compression.evaluation
    return evaluation.device if evaluation is not None and evaluation.latency else None


def count_words(measured: Evaluation | DropSearch) -> str:
    """How many predictions a metric was measured on, or of the caller's own how many examples."""
    from compressor.planning import DropSearch

    count = measured.predictions if isinstance(measured, DropSearch) else measured.count
    return f"{count:,} {'predictions' if measured.higher_is_better is None else 'examples'}"


def calibration_words(result: CalibrationResult) -> str:
    """How many examples chose the ranks, and the expected increase of the loss."""
    caps = "; ranks capped by the window rule" if result.capped else ""
    fitted = "; factors fitted to the dense blocks" if result.refined else ""
    unused = f"; not used: {result.unused}" if result.unused else ""
    loss = f"{result.holdout_loss:.2g}"
    lost = f"loss increase {loss} {result.unit}" if result.unit == "nats per prediction" else f"{result.unit} {loss}"
    return (
        f"{result.examples} {result.made or 'examples'}; {lost} on a holdout of {result.holdout},"
        f" {result.predicted_loss:.2g} predicted to second order{caps}{fitted}{unused}"
    )


def loss_name(unit: str) -> str:
    """What a loss in a unit of the curve is called."""
    return {
        "nats per prediction": "loss increase, nats per prediction",
        "relative error": "relative error of the layers",
    }.get(unit, unit)


def loss_words(loss: float, unit: str) -> str:
    """A loss of the curve, which without data is no prediction of a loss."""
    if unit == "relative error":
        return f"relative error {loss:.3g} of the layers"
    said = f"loss increase {loss:.3g} {unit}" if unit == "nats per prediction" else f"{unit} {loss:.3g}"
    return f"predicted {said}"


def drop_words(metric: str, drop: float, higher_is_better: bool | None = None) -> str:
    """A drop, or its standard error, in the unit of the metric; positive is worse."""
    if not math.isfinite(drop):
        return "infinite"
    return f"{100 * drop:.2f} points" if metric == "accuracy" and higher_is_better is None else f"{drop:.4g}"


def search_words(search: DropSearch) -> str:
    """How a size was chosen by its drop."""
    limit = drop_words(search.metric, search.limit, search.higher_is_better)
    measured = count_words(search)
    what = "a drop" if search.higher_is_better is None else f"a drop in {search.metric}"
    return (
        f"{search.evaluations} evaluations on {search.data} ({measured}); allowed is {what}"
        f" that, with its standard error added, is at most {limit}"
    )


SEARCH_HEADERS = ("kept", "drop", "standard error", "verdict")


def search_rows(search: DropSearch) -> list[tuple[str, ...]]:
    """Every size that was tried, the largest first, under `SEARCH_HEADERS`."""
    from compressor.planning import smallest_found, within_limit

    chosen = smallest_found(search.trials, search.limit)
    rows = []
    for trial in sorted(search.trials, key=lambda trial: -trial.parameters):
        verdict = "chosen" if trial is chosen else "allowed" if within_limit(trial.bound, search.limit) else "too much"
        numbers = (trial.drop, trial.standard_error)
        words = (drop_words(search.metric, each, search.higher_is_better) for each in numbers)
        kept = f"{trial.keep:.3f}, refined" if trial.refined else f"{trial.keep:.3f}"
        rows.append((kept, *words, verdict))
    return rows


def larger_drop_words(evaluation: Evaluation, budget: Budget) -> str | None:
    """That the reported data show a larger drop than was allowed; None if they do not."""
    from compressor.planning import within_limit

    limit = budget.drop_limit
    if limit is None or evaluation.drop is None or within_limit(evaluation.drop, limit):
        return None
    unused = f"on {evaluation.data}, which the search did not use"
    return f"{unused}, the loss is larger than allowed: take a smaller `max_drop`"


def needs_calibration(budget: Budget, *, has_attention: bool) -> bool:
    """Whether a model may be destroyed unnoticed without calibration data.

    With `max_drop` it would be noticed, and every layer in 8 bits loses next to nothing.
    """
    in_8_bits = budget.kind == "bits" and budget.value == 8
    return has_attention and budget.drop_limit is None and not in_8_bits


def without_data_words(compression: Compression) -> str | None:
    """That a model with attention layers was compressed without calibration data; None otherwise."""
    plan = compression.plan
    at_risk = needs_calibration(plan.budget, has_attention=compression.has_attention)
    if plan.calibration is not None or not at_risk or not any(layer.rank is not None for layer in plan.layers):
        return None
    if compression.evaluation is not None:
        return "compressed without calibration data"
    return (
        "compressed without calibration data and not evaluated: models with attention layers often lose most of their"
        " quality this way"
    )


def _growth_words(compression: Compression) -> str | None:
    """That the weight files grow; None if they do not."""
    before, after = compression.bytes.before, compression.bytes.after
    if after <= before:
        return None
    said = f"the weight files grow from {format_size(before)} to {format_size(after)}"
    return f"{said}: the metadata of the format outweigh the saving"


# A requested share is missed if less than this part of the saving is reached.
LEAST_SHARE_OF_THE_SAVING = 0.5


def warning_words(compression: Compression) -> tuple[str, ...]:
    """The warnings of a result."""
    plan, evaluation = compression.plan, compression.evaluation
    found = [
        without_data_words(compression),
        unchanged_words(plan.layers, written=compression.output is not None),
        missed_share_words(compression),
        _growth_words(compression),
        noise_words(compression.fine_tune),
        other_base_words(compression.fine_tune),
    ]
    if evaluation is not None:
        found.append(larger_drop_words(evaluation, plan.budget))
        found.append(large_loss_words(evaluation, plan))
    else:
        found.append(large_holdout_loss_words(plan))
    return tuple(words for words in found if words is not None)


def unchanged_words(layers: Sequence[LayerPlan], *, written: bool) -> str | None:
    """That every layer stays dense; None otherwise."""
    if any(layer.rank is not None for layer in layers):
        return None
    if written:
        return "no layer was factorized; the output holds the same weights"
    return "no layer would be factorized; the output would hold the same weights"


def noise_words(fine_tune: FineTune | None) -> str | None:
    """That the differences of some matrices are no more than rounding; None where all stand above it."""
    noise = () if fine_tune is None else fine_tune.only_rounding
    if fine_tune is None or not noise:
        return None
    left = len(noise) - 1
    others = (
        "" if not left else " and of all others" if left + 1 == len(fine_tune.rounding_shares) else f" and {left} more"
    )
    return (
        f"the difference of {one_line(noise[0])}{others} is no more than rounding to the stored dtype makes where"
        " nothing was learned: it has full rank, and a pair keeps nothing of use; compare in the dtype of the training"
    )


def other_base_words(fine_tune: FineTune | None) -> str | None:
    """That nothing of the base is in most matrices, so that their difference is a whole weight; None otherwise."""
    shares = [] if fine_tune is None else list(fine_tune.shares.values())
    apart = sum(abs(each.fitted) < 0.1 for each in shares)
    if not shares or apart <= len(shares) / 2:
        return None
    return (
        f"{apart} of {len(shares)} matrices have next to nothing of the base in them, so that what is stored is whole"
        " weights: is it the model that the fine-tuning started from?"
    )


def missed_share_words(compression: Compression) -> str | None:
    """Why less than half of the requested saving is reached; None if it is."""
    from compressor.network.layers import EXCLUDED, NOT_INCLUDED

    asked = compression.plan.budget.value if compression.plan.budget.kind == "keep" else None
    if asked is None or compression.fine_tune is not None or not compression.skipped:
        return None
    before, after = compression.parameters.before, compression.parameters.after
    if compression.plan.quantized:  # then it is bytes that are saved, and not numbers
        after = before - compression.plan.eligible_before + compression.plan.eligible_after
    largest = max(compression.skipped, key=lambda layer: layer.parameters)
    if largest.skip in (NOT_INCLUDED, EXCLUDED) or before - after >= LEAST_SHARE_OF_THE_SAVING * (1 - asked) * before:
        return None
    eligible = compression.plan.eligible_before / before
    reason = one_line(largest.skip or "")
    others = f", and {len(compression.skipped) - 1} more" if len(compression.skipped) > 1 else ""
    return (
        f"{asked:.3g} was asked for and {after / before:.1%} of all parameters are kept: layers that can be factorized"
        f" have only {eligible:.1%} of them; left out are {one_line(largest.name)} ({reason}){others}"
    )


def stored_only_words(layers: Sequence[LayerPlan]) -> str | None:
    """Which layers become smaller only in the file; None if none do."""
    names = [one_line(layer.name) for layer in layers if layer.kind == "parameter" and layer.rank is not None]
    if not names:
        return None
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}: multiplied out when the module runs; saves disk space, but neither compute nor memory"


def slowest_times(layer: LayerPlan) -> tuple[float | None, float | None]:
    """The time of a pair over that of the dense layer, in the workload where it is slowest: predicted, and measured."""
    if layer.rank is None or layer.latency is None:
        return None, None
    predicted = (each.predicted.ratio for each in layer.latency if each.predicted.dense > 0)
    measured = (each.measured.ratio for each in layer.latency if each.measured is not None and each.measured.dense > 0)
    return max(predicted, default=None), max(measured, default=None)


def time_words(layer: LayerPlan) -> str:
    """The time of a layer in its slowest workload, as a ratio to dense: predicted, and in parentheses measured."""
    predicted, measured = slowest_times(layer)
    words = "-" if predicted is None else f"{predicted:.2f}x"
    return words if measured is None else f"{words} ({measured:.2f}x)"


def measured_alone(layers: Sequence[LayerPlan]) -> bool:
    """Whether the time of any of the layers was measured."""
    return any(slowest_times(layer)[1] is not None for layer in layers)


def time_note(layers: Sequence[LayerPlan], device: str) -> str:
    """What `time_words` says of the layers."""
    measured = ", in parentheses measured" if measured_alone(layers) else ""
    return f"over that of the dense layer, in the slowest workload: predicted for {device}{measured}"


def above_one_words(layers: Sequence[LayerPlan]) -> str | None:
    """Why the error of a layer is above one; None if none is."""
    names = [one_line(layer.name) for layer in layers if layer.error > 1]
    if not names:
        return None
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the error of {shown} is above 1: on the inputs of the dense model a layer of zeros would be closer; the"
        " factors were fitted to the inputs of the layer in the compressed model, which differ"
    )


# Losses that deserve a warning: accuracy lost (a fraction), and the factor by which perplexity grew.
LARGE_ACCURACY_DROP, LARGE_PERPLEXITY_RATIO = 0.05, 2.0


def large_loss_words(evaluation: Evaluation, plan: Plan | None = None) -> str | None:
    """What to do about a large loss of quality; None if there is none, or no baseline."""
    before, after = evaluation.baseline, evaluation.compressed
    if before is None or evaluation.higher_is_better is not None:  # what is much of another metric is not known
        return None
    if evaluation.metric == "accuracy":
        large = before - after > LARGE_ACCURACY_DROP
    else:
        large = not after <= LARGE_PERPLEXITY_RATIO * before
    if not large:
        return None
    calibrated = "" if plan is not None and plan.calibration is not None else ", or pass `calibration`"
    return f"this is a large loss: keep more{_or_by_size(plan)}{calibrated}"


def large_holdout_loss_words(plan: Plan) -> str | None:
    """What to do where nothing was measured on data, and the loss is large on the holdout; None if it is not."""
    result = plan.calibration
    if result is None or result.unit != "nats per prediction":
        return None
    if result.holdout_loss <= math.log(LARGE_PERPLEXITY_RATIO):
        return None
    return f"the holdout shows a large loss: keep more{_or_by_size(plan)}"


def _or_by_size(plan: Plan | None) -> str:
    """What else loses less: fewer ranks are fast than small."""
    return "" if plan is None or plan.device is None else ", or ask for its size alone with `prefer='size'`"


def faster_words(compression: Compression) -> str | None:
    """What to ask for where quantized layers made a model slower that nobody asked to be fast; None elsewhere."""
    asked = bool(compression.latency) or compression.plan.device is not None
    slower = any(each.change == "worse" for each in compression.latency_changes)
    if asked or not slower or not compression.plan.quantized:
        return None
    return "layers in few bits save bytes, and are slower here; `prefer='speed'` takes only what is faster"


def uniform_words(compression: Compression) -> str | None:
    """What int8 and int4 of the same model take and lose, and this one, in one line; None where they were not measured.

    Losses are on the data where there are any, else on the holdout of the calibration; without either it is the error.
    """
    losses, found, seen = compression.losses, [], set()
    own = None
    for each in reversed(compression.uniform):  # of each width the best first
        measured = None if each.bits in seen else next(losses.by_measure(each), None)
        seen.add(each.bits)
        if measured is not None:
            own, loss = measured
            lost = _lost_words(loss, on="the data" if loss.on == losses.data else loss.on)
            found.append(f"{each.name} ({each.method}) takes {format_size(each.bytes)} {lost}")
    if not found:
        return None
    ours = [] if own is None else [f"this model takes {format_size(compression.bytes.after)} {_lost_words(own)}"]
    return "; ".join([*reversed(found), *ours])


def _lost_words(loss: Loss, on: str | None = None) -> str:
    """A loss; with what it is measured `on`, in its unit."""
    if loss.unit == "relative error":
        return f"at {loss.value:.3g}" if on is None else f"at a relative error of {loss.value:.3g}"
    words = [f"and {'loses' if loss.value >= 0 else 'gains'} {abs(loss.value):.3g}"]
    if on is not None:
        words += [loss.unit, f"on {on}"]
    return " ".join(filter(None, words))
