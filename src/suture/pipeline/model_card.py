"""The model card of a finished run: README.md of the merged model, on disk and on a hub."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.pipeline.card_parts import command_line, front_matter, inputs_table
from suture.pipeline.methods import find_method
from suture.reporting.data import about_scores, percent, score_text, task_heads
from suture.reporting.run_folder import FinishedRun, flat, read
from suture.storage.hub import is_hub_id
from suture.tasks import known

CARD = "README.md"
_OMITTED = {
    "name",
    "cache_dir",
    "save_merging_weights",
}  # in the title, or without effect on the result


def write_card(run: Path) -> None:
    """Write the card next to the merged weights of a run, unless there is one."""
    path = run / "model" / CARD
    if not path.exists():
        path.write_text(card(read(run)), "utf-8")


def card(run: FinishedRun) -> str:
    """The card: method, knobs, coefficients, accuracies, merged files, and the command."""
    data, config = run.data, run.data["config"]
    method, sources = find_method(config["method"]["name"]), config["modelpool"]["models"]
    tags, family = [method.name], config["modelpool"].get("family", "clip")
    library = "open_clip" if family == "open_clip" else "transformers"
    parts = [
        front_matter(list(sources.values()), tags, library, _datasets(config.get("taskpool") or {})),
        [f"# {data['title']}"],
        [f"Merged by [{method.name}]({method.paper}) with suture {data['provenance']['versions']['suture']}."],
        _table(["setting", "value"], _settings(config)),
        *(_coefficients(learned) for learned in data.get("learning", {}).values()),
        *_accuracies(data),
        *_tokens(config),
        *_generations(data),
        ["## Merged from"],
        inputs_table(sources, data["provenance"]["inputs"]),
        ["## To repeat it"],
        [command_line(data["command"])],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _datasets(pool: Mapping[str, Any]) -> list[str]:
    """The tasks' data sets on the hub."""
    sources = [
        (task or {}).get("source") or known(name).get("source") for name, task in (pool.get("tasks") or {}).items()
    ]
    return [source.partition("@")[0] for source in sources if source and is_hub_id(source)]


def _settings(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """Every knob of the method, and of the repair if there is one."""
    repaired = (config.get("repair") or {}).get("kind", "none") != "none"
    for group in ("method", "repair") if repaired else ("method",):
        for key, value in flat(config[group], f"{group}."):
            if key.rpartition(".")[2] not in _OMITTED and not _is_path(value):
                yield [key, f"`{value}`"]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~"))


def _coefficients(learned: Mapping[str, Any]) -> list[str]:
    """Mean and range of the learned coefficients, by task."""
    rows = []
    for task, row in zip(learned["tasks"], learned["coefficients"], strict=True):
        values = row if isinstance(row, list) else [row]
        rows.append([task, *(f"{value:.3f}" for value in (math.fsum(values) / len(values), min(values), max(values)))])
    layers = len(learned["layers"] or ())
    per = f"one for each of {layers} tensors" if layers else "one for each model"
    steps = f"{learned['steps']} step{'s' * (learned['steps'] != 1)}"
    return [f"## Coefficients after {steps}, {per}", "", *_table(["", "mean", "least", "most"], rows)]


def _accuracies(data: Mapping[str, Any]) -> list[list[str]]:
    if not data["rows"]:
        return []
    metrics = {task: each["name"] for task, each in data.get("metrics", {}).items()}
    heads = ["", *task_heads(data["tasks"], metrics), "mean", "norm.", "gap closed"]
    rows = []
    for row in data["rows"]:
        errors = row.get("errors", {})
        scores = [score_text(row["accuracies"].get(t), metrics.get(t), errors.get(t)) for t in data["tasks"]]
        scores.append(score_text(row["mean"], next(iter(metrics.values()), None)))
        rows.append([row["name"], *scores, percent(row["normalised_mean"]), percent(row["gap_closed"])])
    if metrics:
        return [["## Scores"], _table(heads, rows), [about_scores(data["tasks"], metrics)]]
    legend = ["Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy. Gap closed: how far from the"]
    return [["## Accuracy"], _table(heads, rows), [*legend, "pretrained model's mean to that of the experts."]]


def _tokens(config: Mapping[str, Any]) -> list[list[str]]:
    """The way from texts to tokens, for language models: the context, templates, and whose files these are."""
    pool, tasks = config["modelpool"], (config.get("taskpool") or {}).get("tasks") or {}
    if pool.get("family") != "causal_lm":
        return []
    whose = "`companions`" if pool.get("companions") else "the pretrained model"
    lines = [f"Tokenizer, chat template and generation settings are those of {whose}."]
    rows = [[name, f"`{_one_line(task.get('score'))}`", _templates(task)] for name, task in tasks.items()]
    return [["## Tokens and templates"], lines, _table(["task", "score", "template"], rows) if rows else []]


def _templates(task: Mapping[str, Any]) -> str:
    templates = task.get("templates") or []
    return f"`{_one_line(templates[0])}`" if templates else "–"


def _generations(data: Mapping[str, Any]) -> list[list[str]]:
    """Prompts and their continuations, which are quoted so that nothing in them is markup."""
    parts = [["## Continuations"]] if data.get("generations") else []
    for each in data.get("generations", ()):
        rows = [[name, f"`{_one_line(text)}`"] for name, text in each["continuations"].items()]
        parts += [[f"Prompt: `{_one_line(each['prompt'])}`"], _table(["model", "continuation"], rows)]
    return parts


def _one_line(text: Any) -> str:
    """A text inside a cell and between backticks."""
    return " ".join(str(text).replace("`", "'").replace("|", "¦").split()) or " "


def _table(heads: Sequence[str], rows: Any) -> list[str]:
    return [_line(heads), _line(["---"] * len(heads)), *map(_line, rows)]


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"
