"""Charts: one Vega-Lite specification each, shown on the page and written to files.

Specifications are plain dicts. A name from a user is only ever a value of the data, never part of an expression. Only
this module knows how page and file differ: in theme, width, legend and selectors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from suture.reporting.rendering import png, svg

INK = "currentColor"  # charts on the page follow its theme; in files it is replaced by `_INK_IN_FILES`
_INK_IN_FILES = "#24303b"
# Eight colours that stay apart for every kind of colour blindness (at least 0.13 in OKLab, Okabe and Ito's 0.08) and on
# both of the page's backgrounds (contrast 2 or more), then the same lighter and greyer, with other dashes.
PALETTE = (
    *("#4466cc", "#eeaa00", "#aa3300", "#44ccaa", "#774477", "#dd6633", "#bb99ff", "#aa7799"),
    *("#859cde", "#f4c859", "#c87a59", "#85dec8", "#a785a7", "#e99c7a", "#d3bdff", "#c8a7bd"),
    *("#5a6b9e", "#af8d38", "#8d5238", "#5a9e8d", "#745a74", "#a66b52", "#9684b8", "#8d7484"),
)
_DASHES = ((1, 0), (7, 3), (2, 2))  # of the lines in the palette's three rows
_ROW = 8
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_PICKED = {"name": "picked", "value": None}
_ACROSS = 4  # facets in a row
_LETTER = 5.6  # width of a letter of a title, in pixels
_CONFIG: Mapping[str, Any] = {
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "domain", "tick", "grid")},
        **{"gridOpacity": 0.13, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelOpacity": 0.85},
        **{"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11, "labelLimit": 110},
    },
    "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 8},
    "axisXQuantitative": {"tickCount": {"expr": "narrow ? 4 : 8"}},
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
    "header": {"labelColor": INK, "labelFontSize": 11, "titleColor": INK},
}
_ON_PAGE = {**_CONFIG, "background": "transparent", "font": "system-ui, sans-serif"}
_IN_FILES = {**_CONFIG, "background": "white", "font": "DejaVu Sans, Verdana, Arial, sans-serif"}
_IN_FILES |= {"padding": 10, "aria": False}  # aria labels for each mark make files with many points four times larger


@dataclass(frozen=True)
class Choice:
    """A selector on the page, which sets the parameter `name` to one of `options`.

    A file shows the first option. If `facets` is a height in pixels, it shows all of them side by side, with separate
    scales for the axes in `independent`.
    """

    name: str
    label: str
    options: Sequence[str]
    facets: int = 0
    independent: Sequence[str] = ()

    @property
    def filter(self) -> dict[str, str]:
        """The transform that keeps the rows whose field `name` has the chosen value."""
        return {"filter": f"datum.{self.name} === {self.name}"}


@dataclass(frozen=True)
class Chart:
    """One figure.

    - `spec`: Vega-Lite with data, but without width and parameters.
    - `legend`: name → colour. On the page, a click on a name sets the parameter `picked`.
    - `dashes`: name → "dashed" or "dotted", for the legend of lines that are not solid.
    - `about`: a sentence below the chart. `width`: the width of the plot in files, in pixels; `least`: the width below
      which the page lets the reader scroll.
    """

    title: str
    spec: Mapping[str, Any]
    legend: Mapping[str, str] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    about: str = ""
    width: int = 560
    least: int = 0
    dashes: Mapping[str, str] = field(default_factory=dict)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """For a notebook: the picture, and the specification for those that can draw it."""
        return {
            "image/svg+xml": self.svg(),
            "application/vnd.vegalite.v6+json": self.in_file(),
            "text/plain": self.title,
        }

    def svg(self, model: str = "") -> str:
        """The picture as SVG, with the name of a `model` in its title; the same text for equal charts."""
        return svg(self.in_file(model))

    def save(self, stem: str | Path, model: str = "") -> Path:
        """Write STEM.svg and STEM.png, byte-identical for equal charts; returns the SVG's path."""
        stem, picture = Path(stem), self.svg(model)
        drawing = stem.with_name(f"{stem.name}.svg")
        drawing.write_text(picture, "utf-8")
        stem.with_name(f"{stem.name}.png").write_bytes(png(picture))
        return drawing

    def on_page(self) -> dict[str, Any]:
        """The specification for the page: as wide as its container, in the page's colours, without a legend."""
        params = [*self._params(), {"name": "narrow", "expr": "width < 420"}]
        return {"$schema": _SCHEMA, "width": "container", "config": _ON_PAGE, **self.spec, "params": params}

    def in_file(self, model: str = "") -> dict[str, Any]:
        """The specification for a file: with title, `model`, legend, white background and a fixed width."""
        spec = {"width": self.width, **{key: part for key, part in self.spec.items() if key != "data"}}
        for choice in self.choices:
            spec = _facets(spec, choice) if choice.facets else spec
        whole = {"title": self._heading(model), "config": _IN_FILES, **spec}
        data = {"data": self.spec["data"], "params": [*self._params(), {"name": "narrow", "value": False}]}
        return {"$schema": _SCHEMA, **_for_print(whole, self._printed_legend()), **data}

    def _params(self) -> list[dict[str, Any]]:
        return [*({"name": choice.name, "value": choice.options[0]} for choice in self.choices), _PICKED]

    def _heading(self, model: str) -> dict[str, Any]:
        title = f"{self.title}: {model}" if model else self.title
        chosen = [choice.options[0] for choice in self.choices if not choice.facets]
        lines = [line for text in (", ".join(chosen), self.about) for line in wrap(text, int(self.width / _LETTER))]
        style = {"anchor": "start", "fontSize": 13, "fontWeight": "normal", "color": INK, "offset": 8}
        subtitle = {"subtitleFontSize": 10, "subtitleColor": INK, "subtitlePadding": 4}
        return {"text": title, "subtitle": lines, **style, **subtitle}

    def _printed_legend(self) -> dict[str, Any] | None:
        if len(self.legend) < 2:
            return None
        longest = min(40, max(map(len, self.legend)))
        columns = max(1, min(len(self.legend), int(self.width / (6.5 * longest + 26))))
        symbols = {"symbolType": "square", "symbolOpacity": 1, "symbolSize": 90, "symbolStrokeWidth": 0}
        style = {"titleLimit": 0, "labelLimit": 270, "columnPadding": 14, "symbolFillColor": {"expr": _OWN_COLOUR}}
        return {"orient": "top", "title": None, "columns": columns, **symbols, **style}


