"""The interface of a model family, through which its models are merged, evaluated and saved."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor, nn

from suture import __version__
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import ConfigError, SutureError
from suture.storage.cache import cache_directory, digest, once
from suture.tasks.base import Images, Task, Texts

if TYPE_CHECKING:
    from suture.checkpoints import Checkpoint
    from suture.families.shared.pictures import PictureReader
    from suture.families.shared.texts import TextReader

# Configuration, tokenizer and image processor, by the file names of the Hugging Face libraries.
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

_TEXTS = (".json", ".txt", ".model", ".jinja")  # whatever a tokenizer may be made of


def companion_files(directory: Path) -> list[Path]:
    """The files of a model directory that accompany the weights: configuration, tokenizer, processor."""
    return [path for name in _COMPANIONS if (path := Path(directory) / name).is_file()]


class Encoder(nn.Module, ABC):
    """A frozen float32 module that maps a batch of inputs to features (B, D), not normalised.

    Its parameters have the family's canonical names, so a merged state fits without renaming.
    """

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> "Encoder":
        """Copy the weights of another model of this architecture into this one, and return it."""


class Family(ABC):
    """One pretrained model on disk: its encoder, inputs, heads, and how merged models are saved.

    `directory` holds the pretrained model as the family saves it. `weights` are its tensors, if already open.
    `settings` are those keys of a model pool that only this family has (`known_settings`). `experts` are the whole
    fine-tuned models by name, for families whose heads come from them.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["pictures", "texts"]] = "pictures"
    known_settings: ClassVar[frozenset[str]] = frozenset()
    #: Those of them without which there is no model.
    needed_settings: ClassVar[frozenset[str]] = frozenset()
    #: Endings of the names of transformers' classes, as config.json has them, whose models are of this family.
    architectures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        """Whether a model directory is of this family, by its configuration alone."""
        if (directory / "modules.json").is_file():  # a sentence encoder, whatever its architecture
            return False
        try:
            config = json.loads((directory / "config.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        names = config.get("architectures") if isinstance(config, Mapping) else None
        return bool(cls.architectures) and any(str(name).endswith(cls.architectures) for name in names or ())

    def __init__(
        self,
        directory: str | Path | None,
        weights: Mapping[str, Tensor] | None = None,
        settings: Mapping[str, Any] | None = None,
        experts: Mapping[str, "Checkpoint"] | None = None,
    ):
        self._directory = None if directory is None else Path(directory)
        self._weights, self.settings = weights, settings or {}
        self.experts = {} if experts is None else experts

    @property
    def directory(self) -> Path:
        """The pretrained model's directory; raises `ConfigError` if the model is a single file."""
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

    def in_memory(self, checkpoint: "Checkpoint") -> "Checkpoint":
        """A model with the tensors that the modules have, where its files store them in pieces; else as it is."""
        return checkpoint

    @abstractmethod
    def canonical_names(self, names: Iterable[str]) -> dict[str, str]:
        """Canonical name → stored name, for the tensors that are merged."""

    @abstractmethod
    def encoder(self, state: Mapping[str, Tensor] | None = None) -> Encoder:
        """A new encoder with these weights, or the pretrained ones for None."""

    @property
    @abstractmethod
    def reader(self) -> "PictureReader | TextReader":
        """The model's preprocessing: pictures to pixels, or texts to tokens."""

    def decode(
        self, images: Images, track: Track = untracked, description: str = "Decoding", out: Tensor | None = None
    ) -> Tensor:
        """All images as inputs of the encoder: uint8 (N, *input_shape), written into `out` if given."""
        return cast("PictureReader", self.reader).decode(images, track, description, out)

    def tokens(self, texts: Texts, track: Track = untracked, description: str = "Reading texts") -> dict[str, Tensor]:
        """All texts as inputs of the encoder: argument name → int32 (N, length)."""
        return cast("TextReader", self.reader).tokens(texts, track, description)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one decoded image."""
        return cast("PictureReader", self.reader).shape

    @property
    def preprocessing(self) -> str:
        """Everything that `decode` or `tokens` depends on beside its input, as JSON, for the key of a cache.

        If it is empty, nothing is cached.
        """
        return self.reader.preprocessing

    def problems(self, task: Task) -> list[str]:
        """Reasons why a task does not fit this family or its models, one line each, from settings and headers alone."""
        texts = self.reads == "texts"
        if task.score is not None:
            problem = f"Task {task.name!r} has score={task.score.metric}, which family={self.name} does not know"
            return [f"{problem}. Remedy: family: causal_lm, or leave it out."]
        if (task.text_columns is not None) == texts:
            return self._reader_problems()
        problem = f"Task {task.name!r} has {'no ' * texts}text_columns, but family={self.name} reads {self.reads}."
        return [f"{problem} Remedy: {'name them' if texts else 'leave them out'}, or choose another family."]

    def _reader_problems(self) -> list[str]:
        """Settings of the tokenizer that do not fit the model, one line each; what was found good stays so."""
        if self.reads != "texts":
            return []
        try:
            versions = [version(name) for name in ("transformers", "tokenizers")]
            facts = (self.name, str(sorted(self.settings.items())), versions, __version__)
            files = [path for path in self.directory.iterdir() if path.suffix in _TEXTS and path.is_file()]
            once(cache_directory() / "tokenizers" / digest({}, files, *facts), self._read)
        except SutureError as error:
            return [str(error)]
        return []

    def _read(self) -> str:
        """Load the tokenizer, and say so."""
        return f"{type(self.reader).__name__}\n"

    def merged_logits(self) -> Callable[[nn.Module, Any, str], Tensor] | None:
        """A function (encoder, inputs, task) → logits, where a model's own output layer makes them and not a head."""
        return None

    @abstractmethod
    def head(self, task: Task, track: Track = untracked) -> Head | None:
        """The task's head, from features (B, D) to logits (B, C); None if the features are logits already."""

    def saved_part(self, base: "Checkpoint") -> "Checkpoint":
        """The part of the pretrained model that is saved with a merged model; by default all of it."""
        return base

    def complete(self, out: Path) -> None:
        """Add the other files that a model needs to the directory of the merged weights, `model.safetensors`."""
        for path in companion_files(self.directory) if self._directory else ():
            shutil.copyfile(path, out / path.name)

    def write_heads(self, out: Path, heads: Mapping[str, Head]) -> bool:
        """Replace tasks' heads in a saved directory; False if this family's directories hold no heads of single tasks.

        Raises `ConfigError` for a head that does not fit in the place of the task's own.
        """
        return False

    def save(self, state: Mapping[str, Tensor], out: Path) -> None:
        """Write a directory that loads without suture: merged tensors in the base's names and dtypes, companions."""
        from suture.checkpoints import open_checkpoint, save_checkpoint

        base, out = self.saved_part(self.in_memory(open_checkpoint(self.weights))), Path(out)
        stored, tensors = self.canonical_names(base), dict(base.items())
        for name, key in self.canonical_names(state).items():
            tensors[stored[name]] = state[key].detach().to(tensors[stored[name]].dtype)
        out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(tensors, out / "model.safetensors", metadata={"format": "pt"}, pieces=base.pieces)
        self.complete(out)
