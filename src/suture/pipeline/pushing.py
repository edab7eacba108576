"""Uploading a finished run to a hub: the merged model with its card, its repairs and its coefficients."""

from pathlib import Path

from suture.checkpoints.provenance import PROVENANCE
from suture.errors import ConfigError
from suture.storage import hub

_BESIDE = ("surgery*.safetensors", "coefficients.safetensors")


def push(run: str | Path, name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a finished run, or the folder of a merge of files, to the hub's model `name`; returns its address.

    The repository "org/name" (`private` or public) and the branch `revision` are created if needed. All files are one
    commit: an interrupted upload changes nothing, and the next one does not send files again that have arrived. Files
    with paths of this machine (reports, configuration, provenance) are not uploaded. Raises `ConfigError` for a folder
    that is not a run's, and `OutputError` if the hub cannot be written, if possible before anything is sent.
    """
    files = _files(Path(run))
    hub.check_writable(name)
    return hub.upload(files, name, private=private, revision=revision)


def _files(folder: Path) -> dict[str, Path | bytes]:
    """Path in the repository → the file's path here, or its contents."""
    from suture.pipeline.model_card import CARD, card
    from suture.reporting.run_folder import read

    if (folder / PROVENANCE).is_file():
        return {path.relative_to(folder).as_posix(): path for path in _below(folder) if path.name != PROVENANCE}
    run, model = read(folder), folder / "model"
    if not any(model.glob("*.safetensors")):
        several = [path.parent.as_posix() for path in sorted(folder.glob("*/model"))]
        contents = f"the models of several methods ({', '.join(several)})" if several else "no model"
        raise ConfigError(f"'{folder}' holds {contents}. Remedy: name the folder of a run that has one in 'model'.")
    files: dict[str, Path | bytes] = {path.relative_to(model).as_posix(): path for path in _below(model)}
    files |= {path.name: path for pattern in _BESIDE for path in sorted(folder.glob(pattern))}
    return {CARD: card(run).encode()} | files


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
