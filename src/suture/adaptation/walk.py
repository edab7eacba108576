"""Forward passes through a module's blocks, one block at a time, with the weights changed in between.

A block's arguments are outputs of the block before it, or arguments that an earlier block had already (masks,
positions); where neither holds, as behind the downsampling between two stages, the module runs from its start up to
the block. Which it is, a plan says that is made and tried on the first inputs.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from suture.adaptation.blocks import submodule
from suture.core.autocasting import autocast_dtype
from suture.core.batches import Forward, Inputs, Reached, device_of, take, to_device
from suture.errors import ConfigError

_PLAIN = (type(None), bool, str, torch.dtype, torch.device)


class Source(NamedTuple):
    """The source of a block's argument.

    It is `leaf` of the outputs of the block before, `leaf` of the arguments that the earlier `block` had, or the
    constant `value`.
    """

    kind: Literal["output", "argument", "constant"]
    leaf: int = 0
    block: int = 0
    value: Any = None


class Plan(NamedTuple):
    """The blocks, and for each of them the sources of its arguments, or None if the module runs from its start."""

    paths: tuple[str, ...]
    sources: tuple[tuple[Any, tuple[Source, ...]] | None, ...]
    precision: torch.dtype | None

    def kept(self, block: int) -> set[int]:
        """The leaves of a block's arguments that later blocks read."""
        chosen = (s for known in self.sources if known for s in known[1])
        return {source.leaf for source in chosen if source.kind == "argument" and source.block == block}

    def read(self, block: int) -> set[int]:
        """The leaves of a block's outputs that the next block reads."""
        known = self.sources[block + 1] if block + 1 < len(self.sources) else None
        return {source.leaf for source in known[1] if source.kind == "output"} if known else set()


class Store:
    """Tensors between two blocks: in memory on the CPU, or in mapped files of the folder `cache`."""

    def __init__(self, cache: Path | None = None):
        self._cache, self._numbers = cache, count()  # which threads may take from

    def put(self, value: Any, over: Any = None) -> Any:
        """A copy of a tensor, in the memory of `over` if it fits; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if not (isinstance(over, Tensor) and over.shape == value.shape and over.dtype == value.dtype):
            over = self._empty(value)
        return over.copy_(value)

    def _empty(self, like: Tensor) -> Tensor:
        if self._cache is None or not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        file = str(self._cache / f"{id(self)}-{next(self._numbers)}")
        return torch.from_file(file, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


@contextmanager
def new_store(cache: Any = None) -> Iterator[Store]:
    """A store whose files are deleted afterwards."""
    if cache is None:
        yield Store()
        return
    Path(cache).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".states-", dir=cache, ignore_cleanup_errors=True) as folder:
        yield Store(Path(folder))


class Walk:
    """The passes of one module over some batches. The module's weights may change between two calls.

    Blocks are visited in order: `run` any number of times, then `keep` what the next one is to start from. They run on
    `device`, by default the module's; what lies before the first block always runs on the module's. Where the module
    runs up to a block, it does so inside `awake(module, block)`.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        plan: Plan,
        batches: Sequence[Any],
        store: Store,
        device: torch.device | None = None,
        awake: Callable[[nn.Module, int], AbstractContextManager[Any]] | None = None,
    ):
        self.module, self.forward, self.plan = module, forward, plan
        self.batches, self.store = batches, store
        self._home = device_of(module)
        self.device, self._awake = device or self._home, awake
        self._outputs: list[dict[int, Any]] = [{} for _ in batches]
        self._arguments: list[dict[int, tuple[Any, dict[int, Any]]]] = [{} for _ in batches]

    @torch.no_grad()
    def run(
        self, block: int, batch: int, inside: AbstractContextManager | None = None, module: nn.Module | None = None
    ) -> Any:
        """The output of a block for one batch. The block, or that of another `module`, runs `inside` a context."""
        args, kwargs = self._arguments_of(block, batch)
        with self._precision(), inside or nullcontext():
            return submodule(module or self.module, self.plan.paths[block])(*args, **kwargs)

    def keep(self, block: int, batch: int, output: Any) -> None:
        """Keep a block's output for the next one."""
        leaves, before = _flatten(output)[0], self._outputs[batch]
        wanted = self.plan.read(block)
        self._outputs[batch] = {leaf: self.store.put(leaves[leaf], before.get(leaf)) for leaf in wanted}
        if block in self._arguments[batch]:  # only what later blocks read
            shape, values = self._arguments[batch][block]
            kept = self.plan.kept(block)
            self._arguments[batch][block] = (shape, {leaf: v for leaf, v in values.items() if leaf in kept})

    def _arguments_of(self, block: int, batch: int) -> tuple[Any, Any]:
        known, device = self.plan.sources[block], self.device
        if known is not None:
            shape, sources = known
            leaves = [self._leaf(source, batch) for source in sources]
            return _rebuilt(shape, iter([_fresh(leaf, device) for leaf in leaves]))
        if block not in self._arguments[batch]:
            inputs = to_device(self.batches[batch], self._home)
            with self._awake(self.module, block) if self._awake else nullcontext():
                arguments = _reach(self.module, self.forward, self.plan.paths[block], inputs)
            leaves, shape = _flatten(arguments)
            self._arguments[batch][block] = (shape, {i: self.store.put(leaf) for i, leaf in enumerate(leaves)})
        shape, values = self._arguments[batch][block]
        return _rebuilt(shape, iter([_fresh(value, device) for value in values.values()]))

    def _leaf(self, source: Source, batch: int) -> Any:
        if source.kind == "constant":
            return source.value
        if source.kind == "output":
            return self._outputs[batch][source.leaf]
        return self._arguments[batch][source.block][1][source.leaf]

    def _precision(self) -> AbstractContextManager:
        kind = self.device.type
        return torch.autocast(kind, self.plan.precision) if self.plan.precision else nullcontext()


