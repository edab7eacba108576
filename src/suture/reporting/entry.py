"""The entry point to reports: `report(results, …)`, or `report(folders)` for finished runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from suture.checkpoints import Source
from suture.core.extras import check_installed
from suture.errors import ConfigError
from suture.evaluation import TaskInputs
from suture.reporting.comparison import compare
from suture.reporting.files import write
from suture.reporting.results import Result, Scoring
from suture.storage.atomic import new_directory, new_folder


def report(
    results: Mapping[str, Result] | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    tasks: Mapping[str, TaskInputs] | None = None,
    module: nn.Module | None = None,
    pretrained: Source | None = None,
    experts: Mapping[str, Source] | None = None,
    title: str = "",
    overwrite: bool = False,
    interactive: bool = True,
) -> Path:
    """Report on results, or write the page of finished runs; returns the page's path.

    `results`: name → a result of `merge`, `adapt`, `repair` or `evaluate_row`, or any checkpoint or model. Each is
    scored on `tasks`, and compared with `pretrained` and the `experts` (task → model), if given; weights are loaded
    into copies of `module`. The folder `output` (by default a new one below `outputs/report`) gets `report.html`,
    `report.md`, `report.json` and the figures, as a run's folder does. None of the arguments is changed.

    A list is one of folders of finished runs. The page of a single run is written again; several are compared on one
    page, at `output`, by default `comparison.html`. `interactive=False` shows still pictures.

    Raises `ConfigError` for a folder without a finished run, for runs that were scored on different tasks, for weights
    without a `module`, and for a task without an expert; and `OutputError` for a folder in use, unless `overwrite`.

    >>> import tempfile, torch
    >>> from suture.evaluation import TaskInputs
    >>> data, weights = TaskInputs("parity", torch.eye(2), torch.tensor([0, 1])), {"weight": torch.eye(2)}
    >>> module = nn.Linear(2, 2, bias=False)
    >>> folder = Path(tempfile.mkdtemp()) / "report"
    >>> report({"identity": weights}, folder, tasks={"parity": data}, module=module).name
    'report.html'
    """
    check_installed("suture report", modules=["vl_convert"])
    if not isinstance(results, Mapping):
        return compare([Path(run) for run in results], output, interactive=interactive)
    if not results:
        raise ConfigError("There is nothing to report on. Wanted: results={name: what merge, adapt or repair gave}.")
    scored = Scoring(tasks or {}, module, pretrained, experts).report(results, title)
    folder = Path(output) if output else new_folder("report")
    with new_directory(folder, overwrite=overwrite) as partial:
        write(scored, partial, interactive=interactive)
    return folder / "report.html"
