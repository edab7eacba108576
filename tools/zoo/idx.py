"""Write images and labels as gzip'd IDX files, the format of MNIST: http://yann.lecun.com/exdb/mnist/."""

import gzip
import struct
from pathlib import Path

from torch import Tensor

_UNSIGNED_BYTE = 8


def save_split(folder: Path, prefix: str, images: Tensor, labels: Tensor) -> None:
    """Two files whose names start with `prefix`, from uint8 images (n, h, w) and labels (n,)."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / f"{prefix}-images-idx3-ubyte.gz", images)
    _save(folder / f"{prefix}-labels-idx1-ubyte.gz", labels.byte())


def _save(path: Path, array: Tensor) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, _UNSIGNED_BYTE, array.ndim, *array.shape)
    # No time stamp in the gzip header: the same data give the same file.
    path.write_bytes(gzip.compress(header + array.contiguous().numpy().tobytes(), 9, mtime=0))
