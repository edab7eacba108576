"""report.html: one self-contained page for one finished run, or for several side by side.

All its contents come from checked data of the runs, and are escaped. Its policy forbids all connections and all scripts
except the page's own two, which it lists by their hashes.
"""

import base64
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from suture.core.names import in_bytes
from suture.reporting.chart import Chart, task_colours
from suture.reporting.data import COSTS, about_scores, costs, percent, score_text, task_heads
from suture.reporting.figures import charts_of
from suture.reporting.glossary import explained, explained_name, list_of
from suture.reporting.harms import harms
from suture.reporting.headline import headline
from suture.reporting.paths import without_machine
from suture.reporting.rendering import runtime
from suture.reporting.run_folder import FinishedRun, flat, is_reference
from suture.reporting.scores import interval, top_names
from suture.reporting.seeds import seeds_table
from suture.reporting.tables import HEADS, tables

Block = Chart | str
_DESTINATIONS = ("output", "overwrite", "reuse", "choices.", "hydra")  # keys that do not affect a run's results
_ABOUT = """Accuracy in %. Bold: not told apart from the best merge or repair of the column, because the 95% intervals
(Wilson) overlap. Rows are in the order of the run, not of merit; click a column head to sort."""
_BOLD_OF_SCORES = """Bold: not told apart from the best merge or repair of the column, because the 95% intervals
(1.96 standard errors on either side) overlap."""
_KINDS = {"mean": "mean", "learned from": "text", "task's name": "text", "learned": "text"}  # column → its class
_PEAKS = {"process": "Peak memory of the process", "accelerator": "Peak memory of the accelerator"}


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
<script type="application/json" id="data">{_as_json(charts, tables(run.data))}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body></html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy that allows only these scripts and loads nothing."""
    hashes = (base64.b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def _as_json(charts: Sequence[Chart], texts: Mapping[str, str]) -> str:
    """The charts, and the texts to copy, as JSON that is safe inside HTML: all ASCII, without a <."""
    drawn = [
        {
            "spec": chart.on_page(),
            "legend": [[name, colour, chart.dashes.get(name, "")] for name, colour in chart.legend.items()],
            "choices": [[choice.name, choice.label, list(choice.options)] for choice in chart.choices],
        }
        for chart in charts
    ]
    data = {"charts": drawn, "texts": texts}
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sections(run: FinishedRun, charts: list[Chart] | None) -> str:
    """The sections of the page; appends its charts to `charts`, or shows pictures if that is None."""
    data = run.data
    parts = [headline(data), _table(data), _notes(data), seeds_table(data), _generations(data)]
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
    least = f' style="min-width:{chart.least}px"' if chart.least else ""
    inside = f"<figcaption>{caption}</figcaption><div class=wide><div class=chart{least}></div></div>{about}"
    return f'<figure data-chart="{len(charts) - 1}">{inside}</figure>'


def _pictures(run: FinishedRun) -> Iterator[str]:
    """The SVG files as images, in which browsers run no scripts and load nothing."""
    for picture in run.pictures:
        encoded = base64.b64encode(picture.read_bytes()).decode()
        title = escape(picture.stem.replace("_", " "))
        image = f'<img alt="{title}" src="data:image/svg+xml;base64,{encoded}">'
        yield f"<figure><figcaption>{title}</figcaption>{image}</figure>"


def _name_of(data: Mapping[str, Any], task: str) -> str | None:
    """The name of a task's metric; None for accuracy."""
    return data.get("metrics", {}).get(task, {}).get("name")


