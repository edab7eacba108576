"""A model with another model's tokenizer: rows of shared tokens as they are, the others made from them.

A token that only the donor has is written as a sum of a few shared tokens in the donor's embeddings, by orthogonal
matching pursuit; the same sum of the model's embeddings is its row (https://arxiv.org/abs/2506.06607).
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from suture.checkpoints import (
    Checkpoint,
    Source,
    TensorSpec,
    allocate_checkpoint,
    new_directory,
    open_checkpoint,
    provenance_of,
)
from suture.checkpoints.json_files import model_config, read_object
from suture.checkpoints.provenance import PROVENANCE
from suture.checkpoints.tokenizers import token_keys
from suture.errors import ConfigError, refusal
from suture.file_merge.layout import file_stem, split_into_shards, write_index
from suture.file_merge.options import parse_size
from suture.file_merge.output import companions
from suture.file_merge.pursuit import pursue
from suture.merging.compatibility import is_vocabulary, merged_names
from suture.pipeline.card_parts import front_matter, inputs_table

_TOKENIZER = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "*.tiktoken",
    "tokenizer*.json",
    "vocab.*",
)
_HEADS = ("lm_head", "output.weight", "embed_out")
_SLICE = 1 << 20  # entries that are copied at once


@dataclass(frozen=True)
class _Rows:
    """Rows of the donor's tokens: shared ones with their rows in the model, and the others."""

    donor: Tensor
    model: Tensor
    others: Tensor
    count: int


