"""What a run shows: the table in the terminal, report.json, report.md, report.html and the figures."""

from suture.cli.tables import print_report
from suture.reporting.data import Learning, RepairReport, Report
from suture.reporting.report import report
from suture.reporting.write import write

__all__ = ["Learning", "RepairReport", "Report", "print_report", "report", "write"]
