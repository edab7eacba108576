"""What a run shows: the table in the terminal, report.json, report.md, report.html and the figures."""

from suture.report.contents import Learning, Report
from suture.report.files import write
from suture.report.terminal import print_report

__all__ = ["Learning", "Report", "print_report", "write"]
