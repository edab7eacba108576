"""Pickles read as data: a small machine for pickle's opcodes that imports nothing and runs nothing.

It keeps the stack, the marks and the memo of the pickle format (PEP 3154 and `pickletools`). Names stay
names, objects become inert records, and each call goes through `pickle_calls`, which knows the few that
rebuild tensors. What a pickle may cost is bounded: its bytes, its opcodes, and what its calls copy.
"""

import pickletools
import struct
from typing import IO, Any, cast

from suture.checkpoints.pickle_calls import (
    Inert,
    Name,
    StorageRef,
    TensorRef,
    call,
    instantiate,
    named,
    refused_call,
    refused_request,
    scalar_keys,
    storage,
)
from suture.errors import refusal

_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
_MOST_BYTES = 1 << 30
_MOST_OPCODES = 5_000_000  # a checkpoint has about ten for each tensor
_MOST_COPIED = 5_000_000  # entries of containers that are handed to calls, which may name one container many times
_MAGIC_ATTRIBUTES = {
    "__call__",
    "__class__",
    "__del__",
    "__getattr__",
    "__getattribute__",
    "__init__",
    "__new__",
    "__reduce__",
    "__reduce_ex__",
    "__setstate__",
}
_VALUES = {
    "BINBYTES",
    "BINBYTES8",
    "BINFLOAT",
    "BININT",
    "BININT1",
    "BININT2",
    "BINSTRING",
    "BINUNICODE",
    "BINUNICODE8",
    "BYTEARRAY8",
    "FLOAT",
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "SHORT_BINBYTES",
    "SHORT_BINSTRING",
    "SHORT_BINUNICODE",
    "STRING",
    "UNICODE",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(stream: IO[bytes], where: object, storages: dict[str, StorageRef] | None = None) -> Any:
    """The object that a pickle describes, made of containers, names, inert objects and tensor references.

    The stream is left behind the pickle's end; `storages` collects the storages that were named on the way.
    Raises `CheckpointError` if the pickle is damaged or asks for a call.
    """
    machine = _Machine(where, {} if storages is None else storages)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", _Bounded(stream)))):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if count > _MOST_OPCODES:
                raise ValueError(f"more than {_MOST_OPCODES} opcodes")
            machine.step(opcode.name, argument)
    except _DAMAGE as error:
        problem = f"is truncated, corrupt or no PyTorch file: its pickle holds {error or type(error).__name__}"
        raise refusal(where, problem, "copy or download it again") from error
    raise refusal(where, "holds a pickle without an end", "copy or download it again")


class _Bounded:
    """A stream of which only so many bytes are read."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.left = stream, _MOST_BYTES

    def read(self, count: int) -> bytes:
        """The next bytes; raises `ValueError` beyond the bound."""
        self._take(count)
        return self.stream.read(count)

    def readline(self) -> bytes:
        """The next line; raises `ValueError` beyond the bound."""
        line = self.stream.readline(self.left + 1)
        self._take(len(line))
        return line

    def _take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"more than {_MOST_BYTES} bytes")


class _Machine:
    def __init__(self, where: object, storages: dict[str, StorageRef]):
        self.where, self.storages, self.copied = where, storages, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop_many(_TUPLES[name])))
        else:
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                raise refused_request(self.where, f"for pickle's opcode {name}")
            handler(argument)

    def _pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("too few values")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"protocol {version}")

    def _frame(self, length: int) -> None:
        pass

    def _mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_to_mark()

    def _pop_mark(self, _: None) -> None:
        self._pop_to_mark()

    def _dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _list(self, _: None) -> None:
        values = self._pop_to_mark()
        self.stack.append(values)

    def _tuple(self, _: None) -> None:
        values = self._pop_to_mark()
        self.stack.append(tuple(values))

    def _frozenset(self, _: None) -> None:
        values = self._pop_to_mark()
        self.stack.append(frozenset(scalar_keys(values)))

    def _dict(self, _: None) -> None:
        values = self._pop_to_mark()
        self.stack.append({})
        self._set_items(values)

    def _append(self, _: None) -> None:
        self._extend(self._pop_many(1))

    def _appends(self, _: None) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Inert) else target
        if not isinstance(target, list):
            raise TypeError(f"items for a {type(target).__name__}")
        target.extend(values)

    def _setitem(self, _: None) -> None:
        self._set_items(self._pop_many(2))

    def _setitems(self, _: None) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        target = target.mapping if isinstance(target, Inert) else target
        if not isinstance(target, dict):
            raise TypeError(f"keys for a {type(target).__name__}")
        target.update(zip(scalar_keys(values[::2]), values[1::2], strict=True))

    def _additems(self, _: None) -> None:
        values = self._pop_to_mark()
        if not isinstance(self.stack[-1], set):
            raise TypeError(f"members for a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(scalar_keys(values))

    def _global(self, names: str) -> None:
        module, _, qualname = names.partition(" ")
        self.stack.append(named(module, qualname))

    def _stack_global(self, _: None) -> None:
        module, qualname = self._pop_many(2)
        if not isinstance(module, str) or not isinstance(qualname, str):
            raise TypeError("a name that is no text")
        self.stack.append(named(module, qualname))

    def _reduce(self, _: None) -> None:
        function, arguments = self._pop_many(2)
        self._call(function, arguments)

    def _newobj(self, _: None) -> None:
        cls, arguments = self._pop_many(2)
        self.stack.append(instantiate(self.where, cls, self._checked(arguments)))

    def _newobj_ex(self, _: None) -> None:
        cls, arguments, keywords = self._pop_many(3)
        made = instantiate(self.where, cls, self._checked(arguments))
        if isinstance(made, Inert):
            made.state["__keywords__"] = keywords
        self.stack.append(made)

    def _inst(self, names: str) -> None:
        values = self._pop_to_mark()
        self._global(names)
        self._call(self.stack.pop(), tuple(values))

    def _obj(self, _: None) -> None:
        function, *values = self._pop_to_mark()
        self._call(function, tuple(values))

    def _call(self, function: Any, arguments: Any) -> None:
        if str(function) in ("copyreg.__newobj__", "copyreg.__newobj_ex__") and isinstance(function, Name):
            cls, *rest = self._checked(arguments)
            self.stack.append(instantiate(self.where, cls, tuple(rest)))
        else:
            self.stack.append(call(self.where, function, self._checked(arguments)))

    def _checked(self, arguments: Any) -> tuple:
        if not isinstance(arguments, tuple):
            raise TypeError("arguments that are no tuple")
        self._count_copies((arguments, *arguments))
        return arguments

    def _build(self, _: None) -> None:
        target, state = self._pop_many(2)
        self.stack.append(target)
        if isinstance(target, Name):
            raise refused_call(self.where, target._replace(qualname=f"{target.qualname}.__setstate__"))
        if not isinstance(target, Inert):
            if not isinstance(target, dict | TensorRef):
                raise TypeError(f"a state for a {type(target).__name__}")
            return  # attributes of a plain dict, such as the versions kept with a state dict, are not data
        target.built = state
        for part in state if type(state) is tuple else (state,):
            self._keep_state(target, part)

    def _keep_state(self, target: Inert, state: Any) -> None:
        if not isinstance(state, dict):
            return
        taken = sorted(_MAGIC_ATTRIBUTES & state.keys())
        if taken:
            raise refused_request(self.where, f"to replace '{taken[0]}' of '{target.name}'")
        self._count_copies((state,))
        target.state.update(state)

    def _count_copies(self, values: tuple) -> None:
        """Keep account of what calls copy: a pickle of 1 MB could ask for the same long list a million times."""
        self.copied += sum(len(value) for value in values if hasattr(value, "__len__"))
        if self.copied > _MOST_COPIED:
            raise ValueError(f"calls that copy more than {_MOST_COPIED} entries")

    def _binpersid(self, _: None) -> None:
        (identifier,) = self._pop_many(1)
        found = storage(identifier)
        if isinstance(found, StorageRef):
            self.storages[found.key] = found
        self.stack.append(found)

    def _persid(self, identifier: str) -> None:
        raise ValueError("a persistent id that is text")
