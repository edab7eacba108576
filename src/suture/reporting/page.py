"""report.html: one self-contained page of one finished run, or of several side by side.

Everything in it comes from what the runs left, as plain data. Its policy forbids the browser every connection: all that
is shown is in the file. Without the plotting library the same page has still pictures.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

from suture.reporting import charts, vega
from suture.reporting.charts import REFERENCES, Chart
from suture.reporting.data import percent
from suture.reporting.run_folder import Finished, flat

Block = Chart | str
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
_STILL = """The figures are still pictures, because the plotting library was not there when this page was made. For
figures that answer to a pointer: <code>pip install 'suture[page]'</code>, then <code>suture report</code> and the
run's folder."""
_PLACES = ("output", "overwrite", "reuse", "choices.", "hydra")  # where a run went, not what it did
_ABOUT = """Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy. Gap closed: (model − pretrained) /
(experts − pretrained) of the means. A click on a head sorts."""


def page(run: Finished, *, interactive: bool = True) -> str:
    """The whole page as HTML. `interactive` without the plotting library still gives pictures."""
    script = vega.runtime() if interactive else None
    charted: list[Chart] = []
    body = _sections(run, charted if script else None)
    scripts = [f'<script type="application/json" id="charts">{_as_json(charted)}</script>']
    scripts += [f"<script>{script}</script>"] if script else []
    title = escape(run.data["title"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title><style>{_asset("page.css")}</style></head><body>
<header><h1>{title}</h1><button id="theme" type="button">dark or light</button></header>
<main>
{body}
</main>
{"".join(scripts)}
<script>{_asset("page.js")}</script>
</body></html>
"""


def _as_json(charted: Sequence[Chart]) -> str:
    """What JSON.parse takes and no HTML parser trips over; what is not finite is null."""
    text = json.dumps([asdict(chart) for chart in charted])
    return json.dumps(json.loads(text, parse_constant=lambda _: None), separators=(",", ":")).replace("<", "\\u003c")


def _sections(run: Finished, charted: list[Chart] | None) -> str:
    """The sections of the page; charts go into `charted`, or pictures onto the page if it is None."""
    data = run.data
    parts = [_best(data), _table(data), _notes(data)]
    if charted is None:
        parts += [f"<p class=note>{_STILL}</p>", *_pictures(run)]
    else:
        parts += [_section(title, panels, charted) for title, panels in _panels(run) if panels]
    several = data.get("runs")
    parts += [_differences(several), _each(several)] if several else [_section_of("The run", _details(data))]
    return "\n".join(part for part in parts if part)


def _panels(run: Finished) -> Iterator[tuple[str, Mapping[str, Sequence[Block]]]]:
    """Section → panel → charts; where a section has several panels a selector chooses one."""
    data, points = run.data, run.points
    if data["rows"] and data["tasks"]:
        yield "Task by task", {"": [charts.accuracy(data)]}
    yield "Sweeps", {"": [charts.curves(data, knob) for knob in data.get("curves", {})]} if data.get("curves") else {}
    yield "Every model on every task", {"": [charts.matrix(data)]} if data.get("matrix") else {}
    over, losses = points.get("learning", {}), points.get("objective", {})
    learned = data.get("learning", {}).items()
    yield "Coefficients", {n: charts.learning(found, over.get(n, {}), losses.get(n, {})) for n, found in learned}
    yield "Repair", {name: _repair(name, repair, points) for name, repair in data.get("repairs", {}).items()}


def _repair(name: str, repair: Mapping[str, Any], points: Mapping[str, Any]) -> list[Block]:
    shown: list[Block] = [_facts(repair), *charts.accuracy_over_steps(repair["scores"])]
    if "representation" in repair:
        shown.append(charts.by_place(repair["representation"]))
    if name in points.get("scatter", {}):
        shown.append(charts.scatter(points["scatter"][name], points["explained"][name]))
    return shown


def _section(title: str, panels: Mapping[str, Sequence[Block]], charted: list[Chart]) -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in panels)
    chooser = f"<label>of <select class=panels>{options}</select></label>" if len(panels) > 1 else ""
    shown = []
    for i, blocks in enumerate(panels.values()):
        inside = "".join(block if isinstance(block, str) else _figure(block, charted) for block in blocks)
        shown.append(f"<div class=panel{' hidden' * (i > 0)}>{inside}</div>")
    return f"<section><h2>{title} {chooser}</h2>{''.join(shown)}</section>"


def _figure(chart: Chart, charted: list[Chart]) -> str:
    charted.append(chart)
    about = f"<p class=note>{escape(chart.about)}</p>" if chart.about else ""
    caption = escape(chart.title)
    inside = f"<figcaption>{caption}</figcaption><div class=chart></div>{about}"
    return f'<figure data-chart="{len(charted) - 1}">{inside}</figure>'


def _pictures(run: Finished) -> Iterator[str]:
    for picture in run.pictures:
        encoded = base64.b64encode(picture.read_bytes()).decode()
        title = escape(picture.stem.replace("_", " "))
        image = f'<img alt="{title}" src="data:image/svg+xml;base64,{encoded}">'
        yield f"<figure><figcaption>{title}</figcaption>{image}</figure>"


def _best(data: Mapping[str, Any]) -> str:
    """The sentence that a reader wants first."""
    found = [row for row in data["rows"] if row["name"] not in REFERENCES and row["mean"] is not None]
    if not found:
        return ""
    best = max(found, key=lambda row: row["mean"])
    closed = (
        f", which closes {percent(best['gap_closed'])}\N{NO-BREAK SPACE}% of the gap"
        if best["gap_closed"] is not None
        else ""
    )
    means = {row["name"]: row["mean"] for row in data["rows"] if row["name"] in REFERENCES}
    between = "; ".join(f"{name} {percent(mean)}\N{NO-BREAK SPACE}%" for name, mean in means.items())
    said = f"Best: <strong>{escape(best['name'])}</strong> with {percent(best['mean'])}\N{NO-BREAK SPACE}%{closed}."
    return f"<p class=lead>{said}{f' <span class=note>({escape(between)})</span>' if between else ''}</p>"


def _table(data: Mapping[str, Any]) -> str:
    if not data["rows"]:
        return ""
    heads = ["model", *data["tasks"], "mean", "norm.", "gap closed"]
    head = "".join(f"<th scope=col><button type=button>{escape(name)}</button></th>" for name in heads)
    body = "".join(_table_row(data, row) for row in data["rows"])
    counts = "".join(f"<td>{data['samples'].get(task, '')}</td>" for task in data["tasks"])
    foot = f"<tfoot><tr><th scope=row>samples</th>{counts}<td></td><td></td><td></td></tr></tfoot>"
    return f"""<section><h2>Accuracy</h2><div class=wide><table id=accuracy class=sortable>
<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div><p class=note>{_ABOUT}</p></section>"""


def _table_row(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    values = [*(row["accuracies"].get(task) for task in data["tasks"]), row["mean"], row["normalised_mean"]]
    cell = lambda value, more="": f'<td data-value="{"" if value is None else value}"{more}>{percent(value)}</td>'
    share = min(1.0, max(0.0, row["gap_closed"] or 0.0))
    kind = " class=reference" if row["name"] in REFERENCES else ""
    closed = cell(row["gap_closed"], f' class=bar style="--share: {100 * share:.1f}%"')
    name = escape(row["name"]).replace("_", "_<wbr>")
    return f"<tr{kind}><th scope=row>{name}</th>{''.join(map(cell, values))}{closed}</tr>"


def _notes(data: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.get("notes", ()))
    return f"<ul class=notes>{notes}</ul>" if notes else ""


def _facts(repair: Mapping[str, Any]) -> str:
    """What a repair cost, and each task's loss at its first and last step."""
    encoded, encoders = repair["inputs_encoded"], repair["encoders_at_inference"]
    said = (
        f"{repair['kind']}: {repair['added_parameters']:,} numbers added, {repair['steps']:,} steps, "
        f"{encoded.get('merged', 0):,} inputs through the merged model, {encoded.get('experts', 0):,} through experts, "
        f"{encoders} encoder{'s' * (encoders > 1)} at inference."
    )
    lines = "".join(
        f"<tr><th scope=row>{escape(task)}</th><td>{first:.4g}</td><td>{repair['last_loss'][task]:.4g}</td></tr>"
        for task, first in repair["first_loss"].items()
    )
    heads = "<thead><tr><th scope=col>task</th><th scope=col>first loss</th><th scope=col>last loss</th></tr></thead>"
    table = f"<details><summary>Losses</summary><table>{heads}<tbody>{lines}</tbody></table></details>" if lines else ""
    warnings = "".join(f"<li>{escape(line)}</li>" for line in repair["warnings"])
    return f"<p>{escape(said)}</p>{f'<ul class=notes>{warnings}</ul>' if warnings else ''}{table}"


def _differences(runs: Sequence[Mapping[str, Any]]) -> str:
    """The keys in which the configurations of several runs differ."""
    configs = [dict(flat(run["config"])) for run in runs]
    keys = [key for config in configs for key in config if not key.startswith(_PLACES)]
    differing = [key for key in dict.fromkeys(keys) if len({str(config.get(key)) for config in configs}) > 1]
    if not differing:
        return ""
    head = "".join(f"<th scope=col>{escape(run['label'])}</th>" for run in runs)
    line = lambda key: "".join(f"<td>{escape(str(config.get(key, '–')))}</td>" for config in configs)
    body = "".join(f"<tr><th scope=row>{escape(key)}</th>{line(key)}</tr>" for key in differing)
    table = f"<table><thead><tr><th scope=col>key</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _section_of("What differs", f'<div class="wide keys">{table}</div>')


def _each(runs: Sequence[Mapping[str, Any]]) -> str:
    shown = (f"<details class=run><summary>{escape(r['label'])}</summary>{_details(r)}</details>" for r in runs)
    return _section_of("The runs", "".join(shown))


def _section_of(title: str, inside: str) -> str:
    return f"<section><h2>{title}</h2>{inside}</section>" if inside else ""


def _details(run: Mapping[str, Any]) -> str:
    """Where the time went, the command, the configuration and the provenance of one run."""
    command = run.get("command", "")
    repeat = f"<h3>To repeat it</h3><pre class=command>{escape(command)}</pre>" if command else ""
    told = lambda key: escape(json.dumps(run[key], indent=2, ensure_ascii=False))
    names = {"config": "Configuration", "provenance": "Provenance: versions and the sha256 of every input"}
    data = [
        f"<details><summary>{name}</summary><pre>{told(key)}</pre></details>"
        for key, name in names.items()
        if run.get(key)
    ]
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
