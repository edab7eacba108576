"""What a family of models has to provide so that its models can be merged, evaluated and saved."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from suture.errors import ConfigError
from suture.heads import Head
from suture.tasks.base import Images, Task

if TYPE_CHECKING:
    from suture.checkpoints import Checkpoint
    from suture.families.pictures import PictureReader

# track("Decoding mnist", total) opens a progress bar and gives the function that counts steps.
Track = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

# Configuration, tokenizer and image processor, as the Hugging Face libraries name them.
_COMPANIONS = (
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def untracked(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The `Track` that shows nothing."""
    return nullcontext(lambda steps: None)


def companion_files(directory: Path) -> list[Path]:
    """The files of a model directory that go with the weights: configuration, tokenizer, processor."""
    return [path for name in _COMPANIONS if (path := Path(directory) / name).is_file()]


class Encoder(nn.Module, ABC):
    """A frozen float32 module from a batch of inputs to features (B, D), which are not normalised.

    Its parameters carry the canonical names of the family, so a merged state fits without renaming.
    """

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> "Encoder":
        """Copy the weights of another model of this architecture into this one, in place, and return it."""


class Family(ABC):
    """One pretrained model on disk, and what depends on it: encoder, inputs, heads, saving.

    `directory` is the pretrained model as the family saves it. `weights` are its tensors, if already open. `settings`
    are the keys of a model pool that only this family knows, `known_settings`. `experts` are the whole fine-tuned
    models by name, for families whose heads are theirs.
    """

    name: ClassVar[str]
    known_settings: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        directory: str | Path | None,
        weights: Mapping[str, Tensor] | None = None,
        settings: Mapping[str, Any] | None = None,
        experts: Mapping[str, "Checkpoint"] | None = None,
    ):
        self._directory = None if directory is None else Path(directory)
        self._weights, self.settings, self.experts = weights, settings or {}, {} if experts is None else experts

    @property
    def directory(self) -> Path:
        """The pretrained model's directory; raises `ConfigError` if it is a file alone."""
        if self._directory is None:
            label = getattr(self._weights, "label", "_pretrained_")
            raise ConfigError(f"'{label}' is no model directory. Remedy: give one with config and tokenizer.")
        return self._directory

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All tensors of the pretrained model, by their stored names."""
        if self._weights is None:
            from suture.checkpoints import open_checkpoint

            self._weights = open_checkpoint(self.directory)
        return self._weights

    @abstractmethod
    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Canonical name → stored name, for the tensors that take part in a merge."""

    @abstractmethod
    def encoder(self, state: Mapping[str, Tensor] | None = None) -> Encoder:
        """A new encoder with these weights (the pretrained ones when None)."""

    @property
    @abstractmethod
    def reader(self) -> "PictureReader":
        """The model's own way from a picture to pixels."""

    def decode(
        self, images: Images, track: Track = untracked, description: str = "Decoding", out: Tensor | None = None
    ) -> Tensor:
        """The inputs of the encoder for all images, compact: uint8 (N, *input_shape), written into `out` if given."""
        return self.reader.decode(images, track, description, out)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one decoded input."""
        return self.reader.shape

    @property
    def recipe(self) -> str:
        """All that `decode` depends on beside the images, for the key of a cache."""
        return self.reader.recipe

    @abstractmethod
    def head(self, task: Task, track: Track = untracked) -> Head:
        """From features to the task's classes."""

    @abstractmethod
    def save(self, state: Mapping[str, Tensor], out: Path) -> None:
        """Write the model with these merged tensors as a directory that loads without suture."""
