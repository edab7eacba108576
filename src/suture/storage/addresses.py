"""From an address to a local path: "zoo:NAME/PATH", a hub id, or a path on this disk.

>>> zoo_path("zoo:glyphs8/experts/greek").name
'greek'
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from suture.errors import CheckpointError, ConfigError
from suture.storage.cache import cache_directory

ZOO_ADDRESS = "zoo:"
#: Every zoo by its name, and what it holds.
ZOOS = {
    "glyphs8": "a small CLIP and eight experts: seven tasks of rendered glyphs, one of handwriting",
    "real3": "three experts for real images: clothing, handwriting, photographs",
    "manuals": "a small Llama of English manual pages, and six experts: five languages and Python code",
}
#: The zoos whose files are in the package suture-zoo. The others are built in a checkout of the repository.
PACKED = ("glyphs8",)


@cache
def packed() -> Path | None:
    """The folder of the package suture-zoo: installed, or beside this package in a checkout; None without it."""
    spec = find_spec("suture_zoo")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    beside = Path(__file__).parents[3] / "packages" / "suture-zoo" / "src" / "suture_zoo"
    return beside if beside.is_dir() else None


def names() -> list[str]:
    """The zoos whose files are there: shipped or built."""
    return [name for name in ZOOS if folder_of(name)]


def how_to_get(name: str) -> str:
    """The command that brings a zoo."""
    if name in PACKED:
        return "pip install 'suture[demo]', or pip install ./packages/suture-zoo in a checkout of suture's repository"
    return f"python -m tools.zoo build {name} in a checkout of suture's repository"


def state(name: str) -> str:
    """The state that a zoo must be in before it is used: installed or built."""
    return "installed" if name in PACKED else "built"


def installed(name: str) -> bool:
    """Whether the files of a zoo are in the package suture-zoo, and it is there."""
    folder = packed()
    return folder is not None and (folder / name / "experts").is_dir()


def home(name: str) -> Path:
    """The folder in suture's cache in which a zoo that does not ship is built and looked for."""
    return cache_directory() / "zoo" / name


def folder_of(name: str) -> Path | None:
    """The folder of a zoo: in suture-zoo or else in suture's cache; None where there is none yet."""
    if installed(name):
        return Path(str(packed())) / name
    return home(name) if (home(name) / "experts").is_dir() else None


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
        raise ConfigError(f"{address!r}: {name} is not {state(name)} yet. Remedy: {how_to_get(name)}.")
    for part in parts:
        entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if part not in entries:
            raise CheckpointError(
                f"{address!r}: {path.name!r} has no {part!r}. Known: {', '.join(entries) or 'nothing'}."
            )
        path /= part
    return path
