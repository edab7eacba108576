"""What a run shows: the table in the terminal, report.json, report.md, report.html and the figures."""

from suture.report.contents import Learning, RepairReport, Report
from suture.report.files import write
from suture.report.reporting import report
from suture.report.terminal import print_report

__all__ = ["Learning", "RepairReport", "Report", "print_report", "report", "write"]
