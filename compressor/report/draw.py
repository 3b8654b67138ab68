"""Every result as the page that its command prints."""

from __future__ import annotations

from compressor.evaluation import Evaluation
from compressor.planning import Plan
from compressor.report.blocks import Page
from compressor.report.diagnosis_page import diagnosis_page
from compressor.report.pages import (
    archive_page,
    compression_page,
    evaluation_page,
    export_page,
    inspection_page,
    merging_page,
    plan_page,
    restoration_page,
)
from compressor.results import Archiving, Compression, Diagnosis, Export, Inspection, Merging, Restoration


def draw(result: object) -> Page:
    """The page of a result."""
    match result:
        case Archiving():
            return archive_page(result)
        case Compression():
            return compression_page(result)
        case Diagnosis():
            return diagnosis_page(result)
        case Evaluation():
            return evaluation_page(result)
        case Export():
            return export_page(result)
        case Inspection():
            return inspection_page(result)
        case Merging():
            return merging_page(result)
        case Plan():
            return plan_page(result)
        case Restoration():
            return restoration_page(result)
    raise TypeError(f"nothing draws a {type(result).__name__}")
