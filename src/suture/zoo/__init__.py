"""Models and data to start with: a zoo in the package suture-zoo, and one that a checkout of the repository builds.

>>> resolve("zoo:glyphs8/experts/greek").name
'greek'
"""

from suture.storage.addresses import ZOOS, folder_of, home, how_to_get, installed, names, state
from suture.storage.addresses import zoo_path as resolve

__all__ = ["home", "inventory", "names", "resolve"]


def inventory() -> dict[str, str]:
    """Zoo → one line: where it is or how to get it, and what it holds."""
    return {name: f"{_whereabouts(name)}: {summary}" for name, summary in ZOOS.items()}


def _whereabouts(name: str) -> str:
    if installed(name):
        return "installed"
    return f"built in {home(name)}" if folder_of(name) else f"not {state(name)} ({how_to_get(name)})"
