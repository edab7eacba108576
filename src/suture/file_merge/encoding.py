"""A merged model in the codes of its base: written beside the plain one, then read back to say what the codes cost."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.checkpoints import Checkpoint, TensorSpec, allocate_checkpoint, open_checkpoint
from suture.checkpoints.checkpoint import Codes
from suture.checkpoints.provenance import PROVENANCE
from suture.errors import ConfigError, shown
from suture.file_merge.layout import split_into_shards, write_index

_SLICE = 1 << 18  # entries that are compared at once
_REMEDY = "leave out encode, for plain weights"


def codes_of(base: Checkpoint, merged: Mapping[str, TensorSpec]) -> dict[str, Codes]:
    """The codes in which tensors of the result are written again; raises `ConfigError` where that is not possible."""
    codes = dict(base.codes)
    if not codes:
        raise ConfigError(f"encode=input: the base '{shown(base.label)}' holds no codes. Remedy: {_REMEDY}.")
    for name, each in codes.items():
        if each.encode is None:
            problem = f"encode=input: '{shown(name)}' has {each.kind}, which are read and not written"
            raise ConfigError(f"{problem}. Remedy: {_REMEDY}.")
        if name not in merged or merged[name].shape != base.specs[name].shape:
            problem = f"encode=input: '{shown(name)}' has other names or rows in the result than in the base's codes"
            raise ConfigError(f"{problem}. Remedy: {_REMEDY}.")
    return codes


def write_encoded(
    plain: Path, folder: Path, codes: Mapping[str, Codes], unchanged: Collection[str], shard_size: int, stem: str
) -> None:
    """Write the weights of a folder into another one, those with codes as codes.

    Tensors that are `unchanged` keep the base's codes bit for bit, and so does what belongs to codes and is not
    computed from weights.
    """
    with open_checkpoint(plain) as merged, ExitStack() as files:
        specs = {name: spec for name, spec in merged.specs.items() if name not in codes and name not in merged.aliases}
        specs |= {name: spec for each in codes.values() for name, spec in each.specs.items()}
        shards = split_into_shards(specs, merged.aliases, shard_size, stem)
        written: dict[str, Tensor] = {}
        for shard in shards:
            own = {name: location.spec for name, location in shard.locations.items()}
            tied = {alias: name for alias, name in merged.aliases.items() if name in own}
            written |= files.enter_context(allocate_checkpoint(own, folder / shard.file, aliases=tied))
        for name in merged:
            if name not in codes and name not in merged.aliases:
                _copy(merged, name, written[name])
        for name, each in codes.items():
            _encode(merged, name, each, written, unchanged=name in unchanged)
            merged.let_go()
    write_index(folder, shards, stem)


def _copy(merged: Checkpoint, name: str, target: Tensor) -> None:
    for start, stop in _slices(merged.specs[name].numel):
        target.view(-1)[start:stop] = merged.flat(name)[start:stop]


def _encode(merged: Checkpoint, name: str, codes: Codes, written: Mapping[str, Tensor], *, unchanged: bool) -> None:
    assert codes.encode is not None
    fills = () if unchanged else codes.encode.fills
    for stored in codes.specs:
        if stored not in fills:
            written[stored].copy_(codes.read(stored))
    if not unchanged:
        flat = merged.flat(name)
        codes.encode.run(lambda start, stop: flat[start:stop].float(), written)


def record_error(plain: Path, folder: Path, codes: Mapping[str, Codes]) -> dict[str, Any]:
    """Decode what was written, compare it with the plain weights, and add that to the folder's record.

    An error is ‖decoded − plain‖ / ‖plain‖ in the Frobenius norm: of each tensor, and of all together.
    """
    errors, total = {}, torch.zeros(2, dtype=torch.float64)
    with open_checkpoint(plain) as merged, open_checkpoint(folder) as decoded:
        for name in codes:
            squares = _squares(merged, decoded, name)
            errors[name], total = _relative(squares), total + squares
            merged.let_go()
            decoded.let_go()
    kinds = " and ".join(sorted({each.kind for each in codes.values()}))
    found = {"codes": kinds, "relative_error": _relative(total), "tensors": errors}
    file = folder / PROVENANCE
    origin = {**json.loads(file.read_text("utf-8")), "encoding": found}
    file.write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    return found


def error_line(found: Mapping[str, Any]) -> str:
    """The error that codes add, in one sentence."""
    worst = max(found["tensors"], key=found["tensors"].__getitem__)
    total, most = 100 * found["relative_error"], 100 * found["tensors"][worst]
    return (
        f"Encoded again in {found['codes']}, which changes the merged weights by {total:.3g} % of their norm; "
        f"most in '{worst}', by {most:.3g} %."
    )


def _squares(merged: Checkpoint, decoded: Checkpoint, name: str) -> Tensor:
    """The sums of squares of the difference and of the plain weights, float64."""
    plain, coded = merged.flat(name), decoded.flat(name)
    sums = torch.zeros(2, dtype=torch.float64)
    for start, stop in _slices(merged.specs[name].numel):
        wanted = plain[start:stop].double()
        sums += torch.stack([(coded[start:stop].double() - wanted).square().sum(), wanted.square().sum()])
    return sums


def _relative(squares: Tensor) -> float:
    return float((squares[0] / squares[1].clamp(min=1e-300)).sqrt())


def _slices(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, _SLICE):
        yield start, min(start + _SLICE, numel)
