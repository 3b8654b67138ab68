"""Stage 4: a budget becomes a rank for every layer, and why."""

from compressor.planning.budget import SAFE_TOLERANCE, Budget, requested_budget
from compressor.planning.choice import choose_ranks, default_budget, window_rule_advice
from compressor.planning.form import pair_forms
from compressor.planning.plan import (
    CalibrationResult,
    FormRequest,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    predicted_loss,
    read_plan,
)

__all__ = [
    "SAFE_TOLERANCE",
    "Budget",
    "CalibrationResult",
    "FormRequest",
    "LayerPlan",
    "MeasuredLayer",
    "Plan",
    "apply_edits",
    "choose_ranks",
    "default_budget",
    "pair_forms",
    "predicted_loss",
    "read_plan",
    "requested_budget",
    "window_rule_advice",
]
