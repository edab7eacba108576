"""Small models and hand-made files for the tests of checkpoints."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from suture.errors import SutureError


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def torch_zip(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **extra: bytes) -> Path:
    """A zip file as `torch.save` makes it, with a pickle of our own."""
    records = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **extra}
    records |= {f"data/{key}": value for key, value in (storages or {}).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in records.items():
            archive.writestr(f"archive/{name}", value)
    return path


def saved_pickle(value: object) -> bytes:
    """The pickle inside what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with a header of our own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def assert_same(found, wanted) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def refused(function, *arguments, kind: type[SutureError], **options) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    line = str(caught.value)
    assert line.isprintable()
    assert "Remedy: " in line
    return line
