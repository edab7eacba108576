"""Files that lie elsewhere: `s3://`, `hf://` and any address of fsspec, read by ranges, written whole.

Reads go through one small cache of blocks, whatever the number and size of the files. What breaks off is asked for
again; so is what a throttling server refuses.
"""

import hashlib
import inspect
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from suture.errors import CheckpointError, ConfigError, SutureError, output_refusal, refusal

T = TypeVar("T")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.]*(::[a-z][a-z0-9+.]*)*://.+", re.DOTALL)
_TRIES = 6
_FIRST_WAIT = 0.1  # seconds; doubled after every try
_HEADER = 1 << 18
_BLOCK = 1 << 23
_LEAST_BLOCK = 1 << 16
_EACH = 3  # blocks of each file that is read beside others: this one, the next one, and one to spare
_STREAMS = 4
_READERS = 8
_PART, _PARTS = 1 << 23, 4  # of a file that is sent; s3fs would hold ten parts of 50 MB
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


def is_remote(text: object) -> bool:
    """Whether a text is an address of fsspec.

    >>> is_remote("s3://bucket/model"), is_remote("hf://org/name"), is_remote("zoo:glyphs8"), is_remote("a/b")
    (True, True, False, False)
    """
    return isinstance(text, str) and _ADDRESS.fullmatch(text) is not None


class State(NamedTuple):
    """The part of `Path.stat` that is used here; any change of the file changes `st_mtime_ns`."""

    st_size: int
    st_mtime_ns: int
    st_ino: int = 0


class RemotePath:
    """A file or folder at an address, with the part of the interface of `pathlib.Path` that reading models takes."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"RemotePath({self.address!r})"

    def __fspath__(self) -> str:
        return self.address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __lt__(self, other: "RemotePath") -> bool:
        return self.address < other.address

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder."""
        head = self.address.rsplit("/", 1)[0]
        return self if head.endswith(("/", ":")) else RemotePath(head)

    def absolute(self) -> "RemotePath":
        """The same: an address is absolute."""
        return self

    def is_symlink(self) -> bool:
        """False: there are no links."""
        return False

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether there is a file."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether there is a folder; object stores have one where they have objects below it."""
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> State:
        """Size and version, asked for anew; raises `FileNotFoundError`."""
        self._system.invalidate_cache()
        info = self._info()
        if info is None:
            raise FileNotFoundError(2, "it does not exist")
        return State(int(info.get("size") or 0), int(self._version(info)[:12], 16))

    @property
    def version(self) -> str:
        """A hash of what the server says of this version of the file: its tag, time, checksum, size."""
        return self._version(self._info() or {})

    @staticmethod
    def _version(info: dict[str, Any]) -> str:
        keys = (
            "ETag",
            "etag",
            "md5",
            "checksum",
            "LastModified",
            "mtime",
            "last_commit",
            "blob_id",
            "VersionId",
            "size",
        )
        text = json.dumps([str(info.get(key)) for key in keys])
        return hashlib.sha256(text.encode()).hexdigest()

    def iterdir(self) -> Iterator["RemotePath"]:
        """The files and folders in a folder."""
        entries = patiently(lambda: self._system.ls(self._path, detail=False), self.address)
        for entry in sorted(entries):
            name = str(entry).rstrip("/").rsplit("/", 1)[-1]
            if name and name != self.name:
                yield self / name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """The entries of a folder whose names match."""
        return (entry for entry in self.iterdir() if fnmatchcase(entry.name, pattern))

    def read_bytes(self) -> bytes:
        """The whole content of a small file."""
        return patiently(lambda: self._system.cat_file(self._path), self.address)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The whole content of a small file as text."""
        return self.read_bytes().decode(encoding, errors)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file for reading."""
        return self._system.open(self._path, mode, block_size=_HEADER)

    def range(self, begin: int, end: int) -> bytes:
        """The bytes begin … end; raises `CheckpointError` if they cannot be had."""

        def read() -> bytes:
            data = self._system.cat_file(self._path, start=begin, end=end)
            if len(data) != end - begin:
                raise OSError(None, f"{len(data)} bytes came of {end - begin}")
            return data

        try:
            return patiently(read, self.address)
        except OSError as error:
            raise refusal(
                self.address, f"cannot be read: {_reason(error)}", "check the network and the address"
            ) from error

    def _info(self) -> dict[str, Any] | None:
        try:
            return patiently(lambda: self._system.info(self._path), self.address)
        except FileNotFoundError:
            return None

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _path(self) -> str:
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return _file_system(self.address)

    def send(self, file: Path) -> None:
        """Write a local file here: in parts if it is large, visible when it is whole. Raises `OutputError`."""

        def write() -> None:
            self._system.put_file(str(file), self._path, **self._in_parts)
            self._system.invalidate_cache()
            if (found := self._system.info(self._path).get("size")) != file.stat().st_size:
                raise OSError(None, f"{found} bytes are there of {file.stat().st_size}")

        try:
            patiently(write, self.address)
        except (OSError, NotImplementedError, CheckpointError) as error:
            problem = f"cannot be written: {_reason(error)}"
            remedy = "check the network and your rights there; the same command then sends what is missing"
            raise output_refusal(self.address, problem, remedy) from error

    @property
    def _in_parts(self) -> dict[str, int]:
        """The size and number of the parts of a file that are held at a time, where the file system can be told."""
        known = inspect.signature(getattr(self._system, "_put_file", self._system.put_file)).parameters
        return {key: value for key, value in {"chunksize": _PART, "max_concurrency": _PARTS}.items() if key in known}

    def remove(self) -> None:
        """Remove a file."""
        patiently(lambda: self._system.rm_file(self._path), self.address)
        self._system.invalidate_cache()


