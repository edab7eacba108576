"""From an address to a local path: "zoo:NAME/PATH", a hub id, or a path on this disk.

>>> zoo_path("zoo:glyphs8/experts/greek").name
'greek'
"""

from pathlib import Path, PurePosixPath

from suture.errors import CheckpointError, ConfigError
from suture.storage.cache import cache_directory

ZOO = Path(__file__).parent.parent / "zoo"
ZOO_ADDRESS = "zoo:"
#: Every zoo by its name, and what it holds. One that does not ship is built in a checkout of the repository.
ZOOS = {
    "glyphs8": "a small CLIP and eight experts: seven tasks of rendered glyphs, one of handwriting",
    "real3": "three experts for real images: clothing, handwriting, photographs",
    "manuals": "a small Llama of English manual pages, and six experts: five languages and Python code",
}


def names() -> list[str]:
    """The zoos whose files are there: shipped or built."""
    return [name for name in ZOOS if folder_of(name)]


def how_to_build(name: str) -> str:
    """The command that builds a zoo."""
    return f"python -m tools.zoo build {name} in a checkout of suture's repository"


def ships(name: str) -> bool:
    """Whether the files of a zoo came with the package."""
    return (ZOO / name / "experts").is_dir()


def home(name: str) -> Path:
    """The folder in suture's cache in which a zoo that does not ship is built and looked for."""
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
    if name not in ZOOS:
        raise ConfigError(f"{address!r}: there is no zoo {name!r}. Known: {', '.join(ZOOS)}.")
    path = folder_of(name)
    if path is None:
        raise ConfigError(f"{address!r}: {name} is not built yet. Remedy: {how_to_build(name)}.")
    for part in parts:
        entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if part not in entries:
            raise CheckpointError(
                f"{address!r}: {path.name!r} has no {part!r}. Known: {', '.join(entries) or 'nothing'}."
            )
        path /= part
    return path
