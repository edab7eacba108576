"""A test kit for model families: `check_family` runs the laws that every family must keep."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from suture import tasks as data
from suture.checkpoints import open_checkpoint
from suture.core.unread import resident
from suture.errors import CheckpointError, ConfigError
from suture.families.shared.base import Encoder, Family
from suture.families.shared.unread import unread_encoder
from suture.tasks import Task, Tensors, Texts

__all__ = ["check_family"]

_FEW = 3  # inputs of a task that are encoded


def check_family(family: Family, tasks: Iterable[Task], folder: str | Path) -> None:
    """Raise `AssertionError`, with one line, for the first law that a family breaks; for the tests of its package.

    `family` is open: the pretrained model, its settings, and its experts if heads come from them. `tasks` are some
    that fit it, with at least three inputs in their split "test". A merged model is written into `folder`, which must
    not exist. The laws: names, the encoder and its weights, inputs, heads, what is saved.

        check_family(LetterFamily(None, base, experts=experts), tasks, tmp_path / "model")
    """
    before = {name: tensor.clone() for name, tensor in family.weights.items()}
    _check_names(family)
    _check_encoder(family)
    tasks = list(tasks)
    _law(bool(tasks), "no task was given; give at least one")
    for task in tasks:
        _check_task(family, task)
    _check_saved(family, tasks[0], Path(folder))
    _law(_equal(before, family.weights), "the pretrained weights were changed; work on copies")


def _check_names(family: Family) -> None:
    stored = family.canonical_names(family.weights)
    _law(bool(stored), "canonical_names finds nothing to merge in the pretrained weights")
    foreign = [name for name in stored.values() if name not in family.weights]
    _law(not foreign, f"canonical_names gives {foreign[:1]}, which is no stored name")
    _law(len(set(stored.values())) == len(stored), "canonical_names gives one stored name to two canonical names")
    again = family.canonical_names(stored)
    _law(again == {name: name for name in stored}, "canonical_names does not leave canonical names as they are")
    for name, expert in family.experts.items():
        lacking = sorted(set(stored) - set(family.canonical_names(expert)))
        _law(not lacking, f"canonical_names finds no {lacking[:1]} in the expert '{name}'")


def _check_encoder(family: Family) -> None:
    encoder, stored = family.encoder(), family.canonical_names(family.weights)
    _law(isinstance(encoder, Encoder), "encoder() gives no suture.families.Encoder")
    _law(not any(module.training for module in encoder.modules()), "the encoder is not in evaluation mode")
    _law(not any(p.requires_grad for p in encoder.parameters()), "the encoder's parameters require gradients")
    state = encoder.state_dict()
    lacking = sorted(set(stored) - set(state))
    _law(not lacking, f"the encoder has no tensor {lacking[:1]}; its names must be the canonical ones")
    floating = [name for name in stored if state[name].is_floating_point()]
    _law(all(state[name].dtype == torch.float32 for name in floating), "the encoder's weights are not float32")
    unequal = [name for name in floating if not torch.equal(state[name], family.weights[stored[name]].float())]
    _law(not unequal, f"the encoder's {unequal[:1]} is not the pretrained one")
    _check_load(family, encoder, {name: state[name].clone() for name in stored})


def _check_load(family: Family, encoder: Encoder, state: Mapping[str, Tensor]) -> None:
    moved = _moved(state)
    other = family.encoder(moved)
    _law(_equal(moved, other.state_dict()), "encoder(state) has not the weights of that state")
    _law(_equal(state, encoder.state_dict()), "two encoders share weights; give each its own")
    _law(other.load(state) is other, "load() does not return the encoder")
    _law(_equal(state, other.state_dict()), "load() does not copy in all weights")
    _law(_is_read_when_needed(encoder, moved), "load() writes other tensors than those it was seen to copy in")
    missing = dict(list(state.items())[1:])
    first = next(iter(state))
    if state[first].is_floating_point():
        _law(_raises(other, missing), f"load() takes a state without {first!r}; raise CheckpointError")


def _check_task(family: Family, task: Task) -> None:
    problems = family.problems(task)
    _law(not problems, f"problems() refuses a task that was given as one that fits: {problems[:1]}")
    inputs = _inputs(family, task)
    _law(
        _equal_inputs(inputs, _inputs(family, task)), f"the inputs of {task.name!r} differ from one reading to the next"
    )
    _law(isinstance(family.preprocessing, str), "preprocessing is no text")
    encoder = family.encoder()
    with torch.no_grad():
        features = _encoded(encoder, inputs)
        _law(features.ndim == 2 and len(features) == _FEW, f"features have shape {tuple(features.shape)}, not (B, D)")
        _law(bool(features.isfinite().all()), "features are not finite")
        alone = torch.cat([_encoded(encoder, _part(inputs, i)) for i in range(_FEW)])
        close = torch.allclose(features, alone, rtol=1e-3, atol=1e-4)
        _law(close, "a feature depends on the other inputs of its batch")
        head = family.head(task)
        logits = features if head is None else head(features)
    shape, wanted = tuple(logits.shape), (_FEW, len(task.classnames))
    if task.score is not None:  # logits of tokens
        wanted = (_FEW, *shape[1:2])
    _law(shape == wanted, f"the head of {task.name!r} gives logits of shape {shape}, not {wanted}")


def _check_saved(family: Family, task: Task, folder: Path) -> None:
    encoder = family.encoder()
    stored = family.canonical_names(family.weights)
    state = {name: tensor for name, tensor in encoder.state_dict().items() if name in stored}
    moved = _moved(state)
    family.save(moved, folder)
    saved = family.in_memory(open_checkpoint(folder))
    names = family.canonical_names(saved)
    _law(set(names) == set(stored), "canonical_names finds other names in the saved model than in the pretrained one")
    dtypes = [name for name in names if saved[names[name]].dtype != family.weights[stored[name]].dtype]
    _law(not dtypes, f"{dtypes[:1]} is saved in another dtype than the pretrained one's")
    inputs = _inputs(family, task)
    expected = {name: tensor.to(family.weights[stored[name]].dtype) for name, tensor in moved.items()}
    with torch.no_grad():
        ours, theirs = (_encoded(family.encoder(each), inputs) for each in (expected, saved))
    _law(torch.equal(ours, theirs), "the saved model gives other features than the merged one")


def _inputs(family: Family, task: Task) -> Any:
    """A few inputs as the encoder takes them; of a task with a `score`, its unlabelled prompts."""
    loaded: Any = data.load(task, "test") if task.score is None else data.passages(task, "test")
    _law(len(loaded) >= _FEW, f"task {task.name!r} has fewer than {_FEW} inputs")
    if task.score is not None:
        return cast(Any, family).language_inputs(task, loaded.first(_FEW))[0]
    first = loaded.first(_FEW)
    if isinstance(first, Tensors):
        return first.inputs
    return family.tokens(first) if isinstance(first, Texts) else family.decode(first)


def _encoded(encoder: Encoder, inputs: Any) -> Tensor:
    return encoder(**inputs) if isinstance(inputs, Mapping) else encoder(inputs)


def _part(inputs: Any, index: int) -> Any:
    rows = slice(index, index + 1)
    return {key: value[rows] for key, value in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]


def _equal_inputs(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def _moved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same shapes; whole numbers stay."""
    return {name: tensor * 1.01 + 0.001 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def _is_read_when_needed(encoder: Encoder, state: Mapping[str, Tensor]) -> bool:
    """Whether the weights of a model that is split over processes are those of `load`, if the family allows for it."""
    try:
        unread = unread_encoder(encoder, state)
    except ConfigError:  # a family that computes weights is refused with fsdp
        return True
    with resident(unread, torch.device("cpu")):
        return _equal(state, unread.state_dict())


def _raises(encoder: Encoder, state: Mapping[str, Tensor]) -> bool:
    try:
        encoder.load(state)
    except CheckpointError:
        return True
    except Exception as error:
        raise AssertionError(
            f"load() raises {type(error).__name__} for a missing tensor, not CheckpointError"
        ) from error
    return False


def _law(kept: bool, broken: str) -> None:
    """An assertion that stays when Python leaves assertions out."""
    if not kept:
        raise AssertionError(broken)
