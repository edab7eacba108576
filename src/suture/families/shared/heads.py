"""Heads of tasks in files: a linear layer each, as `heads: {task: file}` of a pool names them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.core.head import Head
from suture.errors import CheckpointError, ConfigError, problem, shown, unknown_name

FOLDER = "heads"  # of a saved model, with a file for each task


def stored_head(files: Mapping[str, str], task: str, classes: int | None = None) -> Head:
    """The linear layer in a task's file: weight (C, D) and, if there is one, bias (C,), whatever their prefix.

    Raises `ConfigError` for a task without a file, and `CheckpointError` for a file of anything else or, if `classes`
    is given, with another number of them.
    """
    if not isinstance(files, Mapping):
        raise ConfigError(f"modelpool.heads={shown(files)!r}: wanted a mapping, task: file.")
    if task not in files:
        raise ConfigError(unknown_name("task under modelpool.heads", task, files))
    return linear_head(open_checkpoint(files[task], label=f"head of {task}"), files[task], task, classes)


def linear_head(state: Mapping[str, Tensor], where: object, task: str, classes: int | None = None) -> Head:
    """The head that is one linear layer, from its tensors; errors as of `stored_head`."""
    weights = [name for name in state if state[name].ndim == 2]
    biases = [name for name in state if state[name].ndim == 1]
    if len(weights) != 1 or len(biases) > 1 or len(weights) + len(biases) != len(list(state)):
        found = f"holds {shown(', '.join(state))}; wanted one linear layer: weight (classes, width) and bias"
        raise CheckpointError(problem(where, found, "save the head alone"))
    weight, bias = state[weights[0]].float(), state[biases[0]].float() if biases else None
    if bias is not None and len(bias) != len(weight):
        found = f"has {len(weight)} rows of weights and {len(bias)} biases"
        raise CheckpointError(problem(where, found, "save the linear layer again"))
    if classes is not None and len(weight) != classes:
        found = f"has {len(weight)} classes but task {task!r} has {classes} class names"
        raise CheckpointError(problem(where, found, "list a name for every class, in the head's order"))
    return Head(weight.clone(), None if bias is None else bias.clone())


def save_heads(out: Path, heads: Mapping[str, Head]) -> None:
    """Write `heads/TASK.safetensors` with `weight` and `bias` into a model's directory, replacing what is there."""
    (out / FOLDER).mkdir(exist_ok=True)
    for name, head in heads.items():
        tensors = {"weight": head.weights} | ({} if head.bias is None else {"bias": head.bias})
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_checkpoint(stored, out / FOLDER / f"{name}.safetensors", metadata={"format": "pt"})
