"""report.html: one self-contained page of one finished run, or of several side by side.

Everything in it comes from what the runs left, as checked data, and is escaped. Its policy forbids the browser every
connection and every script but the two of the page, which it knows by their hashes.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

from suture.reporting.chart import Chart
from suture.reporting.data import percent
from suture.reporting.figures import charts_of
from suture.reporting.rendering import runtime
from suture.reporting.run_folder import Finished, flat, is_reference

Block = Chart | str
_DESTINATIONS = ("output", "overwrite", "reuse", "choices.", "hydra")  # where a run went, not what it did
_ABOUT = """Accuracy in %. Norm.: mean over tasks of accuracy / expert accuracy. Gap closed: (model − pretrained) /
(experts − pretrained) of the means. Click a column head to sort."""


def page(run: Finished, *, interactive: bool = True) -> str:
    """The whole page as HTML; without `interactive` it shows the run's pictures."""
    charted: list[Chart] = []
    body = _sections(run, charted if interactive else None)
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
<script type="application/json" id="charts">{_as_json(charted)}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body></html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy under which only these scripts run and nothing is loaded."""
    hashes = (base64.b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def _as_json(charted: Sequence[Chart]) -> str:
    """What JSON.parse takes and no HTML parser trips over: all ASCII, without a <."""
    charts = [
        {
            "spec": chart.on_page(),
            "legend": list(chart.legend.items()),
            "choices": [[choice.name, choice.label, list(choice.options)] for choice in chart.choices],
        }
        for chart in charted
    ]
    return json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sections(run: Finished, charted: list[Chart] | None) -> str:
    """The sections of the page; charts go into `charted`, or pictures onto the page if it is None."""
    data = run.data
    parts = [_best(data), _table(data), _notes(data)]
    if charted is None:
        parts += _pictures(run)
    else:
        parts += [_section(title, panels, charted) for title, panels in _panels(run).items()]
    several = data.get("runs")
    parts += [_differences(several), _each(several)] if several else [_section_of("The run", _details(data))]
    return "\n".join(part for part in parts if part)


def _panels(run: Finished) -> dict[str, dict[str, list[Block]]]:
    """Section → panel → charts; where a section has a panel for each of several models, a selector chooses one."""
    sections: dict[str, dict[str, list[Block]]] = {}
    for drawn in charts_of(run):
        sections.setdefault(drawn.section, {}).setdefault(drawn.model, []).append(drawn.chart)
    if run.data["repairs"]:
        charts = sections.get("Repair", {})
        facts = {name: _facts(repair) for name, repair in run.data["repairs"].items()}
        sections["Repair"] = {name: [said, *charts.get(name, ())] for name, said in facts.items()}
    return sections


def _section(title: str, panels: Mapping[str, Sequence[Block]], charted: list[Chart]) -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in panels)
    chooser = f"<label>of <select class=panels>{options}</select></label>" if len(panels) > 1 else ""
    shown = []
    for i, blocks in enumerate(panels.values()):
        inside = "".join(block if isinstance(block, str) else _figure(block, charted) for block in blocks)
        shown.append(f"<div class=panel{' hidden' * (i > 0)}>{inside}</div>")
    return f"<section><h2>{escape(title)} {chooser}</h2>{''.join(shown)}</section>"


def _figure(chart: Chart, charted: list[Chart]) -> str:
    charted.append(chart)
    about = f"<p class=note>{escape(chart.about)}</p>" if chart.about else ""
    caption = escape(chart.title)
    inside = f"<figcaption>{caption}</figcaption><div class=chart></div>{about}"
    return f'<figure data-chart="{len(charted) - 1}">{inside}</figure>'


def _pictures(run: Finished) -> Iterator[str]:
    """The SVG files as images: a browser runs no script and loads nothing in these."""
    for picture in run.pictures:
        encoded = base64.b64encode(picture.read_bytes()).decode()
        title = escape(picture.stem.replace("_", " "))
        image = f'<img alt="{title}" src="data:image/svg+xml;base64,{encoded}">'
        yield f"<figure><figcaption>{title}</figcaption>{image}</figure>"


def _best(data: Mapping[str, Any]) -> str:
    """The sentence that a reader wants first."""
    scored = [row for row in data["rows"] if not is_reference(row) and row["mean"] is not None]
    if not scored:
        return ""
    best = max(scored, key=lambda row: row["mean"])
    closed = f", which closes {_percents(best['gap_closed'])} of the gap" if best["gap_closed"] is not None else ""
    references = (f"{row['name']} {_percents(row['mean'])}" for row in data["rows"] if is_reference(row))
    between = escape("; ".join(references))
    said = f"Best: <strong>{escape(best['name'])}</strong> with {_percents(best['mean'])}{closed}."
    return f"<p class=lead>{said}{f' <span class=note>({between})</span>' if between else ''}</p>"


def _percents(value: float | None) -> str:
    return f"{percent(value)}\N{NO-BREAK SPACE}%"


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
    share = min(1.0, max(0.0, row["gap_closed"] or 0.0))
    kind = " class=reference" if is_reference(row) else ""
    closed = _cell(row["gap_closed"], f' class=bar style="--share: {100 * share:.1f}%"')
    name = escape(row["name"]).replace("_", "_<wbr>")
    return f"<tr{kind}><th scope=row>{name}</th>{''.join(map(_cell, values))}{closed}</tr>"


def _cell(value: float | None, attributes: str = "") -> str:
    return f'<td data-value="{"" if value is None else float(value)}"{attributes}>{percent(value)}</td>'


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
        if task in repair["last_loss"]
    )
    heads = "<thead><tr><th scope=col>task</th><th scope=col>first loss</th><th scope=col>last loss</th></tr></thead>"
    table = f"<details><summary>Losses</summary><table>{heads}<tbody>{lines}</tbody></table></details>" if lines else ""
    warnings = "".join(f"<li>{escape(line)}</li>" for line in repair["warnings"])
    return f"<p>{escape(said)}</p>{f'<ul class=notes>{warnings}</ul>' if warnings else ''}{table}"


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
    shown = (f"<details class=run><summary>{escape(r['label'])}</summary>{_details(r)}</details>" for r in runs)
    return _section_of("The runs", "".join(shown))


def _section_of(title: str, inside: str) -> str:
    return f"<section><h2>{title}</h2>{inside}</section>" if inside else ""


def _details(run: Mapping[str, Any]) -> str:
    """Where the time went, the command, the configuration and the provenance of one run."""
    command = run.get("command", "")
    repeat = f"<h3>To repeat it</h3><pre class=command>{escape(command)}</pre>" if command else ""
    names = {"config": "Configuration", "provenance": "Provenance: versions and the sha256 of every input"}
    shown = [(name, json.dumps(run[key], indent=2, ensure_ascii=False)) for key, name in names.items() if run.get(key)]
    data = [f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in shown]
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
