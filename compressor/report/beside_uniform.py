"""This model beside int8 and int4 of the same one, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.formatting import format_size
from compressor.report.wording import loss_name, quality_words

if TYPE_CHECKING:
    from compressor.evaluation import UniformQuantization
    from compressor.results import Compression


@dataclass(frozen=True)
class _Column:
    """What is compared: of this model, and of a uniform quantization; None where it was not measured."""

    header: str
    own: str
    of: Callable[[UniformQuantization], str | None]


def uniform_table(compression: Compression) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None:
    """Headers and rows; None where no uniform quantization was measured."""
    if not compression.uniform:
        return None
    columns = list(_columns(compression))
    rows = (
        (f"{each.name} of all layers, {each.method}", *(column.of(each) or "-" for column in columns))
        for each in compression.uniform
    )
    headers = ("", *(column.header for column in columns))
    return headers, (("this model", *(column.own for column in columns)), *rows)


def _columns(compression: Compression) -> Iterator[_Column]:
    losses, evaluation = compression.losses, compression.evaluation
    yield _Column("weight files", format_size(compression.bytes.after), lambda each: format_size(each.bytes))
    if losses.error is not None:
        yield _Column(loss_name("relative error"), f"{losses.error:.3g}", lambda each: _short(each.error))
    if losses.on_holdout is not None:
        header = f"{loss_name(losses.unit)}, on the holdout"
        yield _Column(header, f"{losses.on_holdout:.3g}", lambda each: _short(each.holdout_loss))
    if losses.on_data is not None and (dense := losses.dense_loss) is not None:
        header = f"{loss_name('nats per prediction')}, on {losses.data}"
        yield _Column(
            header, f"{losses.on_data:.3g}", lambda each: None if each.loss is None else _short(each.loss - dense)
        )
    if evaluation is not None:
        metric, higher = evaluation.metric, evaluation.higher_is_better
        yield _Column(
            f"{metric}, on {evaluation.data}",
            quality_words(metric, evaluation.compressed, higher),
            lambda each: None if each.value is None else quality_words(metric, each.value, higher),
        )


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
