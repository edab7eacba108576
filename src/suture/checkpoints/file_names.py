"""File names of transformers against its names in memory: renamed modules, and experts that are fused when loaded."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from suture.checkpoints.checkpoint import Checkpoint, Entry, TensorSpec

_NUMBER = r"(\d+)"


class Fusion(NamedTuple):
    """Tensors of many experts that are one in memory: patterns with * for the expert's number, side by side in rows."""

    sources: Sequence[str]
    target: str


class Rules(NamedTuple):
    """Renamings, each a pattern and what stands in its place, and then fusions."""

    renamings: Sequence[tuple[str, str]]
    fusions: Sequence[Fusion] = ()


#: Architectures, or what several of them share, and what transformers changes as it loads their files.
RULES: dict[str, Rules] = {
    "experts": Rules(
        [(r"\.block_sparse_moe\.", ".mlp.")],
        [
            Fusion([".experts.*.w1.weight", ".experts.*.w3.weight"], ".experts.gate_up_proj"),
            Fusion([".experts.*.w2.weight"], ".experts.down_proj"),
            Fusion([".experts.*.gate_proj.weight", ".experts.*.up_proj.weight"], ".experts.gate_up_proj"),
            Fusion([".experts.*.down_proj.weight"], ".experts.down_proj"),
            Fusion([".experts.*.up_proj.weight"], ".experts.up_proj"),  # without a gate
        ],
    ),
    "llava": Rules(
        [
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model", "model.language_model"),
            (r"^language_model", "model.language_model"),
            (r"^vision_tower", "model.vision_tower"),
            (r"^multi_modal_projector", "model.multi_modal_projector"),
        ]
    ),
    "qwen2_vl": Rules([(r"^visual", "model.visual"), (r"^model(?!\.(language_model|visual))", "model.language_model")]),
}


def in_memory(checkpoint: Checkpoint, kind: str) -> Checkpoint | None:
    """A checkpoint under the names that transformers gives its tensors in memory; None where these are the file's.

    `kind` is one of `RULES`. Experts that lie one by one in the file are fused slice by slice, when they are read.
    """
    renamings, fusions = RULES[kind]
    names = {_renamed(name, renamings): name for name in checkpoint}
    if len(names) != len(checkpoint):
        return None
    fused = _with_stacks(checkpoint.select(names), fusions, names)
    if set(fused) == set(checkpoint):
        return None
    return fused


def with_stacks(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> Checkpoint:
    """A checkpoint whose experts' matrices, stored one by one, are stacks, for the stacks whose names are `wanted`.

    Other names stay as they are. The stored tensors are the `pieces` of a stack.
    """
    return _with_stacks(checkpoint, RULES["experts"].fusions, {name: name for name in checkpoint}, wanted)


def _with_stacks(
    checkpoint: Checkpoint,
    fusions: Sequence[Fusion],
    stored: Mapping[str, str],
    wanted: Callable[[str], bool] = lambda name: True,
) -> Checkpoint:
    """A checkpoint with fusions carried out; `stored` are the names in the file."""
    fused: dict[str, Entry] = {}
    taken: set[str] = set()
    for fusion in fusions:
        for target, parts in _parts(checkpoint, fusion).items():
            if taken & set(parts[0]):
                continue
            if wanted(target) and (entry := _fused(checkpoint, parts, stored)) is not None:
                fused[target] = entry
                taken |= {name for group in parts for name in group}
    if not fused:
        return checkpoint
    return checkpoint.select({name: name for name in checkpoint if name not in taken}).extended(fused)


def _renamed(name: str, renamings: Sequence[tuple[str, str]]) -> str:
    for pattern, target in renamings:
        changed = re.sub(pattern, target, name, count=1)
        if changed != name and "^" in pattern:
            return changed
        name = changed
    return name


def _parts(checkpoint: Checkpoint, fusion: Fusion) -> dict[str, list[list[str]]]:
    """Name in memory → for every source the names of its experts, in their order."""
    found: dict[str, list[dict[int, str]]] = {}
    for place, source in enumerate(fusion.sources):
        pattern = re.compile(rf"(.*?){re.escape(source).replace(re.escape('*'), _NUMBER)}")
        for name in checkpoint:
            if match := pattern.fullmatch(name):
                groups = found.setdefault(match[1] + fusion.target, [{} for _ in fusion.sources])
                groups[place][int(match[2])] = name
    return {
        target: [[group[i] for i in range(len(group))] for group in groups]
        for target, groups in found.items()
        if all(groups)
        and all(sorted(group) == list(range(len(group))) for group in groups)
        and len({len(group) for group in groups}) == 1
    }


def _fused(checkpoint: Checkpoint, parts: Sequence[Sequence[str]], stored: Mapping[str, str]) -> Entry | None:
    """The experts' matrices one behind the other; of each expert those of all sources, one below the other."""
    specs = [[checkpoint.specs[name] for name in group] for group in parts]
    if any(len(set(group)) != 1 or len(group[0].shape) != 2 for group in specs):
        return None
    if len({group[0].shape[1] for group in specs}) != 1 or len({group[0].dtype for group in specs}) != 1:
        return None
    order = [name for expert in zip(*parts, strict=True) for name in expert]
    rows = sum(group[0].shape[0] for group in specs)
    spec = TensorSpec((len(parts[0]), rows, specs[0][0].shape[1]), specs[0][0].dtype)
    pieces = {stored[name]: checkpoint.specs[name] for name in order}
    if where := checkpoint.adjacent(order):  # as suture writes them: a view
        file, begin = where
        read = partial(file.tensor, begin, spec.numel, spec.dtype)
        return Entry(spec, lambda: read().view(spec.shape), file=file, pieces=pieces, begin=begin)
    part = _joined(checkpoint, order)
    return Entry(spec, lambda: part(0, spec.numel).view(spec.shape).to(spec.dtype), part=part, pieces=pieces)


def _joined(checkpoint: Checkpoint, order: Sequence[str]) -> Callable[[int, int], Tensor]:
    """Some entries of tensors that lie one behind the other."""
    begins: list[int] = []
    total = 0
    for name in order:
        begins.append(total)
        total += checkpoint.specs[name].numel

    def part(start: int, stop: int) -> Tensor:
        pieces = [
            checkpoint.flat(name)[max(start - begin, 0) : stop - begin]
            for name, begin in zip(order, begins, strict=True)
            if begin < stop and start < begin + checkpoint.specs[name].numel
        ]
        return torch.cat(pieces) if pieces else checkpoint.flat(order[0])[:0]

    return part
