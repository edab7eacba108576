"""The public function behind each verb, under the name and with the result that it has from now on."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from suture.pipeline.preflight import Preflight
    from suture.reporting import Report


@dataclass
class RunResult:
    folder: Path
    report: Any
    unchanged: bool


@contextlib.contextmanager
def _silently(reports: list[Any], *modules: str) -> Iterator[io.StringIO]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"{module}.print_report", reports.append))
        stack.enter_context(mock.patch("suture.cli.tables.print_preflight"))
        yield stack.enter_context(contextlib.redirect_stdout(io.StringIO()))


def run(config: Mapping[str, Any]) -> "RunResult | Preflight":
    from suture.pipeline.pipeline import run_configured

    reports: list[Any] = []
    with _silently(reports, "suture.cli.tables"):
        result = run_configured(config)
    return RunResult(result, reports[0] if reports else None, not reports) if isinstance(result, Path) else result


def check(config: Mapping[str, Any]) -> "Preflight":
    from suture.pipeline.pipeline import check_configured

    return check_configured(config)


def evaluate_pool(config: Mapping[str, Any], model: str | None = None, matrix: bool = False) -> "Report":
    from suture.pipeline.pipeline import evaluate_configured

    with _silently([], "suture.cli.tables"):
        return evaluate_configured(config, model, matrix)


def demo(output: Path | None = None) -> RunResult:
    from suture.pipeline.pipeline import demo as demo_folder

    reports: list[Any] = []
    with _silently(reports, "suture.cli.tables"):
        return RunResult(demo_folder(output), reports[0], False)


def analyse(name: str, config: Mapping[str, Any], **options: Any) -> tuple[Any, Path]:
    from suture.pipeline.analyse import analyse_configured

    return analyse_configured(name, config, options)


def merge_configured(config: Mapping[str, Any]) -> Any:
    from suture.file_merge import merge_configured as merge

    with _silently([]) as printed:
        result = merge(config)
    for line in printed.getvalue().splitlines():
        if line.startswith("note:"):
            print(line)
    return result


def summarise(folders: Sequence[Path]) -> "tuple[Report, Path] | None":
    from suture.reporting.sweep import summarise as write_summary

    reports: list[Any] = []
    with _silently(reports, "suture.reporting.sweep"):
        shared = write_summary(folders)
    return (reports[0], shared) if shared else None
