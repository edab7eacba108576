"""Formats of files, told by their first bytes, and the entries of those that hold weights."""

from pathlib import Path

from suture.checkpoints.checkpoint import Entry
from suture.checkpoints.gguf_files import read_gguf
from suture.checkpoints.safetensors_files import read_safetensors
from suture.checkpoints.torch_files import read_legacy_torch, read_torch_zip
from suture.errors import CheckpointError, refusal
from suture.storage.remote import RemotePath

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
_DOWNLOAD = "download the weights themselves"
_STRANGERS = [
    (
        b"version https://git-lfs",
        "is a git-lfs pointer, not the weights",
        "run `git lfs pull` in its repository",
    ),
    (b"\x89HDF", "is an HDF5 file, which is not read", "give a safetensors or PyTorch file"),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it"),
    (b"\x93NUMPY", "is a NumPy array, not a checkpoint", "give a safetensors or PyTorch file"),
]


def read_entries(path: Path, key: str | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of a file and the text saved beside them; `CheckpointError` if it holds no weights.

    `key` chooses one of several models that a PyTorch file holds.
    """
    try:
        if not path.is_file():  # a pipe would keep its reader waiting, a device would have no end
            kind = "a folder" if path.is_dir() else "no regular file"
            raise refusal(path, f"is {kind}, not a file of weights", "give the file or model directory itself")
        with path.open("rb") as file:
            start = file.read(512)
        return _read(path, start, key)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise refusal(path, problem, "check the path and its permissions") from error
    except RecursionError as error:
        raise refusal(path, "is nested too deeply to be a checkpoint", "copy or download it again") from error


def _read(path: Path, start: bytes, key: str | None) -> tuple[dict[str, Entry], dict[str, str]]:
    stranger = _stranger(path, start)
    if stranger:
        raise stranger
    if isinstance(path, RemotePath) and start[8:9] != b"{":
        raise refusal(path, "is no safetensors file, and only these are read by ranges", "download it first")
    if start[:4] == b"GGUF":
        return read_gguf(path)
    if start[:4] == b"PK\x03\x04":
        return read_torch_zip(path, key), {}
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return read_safetensors(path)
    if start[:1] == b"\x80" or path.suffix in PICKLE_SUFFIXES:
        return read_legacy_torch(path, key), {}
    problem = f"is no checkpoint; it starts with the bytes {start[:8].hex(' ')}"
    raise refusal(path, problem, "give a safetensors or PyTorch file")


def _stranger(path: Path, start: bytes) -> CheckpointError | None:
    if not start:
        return refusal(path, "is empty", "copy or download it again")
    if not any(start):
        return refusal(path, "starts with nothing but zeros: its download was not finished", _DOWNLOAD)
    if start.lstrip()[:1] == b"<" and b">" in start:
        return refusal(path, "is a web page, not the weights", _DOWNLOAD)
    return next((refusal(path, *message) for magic, *message in _STRANGERS if start.startswith(magic)), None)