_OWN_COLOUR = "scale('color', datum.value)"


def colours(names: Iterable[str], fixed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name → colour: that of `fixed`, or else the next of the palette, in the order of the names."""
    fixed = fixed or {}
    names = list(dict.fromkeys(names))
    drawn = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(n for n in names if n not in fixed)}
    return {name: fixed.get(name) or drawn[name] for name in names}


def task_colours(tasks: Iterable[str]) -> dict[str, str]:
    """Task → its colour in every figure and table of a page: by its position among the run's tasks."""
    return colours(tasks)


def dashed(key: str, names: Iterable[str]) -> dict[str, Any]:
    """Dashes by the field `key`, which tell lines apart beyond the palette's first row."""
    names = list(names)
    ranges = [list(_DASHES[i // _ROW % len(_DASHES)]) for i in range(len(names))]
    channel = {"field": key, "type": "nominal", "scale": {"domain": names, "range": ranges}, "legend": None}
    return {"strokeDash": channel} if len(names) > _ROW else {}


def dash_names(names: Iterable[str]) -> dict[str, str]:
    """Name → "dashed" or "dotted", as `dashed` draws its line."""
    known = {name: ("", "dashed", "dotted")[i // _ROW % len(_DASHES)] for i, name in enumerate(names)}
    return {name: style for name, style in known.items() if style}


def specification(rows: Sequence[Mapping[str, Any]], **parts: Any) -> dict[str, Any]:
    """A specification with these rows of data."""
    return {"data": {"values": rows}, **parts}


def coloured(
    key: str,
    palette: Mapping[str, str],
    *,
    faint: float = 0.12,
    full: float = 1.0,
    unpicked: float | None = None,
) -> dict[str, Any]:
    """Colour by the field `key`, with `full` opacity for the name picked in the legend and `faint` for the others.

    `unpicked` is the opacity while no name is picked, by default `full`.
    """
    scale = {"domain": list(palette), "range": list(palette.values())}
    usual = full if unpicked is None else unpicked
    picked = [{"test": "picked === null", "value": usual}, {"test": f"datum.{key} === picked", "value": full}]
    colour = {"field": key, "type": "nominal", "scale": scale, "legend": None}
    return {"color": colour, "opacity": {"condition": picked, "value": faint}}


def number(name: str, title: str | None = None, *, kind: str = "linear", zero: bool = False, **axis: Any) -> dict:
    """A quantitative channel."""
    channel = {"field": name, "type": "quantitative", "title": title, "scale": {"type": kind, "zero": zero}}
    return {**channel, "axis": axis} if axis else channel


def names_across(name: str, order: Sequence[str]) -> dict[str, Any]:
    """A nominal x axis with slanted labels."""
    axis = {"labelAngle": -40, "grid": False}
    return {"field": name, "type": "nominal", "title": None, "sort": list(order), "axis": axis}


def names_down(name: str, order: Sequence[str], most: str = "(narrow ? 24 : 48)", **axis: Any) -> dict[str, Any]:
    """A nominal y axis; labels longer than `most`, an expression, are cut to their ends, where names differ."""
    ends = f"length(datum.label) > {most} ? '…' + slice(datum.label, 1 - {most}) : datum.label"
    style = {"labelOverlap": True, "grid": False, "labelLimit": 280, "labelExpr": ends}
    return {"field": name, "type": "nominal", "title": None, "sort": list(order), "axis": {**style, **axis}}


def tip(name: str, kind: str = "quantitative", **more: str) -> dict[str, Any]:
    """A line of the tooltip."""
    return {"field": name, "type": kind, **more}


def line(rows: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    """One curve of `value` over `step`."""
    axes = {"x": number("step", "step", tickMinStep=1), "y": number("value", title)}
    encoding = {**axes, "tooltip": [tip("step"), tip("value", format=".4g")]}
    mark = {"type": "line", "color": PALETTE[0], "point": {"size": 20, "filled": True, "color": PALETTE[0]}}
    return specification(rows, mark=mark, encoding=encoding, height=200)


def heat_map(
    rows: Sequence[Mapping[str, Any]],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    colour: Mapping[str, Any],
    *,
    tips: Sequence[Mapping[str, Any]],
    height: float,
    numbers: str = "",
) -> dict[str, Any]:
    """Cells coloured by `value`, with its number in them if `numbers` is a format."""
    channel = {"field": "value", "type": "quantitative", "legend": None, **colour}
    layers: list[dict[str, Any]] = [{"mark": "rect", "encoding": {"color": channel, "tooltip": tips}}]
    if numbers:  # at a luminance of 0.18, black and white have the same contrast
        dark = {"test": "luminance(scale('color', datum.value)) < 0.18", "value": "white"}
        text = {"field": "value", "type": "quantitative", "format": numbers}
        encoding = {"text": text, "color": {"condition": dark, "value": "black"}, "tooltip": tips}
        layers.append({"mark": {"type": "text", "fontSize": 10}, "encoding": encoding})
    return specification(rows, layer=layers, encoding={"x": x, "y": y}, height=height)


def _facets(spec: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """The specification with a panel for every option of a choice."""
    across = min(_ACROSS, len(choice.options))
    transform = [step for step in spec.get("transform", ()) if step != choice.filter]
    size = {"width": spec["width"] // across - 16, "height": choice.facets}
    panel = {**spec, "transform": transform, **size}
    header = {"title": None, "labelLimit": size["width"]}
    facet = {"field": choice.name, "type": "nominal", "sort": list(choice.options), "header": header}
    scales = {"resolve": {"scale": dict.fromkeys(choice.independent, "independent")}}
    return {"facet": facet, "columns": across, "spacing": 14, "spec": panel, **scales}


def _for_print(part: Any, legend: Mapping[str, Any] | None) -> Any:
    """The specification with a dark ink instead of the page's colour, and with the legend that the page draws."""
    if isinstance(part, list | tuple):
        return [_for_print(one, legend) for one in part]
    if not isinstance(part, Mapping):
        return _INK_IN_FILES if part == INK else part
    printed = {k: v if k in ("domain", "sort") else _for_print(v, legend) for k, v in part.items()}
    by_name = part.get("type") == "nominal" and "legend" in part and _named_colours(part.get("scale", {}))
    return {**printed, "legend": legend} if by_name else printed


def _named_colours(scale: Mapping[str, Any]) -> bool:
    return any(isinstance(colour, str) for colour in scale.get("range", ()))
