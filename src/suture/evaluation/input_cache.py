"""The input cache: decoded images and tokens in memory-mapped files, made once for every model and every later run.

A file's key is the inputs' `identity` and the family's `preprocessing`. The cache may be deleted at any time; if it
cannot be written, the inputs are held in memory instead.
"""

import logging
import math
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.core.batches import Inputs
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, OutputError
from suture.families.shared.base import Family
from suture.storage.atomic import new_file
from suture.storage.cache import cache_directory, digest, making
from suture.storage.mapped_file import MappedFile
from suture.tasks.base import Images, Tensors, Texts

T = TypeVar("T")
log = logging.getLogger(__name__)


def decoded(
    family: Family, data: Images | Texts | Tensors, track: Track = untracked, description: str = "Decoding"
) -> Inputs:
    """Data as the family's inputs, from the cache if possible; tensors are inputs already.

    Data without an identity, and those of a family whose `preprocessing` is empty, are not cached.
    """
    if isinstance(data, Tensors):
        return data.inputs
    if isinstance(data, Texts):
        return _tokenized(family, data, track, description)
    return _decoded(family, data, track, description)


def _tokenized(family: Family, texts: Texts, track: Track, description: str) -> dict[str, Tensor]:
    if texts.identity is None or len(texts) == 0 or not family.preprocessing:
        return family.tokens(texts, track, description)
    path = cache_directory() / "inputs" / f"{digest({}, [], texts.identity, family.preprocessing)}.safetensors"
    cached = _cached_tokens(path, len(texts))
    if cached is not None:
        return cached
    tokens = family.tokens(texts, track, description)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(tokens, path)
    except (OSError, OutputError) as error:
        log.warning("Tokens are held in memory, not in %s: %s", path.parent, error)
        return tokens
    return dict(open_checkpoint(path))


def _cached_tokens(path: Path, count: int) -> dict[str, Tensor] | None:
    try:
        tokens = dict(open_checkpoint(path)) if path.is_file() else {}
    except CheckpointError:  # a damaged file is replaced
        return None
    return tokens if tokens and all(len(tensor) == count for tensor in tokens.values()) else None


def _decoded(family: Family, images: Images, track: Track, description: str) -> Tensor:
    if images.identity is None or len(images) == 0 or not family.preprocessing:
        return family.decode(images, track, description)
    shape = (len(images), *family.input_shape)
    path = cache_directory() / "inputs" / f"{digest({}, [], images.identity, family.preprocessing, shape)}.uint8"
    if not _is_whole(path, shape):
        try:
            with making(path):
                if not _is_whole(path, shape):
                    _fill(path, shape, lambda pixels: family.decode(images, track, description, pixels))
        except OutputError as error:
            log.warning("Decoded inputs are held in memory, not in %s: %s", path.parent, error)
            return family.decode(images, track, description)
    return MappedFile(path).tensor(0, math.prod(shape), torch.uint8).view(shape)


def _is_whole(path: Path, shape: Sequence[int]) -> bool:
    return path.is_file() and path.stat().st_size == math.prod(shape)


def _fill(path: Path, shape: Sequence[int], write: Callable[[Tensor], T]) -> None:
    """Let `write` fill a mapped file, whose space is reserved first and which gets its name when it is complete."""
    size = math.prod(shape)
    with new_file(path, size) as descriptor:
        write(torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8).view(tuple(shape)))
