"""The models and data that ship with suture, so that a first run needs no training and no network.

>>> resolve("zoo:glyphs8/experts/greek").name
'greek'
"""

import pkgutil
from pathlib import Path, PurePosixPath

from suture.errors import CheckpointError, ConfigError

_HERE = Path(__file__).parent


def names() -> list[str]:
    """The zoos whose files are installed."""
    return sorted(folder.name for folder in _HERE.iterdir() if (folder / "experts").is_dir())


def buildable() -> list[str]:
    """The zoos that can be built: every module of `suture.zoo.builders`."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_HERE / "builders")]))


def resolve(source: str) -> Path:
    """The file or folder that "zoo:NAME/PATH" names.

    Raises `ConfigError` for an unknown zoo and `CheckpointError` for a path it does not have; both list
    the known names.
    """
    name, *parts = PurePosixPath(source.removeprefix("zoo:")).parts or ("",)
    if name not in names():
        raise ConfigError(f"{source!r}: there is no zoo {name!r}. Known: {', '.join(names()) or 'none'}.")
    found = _HERE / name
    for part in parts:
        known = sorted(entry.name for entry in found.iterdir()) if found.is_dir() else []
        if part not in known:
            raise CheckpointError(
                f"{source!r}: {found.name!r} has no {part!r}. Known: {', '.join(known) or 'nothing'}."
            )
        found /= part
    return found


def build(name: str, out: Path, seed: int = 0, **options) -> Path:
    """Train a zoo from scratch into the new folder `out`; same seed and threads, same bits on one machine.

    Options are those of the zoo's own builder (a `recipe`). Raises `ConfigError` for an unknown name
    or option, and `OutputError` if `out` exists.
    """
    if name not in buildable():
        raise ConfigError(f"There is no zoo {name!r} to build. Known: {', '.join(buildable())}.")
    from suture.zoo.building import build_zoo

    return build_zoo(name, Path(out), seed, options)