def transplant(
    model: Source,
    donor: Source,
    output: str | Path,
    *,
    atoms: Annotated[int, Ge(1)] = 64,
    memory: int | str = "300MB",
    overwrite: bool = False,
) -> Path:
    """Write `model` with the tokenizer of `donor` as a model directory; returns its path.

    Both are model directories with a tokenizer.json. Tokens that both have keep the model's rows bit for bit, in
    embedding and head. The row of any other token, and of rows without one, is the sum of at most `atoms` shared rows
    that comes nearest to it in the donor (orthogonal matching pursuit, https://arxiv.org/abs/2506.06607), taken from
    the model. `memory` limits what the search holds. Special tokens in config.json and generation_config.json are the
    donor's. suture_merge.json says how many tokens are shared and what is left of the others' norms. Raises
    `SutureError` where a tokenizer or a table is missing, or where no token is shared.
    """
    if not isinstance(atoms, int) or isinstance(atoms, bool) or atoms < 1:
        raise ConfigError(f"atoms={atoms!r}: wanted a whole number from 1 on.")
    limit = parse_size("memory", memory)
    opened = {"model": open_checkpoint(model, label="model"), "donor": open_checkpoint(donor, label="donor")}
    tables = _tables(opened["model"], opened["donor"])
    rows = _rows(opened["model"], opened["donor"], tables)
    inputs = [path for each in opened.values() for path in (*each.files, each.directory) if path is not None]
    with new_directory(output, overwrite=overwrite, inputs=inputs) as folder:
        residuals = _write_weights(folder, opened, tables, rows, atoms, limit)
        _write_companions(folder, opened, rows.count)
        found = {"atoms": atoms, "shared_tokens": len(rows.donor), "other_rows": len(rows.others)}
        origin = {**provenance_of(opened), "transplant": found | {"residuals": residuals}}
        (folder / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
        sources = {"model": model, "donor": donor}
        (folder / "README.md").write_text(_card(Path(output).name, sources, origin), "utf-8")
    return Path(output)


def _tables(model: Checkpoint, donor: Checkpoint) -> dict[str, str]:
    """Each table of the model with a row for each token → the donor's: heads by its head, if it has one."""
    own, others = _vocabulary(model), _vocabulary(donor)
    for label, checkpoint, names in (("model", model, own), ("donor", donor, others)):
        if not any(not _is_head(name) for name in names):
            raise refusal(label, "has no embedding with a row for each token", "give a language model")
        if checkpoint.directory is None or not (checkpoint.directory / "tokenizer.json").is_file():
            raise refusal(label, "has no tokenizer.json, so its rows have no tokens", "put it beside the weights")
    embedding = next(name for name in others if not _is_head(name))
    head = next((name for name in others if _is_head(name)), embedding)
    return {name: head if _is_head(name) else embedding for name in own}


def _vocabulary(checkpoint: Checkpoint) -> list[str]:
    return [name for name in merged_names(checkpoint) if is_vocabulary(name, checkpoint)]


def _is_head(name: str) -> bool:
    return any(part in name for part in _HEADS)


def _rows(model: Checkpoint, donor: Checkpoint, tables: Mapping[str, str]) -> _Rows:
    """The rows of tokens that both have, by what they stand for, and the donor's other rows."""
    own, others = _keys(model, tables), _keys(donor, tables.values())
    numbers: dict[str | bytes, int] = {}
    for row in sorted(own):
        numbers.setdefault(own[row], row)
    shared = {row: numbers[key] for row, key in sorted(others.items()) if key in numbers}
    if not shared:
        raise ConfigError("The tokenizers have no token in common. Remedy: give models of one kind of text.")
    count = max(donor.specs[name].shape[0] for name in tables.values())
    lacking = [row for row in range(count) if row not in shared]
    return _Rows(torch.tensor(list(shared)), torch.tensor(list(shared.values())), torch.tensor(lacking).long(), count)


def _keys(checkpoint: Checkpoint, names: Any) -> dict[int, str | bytes]:
    assert checkpoint.directory is not None
    keys = token_keys(checkpoint.directory / "tokenizer.json")
    rows = min(checkpoint.specs[name].shape[0] for name in names)
    if keys and max(keys) >= rows:
        problem = f"has a tokenizer.json for {max(keys) + 1} rows, and weights of {rows}"
        raise refusal(checkpoint.label, problem, "put the tokenizer of these weights beside them")
    return keys


def _write_weights(
    folder: Path, opened: Mapping[str, Checkpoint], tables: Mapping[str, str], rows: _Rows, atoms: int, memory: int
) -> dict[str, float]:
    """Write all tensors; returns what is left of the other rows' norms in the donor, on average, for each table."""
    model, donor = opened["model"], opened["donor"]
    specs = {name: spec for name, spec in model.specs.items() if name not in model.aliases}
    specs |= {name: TensorSpec((rows.count, *specs[name].shape[1:]), specs[name].dtype) for name in tables}
    stem = file_stem(model.files)
    shards = split_into_shards(specs, model.aliases, parse_size("shard_size", "5GB"), stem)
    residuals = {}
    with ExitStack() as files:
        for shard in shards:
            own = {name: location.spec for name, location in shard.locations.items()}
            tied = {alias: name for alias, name in model.aliases.items() if name in own}
            written = files.enter_context(allocate_checkpoint(own, folder / shard.file, aliases=tied))
            for name in own:
                if name in tables:
                    residuals[name] = _fill(written[name], model[name], donor[tables[name]], rows, atoms, memory)
                else:
                    _copy(model, name, written[name])
    write_index(folder, shards, stem)
    return residuals


def _copy(model: Checkpoint, name: str, target: Tensor) -> None:
    numel = model.specs[name].numel
    for start in range(0, numel, _SLICE):
        stop = min(start + _SLICE, numel)
        target.view(-1)[start:stop] = model.flat(name)[start:stop]


def _fill(target: Tensor, own: Tensor, donor: Tensor, rows: _Rows, atoms: int, memory: int) -> float:
    """Fill one table, some rows at a time."""
    width = donor.shape[1]
    step = max(1, memory // (8 * width * (min(atoms, width) + 8)))
    for start in range(0, len(rows.donor), step):
        part = slice(start, start + step)
        target[rows.donor[part]] = own[rows.model[part]]
    left = []
    for start in range(0, len(rows.others), step):
        numbers = rows.others[start : start + step]
        table = lambda first, last: donor[rows.donor[first:last]].float()
        found = pursue(donor[numbers].float(), table, len(rows.donor), atoms)
        for number, chosen, coefficients in zip(numbers, found.chosen, found.coefficients, strict=True):
            target[number] = (coefficients @ own[rows.model[chosen]].float()).to(target.dtype)
        left.append(found.residuals[:, -1])
    return float(torch.cat(left).mean()) if left else 0.0


def _write_companions(folder: Path, opened: Mapping[str, Checkpoint], rows: int) -> None:
    """The model's files, but the donor's tokenizer; sizes and special tokens in the configurations."""
    model, donor = opened["model"], opened["donor"]
    assert donor.directory is not None
    theirs = {path for pattern in _TOKENIZER for path in donor.directory.glob(pattern) if path.is_file()}
    replaced = {path for pattern in _TOKENIZER for path in (model.directory or Path()).glob(pattern)}
    for path in [*(set(companions(model.directory)) - replaced), *theirs]:
        shutil.copyfile(path, folder / path.name)
    ids = {key: value for key, value in model_config(donor.directory).items() if key.endswith("_token_id")}
    for name in ("config.json", "generation_config.json"):
        if (file := folder / name).is_file():
            content = _with_tokens(read_object(file, "copy or download the model again"), ids, rows)
            if model.decoded:
                content.pop("quantization_config", None)
            file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _with_tokens(content: dict[str, Any], ids: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A configuration with other special tokens and another size, in its parts too."""
    changed = {}
    for key, value in content.items():
        if key == "vocab_size":
            value = rows
        elif key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = ids.get(key)
        elif key in ("text_config", "decoder") and isinstance(value, dict):
            value = _with_tokens(value, ids, rows)
        changed[key] = value
    return changed


def _card(name: str, sources: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    found = origin["transplant"]
    lines = [
        *front_matter([sources["model"]], ["transplant"], "transformers"),
        f"# {name}",
        "",
        f"A model with the tokenizer of another, made by suture {origin['versions']['suture']}: "
        f"{found['shared_tokens']} tokens keep their rows, {found['other_rows']} rows are sums of at most "
        f"{found['atoms']} of these ([orthogonal matching pursuit](https://arxiv.org/abs/2506.06607)).",
        "",
        *inputs_table(sources, origin["inputs"]),
        "",
    ]
    return "\n".join(lines)