def probe_of(inputs: Mapping[str, Inputs]) -> Any:
    """Two inputs of one task to make a plan with: of texts the shortest and the longest, so that masks are in use."""
    chosen, best = take(next(iter(inputs.values())), slice(0, 2)), (0, 0)
    for rows in inputs.values():
        mask = rows.get("attention_mask") if isinstance(rows, Mapping) else None
        if mask is not None and mask.dim() == 2:
            lengths = (mask > 0).sum(1)
            spread = (int(lengths.max() - lengths.min()), mask.shape[1] - int(lengths.min()))
            if spread > best:
                best, chosen = spread, take(rows, torch.stack([lengths.argmin(), lengths.argmax()]).cpu())
    return chosen


def make_plan(module: nn.Module, forward: Forward, paths: Sequence[str], inputs: Any) -> Plan:
    """The plan for these blocks, found by running `inputs` once and confirmed by walking them through all blocks.

    Raises `ConfigError` for a block that does not run exactly once.
    """
    inputs = to_device(inputs, device_of(module))
    seen, precision = _watch(module, forward, paths, inputs)
    sources: list[tuple[Any, tuple[Source, ...]] | None] = [None]
    for i in range(1, len(paths)):
        sources.append(_sources(seen, i, [j for j in range(i) if sources[j] is None]))
    plan = Plan(tuple(paths), tuple(sources), precision)
    return _confirmed(plan, module, forward, inputs, [record[2] for record in seen])


def _confirmed(plan: Plan, module: nn.Module, forward: Forward, inputs: Any, outputs: Sequence[Any]) -> Plan:
    """The plan, with every block whose arguments it did not get right run from the module's start."""
    walk = Walk(module, forward, plan, [inputs], Store())
    for i, expected in enumerate(outputs):
        found = walk.run(i, 0)
        if plan.sources[i] is not None and not _close(_flatten(found)[0], expected):
            sources = (*plan.sources[:i], None, *plan.sources[i + 1 :])
            return _confirmed(plan._replace(sources=sources), module, forward, inputs, outputs)
        walk.keep(i, 0, found)
    return plan


def _close(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(b, Tensor)]
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in pairs)


