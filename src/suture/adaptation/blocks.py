"""The blocks of a module of any architecture, in the order in which they run."""

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from suture.core.batches import Forward, Inputs, call, device_of, take, to_device
from suture.core.sharding import has_parts
from suture.core.unread import is_unread
from suture.errors import ConfigError, IncompatibleModels

Blocks = str | Sequence[str] | None


class Block(NamedTuple):
    """A block: its path in the module, the width of its output, and the axes of the inputs and the channels."""

    path: str
    dim: int
    batch_axis: int = 0
    channel_axis: int = -1


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters require no gradient and share their memory with the module's.

    A module whose weights are split over processes is such a copy already.
    """
    if has_parts(module):
        return module
    memo: dict[int, Any] = {
        id(p): p if is_unread(p) else nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()
    }
    return copy.deepcopy(module, memo).eval()


def find_blocks(
    module: nn.Module,
    inputs: Inputs,
    *,
    forward: Forward = call,
    blocks: Blocks = None,
    channel_axis: int | None = None,
) -> tuple[Block, ...]:
    """The blocks in the order in which they run, with their layouts, found by running the first input.

    `blocks`: module paths; a regular expression for whole paths; or None for the children of the longest ModuleList or
    Sequential that runs and has children of one class, and of all other such lists of that class, such as the stages of
    a ResNet.
    The channels are on axis 1 of outputs with four or more axes, unless only the last axis fits the block's biases, and
    else on the last axis; `channel_axis` overrides this. Raises `ConfigError` for blocks that do not exist, do not run
    exactly once, or do not return a tensor.
    """
    paths = _paths(module, blocks, lambda: _running(module, forward, inputs))
    shapes = [_shapes(module, forward, paths, inputs, count) for count in (2, 3)]
    ran = [path for path in shapes[0] if path in paths]
    if blocks is not None and len(ran) < len(paths):
        missing = next(path for path in paths if path not in ran)
        raise ConfigError(f"blocks: '{missing}' does not run when the module does. Remedy: name blocks that do.")
    return tuple(_block(module, path, shapes[0][path], shapes[1][path], channel_axis) for path in ran)


def _paths(module: nn.Module, blocks: Blocks, running: Callable[[], set[str]]) -> list[str]:
    names = dict(module.named_modules())
    if blocks is None:
        paths = _longest_lists(names, running)
        expected = "a ModuleList or Sequential of blocks of one class. Remedy: give blocks=[path, …]"
    elif isinstance(blocks, str):
        paths = [name for name in names if name and _pattern(blocks).fullmatch(name)]
        expected = f"a path that matches {blocks!r}. Remedy: name some of: {', '.join(list(names)[1:9])} …"
    else:
        paths = list(dict.fromkeys(blocks))
        for path in paths:
            submodule(module, path)
        expected = "at least one path in `blocks`"
    if not paths:
        raise ConfigError(f"The module ({type(module).__name__}) has no blocks: wanted {expected}.")
    return paths


def _longest_lists(names: dict[str, nn.Module], running: Callable[[], set[str]]) -> list[str]:
    lists = [
        {f"{name}.{child}".lstrip("."): block for child, block in module.named_children()}
        for name, module in names.items()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(block) for block in module.children()}) == 1
    ]
    if len({type(block) for blocks in lists for block in blocks.values()}) > 1:  # a vision tower has no part in texts
        ran = running()
        lists = [blocks for blocks in lists if not ran.isdisjoint(blocks)]
    longest = max(lists, key=len, default={})
    if len(longest) < 2:
        return []
    kind = type(next(iter(longest.values())))
    paths = [path for blocks in lists for path, block in blocks.items() if type(block) is kind]
    return [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]


def _running(module: nn.Module, forward: Forward, inputs: Inputs) -> set[str]:
    """The paths of all modules that run for the first input."""
    probe, ran = frozen_copy(module), set[str]()
    with torch.no_grad(), ExitStack() as hooks:
        for path, part in probe.named_modules():
            note = lambda module, arguments, output, path=path: ran.add(path)
            hooks.enter_context(part.register_forward_hook(note))
        forward(probe, to_device(take(inputs, torch.zeros(1, dtype=torch.long)), device_of(module)))
    return ran


def _shapes(
    module: nn.Module, forward: Forward, paths: Sequence[str], inputs: Inputs, count: int
) -> dict[str, torch.Size]:
    """Path → output shape, for `count` copies of the first input, in the order in which the blocks run."""
    probe, shapes = frozen_copy(module), {}

    def record(path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if path in shapes:
            raise ConfigError(f"blocks: '{path}' runs twice in one pass; a repair needs blocks that run once.")
        shapes[path] = output_tensor(output, path).shape

    with torch.no_grad(), ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(submodule(probe, path).register_forward_hook(partial(record, path)))
        forward(probe, to_device(take(inputs, torch.zeros(count, dtype=torch.long)), device_of(module)))
    return shapes


def _block(module: nn.Module, path: str, two: torch.Size, three: torch.Size, channel_axis: int | None) -> Block:
    differ = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if (a, b) == (2, 3)]
    if len(differ) != 1:
        raise ConfigError(f"blocks: '{path}' gives {tuple(two)} for two inputs; no axis counts the inputs.")
    if channel_axis is None:
        widths = {p.numel() for p in submodule(module, path).parameters() if p.dim() == 1}
        last = len(two) < 4 or (two[-1] in widths and two[1] not in widths)
        channel_axis = -1 if last else 1
    if not -len(two) <= channel_axis < len(two) or channel_axis % len(two) == differ[0]:
        raise ConfigError(f"channel_axis={channel_axis}: '{path}' gives {tuple(two)}, inputs on axis {differ[0]}.")
    return Block(path, two[channel_axis], differ[0], channel_axis)


def output_tensor(output: Any, path: str) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(tensor, Tensor) or tensor.dim() < 2:
        kind = type(output).__name__
        raise ConfigError(
            f"blocks: '{path}' gives a {kind}; wanted a tensor (batch, …) or a tuple that begins with one."
        )
    return tensor


def submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        kind = type(module).__name__
        raise IncompatibleModels(f"The module ({kind}) has no block '{path}'. Remedy: name its own blocks.") from None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"blocks: {text!r} is not a regular expression: {error}.") from None
