"""From a budget and measurements to a plan: a rank for every layer, and why."""

from __future__ import annotations

from compressor.planning.budget import Budget, checked_budget
from compressor.planning.choice import (
    choose_ranks,
    default_budget,
    is_worthwhile,
    rank_caps,
    window_rule_advice,
    worthwhile_size,
)
from compressor.planning.drop_search import DropSearch, Sizes, Trial, search_by_drop, smallest_found, within_limit
from compressor.planning.edits import apply_edits, given_plan, read_plan
from compressor.planning.latency import LayerLatency, TimeLimit, Times, WorkloadLatency
from compressor.planning.layer_choices import has_pairs, least_seconds, smallest_size
from compressor.planning.measured import MeasuredLayer, dense_seconds, predicted_loss, with_latency
from compressor.planning.plan import CalibrationResult, LayerPlan, LossUnit, Plan, dense_plan
from compressor.planning.settings import PLANNING, PlanningSettings
from compressor.planning.size import plan_by_size
from compressor.planning.size_curve import SizeCurve, StoredForm, plan_loss, size_curve
from compressor.planning.widths import quantized_forms

__all__ = [
    "PLANNING",
    "Budget",
    "CalibrationResult",
    "DropSearch",
    "LayerLatency",
    "LayerPlan",
    "LossUnit",
    "MeasuredLayer",
    "Plan",
    "PlanningSettings",
    "SizeCurve",
    "Sizes",
    "StoredForm",
    "TimeLimit",
    "Times",
    "Trial",
    "WorkloadLatency",
    "apply_edits",
    "checked_budget",
    "choose_ranks",
    "default_budget",
    "dense_plan",
    "dense_seconds",
    "given_plan",
    "has_pairs",
    "is_worthwhile",
    "least_seconds",
    "plan_by_size",
    "plan_loss",
    "predicted_loss",
    "quantized_forms",
    "rank_caps",
    "read_plan",
    "search_by_drop",
    "size_curve",
    "smallest_found",
    "smallest_size",
    "window_rule_advice",
    "with_latency",
    "within_limit",
    "worthwhile_size",
]
