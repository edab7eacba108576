"""A finished run to a hub: the merged model with its card, and beside it what repairs it and what was learned."""

from pathlib import Path

from suture.checkpoints.provenance import PROVENANCE
from suture.errors import ConfigError
from suture.storage import hub

_BESIDE = ("surgery*.safetensors", "coefficients.safetensors")


def push(run: str | Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a finished run, or the folder of a merge of files, to the hub's model `name`; returns its address.

    The repository "org/name" is made if it is not there (`private` or for all to see), and so is the branch `revision`.
    All files come in one commit: an upload that breaks off changes nothing, and the next one does not send again what
    has arrived. What names places on this machine (reports, configuration, provenance) stays here. Raises `ConfigError`
    for what is no run, and `OutputError` where the hub cannot be written, before anything is sent if that can be known.
    """
    files = _files(Path(run))
    hub.check_writable(name)
    return hub.upload(files, name, private=private, revision=revision)


def _files(folder: Path) -> dict[str, Path | bytes]:
    """Where each file goes in the repository, and where it is or what it holds."""
    from suture.pipeline.model_card import CARD, card
    from suture.reporting.run_folder import read

    if (folder / PROVENANCE).is_file():
        return {path.relative_to(folder).as_posix(): path for path in _below(folder) if path.name != PROVENANCE}
    run, model = read(folder), folder / "model"
    if not any(model.glob("*.safetensors")):
        several = [path.as_posix() for path in sorted(folder.glob("models/*"))]
        found = f"the models of several methods ({', '.join(several)})" if several else "no model"
        raise ConfigError(f"'{folder}' holds {found}. Remedy: name the folder of a run that has one in 'model'.")
    files: dict[str, Path | bytes] = {path.relative_to(model).as_posix(): path for path in _below(model)}
    files |= {path.name: path for pattern in _BESIDE for path in sorted(folder.glob(pattern))}
    return {CARD: card(run).encode()} | files


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