def _table(data: Mapping[str, Any]) -> str:
    if not data["rows"]:
        return ""
    palette, top = task_colours(data["tasks"]), top_names(data)
    metrics = {task: each["name"] for task, each in data.get("metrics", {}).items()}
    title, about = (
        ("Scores", f"{about_scores(data['tasks'], metrics)} {_BOLD_OF_SCORES}") if metrics else ("Accuracy", _ABOUT)
    )
    chips = [
        f'<i class=chip style="--colour:{palette[task]}"></i>{escape(head).replace("_", "_<wbr>")}'
        for task, head in zip(data["tasks"], task_heads(data["tasks"], metrics), strict=True)
    ]
    mean, *rest = [(_KINDS.get(name, ""), explained(name)) for name in HEADS]
    head = _heads([("", "model"), mean, *(("", chip) for chip in chips), *rest])
    body = "".join(_table_row(data, row, top) for row in data["rows"])
    counts = "".join(f"<td>{_count(data['samples'].get(task))}</td>" for task in data["tasks"])
    empty = "".join("<td></td>" for _ in rest)
    foot = f"<tfoot><tr><th scope=row>test inputs</th><td class=mean></td>{counts}{empty}</tr></tfoot>"
    names = (part for row in data["rows"] for part in re.split(r" \+ |, ", row["name"]))
    words = list_of(dict.fromkeys((*HEADS, *COSTS, *names)))
    pinned = " pinned" * any(row["mean"] is not None for row in data["rows"])
    return f"""<section><h2>{title}</h2>{_table_controls(data)}
<div class=wide><table id=accuracy class="sortable{pinned}">
<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div><p class=note>{about}</p>
{_costs_table(data)}{words}</section>"""


def _heads(heads: Iterable[tuple[str, str]]) -> str:
    """Column heads that sort, from pairs of a class and what is inside."""
    return "".join(f'<th scope=col class="{kind}"><button type=button>{inside}</button></th>' for kind, inside in heads)


def _costs_table(data: Mapping[str, Any]) -> str:
    """The costs of every merge and repair, as far as anything is known of them."""
    rows = [row for row in data["rows"] if not is_reference(row)]
    known = [name for i, name in enumerate(COSTS) if any(costs(data, row)[i] != "–" for row in rows)]
    if not known:
        return ""
    head = _heads([("", "model"), *((_KINDS.get(name, ""), explained(name)) for name in known)])
    body = "".join(_costs_row(data, row, known) for row in rows)
    table = f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h3>What each model takes</h3><div class=wide>{table}</div>"


def _costs_row(data: Mapping[str, Any], row: Mapping[str, Any], known: Collection[str]) -> str:
    numbers = {
        "added": row["added_parameters"],
        **{key: data[key].get(row["name"], "") for key in ("seconds", "memory")},
    }
    kinds = {"task's name": "text", "learned": "text long"}
    cells = {
        name: f'<td data-value="{numbers[name]}">{escape(text)}</td>'
        if name in numbers
        else f'<td class="{kinds[name]}">{escape(text)}</td>'
        for name, text in zip(COSTS, costs(data, row), strict=True)
    }
    return f"<tr><th scope=row>{explained_name(row['name'])}</th>{''.join(cells[name] for name in known)}</tr>"


def _table_controls(data: Mapping[str, Any]) -> str:
    """A switch for the intervals of single tasks, and a button that copies the table in each format."""
    buttons = "".join(f'<button type=button class=copy data-text="{name}">{name}</button>' for name in tables(data))
    known = any(interval(data, row, task) for row in data["rows"] for task in data["tasks"])
    switch = "<label><input type=checkbox id=intervals> 95% intervals of every task</label>" if known else ""
    return f"<div class=controls>{switch}<span>Copy as {buttons}</span></div>"


def _table_row(data: Mapping[str, Any], row: Mapping[str, Any], top: Mapping[str, set[str]]) -> str:
    cells = [_score(data, row, task, row["name"] in top[task]) for task in ("mean", *data["tasks"])]
    share = min(1.0, max(0.0, row["gap_closed"] or 0.0))
    kind = " class=reference" if is_reference(row) else ""
    norm = _cell(row["normalised_mean"])
    closed = _cell(row["gap_closed"], f' class=bar style="--share: {100 * share:.1f}%"')
    split = escape(row["split"]) if row["split"] and row["learned"] else "–"
    name = explained_name(row["name"])
    return f"<tr{kind}><th scope=row>{name}</th>{''.join(cells)}<td class=text>{split}</td>{norm}{closed}</tr>"


