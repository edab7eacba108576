"""Compatibility of models, from headers alone: names, shapes, dtypes, ties, vocabularies."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from suture.checkpoints import Checkpoint, Source, TensorSpec, open_checkpoint, open_fine_tuned
from suture.checkpoints.matching import matched
from suture.checkpoints.quantised import quantised_problem
from suture.checkpoints.spellings import spelling_problem
from suture.checkpoints.tokenizers import mixed_tokens
from suture.core.names import short
from suture.errors import CheckpointError, ConfigError, shown

_LISTED = 5  # problems of one kind that are listed for a model; any more are only counted
#: Parts of the names of embeddings and heads, which have a row for each token.
VOCABULARY = ("embed", "lm_head", "wte", "shared.weight", "output.weight")


def compatibility(
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    *,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    by_row: bool = False,
    pool: bool = False,
) -> list[str]:
    """Every reason why the models cannot be merged, one line each; an empty list if they can.

    `base` and `models` are as for `merge`. Integer and bool tensors are taken from the base, so they may be missing or
    differ. Tensors named in `frozen` are not compared. `mixed_dtypes` allows floating-point dtypes other than the
    base's. `by_row` allows one row of an embedding to be different tokens. With `pool` the keys of a model pool are
    named as remedies. Raises `CheckpointError` for a model that cannot be opened.
    """
    if not models:
        return ["There is no model to merge. Remedy: give at least one fine-tuned model beside the base."]
    base, checkpoints = open_models(base, models)
    problems = [
        f"'{name}' is to be left at the base, but the base has no such tensor." for name in _unknown(base, frozen)
    ]
    if unmergeable := _files_problems(base, checkpoints, frozen, by_row):
        return problems + unmergeable
    for label, model in checkpoints.items():
        if spelling := spelling_problem(label, merged_names(base, frozen), base.specs, model.specs):
            problems.append(spelling)
            continue
        problems += _first_few(_missing(base, model, label, frozen), label)
        problems += _first_few(_extra(base, model, label), label)
        problems += _first_few(_different(base, model, label, frozen, mixed_dtypes, pool), label)
        problems += _first_few(_untied(base, model, label), label)
    return problems


def open_models(
    base: Source, models: Mapping[str, Source] | Sequence[Source], key: str | None = None
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """The base and its fine-tuned models, opened; those of a sequence are named model_1, model_2, ….

    Models whose names or ties differ from the base's by a known rule have the base's names here.
    """
    if isinstance(models, str | os.PathLike):
        raise ConfigError(f"models is the one path '{shown(models)}'. Remedy: give a list, or a mapping name → model.")
    if not isinstance(models, Mapping):
        models = {f"model_{number}": model for number, model in enumerate(models, start=1)}
    base = open_checkpoint(base, key=key)
    found = matched(base, {name: open_fine_tuned(model, base, label=name, key=key) for name, model in models.items()})
    return found.base, found.models


def merged_names(base: Checkpoint, frozen: Sequence[str] = ()) -> list[str]:
    """Names of the tensors that are merged, sorted: floating point, not frozen, and the first of each tied group."""
    left_out = {*frozen, *base.aliases}
    return sorted(n for n, spec in base.specs.items() if spec.dtype.is_floating_point and n not in left_out)


def _files_problems(
    base: Checkpoint, models: Mapping[str, Checkpoint], frozen: Sequence[str], by_row: bool
) -> list[str]:
    """Reasons against a merge whatever the names and shapes: quantised weights, and rows of different tokens."""
    try:
        problems = [problem for each in (base, *models.values()) if (problem := quantised_problem(each))]
        tables = [base.specs[name].shape for name in merged_names(base, frozen) if is_vocabulary(name, base)]
        if not problems and tables and not by_row:
            problems = mixed_tokens(base, models, max(shape[0] for shape in tables))
    except CheckpointError as error:
        return [str(error)]
    return problems


def is_vocabulary(name: str, base: Checkpoint) -> bool:
    """Whether a tensor has a row for each token: an embedding or a head, not of positions or patches."""
    other = any(part in name for part in ("position", "patch", "token_type"))
    return not other and len(base.specs[name].shape) == 2 and any(part in name for part in VOCABULARY)


def _unknown(base: Checkpoint, frozen: Sequence[str]) -> list[str]:
    return [name for name in frozen if name not in base.specs and name not in base.aliases]


def _missing(base: Checkpoint, model: Checkpoint, label: str, frozen: Sequence[str]) -> Iterator[str]:
    for name in merged_names(base, frozen):
        if name not in model:
            yield (
                f"'{name}' is missing in '{label}' (the base has {_describe(base.specs[name])}). "
                "Remedy: check that both are of one architecture and saved whole, or name what to merge with only=[…]."
            )


def _extra(base: Checkpoint, model: Checkpoint, label: str) -> Iterator[str]:
    for name in sorted(set(model.specs) - set(base)):
        if model.specs[name].dtype.is_floating_point and name not in model.aliases:
            yield (
                f"'{name}' ({_describe(model.specs[name])}) is in '{label}' but not in the base. "
                "Remedy: merge models of one architecture, or drop the tensor from that checkpoint."
            )


def _different(
    base: Checkpoint, model: Checkpoint, label: str, frozen: Sequence[str], mixed_dtypes: bool, pool: bool
) -> Iterator[str]:
    for name in merged_names(base, frozen):
        if name not in model:
            continue
        expected, spec = base.specs[name], spec_of(model, name)
        if spec.shape != expected.shape:
            yield _shape_problem(name, label, spec, expected, pool)
        elif spec.dtype != expected.dtype and not (mixed_dtypes and spec.dtype.is_floating_point):
            yield (
                f"'{name}' is {short(spec.dtype)} in '{label}' but {short(expected.dtype)} in the base. "
                "Remedy: convert one of them, or allow it with mixed_dtypes=true."
            )


def _shape_problem(name: str, label: str, spec: TensorSpec, expected: TensorSpec, pool: bool) -> str:
    vocabulary = any(part in name for part in VOCABULARY)
    if vocabulary and spec.shape[1:] == expected.shape[1:]:
        at_base = "; or leave the tensor at the base by naming it under `frozen` in the pool" if pool else ""
        return (
            f"'{name}' has {spec.shape[0]} rows in '{label}' but {expected.shape[0]} in the base: the vocabularies "
            f"differ. Remedy: suture merge … vocabulary=base, crop, pad or union; resize that model's embeddings to "
            f"{expected.shape[0]} rows{at_base}."
        )
    return (
        f"'{name}' has shape {tuple(spec.shape)} in '{label}' but {tuple(expected.shape)} in the base. "
        "Remedy: merge models of one architecture."
    )


def _untied(base: Checkpoint, model: Checkpoint, label: str) -> Iterator[str]:
    for alias, name in base.aliases.items():
        if alias in model.specs and name in model.specs and model.aliases.get(alias, alias) == alias:
            yield (
                f"'{alias}' is tied to '{name}' in the base but not in '{label}'. "
                "Remedy: tie them in that model, or untie them in the base."
            )


def spec_of(checkpoint: Checkpoint, name: str) -> TensorSpec:
    """Shape and dtype of a tensor, by its own name or a tied one."""
    return checkpoint.specs[checkpoint.aliases.get(name, name)]


def _describe(spec: TensorSpec) -> str:
    return f"{short(spec.dtype)} {tuple(spec.shape)}"


def _first_few(problems: Iterable[str], label: str) -> list[str]:
    lines = list(problems)
    rest = len(lines) - _LISTED
    return lines if rest <= 0 else [*lines[:_LISTED], f"… and {rest} more of this kind in '{label}'."]
