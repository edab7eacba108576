"""Vega-Lite outside a browser: charts as SVG and PNG files, and the page's runtime script.

Both come from `vl-convert-python`, which contains Vega-Lite and a JavaScript engine and downloads nothing.
"""

import contextlib
import re
from importlib.metadata import version
from typing import Any

from suture.core.extras import check_installed
from suture.errors import OutputError
from suture.storage.atomic import write_text
from suture.storage.cache import cache_directory

_SCALE = 1.5  # PNG pixels per pixel of the specification
_REFERENCE = re.compile(r"""(<[^<>]*?(?:id="|url\(#))(gradient_|clip)(\d+)""")  # in tags only, not in text
_SHAPE = re.compile(r"""(<[^<>]*? (?:d|transform)=")([^"<>]*)""")
_DECIMALS = re.compile(r"(\.\d\d)\d+(?!\d|e)")
_ENTRY = "window.vegaEmbed = vegaEmbed;"


def svg(spec: dict[str, Any]) -> str:
    """The picture of a specification as SVG, the same text for equal ones."""
    check_installed("a figure", modules=["vl_convert"])
    import vl_convert

    return _rounded(_renumbered(vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])))


def png(picture: str) -> bytes:
    """An SVG as PNG."""
    import vl_convert

    return vl_convert.svg_to_png(picture, scale=_SCALE)


def _renumbered(svg: str) -> str:
    """The picture with gradients numbered from 0, because Vega continues its count from picture to picture."""
    numbers: dict[str, str] = {}
    return _REFERENCE.sub(lambda m: f"{m[1]}{m[2]}{numbers.setdefault(m[3], str(len(numbers)))}", svg)


def _rounded(svg: str) -> str:
    """The picture with coordinates of two decimals, which makes files of many points a third smaller."""
    return _SHAPE.sub(lambda m: m[1] + _DECIMALS.sub(r"\1", m[2]), svg)


def runtime() -> str:
    """The script that defines `vegaEmbed` (0.9 MB), bundled once and then read from the cache."""
    check_installed("a page", modules=["vl_convert"])
    import vl_convert

    path = cache_directory() / f"vega-embed-{version('vl-convert-python')}.js"
    if path.is_file():
        return path.read_text("utf-8")
    script = vl_convert.javascript_bundle(_ENTRY).replace("</script", "<\\/script").replace("<!--", "<\\!--")
    with contextlib.suppress(OutputError):  # without a cache the script is bundled again, which takes seconds
        write_text(path, script)
    return script
