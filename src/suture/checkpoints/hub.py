"""Models of a hub, by id: downloaded once into the hub's own cache, or found there when offline."""

import os
import re
from pathlib import Path

from suture.checkpoints.formats import SUFFIXES
from suture.checkpoints.refusals import refusal

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMPANIONS = ["*.json", "*.txt", "*.model"]


def is_hub_id(text: str) -> bool:
    """Whether "org/name" can be a hub id and not a local path that happens to be missing."""
    return bool(_ID.fullmatch(text)) and not text.endswith((*SUFFIXES, ".json")) and not Path(text).parent.is_dir()


def download(name: str, revision: str | None = None) -> Path:
    """The directory of a hub model's weights, config and tokenizer; PyTorch files only without safetensors.

    With HF_HUB_OFFLINE=1 only the hub's cache is looked at. Raises `CheckpointError`.
    """
    directory = _snapshot(name, revision, ["*.safetensors", *_COMPANIONS])
    if not any(directory.glob("*.safetensors")):
        directory = _snapshot(name, revision, ["*.bin", *_COMPANIONS])
    return directory


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=offline,
            )
        )
    except Exception as error:  # its HTTP library's errors share no base with its own
        raise _refusal(name, revision, offline, error) from error


def _refusal(name: str, revision: str | None, offline: bool, error: Exception) -> Exception:
    what = f"the hub model '{name}'" + (f" at revision '{revision}'" if revision else "")
    kind = type(error).__name__
    if offline:
        problem, remedy = (
            f"is not on disk: {what} is not in the hub's cache and HF_HUB_OFFLINE is set",
            ("give the path of a local copy, or unset HF_HUB_OFFLINE"),
        )
    elif kind == "GatedRepoError":
        problem, remedy = (
            f"may not be read: {what} asks for a login",
            "accept its terms and log in to the hub",
        )
    elif kind == "RevisionNotFoundError":
        problem, remedy = f"does not exist: the hub knows no such revision of '{name}'", "check the revision"
    elif kind in ("RepositoryNotFoundError", "HFValidationError"):
        problem, remedy = f"does not exist: it is no local path and {what} is unknown", "check the spelling"
    else:
        problem = f"cannot be fetched: it is no local path, and {what} could not be reached ({kind})"
        remedy = "check the network, or give the path of a local copy"
    return refusal(name, problem, remedy)
