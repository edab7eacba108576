"""report.html: one self-contained page for one finished run, or for several side by side.

All its contents come from checked data of the runs, and are escaped. Its policy forbids all connections and all scripts
except the page's own two, which it lists by their hashes.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from suture.reporting.chart import Chart
from suture.reporting.data import COSTS, about_scores, costs, percent, score_text, task_head
from suture.reporting.figures import charts_of
from suture.reporting.rendering import runtime
from suture.reporting.run_folder import FinishedRun, flat, is_reference

Block = Chart | str
_DESTINATIONS = ("output", "overwrite", "reuse", "choices.", "hydra")  # keys that do not affect a run's results
_ABOUT = """Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy. Gap closed: (model − pretrained) /
(experts − pretrained) of the means. Task's name: whether the model must be told which task an input belongs to, or a
router chooses it. Learned: what was learned, and from which inputs; – where only weights were read. Seconds: to merge
and repair. Click a column head to sort."""


def page(run: FinishedRun, *, interactive: bool = True) -> str:
    """The page as HTML; without `interactive` it shows the run's pictures instead of charts."""
    charts: list[Chart] = []
    body = _sections(run, charts if interactive else None)
    scripts = [*([runtime()] if interactive else []), _asset("page.js")]
    title = escape(run.data["title"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<title>{title}</title><style>{_asset("page.css")}</style></head><body>
<header><h1>{title}</h1><button id="theme" type="button">dark or light</button></header>
<main>
{body}
</main>
<script type="application/json" id="charts">{_as_json(charts)}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body></html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that allows only these scripts and loads nothing."""
    hashes = (base64.b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def _as_json(charts: Sequence[Chart]) -> str:
    """The charts as JSON that is safe inside HTML: all ASCII, without a <."""
    data = [
        {
            "spec": chart.on_page(),
            "legend": list(chart.legend.items()),
            "choices": [[choice.name, choice.label, list(choice.options)] for choice in chart.choices],
        }
        for chart in charts
    ]
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sections(run: FinishedRun, charts: list[Chart] | None) -> str:
    """The sections of the page; appends its charts to `charts`, or shows pictures if that is None."""
    data = run.data
    parts = [_best(data), _table(data), _notes(data), _generations(data)]
    if charts is None:
        parts += _pictures(run)
    else:
        parts += [_section(title, panels, charts) for title, panels in _panels(run).items()]
    several = data.get("runs")
    parts += [_differences(several), _each(several)] if several else [_section_of("The run", _details(data))]
    return "\n".join(part for part in parts if part)


def _panels(run: FinishedRun) -> dict[str, dict[str, list[Block]]]:
    """Section → panel → charts; a selector chooses among the panels of a section, one for each model."""
    sections: dict[str, dict[str, list[Block]]] = {}
    for drawn in charts_of(run):
        sections.setdefault(drawn.section, {}).setdefault(drawn.model, []).append(drawn.chart)
    if run.data["repairs"]:
        charts = sections.get("Repair", {})
        facts = {name: _facts(repair) for name, repair in run.data["repairs"].items()}
        sections["Repair"] = {name: [text, *charts.get(name, ())] for name, text in facts.items()}
    return sections


def _section(title: str, panels: Mapping[str, Sequence[Block]], charts: list[Chart]) -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in panels)
    selector = f"<label>of <select class=panels>{options}</select></label>" if len(panels) > 1 else ""
    divisions = []
    for i, blocks in enumerate(panels.values()):
        inside = "".join(block if isinstance(block, str) else _figure(block, charts) for block in blocks)
        divisions.append(f"<div class=panel{' hidden' * (i > 0)}>{inside}</div>")
    return f"<section><h2>{escape(title)} {selector}</h2>{''.join(divisions)}</section>"


def _figure(chart: Chart, charts: list[Chart]) -> str:
    charts.append(chart)
    about = f"<p class=note>{escape(chart.about)}</p>" if chart.about else ""
    caption = escape(chart.title)
    inside = f"<figcaption>{caption}</figcaption><div class=chart></div>{about}"
    return f'<figure data-chart="{len(charts) - 1}">{inside}</figure>'


def _pictures(run: FinishedRun) -> Iterator[str]:
    """The SVG files as images, in which browsers run no scripts and load nothing."""
    for picture in run.pictures:
        encoded = base64.b64encode(picture.read_bytes()).decode()
        title = escape(picture.stem.replace("_", " "))
        image = f'<img alt="{title}" src="data:image/svg+xml;base64,{encoded}">'
        yield f"<figure><figcaption>{title}</figcaption>{image}</figure>"


def _best(data: Mapping[str, Any]) -> str:
    """The first sentence: the best model, its accuracy, and the references."""
    if data.get("metrics"):
        return _best_by_gap(data)
    scored = [row for row in data["rows"] if not is_reference(row) and row["mean"] is not None]
    if not scored:
        return ""
    best = max(scored, key=lambda row: row["mean"])
    closed = f", which closes {_percents(best['gap_closed'])} of the gap" if best["gap_closed"] is not None else ""
    references = (f"{row['name']} {_percents(row['mean'])}" for row in data["rows"] if is_reference(row))
    compared = escape("; ".join(references))
    sentence = f"Best: <strong>{escape(best['name'])}</strong> with {_percents(best['mean'])}{closed}."
    return f"<p class=lead>{sentence}{f' <span class=note>({compared})</span>' if compared else ''}</p>"


def _best_by_gap(data: Mapping[str, Any]) -> str:
    """The same for language models, whose scores may be in several units: the model that closes most of the gap."""
    scored = [row for row in data["rows"] if not is_reference(row) and row.get("gap_closed") is not None]
    if not scored:
        return ""
    best = max(scored, key=lambda row: row["gap_closed"])
    closed = _percents(best["gap_closed"])
    return f"<p class=lead>Best: <strong>{escape(best['name'])}</strong>, which closes {closed} of the gap.</p>"


def _name_of(data: Mapping[str, Any], task: str) -> str | None:
    """The name of a task's metric; None for accuracy."""
    return data.get("metrics", {}).get(task, {}).get("name")


def _percents(value: float | None) -> str:
    return f"{percent(value)}\N{NO-BREAK SPACE}%"


def _table(data: Mapping[str, Any]) -> str:
    if not data["rows"]:
        return ""
    metrics = {task: each["name"] for task, each in data.get("metrics", {}).items()}
    title, about = ("Scores", about_scores(metrics)) if metrics else ("Accuracy", _ABOUT)
    tasks = [task_head(task, metrics.get(task)) for task in data["tasks"]]
    heads = ["model", *tasks, "mean", "norm.", "gap closed", *COSTS]
    head = "".join(f"<th scope=col><button type=button>{escape(name)}</button></th>" for name in heads)
    body = "".join(_table_row(data, row) for row in data["rows"])
    counts = "".join(f"<td>{data['samples'].get(task, '')}</td>" for task in data["tasks"])
    foot = f"<tfoot><tr><th scope=row>samples</th>{counts}{'<td></td>' * (3 + len(COSTS))}</tr></tfoot>"
    return f"""<section><h2>{title}</h2><div class=wide><table id=accuracy class=sortable>
<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div><p class=note>{about}</p></section>"""


def _table_row(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    relative = _cell(row["normalised_mean"])
    errors, names = row.get("errors", {}), {task: _name_of(data, task) for task in data["tasks"]}
    scores = [_score(row["accuracies"].get(task), name, errors.get(task)) for task, name in names.items()]
    scores.append(_score(row["mean"], next((name for name in names.values() if name), None), None))
    share = min(1.0, max(0.0, row["gap_closed"] or 0.0))
    kind = " class=reference" if is_reference(row) else ""
    closed = _cell(row["gap_closed"], f' class=bar style="--share: {100 * share:.1f}%"')
    name = escape(row["name"]).replace("_", "_<wbr>")
    taken = data["seconds"].get(row["name"])
    named, learned, seconds = map(escape, costs(row, taken))
    value = "" if taken is None else float(taken)
    cost = f'<td class=text>{named}</td><td class=text>{learned}</td><td data-value="{value}">{seconds}</td>'
    return f"<tr{kind}><th scope=row>{name}</th>{''.join(scores)}{relative}{closed}{cost}</tr>"


def _score(value: float | None, name: str | None, error: float | None) -> str:
    text = score_text(value, name, error)
    return f'<td data-value="{"" if value is None else float(value)}">{text}</td>'


def _cell(value: float | None, attributes: str = "") -> str:
    return f'<td data-value="{"" if value is None else float(value)}"{attributes}>{percent(value)}</td>'


def _notes(data: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.get("notes", ()))
    return f"<ul class=notes>{notes}</ul>" if notes else ""


def _generations(data: Mapping[str, Any]) -> str:
    """The prompts, each with its continuation by every model."""
    tables = []
    for each in data.get("generations", ()):
        lines = "".join(
            f"<tr><th scope=row>{escape(str(name))}</th><td class=text>{escape(str(text))}</td></tr>"
            for name, text in each.get("continuations", {}).items()
        )
        prompt = escape(str(each.get("prompt", "")))
        tables.append(f"<h3>{prompt}</h3><div class=wide><table><tbody>{lines}</tbody></table></div>")
    return _section_of("Continuations", "".join(tables))


def _facts(repair: Mapping[str, Any]) -> str:
    """A repair's cost, and each task's loss at its first and last step."""
    encoded, encoders = repair["inputs_encoded"], repair["encoders_at_inference"]
    cost = (
        f"{repair['kind']}: {repair['added_parameters']:,} numbers added, {repair['steps']:,} steps, "
        f"{encoded.get('merged', 0):,} inputs through the merged model, {encoded.get('experts', 0):,} through experts, "
        f"{encoders} encoder{'s' * (encoders > 1)} at inference."
    )
    lines = "".join(
        f"<tr><th scope=row>{escape(task)}</th><td>{first:.4g}</td><td>{repair['last_loss'][task]:.4g}</td></tr>"
        for task, first in repair["first_loss"].items()
        if task in repair["last_loss"]
    )
    heads = "<thead><tr><th scope=col>task</th><th scope=col>first loss</th><th scope=col>last loss</th></tr></thead>"
    table = f"<details><summary>Losses</summary><table>{heads}<tbody>{lines}</tbody></table></details>" if lines else ""
    warnings = "".join(f"<li>{escape(line)}</li>" for line in repair["warnings"])
    return f"<p>{escape(cost)}</p>{f'<ul class=notes>{warnings}</ul>' if warnings else ''}{table}"


def _differences(runs: Sequence[Mapping[str, Any]]) -> str:
    """The keys in which the configurations of several runs differ."""
    configs = [dict(flat(run["config"])) for run in runs]
    keys = [key for config in configs for key in config if not key.startswith(_DESTINATIONS)]
    differing = [key for key in dict.fromkeys(keys) if len({str(config.get(key)) for config in configs}) > 1]
    if not differing:
        return ""
    head = "".join(f"<th scope=col>{escape(run['label'])}</th>" for run in runs)
    values = {key: [escape(str(config.get(key, "–"))) for config in configs] for key in differing}
    body = "".join(
        f"<tr><th scope=row>{escape(key)}</th>{''.join(f'<td>{value}</td>' for value in line)}</tr>"
        for key, line in values.items()
    )
    table = f"<table><thead><tr><th scope=col>key</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _section_of("What differs", f'<div class="wide keys">{table}</div>')


def _each(runs: Sequence[Mapping[str, Any]]) -> str:
    details = (f"<details class=run><summary>{escape(r['label'])}</summary>{_details(r)}</details>" for r in runs)
    return _section_of("The runs", "".join(details))


def _section_of(title: str, inside: str) -> str:
    return f"<section><h2>{title}</h2>{inside}</section>" if inside else ""


def _details(run: Mapping[str, Any]) -> str:
    """The profile, the command, the configuration and the provenance of one run."""
    command = run.get("command", "")
    repeat = f"<h3>To repeat it</h3><pre class=command>{escape(command)}</pre>" if command else ""
    names = {"config": "Configuration", "provenance": "Provenance: versions and the sha256 of every input"}
    texts = [(name, json.dumps(run[key], indent=2, ensure_ascii=False)) for key, name in names.items() if run.get(key)]
    data = [f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in texts]
    return _profile(run.get("profile_seconds", {})) + repeat + "".join(data)


def _profile(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    longest = max(seconds.values()) or 1.0
    lines = "".join(
        f"<tr><th scope=row>{escape(activity)}</th>"
        f'<td class=bar style="--share: {100 * value / longest:.1f}%">{value:.2f} s</td></tr>'
        for activity, value in seconds.items()
    )
    return f"<h3>Where the time went</h3><table class=profile><tbody>{lines}</tbody></table>"


def _asset(name: str) -> str:
    return (files("suture.reporting") / "assets" / name).read_text("utf-8")
