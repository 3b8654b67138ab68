"""LoRA adapters as they are found: read in their dialects, resized, merged, and written in any of them."""

from compressor.adapters.applied import AppliedAdapter, applied_adapter
from compressor.adapters.budget import adapter_ranks, needs_spectra
from compressor.adapters.dialects import DIALECTS, is_adapter, read_adapter
from compressor.adapters.inspection import AdapterInspection, InspectedModule, inspected_adapter
from compressor.adapters.merge import merged_adapter
from compressor.adapters.module import Adapter, AdapterModule, is_magnitude
from compressor.adapters.names import ModuleName
from compressor.adapters.plan import ModulePlan, adapter_plan, planned_ranks
from compressor.adapters.resize import (
    ModuleChange,
    ModuleSpectrum,
    adapter_spectra,
    module_change,
    relative_error,
    resized_artifact,
    written_as,
)

__all__ = [
    "DIALECTS",
    "Adapter",
    "AdapterInspection",
    "AdapterModule",
    "AppliedAdapter",
    "InspectedModule",
    "ModuleChange",
    "ModuleName",
    "ModulePlan",
    "ModuleSpectrum",
    "adapter_plan",
    "adapter_ranks",
    "adapter_spectra",
    "applied_adapter",
    "inspected_adapter",
    "is_adapter",
    "is_magnitude",
    "merged_adapter",
    "module_change",
    "needs_spectra",
    "planned_ranks",
    "read_adapter",
    "relative_error",
    "resized_artifact",
    "written_as",
]
