"""What a family of models has to provide so that its models can be merged, evaluated and saved."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor, nn

from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import ConfigError, SutureError
from suture.tasks.base import Images, Task, Texts

if TYPE_CHECKING:
    from suture.checkpoints import Checkpoint
    from suture.families.shared.pictures import PictureReader
    from suture.families.shared.texts import TextReader

# Configuration, tokenizer and image processor, as the Hugging Face libraries name them.
_COMPANIONS = (
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


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
    reads: ClassVar[Literal["pictures", "texts"]] = "pictures"
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
    def reader(self) -> "PictureReader | TextReader":
        """The model's own way from a picture to pixels, or from a text to tokens."""

    def decode(
        self, images: Images, track: Track = untracked, description: str = "Decoding", out: Tensor | None = None
    ) -> Tensor:
        """The inputs of the encoder for all images, compact: uint8 (N, *input_shape), written into `out` if given."""
        return cast("PictureReader", self.reader).decode(images, track, description, out)

    def tokens(self, texts: Texts, track: Track = untracked, description: str = "Reading texts") -> dict[str, Tensor]:
        """The inputs of the encoder for all texts: int32 (N, length), each under the name of an argument."""
        return cast("TextReader", self.reader).tokens(texts, track, description)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one decoded image."""
        return cast("PictureReader", self.reader).shape

    @property
    def recipe(self) -> str:
        """All that `decode` or `tokens` depends on beside its input, for the key of a cache."""
        return self.reader.recipe

    def problems(self, task: Task) -> list[str]:
        """What of a task does not fit this family or its models, one line each; from words and headers alone."""
        if (task.text_columns is not None) == (self.reads == "texts"):
            return self._reader_problems()
        found, remedy = (
            ("no text_columns", "name them") if self.reads == "texts" else ("text_columns", "leave them out")
        )
        reads = f"family={self.name} reads {self.reads}"
        return [f"Task {task.name!r} has {found}, but {reads}. Remedy: {remedy}, or choose another family."]

    def _reader_problems(self) -> list[str]:
        """What of the tokenizer's settings does not fit the model."""
        try:
            _ = self.reader if self.reads == "texts" else None
        except SutureError as error:
            return [str(error)]
        return []

    @abstractmethod
    def head(self, task: Task, track: Track = untracked) -> Head:
        """From features to the task's classes."""

    def kept(self, base: "Checkpoint") -> "Checkpoint":
        """The part of the pretrained model that a merged model is saved with: all of it, unless a family says less."""
        return base

    def complete(self, out: Path) -> None:
        """Add what a model needs beside the merged weights, `model.safetensors`, to their directory."""
        for path in companion_files(self.directory) if self._directory else ():
            shutil.copyfile(path, out / path.name)

    def save(self, state: Mapping[str, Tensor], out: Path) -> None:
        """Write a directory that loads without suture: the merged tensors in the base's names and dtypes, and more."""
        from suture.checkpoints import open_checkpoint, save_checkpoint

        base, out = self.kept(open_checkpoint(self.weights)), Path(out)
        stored, tensors = self.canonical_names(base), dict(base.items())
        for name, key in self.canonical_names(state).items():
            tensors[stored[name]] = state[key].detach().to(tensors[stored[name]].dtype)
        out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(tensors, out / "model.safetensors", metadata={"format": "pt"})
        self.complete(out)
