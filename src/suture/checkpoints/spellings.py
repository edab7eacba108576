"""The same tensors under other names: prefixes, and the parametrisation of weight normalisation."""

from collections.abc import Collection, Iterable
from itertools import islice

from suture.errors import problem, shown

_LOOKED_AT = 5  # names from which a prefix is guessed
_GUESSES = 50
_WRAPPERS = {"module.": "model.module", "_orig_mod.": "model._orig_mod"}
#: What torch.nn.utils.weight_norm stores in place of NAME, and what torch.nn.utils.parametrizations.weight_norm does.
_NORMALISED = ("{0}_g", "{1}.parametrizations.{2}.original0")


def spelling_problem(label: str, names: Iterable[str], base: Collection[str], model: Collection[str]) -> str | None:
    """Why a model lacks tensors of the base, if it has them in another form: a prefix, or weight normalisation.

    `names` are those that the base and the model should share; `base` and `model` all that each of them has.
    """
    missing = sorted(set(names) - set(model))
    extra = sorted(set(model) - set(base))
    if not missing:
        return None
    if normalised := next((name for name in missing if _normalised(name, model)), None):
        return _normalisation(label, label, normalised)
    if normalised := next((name for name in extra if _normalised(name, base)), None):
        return _normalisation(label, "the base", normalised)
    if prefix := common_prefix(missing, extra):
        found = f"has the prefix '{shown(prefix)}' before its names: '{shown(prefix + missing[0])}'"
        return problem(label, f"{found} is '{shown(missing[0])}' in the base", _remedy(prefix))
    if prefix := common_prefix(extra, missing):
        found = f"has no prefix '{shown(prefix)}' before its names, which the base has: '{shown(missing[0])}'"
        return problem(label, found, _remedy(prefix))
    return None


def common_prefix(names: list[str], others: list[str]) -> str | None:
    """The prefix that most of the names have."""
    there = set(others)
    guesses = (
        other.removesuffix(name) for name in names[:_LOOKED_AT] for other in others if other.endswith(f".{name}")
    )
    for prefix in islice(guesses, _GUESSES):
        if 2 * sum(prefix + name in there for name in names) > len(names):
            return prefix
    return None


def _remedy(prefix: str) -> str:
    if prefix in _WRAPPERS:
        return f"give {_WRAPPERS[prefix]}, the model without its wrapper"
    return "load one of the two into the class of the other, and save it again"


def _normalised(name: str, names: Collection[str]) -> bool:
    module, _, parameter = name.rpartition(".")
    return any(form.format(name, module, parameter) in names for form in _NORMALISED)


def _normalisation(label: str, where: str, name: str) -> str:
    found = f"cannot be compared: '{shown(name)}' is stored as a direction and a length (weight_norm) in '{where}'"
    return problem(label, found, "call torch.nn.utils.remove_weight_norm on those modules, and save the model again")
