"""Models and data to start with: what ships with suture, and what it builds from data on this machine.

>>> resolve("zoo:glyphs8/experts/greek").name
'greek'
"""

from pathlib import Path

from suture.errors import ConfigError
from suture.storage.addresses import buildable, folder_of, home, names, ships
from suture.storage.addresses import zoo_path as resolve

__all__ = ["build", "buildable", "folder_of", "home", "inventory", "names", "resolve", "ships"]


def build(name: str, out: Path | None = None, seed: int = 0, **options) -> Path:
    """Train a zoo into the new folder `out`, by default its `home`; same seed and threads, same bits on one machine.

    Options are those of the zoo's own builder (a `recipe`, `data`). Returns the folder. Raises `ConfigError` for
    an unknown name or option, `DataError` for data that is not there, and `OutputError` if the folder exists.
    """
    if name not in buildable():
        raise ConfigError(f"There is no zoo {name!r} to build. Known: {', '.join(buildable())}.")
    if out is None and ships(name):
        raise ConfigError(f"{name} ships with suture. Remedy: to build it anew, name a folder: --output DIR")
    from suture.zoo.building import build_zoo

    return build_zoo(name, Path(out or home(name)), seed, options)


def inventory() -> dict[str, str]:
    """One line on each zoo: where it is, or how to get it, and what is in it."""
    from importlib import import_module

    about = {name: import_module(f"suture.zoo.builders.{name}").SUMMARY for name in buildable()}
    return {name: f"{_whereabouts(name)}: {about[name]}" for name in about}


def _whereabouts(name: str) -> str:
    if ships(name):
        return "ships with suture"
    return f"built in {home(name)}" if folder_of(name) else f"not built, suture zoo build {name} makes it"
