"""What a run shows: the table in the terminal, report.json, report.md, report.html and the figures."""

from suture.report.contents import Report
from suture.report.files import write

__all__ = ["Report", "write"]