@torch.no_grad()
def _reach(module: nn.Module, forward: Forward, path: str, inputs: Any) -> tuple[Any, Any]:
    """The arguments of a block for these inputs."""

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise Reached(args, kwargs)

    hook = submodule(module, path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward(module, inputs)
    except Reached as reached:
        return reached.args  # (args, kwargs) of the block
    finally:
        hook.remove()
    raise ConfigError(f"blocks: '{path}' does not run on every input. Remedy: name blocks that do.")


_Record = tuple[list[Any], Any, list[Any], list[Any]]  # arguments, their shape, copies of the outputs, the outputs


@torch.no_grad()
def _watch(
    module: nn.Module, forward: Forward, paths: Sequence[str], inputs: Any
) -> tuple[list[_Record], torch.dtype | None]:
    """Arguments and outputs of every block in one pass, and the precision of autocast, if it is on."""
    before: dict[str, tuple[list[Any], Any]] = {}
    after: dict[str, list[Any]] = {}
    copies: dict[str, list[Any]] = {}
    precision: list[torch.dtype | None] = []
    device = device_of(module)

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if path in before:
            raise ConfigError(f"blocks: '{path}' runs twice in one pass. Remedy: name blocks that run once.")
        before[path] = _flatten((args, kwargs))
        precision.append(autocast_dtype(device))

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        after[path] = _flatten(output)[0]
        copies[path] = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in after[path]]

    hooks: list[Any] = []
    for path in paths:
        part = submodule(module, path)
        hooks.append(part.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
        hooks.append(part.register_forward_hook(partial(leave, path)))
    try:
        forward(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for path in paths:
        if path not in after:
            raise ConfigError(f"blocks: '{path}' does not run when the module does. Remedy: name blocks that do.")
    return [(*before[path], copies[path], after[path]) for path in paths], next(filter(None, precision), None)


def _sources(seen: Sequence[_Record], block: int, starts: Sequence[int]) -> tuple[Any, tuple[Source, ...]] | None:
    """The sources of a block's arguments, of which those of the blocks `starts` can be read again."""
    leaves, shape = seen[block][:2]
    found = [_source(leaf, j, seen, block, starts) for j, leaf in enumerate(leaves)]
    return None if None in found else (shape, tuple(source for source in found if source))


def _source(leaf: Any, place: int, seen: Sequence[_Record], block: int, starts: Sequence[int]) -> Source | None:
    if isinstance(leaf, _PLAIN):
        for i in reversed(starts):  # what is None here, such as a mask, may be a tensor in another batch
            if seen[i][1] == seen[block][1] and type(seen[i][0][place]) is type(leaf) and seen[i][0][place] == leaf:
                return Source("argument", place, i)
        return Source("constant", value=leaf)
    for j, output in enumerate(seen[block - 1][3]):
        if isinstance(leaf, Tensor) and _same(leaf, output):
            return Source("output", j)
    for i in starts:
        for j, argument in enumerate(seen[i][0]):
            if _same(leaf, argument):
                return Source("argument", j, i)
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two leaves are one object, one piece of memory, or equal numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        layout = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
        return one is other or (one.numel() > 0 and layout[0] == layout[1])
    number = isinstance(one, int | float) and type(one) is type(other)
    return one is other or (number and one == other)


def _fresh(leaf: Any, device: torch.device) -> Any:
    """A leaf that a block may change: a copy of a tensor or of a cache."""
    if isinstance(leaf, Tensor):
        return leaf.to(device, copy=True)
    return leaf if isinstance(leaf, (*_PLAIN, int, float)) or callable(leaf) else copy.deepcopy(leaf)


def _flatten(value: Any) -> tuple[list[Any], Any]:
    """The leaves of nested tuples, lists and dicts, and the shape that puts them together again."""
    if type(value) in (tuple, list):
        parts = [_flatten(part) for part in value]
        return [leaf for leaves, _ in parts for leaf in leaves], (type(value), [shape for _, shape in parts])
    if type(value) is dict:
        leaves, (_, shapes) = _flatten(list(value.values()))
        return leaves, (dict, dict(zip(value, shapes, strict=True)))
    return [value], None


def _rebuilt(shape: Any, leaves: Iterator[Any]) -> Any:
    if shape is None:
        return next(leaves)
    kind, parts = shape
    if kind is dict:
        return {key: _rebuilt(part, leaves) for key, part in parts.items()}
    return kind(_rebuilt(part, leaves) for part in parts)
