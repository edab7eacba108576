"""The models of a pool, opened; weights are read when needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture.checkpoints import Checkpoint, allocate_checkpoint, open_checkpoint, open_fine_tuned, provenance_of
from suture.checkpoints.adapter_bases import base_notes
from suture.checkpoints.adapters import is_adapter
from suture.checkpoints.matching import Matched, matched
from suture.core.batches import order_kernels
from suture.core.fabric import OneDevice
from suture.errors import PRETRAINED, CheckpointError, ConfigError
from suture.families import Encoder, Family, family
from suture.families.shared.unread import unread_encoder
from suture.merging.selection import Selection, select
from suture.merging.task_vectors import TaskVectors
from suture.pipeline.pools import ModelPool


@dataclass(frozen=True)
class Models:
    """A pretrained model and its experts, under the canonical names of their family.

    `base` and `experts` have only the tensors that are merged, `whole_base` all of the pretrained model's. `family`
    names the tensors and makes encoder, inputs and heads. `notes` say which names were matched how.
    """

    pool: ModelPool
    family: Family
    whole_base: Checkpoint
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    threads: int = 0
    notes: Sequence[str] = ()
    channels_last: bool = False

    def vectors(self, frozen: tuple[str, ...] = ()) -> TaskVectors:
        """The task vectors; the pool's frozen tensors and `frozen` stay at the base."""
        return TaskVectors(self.base, self.experts, (*self.pool.frozen, *frozen), self.threads)

    def new_encoder(self, device: torch.device | str = "cpu") -> Encoder:
        """A module with the pretrained weights, in evaluation mode; with `channels_last` its kernels have them so."""
        encoder = self.family.encoder().eval().to(device)
        return order_kernels(encoder) if self.channels_last else encoder

    def loader(self, device: OneDevice, *, unread: bool = False) -> Callable[[Mapping[str, Tensor]], nn.Module]:
        """A function from merged tensors to an encoder with them, on the device: one module, loaded anew each time.

        With `unread` they are different modules on the CPU, whose weights are read when they are needed.
        """
        if unread:
            return partial(unread_encoder, self._unread)
        return self.new_encoder(device.device).load

    @cached_property
    def can_be_unread(self) -> bool:
        """Whether the family only copies weights, so that they can be read a part at a time."""
        try:
            return self._unread is not None
        except ConfigError:
            return False

    @cached_property
    def _unread(self) -> Any:
        return unread_encoder(self.new_encoder(), self.base)

    def mergeable(self, checkpoint: Checkpoint) -> Checkpoint:
        """The tensors of a checkpoint that are merged, under the family's canonical names."""
        whole = self.family.in_memory(checkpoint)
        return whole.select(self.family.canonical_names(whole))

    @property
    def stored_names(self) -> Mapping[str, str]:
        """Canonical name → name in the pretrained model, of the tensors that are merged."""
        return self.family.canonical_names(self.whole_base)

    def unmatched(self, tasks: tuple[str, ...]) -> list[str]:
        """One line for each expert without a task of its name to learn from."""
        return [
            f"Model '{name}' has no task of its name, so there are no inputs to learn from. "
            "Remedy: add the task to the task pool, or take the model out of the model pool."
            for name in self.experts
            if name not in tasks
        ]

    @property
    def files(self) -> list[Path]:
        """The files that the models are read from."""
        return [path for model in (self.whole_base, *self.experts.values()) for path in model.files]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions, and the hashes of all files."""
        return provenance_of({PRETRAINED: self.whole_base, **self.experts})

    @contextmanager
    def new_model(self, folder: Path) -> Iterator[dict[str, Tensor]]:
        """Write a model directory as the family saves it; yields canonical name → tensor, for the merge to fill in.

        The tensors that are not merged are copied from the pretrained model.
        """
        base = self.family.saved_part(self.whole_base)
        stored = self.family.canonical_names(base)
        folder.mkdir(parents=True)
        file, shared = folder / "model.safetensors", {"aliases": base.aliases, "pieces": base.pieces}
        with allocate_checkpoint(base.specs, file, **shared) as tensors:
            yield {name: tensors[stored[name]] for name in self.vectors().specs}
            for name in set(tensors) - set(stored.values()):
                tensors[name].copy_(base[name])
        self.family.complete(folder)


def _fine_tuned(
    source: Any, label: str, chosen: Family, stored: Checkpoint, base: Checkpoint, canonical_names: Any
) -> Checkpoint:
    """A fine-tuned model in the form of the base; an adapter may know experts as stacks, or one by one as stored."""
    if not base.pieces or not is_adapter(source):
        return chosen.in_memory(open_fine_tuned(source, base, label=label, canonical_names=canonical_names))
    own = {name: canonical for canonical, name in chosen.canonical_names(base).items()}
    try:
        return open_fine_tuned(source, base.select({own.get(name, name): name for name in base}), label=label)
    except CheckpointError:
        return chosen.in_memory(open_fine_tuned(source, stored, label=label, canonical_names=canonical_names))


def open_models(pool: ModelPool, threads: int = 0, *, channels_last: bool = False) -> Models:
    """Open the models of a pool, reading only headers; raises `CheckpointError` for a file that cannot be read."""
    stored_base = open_checkpoint(pool.base, label=PRETRAINED)
    whole_experts: dict[str, Checkpoint] = {}
    chosen = family(pool.family)(stored_base.directory, stored_base, pool.settings, whole_experts)
    whole_base = chosen.in_memory(stored_base)
    stored = chosen.canonical_names(whole_base)

    def canonical_names(names: Any) -> dict[str, str]:
        return {stored.get(canonical, canonical): name for canonical, name in chosen.canonical_names(names).items()}

    for name, model in pool.models.items():
        whole_experts[name] = _fine_tuned(model, name, chosen, stored_base, whole_base, canonical_names)

    def mergeable(checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint.select(chosen.canonical_names(checkpoint))

    base = mergeable(whole_base)
    experts = {name: mergeable(model) for name, model in whole_experts.items()}
    found = matched(base, experts)
    if found.base is not base:  # the family saves the base as it is stored
        found = Matched(base, experts)
    exact = [name for name in pool.frozen if "*" not in name]
    patterns = [name for name in pool.frozen if "*" in name]
    selected = select(base, found.models, Selection(patterns, pool.keep, pool.only))
    pool = replace(pool, frozen=(*exact, *selected.frozen))
    notes = [*found.notes, *base_notes(whole_experts, whole_base)]
    return Models(pool, chosen, whole_base, base, selected.models, threads, notes, channels_last)
