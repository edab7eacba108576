"""A chart: one Vega-Lite specification, shown on the page and written to files.

Specifications are plain dicts. A name that comes from a user is only ever a value of the data, never part of an
expression. Where page and file differ is said here: theme, width, legend, selectors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

INK = "currentColor"  # of the page, so that charts follow its theme; files have `_INK_IN_FILES`
_INK_IN_FILES = "#24303b"
PALETTE = (
    *("#3b82c4", "#e08a2e", "#3aa76d", "#b463b4", "#d0524a", "#6b78d6", "#a07c4f", "#35a3b0"),
    *("#8db8dd", "#eec08d", "#8fd0ab", "#d9b0d9", "#e6a39f", "#b3bbec", "#cbb494", "#8fd0d8"),
    *("#1f4e79", "#8a4b08", "#1e6b45", "#6d2f6d", "#7d1f1b", "#343f8f", "#5d4526", "#176068"),
)
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_PICKED = {"name": "picked", "value": None}
_ACROSS = 4  # facets beside each other
_LETTER = 5.6  # width of a letter of a title, in pixels
_CONFIG: Mapping[str, Any] = {
    "view": {"stroke": None},
    "axis": {
        **{f"{part}Color": INK for part in ("label", "title", "domain", "tick", "grid")},
        **{"gridOpacity": 0.13, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelOpacity": 0.85},
        **{"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11, "labelLimit": 110},
    },
    "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 8},
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
    "header": {"labelColor": INK, "labelFontSize": 11, "titleColor": INK},
}
_ON_PAGE = {**_CONFIG, "background": "transparent", "font": "system-ui, sans-serif"}
_IN_FILES = {**_CONFIG, "background": "white", "font": "DejaVu Sans, Verdana, Arial, sans-serif"}
_IN_FILES |= {"padding": 10, "aria": False}  # of each mark: four times the size of a file with many points


@dataclass(frozen=True)
class Choice:
    """A selector of the page: the parameter `name` takes one of `options`.

    A file shows the first option; or, if `facets` is a height, all of them beside each other, each that high, with
    scales of their own along the axes in `independent`.
    """

    name: str
    label: str
    options: Sequence[str]
    facets: int = 0
    independent: Sequence[str] = ()

    @property
    def filter(self) -> dict[str, str]:
        """The transform that leaves the rows whose field of the same name has the value chosen."""
        return {"filter": f"datum.{self.name} === {self.name}"}


@dataclass(frozen=True)
class Chart:
    """One figure.

    - `spec`: Vega-Lite, with its data, without width and parameters.
    - `legend`: name → colour. On the page a click on a name sets the parameter `picked`.
    - `about`: a sentence below the chart. `width`: pixels of a file's plot.
    """

    title: str
    spec: Mapping[str, Any]
    legend: Mapping[str, str] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    about: str = ""
    width: int = 560

    def on_page(self) -> dict[str, Any]:
        """As the page's script draws it: as wide as its box, in the page's colours; the legend is the page's."""
        params = [*self._params(), {"name": "narrow", "expr": "width < 420"}]
        return {"$schema": _SCHEMA, "width": "container", "config": _ON_PAGE, **self.spec, "params": params}

    def in_file(self, model: str = "") -> dict[str, Any]:
        """Complete in itself: title with the model that it is of, legend, a white background, a fixed width."""
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
        shown = [choice.options[0] for choice in self.choices if not choice.facets]
        lines = [line for text in (", ".join(shown), self.about) for line in wrap(text, int(self.width / _LETTER))]
        look = {"anchor": "start", "fontSize": 13, "fontWeight": "normal", "color": INK, "offset": 8}
        under = {"subtitleFontSize": 10, "subtitleColor": INK, "subtitlePadding": 4}
        return {"text": title, "subtitle": lines, **look, **under}

    def _printed_legend(self) -> dict[str, Any] | None:
        if len(self.legend) < 2:
            return None
        longest = min(40, max(map(len, self.legend)))
        columns = max(1, min(len(self.legend), int(self.width / (6.5 * longest + 26))))
        symbols = {"symbolType": "square", "symbolOpacity": 1, "symbolSize": 90, "symbolStrokeWidth": 0}
        look = {"titleLimit": 0, "labelLimit": 270, "columnPadding": 14, "symbolFillColor": {"expr": _OWN_COLOUR}}
        return {"orient": "top", "title": None, "columns": columns, **symbols, **look}


