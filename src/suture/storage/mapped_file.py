"""A file mapped into memory once, privately; tensors are views of it."""

import mmap
import os
import sys
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from suture.errors import refusal

# Without it Linux counts a whole private mapping as memory, and refuses one that is larger than what it has.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """The bytes of a file, mapped when the first tensor is read. The mapping lives as long as its tensors."""

    def __init__(self, path: Path):
        self.path = path

    def tensor(self, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` entries from byte `begin` on, 1-D: a view with its own storage, or a copy if unaligned."""
        end = begin + count * dtype.itemsize
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if end > len(self._bytes):
            raise refusal(self.path, "became shorter after it was opened", "leave it alone while it is read")
        if begin % dtype.itemsize:
            return torch.frombuffer(bytearray(self._bytes[begin:end]), dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=begin)

    def let_go(self) -> None:
        """Take the file's pages out of this process's memory; changes that were made to them are lost."""
        if "_bytes" in vars(self) and hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def _bytes(self) -> mmap.mmap:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                return _map_privately(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise refusal(self.path, f"cannot be mapped: {error}", "check that it still exists") from error


def _map_privately(descriptor: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)
