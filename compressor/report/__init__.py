"""What people look at: tables for a terminal, and a report in one HTML file."""

from compressor.report.html import check_report_path, write_report
from compressor.report.text import (
    compression_text,
    evaluation_text,
    inspection_text,
    merging_text,
    plan_text,
    restoration_text,
)

__all__ = [
    "check_report_path",
    "compression_text",
    "evaluation_text",
    "inspection_text",
    "merging_text",
    "plan_text",
    "restoration_text",
    "write_report",
]
