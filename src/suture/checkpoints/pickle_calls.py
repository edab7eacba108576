"""The calls that a pickle may ask for. Each answer is a function of this file; no name is ever looked up.

Tensors, storages and the few plain containers that PyTorch saves are rebuilt. Classes become inert records
that hold their arguments and state. Anything else, a function above all, is refused.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from suture.errors import CheckpointError, refusal, shown

_MOST_DIMENSIONS = 64
_MOST_IN_A_KEY = 16  # parts of a tuple that is a key
_TRUST = "use a copy saved as safetensors, or as a plain state dict, by someone you trust"
_FROM_TYPE = ("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2")
_TORCH_LAYERS = ("torch.nn", "torch._C._nn")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Name(NamedTuple):
    """A class or function that a pickle names; it is never imported."""

    module: str
    qualname: str

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


class Inert:
    """A record in place of an object of a class that is not imported: its arguments, state and items.

    `built` is the state as the pickle gave it, which for arrays is no mapping.
    """

    def __init__(self, name: Name, arguments: tuple = ()):
        self.name, self.arguments = name, arguments
        self.state: dict[Any, Any] = {}
        self.built: Any = None
        self.items: list[Any] = []
        self.mapping: dict[Any, Any] = {}


class StorageRef(NamedTuple):
    """A storage of the file: the key of its record, its dtype, and where in it a view of it starts."""

    key: str
    dtype: torch.dtype
    start: int = 0


class TensorRef:
    """A tensor of the file: a strided view of a storage, in entries of `dtype`."""

    def __init__(self, storage: StorageRef, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None):
        if len(shape) > _MOST_DIMENSIONS or len(shape) != len(stride):
            raise ValueError("a tensor with a shape that is none")
        numbers = [offset, *shape, *stride]
        if not isinstance(storage, StorageRef) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("a tensor without a storage, or with a shape that is none")
        self.storage, self.dtype = storage, dtype or storage.dtype
        self.offset = offset + storage.start
        self.shape, self.stride = tuple(shape), tuple(stride)


class Unsupported:
    """A tensor of a kind that cannot be merged: sparse, quantised, meta, nested."""

    def __init__(self, kind: str):
        self.kind = kind


def named(module: str, qualname: str) -> Name:
    """The name that a pickle gives, with Python 2's modules under their present names."""
    return Name(_PYTHON_2.get(module, module), qualname)


def call(where: object, function: Any, arguments: tuple) -> Any:
    """The result of REDUCE. Raises `CheckpointError` for everything that is not known to be harmless."""
    if isinstance(function, Name):
        if str(function) == "functools.partial":
            return _partial(where, function, arguments)
        if str(function) == "copyreg._reconstructor":
            return instantiate(where, arguments[0], ())
        if str(function) in _FROM_TYPE:
            return call(where, arguments[0], arguments[2])
        if str(function) in _REBUILDERS:
            return _REBUILDERS[str(function)](*arguments)
        if str(function) in _INERT or (_third_party(function) and _like_a_class(function)):
            return Inert(function, arguments)
    raise refused_call(where, function)


def instantiate(where: object, cls: Any, arguments: tuple) -> Any:
    """The result of NEWOBJ: an instance that was never initialised. Only classes are asked for in this way."""
    if isinstance(cls, Name) and (_third_party(cls) or (_root(cls) == "torch" and _like_a_class(cls))):
        rebuild = _REBUILDERS.get(str(cls))
        return rebuild(*arguments) if rebuild else Inert(cls, arguments)
    return call(where, cls, arguments)


def refused_call(where: object, function: Any) -> CheckpointError:
    """The refusal of a pickle that wants something to be run."""
    wanted = function.name if isinstance(function, Inert) else function
    wanted = shown(wanted) if isinstance(wanted, Name) else f"a {type(function).__name__}"
    return refusal(where, f"is a pickle that asks to call '{wanted}'; it was not run", _TRUST)


def refused_request(where: object, request: str) -> CheckpointError:
    """The refusal of a pickle that wants something else than data."""
    return refusal(where, f"is a pickle that asks {request}; it was not run", _TRUST)


