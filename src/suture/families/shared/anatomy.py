"""Names and shapes of an architecture's tensors: found by building it without memory, and kept for the next process."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from suture.errors import OutputError
from suture.families.shared.spelling import spelling_of
from suture.storage.atomic import write_text
from suture.storage.cache import cache_directory

Shape = tuple[int | None, ...]


class Anatomy:
    """The facts of a classification model that need no weights.

    `build(classes)` makes it on the meta device; it is called where the cache has nothing under `key`, which must say
    everything that the architecture depends on. To import and build one takes transformers seconds.
    """

    def __init__(self, key: str, build: Callable[[int], Any]):
        self._file, self._build = cache_directory() / "architectures" / f"{key}.json", build

    @property
    def prefix(self) -> str:
        """The name of the backbone in the model."""
        return self._known["prefix"]

    @cached_property
    def backbone(self) -> set[str]:
        """The names of the backbone's tensors."""
        return set(self._known["backbone"])

    @cached_property
    def counters(self) -> set[str]:
        """Names of the integer tensors, which a checkpoint may lack."""
        return set(self._known["counters"])

    @cached_property
    def head(self) -> dict[str, Shape]:
        """Name → shape of the head's tensors, with None for the number of classes."""
        return {name: tuple(shape) for name, shape in self._known["head"].items()}

    @cached_property
    def two(self) -> Any:
        """The model with two classes, on the meta device."""
        return self._build(2)

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
        """Stored name → the current name in the model."""
        names, known = list(names), self._known["spelled"]
        if unknown := [name for name in names if name not in known]:
            known |= {name: self._spelling(name) for name in unknown}
            self._keep()
        return {name: known[name] for name in names}

    @cached_property
    def _spelling(self) -> Callable[[str], str]:
        return spelling_of(self.two)

    @cached_property
    def _known(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            known = json.loads(self._file.read_text("utf-8"))
            if isinstance(known, Mapping) and {"prefix", "backbone", "counters", "head", "spelled"} <= set(known):
                return dict(known)
        return self._found()

    def _found(self) -> dict[str, Any]:
        """The facts by the model itself; the axis of the classes by a model with three of them."""
        prefix, two, three = self.two.base_model_prefix, self.two.state_dict(), self._build(3).state_dict()
        return {
            "prefix": prefix,
            "backbone": [f"{prefix}.{name}" for name in getattr(self.two, prefix).state_dict()],
            "counters": [name for name, tensor in two.items() if not tensor.is_floating_point()],
            "head": {
                name: [a if a == b else None for a, b in zip(two[name].shape, three[name].shape, strict=True)]
                for name in two
                if not name.startswith(f"{prefix}.")
            },
            "spelled": {},
        }

    def _keep(self) -> None:
        with suppress(OutputError):
            write_text(self._file, json.dumps(self._known))
