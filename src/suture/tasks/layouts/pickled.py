"""Arrays and lists of a pickle, such as CIFAR's, read without importing or running anything.

The pickle is read as data by `suture.checkpoints`; here numpy's own way of pickling an array (its `__reduce__`: a call
of `_reconstruct`, then the state version, shape, dtype, order, bytes) becomes an array of numbers again.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.pickle_calls import Inert
from suture.checkpoints.unpickling import read_pickle
from suture.errors import CheckpointError, DataError, data_refusal, shown

_NUMBERS = {"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"}


def read_pickled(path: Path) -> dict[str, Any]:
    """The mapping that a pickle holds, by text keys; raises `DataError` for anything else, and for code to run."""
    try:
        with path.open("rb") as file:
            found = read_pickle(file, path)
    except CheckpointError as error:
        reason = str(error).partition(" Remedy:")[0]
        raise DataError(f"{reason} Remedy: fetch it again from where its authors publish it.") from None
    if not isinstance(found, dict):
        problem = f"holds a pickled {type(found).__name__}, wanted a mapping of arrays"
        raise data_refusal(path, problem, "fetch it again")
    return {_text(key): value for key, value in found.items()}


def as_array(value: Any) -> np.ndarray:
    """A pickled array, or a list of numbers or of text, as an array; raises `ValueError` for anything else."""
    if isinstance(value, list):
        return np.array([_text(item) for item in value])
    if not isinstance(value, Inert) or not value.name.qualname.endswith("_reconstruct"):
        raise ValueError(f"a {type(value).__name__} where an array was wanted")
    _, shape, dtype, fortran, data = value.built
    kind = dtype.arguments[0]
    if kind not in _NUMBERS or dtype.built[1] not in ("|", "<", ">", "="):
        raise ValueError(f"an array of {shown(kind)}")
    data = data.encode("latin1") if isinstance(data, str) else data
    if not all(type(n) is int and n >= 0 for n in shape) or len(data) != math.prod(shape) * int(kind[1:]):
        raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
    order = "<" if dtype.built[1] == "=" else dtype.built[1]
    return np.frombuffer(data, np.dtype(f"{order}{kind}")).reshape(shape, order="F" if fortran else "C")


def _text(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value
