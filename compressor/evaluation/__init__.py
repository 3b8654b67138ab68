"""Quality, cost and latency of models: one alone, or a compressed one beside its baseline."""

from __future__ import annotations

from compressor.evaluation.cost import (
    TIMING,
    Cost,
    Latency,
    TimedWorkload,
    TimingSettings,
    count_bytes,
    count_macs,
    count_parameters,
    measure_cost,
    measure_latency,
    measure_peak_memory,
    process_memory,
    resident_memory,
)
from compressor.evaluation.custom_metric import PARTS
from compressor.evaluation.evaluate import Evaluation, compare, device_words, latency_changes
from compressor.evaluation.layer_latency import PairTimer, unfilled_module
from compressor.evaluation.metrics import Quality, drop_error, measure_quality, quality_drop, require_accepted
from compressor.evaluation.uniform import BetterUniform, Losses, UniformQuantization, better_uniform
from compressor.evaluation.verdict import Change, LatencyChange, QualityChange, Remark, SizeChange, Verdict, judged

__all__ = [
    "PARTS",
    "TIMING",
    "BetterUniform",
    "Change",
    "Cost",
    "Evaluation",
    "Latency",
    "LatencyChange",
    "Losses",
    "PairTimer",
    "Quality",
    "QualityChange",
    "Remark",
    "SizeChange",
    "TimedWorkload",
    "TimingSettings",
    "UniformQuantization",
    "Verdict",
    "better_uniform",
    "compare",
    "count_bytes",
    "count_macs",
    "count_parameters",
    "device_words",
    "drop_error",
    "judged",
    "latency_changes",
    "measure_cost",
    "measure_latency",
    "measure_peak_memory",
    "measure_quality",
    "process_memory",
    "quality_drop",
    "require_accepted",
    "resident_memory",
    "unfilled_module",
]
