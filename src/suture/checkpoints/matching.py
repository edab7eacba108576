"""Models whose names or ties differ from the base's by a known rule, brought to the base's names."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.file_names import RULES, in_memory
from suture.checkpoints.spellings import common_prefix
from suture.errors import shown

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARAMETRISED = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.original([01])")
_SLICE = 1 << 20  # entries that are compared at once


@dataclass
class Matched:
    """Base and models under one set of names, and a line for each difference that was seen through."""

    base: Checkpoint
    models: dict[str, Checkpoint] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def matched(base: Checkpoint, models: Mapping[str, Checkpoint]) -> Matched:
    """The models under the base's names where a rule leads to them; what differs otherwise stays as it is.

    The base changes only where models hold experts fused that it holds one by one, and where two of its tensors are
    equal copies of which a model stores one.
    """
    found = Matched(base, dict(models))
    _match_files(found)
    for label, model in found.models.items():
        found.models[label] = _renamed(found, label, model)
    _tie_base(found)
    for label, model in found.models.items():
        found.models[label] = _with_ties(found, label, model)
    return found


def _match_files(found: Matched) -> None:
    """Bring those that have the names of files to the names of the model in memory, where the others have these."""
    if all(_names(model) == _names(found.base) for model in found.models.values()):
        return
    for label, model in found.models.items():
        if not _distance(found.base, model):
            continue
        for kind in RULES:
            converted = in_memory(model, kind)
            if converted is not None and _distance(found.base, converted) < _distance(found.base, model):
                found.models[label] = converted
                found.notes.append(f"'{label}' has the names of a file, read under those of the model in memory.")
                break
            whole = in_memory(found.base, kind)
            if whole is not None and _distance(whole, model) < _distance(found.base, model):
                found.base = whole
                found.notes.append("The base has the names of a file, read under those of the model in memory.")
                _match_files(found)
                return


def _distance(base: Checkpoint, model: Checkpoint) -> int:
    """The number of tensors that one has and the other lacks, wrappers and prefixes left aside."""
    renamed = _renamed(Matched(base), "", model)
    return min(len(_lacking(base, renamed)), len(_lacking(renamed, base)))


def _names(checkpoint: Checkpoint) -> set[str]:
    """Names of the tensors that are merged, tied ones under all their names."""
    return {name for name, spec in checkpoint.specs.items() if spec.dtype.is_floating_point}


def _lacking(base: Checkpoint, model: Checkpoint) -> set[str]:
    return _names(base) - set(model)


def _renamed(found: Matched, label: str, model: Checkpoint) -> Checkpoint:
    """A model under the base's names, by the rules that wrappers, libraries and bare models follow."""
    base = found.base
    missing, extra = _lacking(base, model), {name for name in _names(model) if name not in base}
    if not missing or not extra:
        return model
    of_base, of_model = _by_plain_name(missing), _by_plain_name(extra)
    pairs = {of_base[plain]: of_model[plain] for plain in of_base.keys() & of_model.keys()}
    left, other = of_base.keys() - of_model.keys(), of_model.keys() - of_base.keys()
    if prefix := common_prefix(sorted(left), sorted(other)):
        pairs |= {of_base[name]: of_model[prefix + name] for name in left if prefix + name in of_model}
        found.notes.append(f"'{label}' has the prefix '{shown(prefix)}' before names, which is left out.")
    elif prefix := common_prefix(sorted(other), sorted(left)):
        pairs |= {of_base[prefix + name]: of_model[name] for name in other if prefix + name in of_base}
        found.notes.append(f"'{label}' lacks the prefix '{shown(prefix)}' before names, which the base has.")
    elif pairs:
        one = min(pairs)
        found.notes.append(f"'{label}' has {len(pairs)} other names: '{shown(pairs[one])}' is '{shown(one)}'.")
    if not pairs:
        return model
    own = {stored: name for name, stored in pairs.items()}
    return model.select({own.get(name, name): name for name in model})


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """Plain name → name, without those that two names have in common."""
    plain: dict[str, str] = {}
    several: set[str] = set()
    for name in names:
        several |= {_plain(name)} & plain.keys()
        plain[_plain(name)] = name
    return {each: name for each, name in plain.items() if each not in several}


