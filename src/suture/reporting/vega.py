"""The plotting library of the page: Vega-Lite's runtime, as one script without network.

It comes out of `vl-convert-python`, an extra (`suture[page]`): 85 MB installed, 0.9 MB in a page, where plotly's script
would be 4.5 MB. Charts are plain JSON, so a page without it is the same page with still pictures.
"""

import contextlib
from importlib.metadata import version

from suture.errors import OutputError
from suture.storage.atomic import write_text
from suture.storage.cache import cache_directory

_ENTRY = "window.vegaEmbed = vegaEmbed;"


def runtime() -> str | None:
    """The script that defines `vegaEmbed`, made once and then taken from the cache; None without the extra."""
    try:
        import vl_convert
    except ModuleNotFoundError:
        return None
    path = cache_directory() / f"vega-embed-{version('vl-convert-python')}.js"
    if path.is_file():
        return path.read_text("utf-8")
    script = vl_convert.javascript_bundle(_ENTRY).replace("</script", "<\\/script").replace("<!--", "<\\!--")
    with contextlib.suppress(OutputError):  # a cache that cannot be written costs seconds, not the page
        write_text(path, script)
    return script
