"""From an address to a local path: "zoo:NAME/PATH", a hub id, or a path on this disk.

>>> zoo_path("zoo:glyphs8/experts/greek").name
'greek'
"""

from pathlib import Path, PurePosixPath

from suture.errors import CheckpointError, ConfigError
from suture.storage.cache import cache_directory

ZOO = Path(__file__).parent.parent / "zoo"
ZOO_ADDRESS = "zoo:"


def names() -> list[str]:
    """The zoos whose files are there: shipped or built."""
    shipped = {folder.name for folder in ZOO.iterdir() if (folder / "experts").is_dir()}
    return sorted({*shipped, *(name for name in buildable() if folder_of(name))})


def buildable() -> list[str]:
    """The zoos that can be built: every module of `suture.zoo.builders`."""
    return sorted(file.stem for file in (ZOO / "builders").glob("[a-z]*.py"))


def ships(name: str) -> bool:
    """Whether the files of a zoo came with the package."""
    return (ZOO / name / "experts").is_dir()


def home(name: str) -> Path:
    """The folder that a zoo which does not ship is built into, unless told otherwise: in suture's cache."""
    return cache_directory() / "zoo" / name


def folder_of(name: str) -> Path | None:
    """The folder of a zoo: in the package or else in suture's cache; None where there is none yet."""
    return next((folder for folder in (ZOO / name, home(name)) if (folder / "experts").is_dir()), None)


def zoo_path(address: str) -> Path:
    """The file or folder that "zoo:NAME/PATH" names.

    Raises `ConfigError` for an unknown zoo or one that is not built yet, and `CheckpointError` for a path it
    does not have; both list the known names.
    """
    name, *parts = PurePosixPath(address.removeprefix(ZOO_ADDRESS)).parts or ("",)
    known = sorted({*names(), *buildable()})
    if name not in known:
        raise ConfigError(f"{address!r}: there is no zoo {name!r}. Known: {', '.join(known)}.")
    found = folder_of(name)
    if found is None:
        raise ConfigError(f"{address!r}: {name} is not built yet. Remedy: suture zoo build {name}")
    for part in parts:
        known = sorted(entry.name for entry in found.iterdir()) if found.is_dir() else []
        if part not in known:
            raise CheckpointError(
                f"{address!r}: {found.name!r} has no {part!r}. Known: {', '.join(known) or 'nothing'}."
            )
        found /= part
    return found