def _plain(name: str) -> str:
    """A name without wrappers, and in today's spelling of norms and of weight normalisation.

    >>> _plain("module.encoder._orig_mod.LayerNorm.gamma"), _plain("conv.parametrizations.weight.original1")
    ('encoder.LayerNorm.weight', 'conv.weight_v')
    """
    name = _WRAPPERS.sub("", name) or name
    if match := _PARAMETRISED.fullmatch(name):
        return f"{match[1] + '.' if match[1] else ''}{match[2]}_{'gv'[int(match[3])]}"
    module, _, last = name.rpartition(".")
    return f"{module}.{ {'gamma': 'weight', 'beta': 'bias'}.get(last, last) }" if module else name


def _tie_base(found: Matched) -> None:
    """Tie tensors of the base that are equal copies, where some model has only one of the two names."""
    base = found.base
    lacked = set().union(*(_lacking(base, model) for model in found.models.values()))
    ties = {}
    for name in sorted(lacked - set(base.aliases)):
        having = [model for model in found.models.values() if name not in model]
        others = [other for other in base if other not in lacked and all(other in model for model in having)]
        if other := _copy_of(base, name, others):
            ties[name] = other
    if ties:
        found.base = base.tied(ties)
        found.notes += [f"The base has equal copies under '{n}' and '{o}', taken as tied." for n, o in ties.items()]


def _with_ties(found: Matched, label: str, model: Checkpoint) -> Checkpoint:
    """A model with the base's ties: whichever name it keeps, and equal copies."""
    base, names, ties = found.base, {name: name for name in model}, {}
    for alias, name in base.aliases.items():
        if alias in model and name not in model:
            names[name] = alias
            names.pop(alias, None)  # an alias may be left out
        elif alias in model and name in model and not _are_tied(model, alias, name) and _equal(model, alias, name):
            ties[alias] = name
    for group in _groups(model):
        if any(name in base for name in group):
            names = {new: old for new, old in names.items() if new in base or old not in group}
    for name in sorted(_names(model) - set(base) - set(model.aliases)):
        if name in names and (other := _copy_of(model, name, [o for o in model if o in base])):
            del names[name]
            found.notes.append(f"'{label}' has '{shown(name)}' as an equal copy of '{shown(other)}', taken as tied.")
    if ties:
        found.notes += [f"'{label}' has equal copies under '{a}' and '{n}', taken as tied." for a, n in ties.items()]
        model = model.tied(ties)
    return model if names.keys() == set(model) else model.select(names)


def _groups(model: Checkpoint) -> list[set[str]]:
    """The names of every tied tensor."""
    groups: dict[str, set[str]] = {}
    for alias, name in model.aliases.items():
        groups.setdefault(name, {name}).add(alias)
    return list(groups.values())


def _are_tied(model: Checkpoint, one: str, other: str) -> bool:
    return model.aliases.get(one, one) == model.aliases.get(other, other)


def _copy_of(model: Checkpoint, name: str, others: Collection[str]) -> str | None:
    """Another tensor with the very same values, which a tie would explain: a table, or a bias of the same head."""
    spec = model.specs[name]
    owner = name.rpartition(".")[0].rpartition(".")[0]
    for other in others:
        if other == name or model.specs[other] != spec or spec.numel < 2:
            continue
        of_same_head = other.rpartition(".")[0] == owner and other.rpartition(".")[2] == name.rpartition(".")[2]
        if (len(spec.shape) == 2 or of_same_head) and _equal(model, name, other):
            return other
    return None


def _equal(model: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a model have the same values."""
    if model.specs[one] != model.specs[other]:
        return False
    first, second = model.flat(one), model.flat(other)
    starts = range(0, model.specs[one].numel, _SLICE)
    return all(torch.equal(first[at : at + _SLICE], second[at : at + _SLICE]) for at in starts)
