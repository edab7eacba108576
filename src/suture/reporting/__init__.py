"""The report of a run: report.json, report.md, report.html and the figures."""

from suture.reporting.data import Report
from suture.reporting.entry import report
from suture.reporting.files import write

__all__ = ["Report", "report", "write"]
