"""The report of a run: report.json, report.md, report.html and the figures."""

from suture.reporting.data import Report
from suture.reporting.report import report
from suture.reporting.write import write

__all__ = ["Report", "report", "write"]
