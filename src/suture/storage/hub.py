"""Models and data sets of a hub, by id: downloaded once into the hub's own cache, or found there when offline; uploads.

An id is "org/name", or "org/name@revision" for a branch, tag or commit. Downloads show their progress, go on where they
were interrupted, and are huggingface_hub's own.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from suture.errors import CheckpointError, DataError, OutputError, SutureError

Kind = Literal["model", "dataset"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_LONGEST_ID = 200  # letters; the hub allows 96 for each part, and a branch may follow
_COMPANIONS = ["*.json", "*.txt", "*.model"]
_NOT_AN_ID = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pickle", ".pkl", ".json", ".yaml")
_ERRORS: dict[Kind, type[SutureError]] = {"model": CheckpointError, "dataset": DataError}


def is_hub_id(text: str) -> bool:
    """Whether "org/name" can be a hub id and not a local path that happens to be missing."""
    fits = len(text) <= _LONGEST_ID and _ID.fullmatch(text) is not None and not text.endswith(_NOT_AN_ID)
    return fits and not Path(text).parent.is_dir()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that only the hub's cache may be looked at."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def download(name: str, revision: str | None = None) -> Path:
    """The directory of a hub model's weights, config and tokenizer; PyTorch files only without safetensors.

    With HF_HUB_OFFLINE=1 only the hub's cache is looked at. Raises `CheckpointError`.
    """
    directory = _snapshot("model", name, revision, ["*.safetensors", *_COMPANIONS], top_level=True)
    if not any(directory.glob("*.safetensors")):
        directory = _snapshot("model", name, revision, ["*.bin", *_COMPANIONS], top_level=True)
    return directory


def download_dataset(name: str, subset: str | None = None) -> Path:
    """The directory of a hub data set; of one subset (a folder in it) if that is named. Raises `DataError`."""
    patterns = ["*.md", "*.json", f"{subset}/*"] if subset else ["*"]
    return _snapshot("dataset", name, None, patterns)


def cached_dataset(name: str) -> Path | None:
    """The directory of a data set that is in the hub's cache already; None if it is not."""
    import huggingface_hub

    name, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, repo_type="dataset", local_files_only=True
            )
        )
    except Exception:  # as below
        return None


def check_writable(name: str) -> None:
    """Refuse what cannot be written without asking the hub: no id, no token, no network. Raises `OutputError`."""
    import huggingface_hub

    if not _ID.fullmatch(name) or "@" in name:
        raise OutputError(f"'{name}' is no name of a model on the hub. Remedy: write it as org/name.")
    if is_offline():
        raise OutputError(f"'{name}' cannot be written: HF_HUB_OFFLINE is set. Remedy: unset it.")
    if huggingface_hub.get_token() is None:
        raise OutputError(f"'{name}' cannot be written without a token. Remedy: hf auth login, or set HF_TOKEN.")


def upload(files: Mapping[str, Path | bytes], name: str, *, private: bool = False, revision: str | None = None) -> str:
    """Commit files, by their paths in the repository, to a hub model that is made if need be; returns its address.

    One commit, so that the model on the hub is always whole. Raises `OutputError`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(path, source) for path, source in files.items()]
    sending = False
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        sending = True
        api.create_commit(name, operations, commit_message="Upload a model merged with suture", revision=revision)
    except Exception as error:  # its HTTP library's errors share no base with its own
        raise _upload_refusal(name, error, sending) from error
    return f"{address}/tree/{revision}" if revision else str(address)


def _upload_refusal(name: str, error: Exception, sending: bool) -> OutputError:
    found: BaseException = error
    while found.__cause__ is not None and not hasattr(found, "response"):
        found = found.__cause__
    status = getattr(getattr(found, "response", None), "status_code", None)
    what = f"{type(found).__name__}{f', status {status}' if status else ''}"
    if status in (401, 403):
        problem, remedy = f"may not be written: the hub refuses the token ({what})", "use a token that may write there"
    elif sending:
        problem = f"is as it was: the upload broke off ({what})"
        remedy = "give the same words again; what has arrived is not sent again"
    else:
        problem, remedy = f"could not be reached ({what}); nothing was sent", "check the network and the name"
    return OutputError(f"'{name}' {problem}. Remedy: {remedy}.")


def _snapshot(kind: Kind, name: str, revision: str | None, patterns: Sequence[str], *, top_level: bool = False) -> Path:
    import huggingface_hub

    name, _, named = name.partition("@")
    revision = revision or named or None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                repo_type=kind,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"] if top_level else None,
                local_files_only=is_offline(),
            )
        )
    except Exception as error:  # its HTTP library's errors share no base with its own
        raise _refusal(kind, name, revision, error) from error


def _refusal(kind: Kind, name: str, revision: str | None, error: Exception) -> SutureError:
    what = f"the hub {'model' if kind == 'model' else 'data set'} '{name}'"
    what += f" at revision '{revision}'" if revision else ""
    found = type(error).__name__
    if is_offline():
        problem = f"is not on disk: {what} is not in the hub's cache and HF_HUB_OFFLINE is set"
        remedy = "give the path of a local copy, or unset HF_HUB_OFFLINE"
    elif found == "GatedRepoError":
        problem, remedy = f"may not be read: {what} asks for a login", "accept its terms and log in to the hub"
    elif found == "RevisionNotFoundError":
        problem, remedy = f"does not exist: the hub knows no such revision of '{name}'", "check the revision"
    elif found in ("RepositoryNotFoundError", "HFValidationError"):
        problem, remedy = f"does not exist: it is no local path and {what} is unknown", "check the spelling"
    else:
        problem = (
            f"cannot be fetched: it is no path from the folder where you are, and {what} could not be reached ({found})"
        )
        remedy = "check the network, or give the path of a local copy"
    return _ERRORS[kind](f"'{name}' {problem}. Remedy: {remedy}.")