def _score(data: Mapping[str, Any], row: Mapping[str, Any], task: str, best: bool) -> str:
    """A score with its interval below, which for single tasks is hidden at first."""
    bounds, name = interval(data, row, task), _name_of(data, task)
    if task == "mean":
        value, error, name = row["mean"], None, next((n for t in data["tasks"] if (n := _name_of(data, t))), None)
    else:
        value, error = row["accuracies"].get(task), row.get("errors", {}).get(task)
    between = "" if bounds is None else f"<small>{'–'.join(map(percent, bounds))}</small>"
    kind = " ".join(["top"] * best + ["mean"] * (task == "mean"))
    text = escape(score_text(value, name, error))
    shown = f"<strong>{text}</strong>" if best else text
    number = "" if value is None else float(value)
    return f'<td class="{kind}" data-value="{number}">{shown}{between}</td>'


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _cell(value: float | None, attributes: str = "") -> str:
    return f'<td data-value="{"" if value is None else float(value)}"{attributes}>{percent(value)}</td>'


def _notes(data: Mapping[str, Any]) -> str:
    """The harms, then the run's other notes."""
    bad = harms(data)
    rest = [note for note in data.get("notes", ()) if not any(line.endswith(note) for line in bad)]
    parts = {"What to watch": bad, "Notes": rest}
    return "".join(
        f"<section><h2>{title}</h2><ul class=notes>"
        + "".join(f"<li>{escape(without_machine(line))}</li>" for line in lines)
        + "</ul></section>"
        for title, lines in parts.items()
        if lines
    )


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
    added = f"{repair['added_parameters']:,}" if repair["added_parameters"] else "no"
    steps = f"{repair['steps']:,} steps, " if repair["steps"] else ""
    cost = (
        f": {added} parameters added, {steps}"
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
    warnings = "".join(f"<li>{escape(without_machine(line))}</li>" for line in repair["warnings"])
    watch = f"<ul class=notes>{warnings}</ul>" if warnings else ""
    return f"<p>{explained(repair['kind'])}{escape(cost)}</p>{watch}{table}"


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
    """Circumstances, profile, command, configuration and provenance of one run, without a machine's paths."""
    command = run.get("repeat") or without_machine(run.get("command", ""))
    where = "<p class=note>In the folder of this page:</p>" if run.get("repeat") else ""
    repeat = f"<h3>To repeat it</h3>{where}<pre class=command>{escape(command)}</pre>" if command else ""
    names = {"config": "Configuration", "provenance": "Provenance: versions and the sha256 of every input"}
    known = {name: without_machine(run[key]) for key, name in names.items() if run.get(key)}
    texts = [(name, json.dumps(value, indent=2, ensure_ascii=False)) for name, value in known.items()]
    data = [f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in texts]
    profile = _profile(run.get("profile_seconds", {}))
    return _circumstances(run.get("circumstances", {})) + profile + repeat + "".join(data)


def _circumstances(known: Mapping[str, Any]) -> str:
    """Date, commit, hardware and peak memory."""
    machine, peaks = known.get("hardware"), known.get("peak_memory", {})
    date = re.sub(r"T(\d\d:\d\d):\d\d\+00:00$", r" \1 UTC", known.get("date") or "")
    lines = {"Date": date, "Commit of the working directory": known.get("commit")}
    if machine:
        cores, threads = (f"{n} {word}{'s' * (n != 1)}" for word in ("core", "thread") for n in [machine[f"{word}s"]])
        lines["Processor"] = f"{machine['processor']}, {cores}, {threads} used"
        lines["Accelerators"] = ", ".join(machine["accelerators"]) or "none"
    lines |= {title: in_bytes(peaks[key]) for key, title in _PEAKS.items() if key in peaks}
    body = "".join(f"<tr><th scope=row>{k}</th><td class=text>{escape(v)}</td></tr>" for k, v in lines.items() if v)
    return f'<div class="wide keys"><table class=facts><tbody>{body}</tbody></table></div>' if body else ""


def _profile(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    longest = max(seconds.values()) or 1.0
    lines = "".join(
        f"<tr><th scope=row>{escape(activity)}</th>"
        f'<td class=bar style="--share: {100 * value / longest:.1f}%">{value:.2f} s</td></tr>'
        for activity, value in seconds.items()
    )
    note = "<p class=note>An activity includes those that it consists of: adaptation includes its passes.</p>"
    parts = note * ("test-time adaptation" in seconds)
    return f"<h3>Where the time went</h3><table class=profile><tbody>{lines}</tbody></table>{parts}"


def _asset(name: str) -> str:
    return (files("suture.reporting") / "assets" / name).read_text("utf-8")
