"""The files of a finding: the table as JSON and CSV, the figure as PNG and SVG."""

import csv
import json
from pathlib import Path

from suture.analysis.finding import Finding
from suture.storage.atomic import disk_errors


def save(finding: Finding, folder: str | Path) -> Path:
    """Write NAME.json, NAME.csv, NAME.png and NAME.svg into a folder, created if needed; returns the folder.

    Raises `OutputError` if they cannot be written.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{finding.name}.json").write_text(json.dumps(finding.as_data(), indent=2) + "\n", "utf-8")
        with (folder / f"{finding.name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([finding.heads, *finding.rows])
        finding.plot().save(folder / finding.name)
    return folder
