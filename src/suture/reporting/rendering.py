"""Vega-Lite outside a browser: charts as SVG and PNG files, and the runtime script of the page.

All of it comes from `vl-convert-python`, which holds Vega-Lite and a JavaScript engine and fetches nothing.
"""

import contextlib
import re
from importlib.metadata import version
from pathlib import Path

from suture.errors import OutputError
from suture.reporting.chart import Chart
from suture.storage.atomic import write_text
from suture.storage.cache import cache_directory

_SCALE = 1.5  # pixels of a PNG for one of the specification
_REFERENCE = re.compile(r"""(<[^<>]*?(?:id="|url\(#))(gradient_|clip)(\d+)""")  # in tags only, not in text
_ENTRY = "window.vegaEmbed = vegaEmbed;"


def save(chart: Chart, stem: Path, model: str = "") -> Path:
    """Write STEM.svg and STEM.png; returns the SVG's path. The same chart gives the same bytes."""
    import vl_convert

    picture = _renumbered(vl_convert.vegalite_to_svg(chart.in_file(model), allowed_base_urls=[]))
    svg, png = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("svg", "png"))
    svg.write_text(picture, "utf-8")
    png.write_bytes(vl_convert.svg_to_png(picture, scale=_SCALE))
    return svg


def _renumbered(svg: str) -> str:
    """The same picture with its own numbering of gradients: Vega goes on counting from picture to picture."""
    numbers: dict[str, str] = {}
    return _REFERENCE.sub(lambda m: f"{m[1]}{m[2]}{numbers.setdefault(m[3], str(len(numbers)))}", svg)


def runtime() -> str:
    """The script that defines `vegaEmbed`, 0.9 MB, made once and then taken from the cache."""
    import vl_convert

    path = cache_directory() / f"vega-embed-{version('vl-convert-python')}.js"
    if path.is_file():
        return path.read_text("utf-8")
    script = vl_convert.javascript_bundle(_ENTRY).replace("</script", "<\\/script").replace("<!--", "<\\!--")
    with contextlib.suppress(OutputError):  # a cache that cannot be written costs seconds, not the page
        write_text(path, script)
    return script
