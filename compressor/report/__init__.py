"""What people look at: tables for a terminal, and a report in one HTML file."""

from compressor.report.diagnosis import diagnosis_text
from compressor.report.html import check_report_path, write_report
from compressor.report.rank_figure import check_figure_path, write_rank_figure
from compressor.report.text import (
    compression_text,
    evaluation_text,
    export_text,
    inspection_text,
    merging_text,
    plan_text,
    restoration_text,
)

__all__ = [
    "check_figure_path",
    "check_report_path",
    "compression_text",
    "diagnosis_text",
    "evaluation_text",
    "export_text",
    "inspection_text",
    "merging_text",
    "plan_text",
    "restoration_text",
    "write_rank_figure",
    "write_report",
]
