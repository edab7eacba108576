"""Models and data to start with: what ships with suture, and what it builds from data on this machine.

>>> resolve("zoo:glyphs8/experts/greek").name
'greek'
"""

import pkgutil
from pathlib import Path, PurePosixPath

from suture.errors import CheckpointError, ConfigError

_HERE = Path(__file__).parent


def names() -> list[str]:
    """The zoos whose files are there: shipped or built."""
    shipped = {folder.name for folder in _HERE.iterdir() if (folder / "experts").is_dir()}
    return sorted({*shipped, *(name for name in buildable() if folder_of(name))})


def buildable() -> list[str]:
    """The zoos that can be built: every module of `suture.zoo.builders`."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_HERE / "builders")]))


def ships(name: str) -> bool:
    """Whether the files of a zoo came with the package."""
    return (_HERE / name / "experts").is_dir()


def home(name: str) -> Path:
    """The folder that a zoo which does not ship is built into, unless told otherwise: in suture's cache."""
    from suture.checkpoints.hashing import cache_directory

    return cache_directory() / "zoo" / name


def folder_of(name: str) -> Path | None:
    """The folder of a zoo: in the package or else in suture's cache; None where there is none yet."""
    return next((folder for folder in (_HERE / name, home(name)) if (folder / "experts").is_dir()), None)


def resolve(source: str) -> Path:
    """The file or folder that "zoo:NAME/PATH" names.

    Raises `ConfigError` for an unknown zoo or one that is not built yet, and `CheckpointError` for a path it
    does not have; both list the known names.
    """
    name, *parts = PurePosixPath(source.removeprefix("zoo:")).parts or ("",)
    known = sorted({*names(), *buildable()})
    if name not in known:
        raise ConfigError(f"{source!r}: there is no zoo {name!r}. Known: {', '.join(known)}.")
    found = folder_of(name)
    if found is None:
        raise ConfigError(f"{source!r}: {name} is not built yet. Remedy: suture zoo build {name}")
    for part in parts:
        known = sorted(entry.name for entry in found.iterdir()) if found.is_dir() else []
        if part not in known:
            raise CheckpointError(
                f"{source!r}: {found.name!r} has no {part!r}. Known: {', '.join(known) or 'nothing'}."
            )
        found /= part
    return found


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