def storage(identifier: Any) -> Any:
    """The meaning of a persistent id: ('storage', type, key, location, numel), or a class and its source."""
    kind, named_type, *rest = identifier
    if kind == "module":
        return named_type
    key, view = rest[0], rest[3] if len(rest) > 3 else None
    if kind != "storage" or type(key) is not str:
        raise ValueError("a storage without a key")
    dtype = _STORAGES[named_type.qualname]
    start = view[1] if view else 0
    if type(start) is not int or not 0 <= start < 2**63:
        raise ValueError("a storage that starts nowhere")
    return StorageRef(key, dtype, start)


def _root(name: Name) -> str:
    return name.module.split(".")[0]


def _third_party(name: Name) -> bool:
    return _root(name) not in sys.stdlib_module_names and _root(name) not in ("torch", "")


def _like_a_class(name: Name) -> bool:
    return name.qualname.split(".")[-1].lstrip("_")[:1].isupper()


def _partial(where: object, name: Name, arguments: tuple) -> Inert:
    """Kept as data if it is made of a class or a model's own function, never of what Python can run."""
    function = arguments[0]
    if isinstance(function, Inert):
        return Inert(name, arguments)
    if isinstance(function, Name) and (_third_party(function) or function.module.startswith(_TORCH_LAYERS)):
        return Inert(name, arguments)
    raise refused_call(where, function)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    return TensorRef(storage, offset, shape, stride)


def _tensor_with_dtype(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata=None) -> TensorRef:
    return TensorRef(storage, offset, shape, stride, _DTYPES[dtype.qualname])


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes kept as {encoding} text")
    return text.encode("latin1")


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes:
    if not isinstance(data, bytes | str):
        raise ValueError("bytes made of something else")
    return data if isinstance(data, bytes) else _encoded(data, encoding)


def _of_kind(kind: str) -> Callable[..., Unsupported]:
    return lambda *_: Unsupported(kind)


def _record(name: str) -> Callable[..., Inert]:
    module, _, qualname = name.rpartition(".")
    return lambda *arguments: Inert(Name(module, qualname), arguments)


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "QInt32Storage": torch.qint32,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
_REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch._utils._rebuild_device_tensor_from_numpy": _of_kind("a tensor of another device's own format"),
    "torch._utils._rebuild_meta_tensor_no_storage": _of_kind("a meta tensor, which has no values"),
    "torch._utils._rebuild_nested_tensor": _of_kind("a nested tensor"),
    "torch._utils._rebuild_qtensor": _of_kind("a quantised tensor"),
    "torch._utils._rebuild_sparse_tensor": _of_kind("a sparse tensor"),
    "torch._utils._rebuild_wrapper_subclass": _of_kind("a wrapped tensor"),
    "torch.Size": lambda shape=(): tuple(shape),
    "torch.device": _record("torch.device"),
    "torch.serialization._get_layout": _record("torch.layout"),
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "collections.defaultdict": lambda factory=None, pairs=(): dict(pairs),
    "collections.Counter": lambda counts=(): dict(counts),
    "_codecs.encode": _encoded,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.dict": lambda pairs=(): dict(pairs),
    "builtins.list": lambda values=(): list(values),
    "builtins.tuple": lambda values=(): tuple(values),
    "builtins.set": lambda values=(): set(scalar_keys(values)),
    "builtins.frozenset": lambda values=(): frozenset(scalar_keys(values)),
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(real, imaginary),
}
_INERT = frozenset(
    [
        "argparse.Namespace",
        "builtins.object",
        "builtins.range",
        "builtins.slice",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "decimal.Decimal",
        "fractions.Fraction",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "types.SimpleNamespace",
        "uuid.UUID",
    ]
)
_SCALARS = (str, int, float, bytes, type(None), Name, Inert)


def scalar_keys(values: Any) -> list[Any]:
    """The values, checked to be fit for keys.

    Hashing a tuple nested a million deep would crash Python, and long tuples or numbers are hashed anew each time.
    """
    values = list(values)
    for value in values:
        parts = value if type(value) is tuple else (value,)
        if len(parts) > _MOST_IN_A_KEY or not all(map(_is_scalar, parts)):
            raise ValueError(f"a {type(value).__name__} as a key")
    return values


def _is_scalar(value: Any) -> bool:
    return isinstance(value, _SCALARS) and not (isinstance(value, int) and value.bit_length() > 64)
