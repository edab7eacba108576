"""The blocks that a calibration visits, and the layers of them that it cannot reach."""

from collections.abc import Container, Iterator

from torch import nn

from suture.adaptation.blocks import Block, find_blocks, submodule
from suture.errors import ConfigError
from suture.repairs.problem import Problem

_LISTED = 3


def calibrated_blocks(module: nn.Module, problem: Problem, blocks: str | list[str] | None) -> tuple[Block, ...]:
    """The blocks to calibrate, and the BatchNorm layers outside of them, in the order in which they run."""
    inputs = problem.inputs[problem.tasks[0]]
    if blocks is not None:
        return find_blocks(module, inputs, forward=problem.forward, blocks=blocks)
    try:
        found = find_blocks(module, inputs, forward=problem.forward)
        paths = [block.path for block in found]
    except ConfigError:
        paths = [name for name, part in module.named_modules() if name and not list(part.children())]
        paths = [name for name in paths if any(True for _ in submodule(module, name).parameters())]
    inside = tuple(f"{path}." for path in paths)
    norms = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and name not in paths and not name.startswith(inside)
    ]
    return find_blocks(module, inputs, forward=problem.forward, blocks=[*paths, *norms])


def silent_layers(part: nn.Module, path: str, reached: Container[str]) -> Iterator[str]:
    """One line for the matrices and kernels of a block that no input has reached."""
    names = {
        f"{path}.{name}.{own}".replace("..", "."): tensor
        for name, layer in part.named_modules()
        for own, tensor in layer.named_parameters(recurse=False)
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or tensor.dim() == 3
    }
    silent = [name for name, tensor in names.items() if tensor.dim() > 1 and name not in reached]
    if silent:
        rest = f" and {len(silent) - _LISTED} more" if len(silent) > _LISTED else ""
        yield f"No input reaches {', '.join(map(repr, silent[:_LISTED]))}{rest}: left as merged."
