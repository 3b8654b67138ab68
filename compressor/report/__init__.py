"""What people look at: tables for a terminal, and a report in one HTML file."""

from compressor.report.diagnosis_page import diagnosis_page
from compressor.report.html import check_report_path, write_report
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
from compressor.report.rank_figure import check_figure_path, write_rank_figure

__all__ = [
    "archive_page",
    "check_figure_path",
    "check_report_path",
    "compression_page",
    "diagnosis_page",
    "evaluation_page",
    "export_page",
    "inspection_page",
    "merging_page",
    "plan_page",
    "restoration_page",
    "write_rank_figure",
    "write_report",
]