_OWN_COLOUR = "scale('color', datum.value)"


def colours(names: Iterable[str], fixed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name → colour; those in `fixed` have theirs, the others take the palette in their order."""
    fixed = fixed or {}
    names = list(dict.fromkeys(names))
    drawn = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(n for n in names if n not in fixed)}
    return {name: fixed.get(name) or drawn[name] for name in names}


def specification(rows: Sequence[Mapping[str, Any]], **parts: Any) -> dict[str, Any]:
    """A spec of these rows of data."""
    return {"data": {"values": rows}, **parts}


def coloured(
    key: str,
    palette: Mapping[str, str],
    *,
    faint: float = 0.12,
    full: float = 1.0,
    unpicked: float | None = None,
) -> dict[str, Any]:
    """Colour by the field `key`; `full` opacity for the name picked in the legend, `faint` for the others.

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
    """A nominal y axis; of labels longer than `most`, an expression, the ends are left, where names differ."""
    ends = f"length(datum.label) > {most} ? '…' + slice(datum.label, 1 - {most}) : datum.label"
    look = {"labelOverlap": True, "grid": False, "labelLimit": 280, "labelExpr": ends}
    return {"field": name, "type": "nominal", "title": None, "sort": list(order), "axis": {**look, **axis}}


def tip(name: str, kind: str = "quantitative", **more: str) -> dict[str, Any]:
    """A line of what the pointer shows."""
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
    """Coloured cells of `value`; with numbers in them where there is a format for these."""
    channel = {"field": "value", "type": "quantitative", "legend": None, **colour}
    layers: list[dict[str, Any]] = [{"mark": "rect", "encoding": {"color": channel, "tooltip": tips}}]
    if numbers:
        dark = {"test": "luminance(scale('color', datum.value)) < 0.35", "value": "white"}
        text = {"field": "value", "type": "quantitative", "format": numbers}
        written = {"text": text, "color": {"condition": dark, "value": "black"}, "tooltip": tips}
        layers.append({"mark": {"type": "text", "fontSize": 10}, "encoding": written})
    return specification(rows, layer=layers, encoding={"x": x, "y": y}, height=height)


def _facets(spec: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """Every option of a choice in a panel of its own."""
    across = min(_ACROSS, len(choice.options))
    transform = [step for step in spec.get("transform", ()) if step != choice.filter]
    size = {"width": spec["width"] // across - 16, "height": choice.facets}
    panel = {**spec, "transform": transform, **size}
    header = {"title": None, "labelLimit": size["width"]}
    facet = {"field": choice.name, "type": "nominal", "sort": list(choice.options), "header": header}
    scales = {"resolve": {"scale": dict.fromkeys(choice.independent, "independent")}}
    return {"facet": facet, "columns": across, "spacing": 14, "spec": panel, **scales}


def _for_print(part: Any, legend: Mapping[str, Any] | None) -> Any:
    """The same specification with a dark ink instead of the page's, and the legend that the page draws itself."""
    if isinstance(part, list | tuple):
        return [_for_print(one, legend) for one in part]
    if not isinstance(part, Mapping):
        return _INK_IN_FILES if part == INK else part
    printed = {k: v if k in ("domain", "sort") else _for_print(v, legend) for k, v in part.items()}
    by_name = part.get("type") == "nominal" and "legend" in part and "range" in part.get("scale", {})
    return {**printed, "legend": legend} if by_name else printed
