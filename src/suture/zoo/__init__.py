"""Models and data to start with: a zoo that ships with suture, and one that a checkout of its repository builds.

>>> resolve("zoo:glyphs8/experts/greek").name
'greek'
"""

from suture.storage.addresses import ZOOS, folder_of, home, how_to_build, names, ships
from suture.storage.addresses import zoo_path as resolve

__all__ = ["home", "inventory", "names", "resolve"]


def inventory() -> dict[str, str]:
    """Zoo → one line: where it is or how to get it, and what it holds."""
    return {name: f"{_whereabouts(name)}: {summary}" for name, summary in ZOOS.items()}


def _whereabouts(name: str) -> str:
    if ships(name):
        return "ships with suture"
    return f"built in {home(name)}" if folder_of(name) else f"not built ({how_to_build(name)})"
