"""Files of `torch.save`: a zip archive of a pickle and the raw storages, or the stream of PyTorch before 1.6.

The pickle is read as data (`unpickling`); tensors are views of the file.
"""

import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import SUPPORTED, Entry, TensorSpec
from suture.checkpoints.pickle_calls import StorageRef, TensorRef
from suture.checkpoints.state_dicts import weights
from suture.checkpoints.unpickling import read_pickle
from suture.core.names import short
from suture.errors import refusal, shown
from suture.storage.mapped_file import MappedFile

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LARGEST_PICKLE = 1 << 30  # bytes
_AGAIN = "copy or download it again"
_PLAIN = "save it anew as safetensors or with torch.save(model.state_dict(), …)"


class Extent(NamedTuple):
    """The position of a run of bytes in a file."""

    begin: int
    nbytes: int


def read_torch_zip(path: Path, key: str | None = None) -> dict[str, Entry]:
    """The entries of a PyTorch zip file; `CheckpointError` if it is not whole or asks for code to be run.

    `key` chooses one of several models. Of a TorchScript archive only the weights are read, none of its program.
    """
    records = _zip_records(path)
    prefix = _archive_prefix(path, records)
    with path.open("rb") as file:
        order = _bytes_of(file, path, records.get(f"{prefix}byteorder", Extent(0, 0))).strip()
        if order not in (b"", b"little"):
            raise refusal(path, f"was written with the byte order {order!r}, not little", _PLAIN)
        value = read_pickle(BytesIO(_bytes_of(file, path, records[f"{prefix}data.pkl"])), path)
    storages = {
        name.removeprefix(f"{prefix}data/"): extent
        for name, extent in records.items()
        if name.startswith(f"{prefix}data/")
    }
    return _entries(path, weights(value, path, key), storages)


def read_legacy_torch(path: Path, key: str | None = None) -> dict[str, Entry]:
    """The entries of a file of PyTorch before 1.6, or the refusal of any other pickle."""
    with path.open("rb") as file:
        magic = read_pickle(file, path)
        if magic != _LEGACY_MAGIC:
            raise refusal(path, f"is a plain pickle of a {type(magic).__name__}, not a PyTorch file", _PLAIN)
        protocol, system = read_pickle(file, path), read_pickle(file, path)
        if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
            raise refusal(path, "was written by an unknown version of PyTorch or with another byte order", _PLAIN)
        seen: dict[str, StorageRef] = {}
        value = read_pickle(file, path, seen)
        keys = read_pickle(file, path)
        storages = _legacy_storages(file, path, keys, seen)
    return _entries(path, weights(value, path, key), storages)


def _zip_records(path: Path) -> dict[str, Extent]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            listed = archive.infolist()
            names = {info.filename for info in listed}
            if len(names) != len(listed):
                raise ValueError("it lists a record twice")
            return {info.filename: _record(file, info) for info in listed if not _is_program(info.filename)}
    except (
        zipfile.BadZipFile,
        ValueError,
        struct.error,
        NotImplementedError,
        EOFError,
        LookupError,
    ) as error:
        raise refusal(path, f"is a truncated or corrupt PyTorch zip file: {error}", _AGAIN) from error


def _record(file: IO[bytes], info: zipfile.ZipInfo) -> Extent:
    """A record's bytes; its local header says how long the names and the padding before them are."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ValueError(f"its record '{info.filename}' is compressed")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"its record '{info.filename}' is not where the list says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    begin = info.header_offset + 30 + name_length + extra_length
    if begin + info.file_size > file.seek(0, 2):
        raise ValueError(f"its record '{info.filename}' ends after the file")
    return Extent(begin, info.file_size)


def _archive_prefix(path: Path, records: Mapping[str, Extent]) -> str:
    """The folder that everything in the archive is under, with its slash."""
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    prefix = roots[0] if roots else ""
    if len(roots) != 1:
        raise refusal(path, "is a zip file, but not one that PyTorch saved", "give a safetensors or PyTorch file")
    return prefix


def _is_program(name: str) -> bool:
    """Whether a record belongs to the program of a TorchScript archive, and not to its weights."""
    return name.split("/")[1:2] in (["constants.pkl"], ["constants"], ["code"], ["extra"])


def _bytes_of(file: IO[bytes], path: Path, extent: Extent) -> bytes:
    if extent.nbytes > _LARGEST_PICKLE:
        raise refusal(path, f"has a pickle of {extent.nbytes} bytes, too many for names and shapes", _PLAIN)
    file.seek(extent.begin)
    return file.read(extent.nbytes)


def _legacy_storages(file: IO[bytes], path: Path, keys: Any, seen: Mapping[str, StorageRef]) -> dict[str, Extent]:
    """After the pickles come, in the order of `keys`, each storage's length (8 bytes) and its bytes."""
    begin, size = file.tell(), file.seek(0, 2)
    storages = {}
    for key in keys if isinstance(keys, list) else ():
        if key not in seen:
            raise refusal(path, f"is corrupt: no tensor uses its storage {shown(key)!r}", _AGAIN)
        file.seek(begin)
        count = int.from_bytes(file.read(8), "little")
        storages[key] = Extent(begin + 8, count * seen[key].dtype.itemsize)
        begin = sum(storages[key])
        if begin > size:
            raise refusal(path, f"is truncated: its storages take at least {begin} of {size} bytes", _AGAIN)
    return storages


def _entries(path: Path, tensors: Mapping[str, TensorRef], storages: Mapping[str, Extent]) -> dict[str, Entry]:
    file = MappedFile(path)
    return {name: _entry(file, name, tensor, storages) for name, tensor in tensors.items()}


def _entry(file: MappedFile, name: str, tensor: TensorRef, storages: Mapping[str, Extent]) -> Entry:
    spec = TensorSpec(tensor.shape, tensor.dtype)
    if not spec.addressable:
        raise refusal(file.path, f"gives {shown(name)!r} a shape larger than any tensor can have", _PLAIN)
    if spec.dtype not in SUPPORTED:
        problem = f"holds a tensor of the unsupported dtype {short(spec.dtype)} under {shown(name)!r}"
        raise refusal(file.path, problem, "convert it to a floating-point, integer or bool dtype")
    if spec.numel == 0:
        return Entry(spec, partial(torch.empty, spec.shape, dtype=spec.dtype))
    record = storages.get(tensor.storage.key)
    if record is None:
        raise refusal(file.path, f"has lost the record with the values of {shown(name)!r}", _AGAIN)
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    end = (tensor.offset + max(length, spec.numel)) * spec.dtype.itemsize
    if end > record.nbytes:
        problem = f"claims {end} bytes for {shown(name)!r} {tensor.shape}, but its record holds {record.nbytes}"
        raise refusal(file.path, problem, _PLAIN)
    begin = record.begin + tensor.offset * spec.dtype.itemsize
    read = partial(_view, file, begin, length, tensor)
    return Entry(spec, read, (file.path, begin, tensor.shape, tensor.stride, spec.dtype), file=file)


def _view(file: MappedFile, begin: int, length: int, tensor: TensorRef) -> Tensor:
    return file.tensor(begin, length, tensor.dtype).as_strided(tensor.shape, tensor.stride)