class RangedFile:
    """The tensors of a file that is read by ranges, through the blocks that all files share."""

    def __init__(self, path: RemotePath, size: int):
        self.path, self.size = path, size

    def tensor(self, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` entries from byte `begin` on, 1-D."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        data = bytearray(count * dtype.itemsize)
        end, at = begin + len(data), begin
        while at < end:
            start, block = BLOCKS.block(self, at)
            part = block[at - start : end - start]
            data[at - begin : at - begin + len(part)] = part
            at += len(part)
        return torch.frombuffer(data, dtype=dtype)


class _Blocks:
    """The blocks of files that were read last; each is asked for by one thread, and the others wait for it.

    Behind a block that follows the last one of its file, the next one is asked for beside the reader's work.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.limit(1 << 26)

    def limit(self, memory: int, streams: int = _STREAMS) -> None:
        """Hold at most about so many bytes, for so many files that are read side by side."""
        size = min(_BLOCK, memory // (_EACH * streams))
        self.size = max(_LEAST_BLOCK, size - size % _LEAST_BLOCK)
        self.count = max(2, memory // self.size)
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._last: dict[tuple[str, int], int] = {}  # file and thread → start of the block that it read last

    def block(self, file: RangedFile, at: int) -> tuple[int, bytes]:
        """The first byte, and the bytes, of the block with the byte `at`."""
        start, reader = at - at % self.size, (file.path.address, threading.get_ident())
        following, ahead = start + self.size, None
        with self._lock:
            future, new = self._entry(file, start)
            if self._last.get(reader) == start - self.size and following < file.size:
                ahead, missing = self._entry(file, following)
                ahead = ahead if missing else None
            self._last[reader] = start
        if ahead is not None:
            _readers().submit(self._fetch, file, following, ahead)
        if new:
            self._fetch(file, start, future)
        return start, future.result()

    def _entry(self, file: RangedFile, start: int) -> tuple[Future[bytes], bool]:
        """The block that begins at `start`, and whether it is still to be fetched."""
        key = (file.path.address, start)
        new = key not in self._held
        future = self._held.setdefault(key, Future())
        self._held.move_to_end(key)
        while len(self._held) > self.count:
            self._held.popitem(last=False)
        return future, new

    def _fetch(self, file: RangedFile, start: int, future: Future[bytes]) -> None:
        try:
            future.set_result(file.path.range(start, min(start + self.size, file.size)))
        except BaseException as error:
            with self._lock:
                self._held.pop((file.path.address, start), None)
            future.set_exception(error)


@cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read ahead."""
    return ThreadPoolExecutor(_READERS, "reading ahead")


#: The blocks of all remote files of this process.
BLOCKS = _Blocks()


def patiently(function: Callable[[], T], address: str) -> T:
    """The result of a call, which is made again after errors that may pass; raises the last one."""
    wait = _FIRST_WAIT
    for left in reversed(range(_TRIES)):
        try:
            return function()
        except (*_FINAL, SutureError, NotImplementedError):
            raise
        except Exception as error:  # every file system has errors of its own
            if not left:
                raise OSError(None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
            time.sleep(wait)
            wait *= 2
    raise AssertionError(address)


@cache
def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise ConfigError(f"'{address}' needs fsspec. Remedy: pip install 'suture[remote]'.") from None
    try:
        system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        remedy = "pip install 'suture[remote]', or give a local path"
        raise ConfigError(f"'{address}' cannot be opened: {' '.join(str(error).split())}. Remedy: {remedy}.") from None
    return system, str(path)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
