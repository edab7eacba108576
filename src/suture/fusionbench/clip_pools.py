"""Pools of CLIP models and tasks as classes: models by name, and the accuracy of a model on every task."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from statistics import fmean
from typing import Any

from torch import nn

from suture.checkpoints import Source, open_checkpoint, open_fine_tuned
from suture.errors import PRETRAINED, CheckpointError, ConfigError, unknown_name
from suture.evaluation import BATCH_SIZE, TaskInputs, evaluate, evaluation_set
from suture.families import Encoder, Family, family
from suture.pipeline.pools import ModelPool, TaskPool


class CLIPVisionModelPool(Mapping[str, nn.Module]):
    """The vision towers of a pool by name, `_pretrained_` among them; each is read at its access.

    `models` maps names to folders, files or hub ids, or is the name of a pool that suture knows. A tower maps pixels
    (B, 3, H, W) to features (B, D), not normalised. Raises `ConfigError` without `_pretrained_`.

    >>> pool = CLIPVisionModelPool("glyphs8")
    >>> pool.model_names[:2]
    ['latin', 'greek']
    """

    def __init__(self, models: Mapping[str, Source] | str, **options: Any):
        config = _shipped("modelpool", models) if isinstance(models, str) else {"models": dict(models)}
        self.pool = ModelPool.from_config({**config, **options})

    @property
    def model_names(self) -> list[str]:
        """The names of the fine-tuned models."""
        return list(self.pool.models)

    def load_model(self, name: str = PRETRAINED) -> Encoder:
        """A new module with the weights of one model."""
        if name not in self:
            raise ConfigError(unknown_name("model of the pool", name, self))
        encoder = self._family.encoder()
        return encoder if name == PRETRAINED else encoder.load(self._weights(name))

    def _weights(self, name: str) -> Mapping[str, Any]:
        return open_fine_tuned(self.pool.models[name], self._base, label=name)

    def __getitem__(self, name: str) -> Encoder:
        if name not in self.pool.models and name != PRETRAINED:
            raise KeyError(name)
        return self.load_model(name)

    def __contains__(self, name: object) -> bool:
        return name == PRETRAINED or name in self.pool.models

    def __iter__(self) -> Iterator[str]:
        return iter([PRETRAINED, *self.pool.models])

    def __len__(self) -> int:
        return len(self.pool.models) + 1

    @cached_property
    def _base(self):
        return open_checkpoint(self.pool.base, label=PRETRAINED)

    @cached_property
    def _family(self) -> Family:
        return family(self.pool.family)(self._base.directory, self._base, self.pool.settings)


class CLIPVisionModelTaskPool:
    """Tasks with zero-shot heads of one CLIP: `evaluate(model)` returns the accuracy on each.

    `test_datasets` maps tasks to their keys (source, class names, templates), lists published tasks by name, or is the
    name of a pool that suture knows. `clip_model` is the CLIP whose text tower makes the heads.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, Any] | Iterable[str] | str,
        clip_model: Source = "openai/clip-vit-base-patch32",
        *,
        batch_size: int = BATCH_SIZE,
    ):
        if isinstance(test_datasets, str):
            config = _shipped("taskpool", test_datasets)
        elif isinstance(test_datasets, Mapping):
            config = {"tasks": dict(test_datasets)}
        else:
            config = {"tasks": {name: {} for name in test_datasets}}
        self.pool = TaskPool.from_config(config)
        self.clip_model, self.batch_size = clip_model, batch_size

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, in order."""
        return [task.name for task in self.pool.tasks]

    def evaluate(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """{task: {"accuracy": …, "samples": …}, …, "average": {"accuracy": …}} on the test splits.

        `model` maps pixels to features, or is a CLIP model of `transformers` with the architecture of `clip_model`.
        """
        encoder = model if isinstance(model, Encoder) else self._as_encoder(model)
        results = {name: evaluate(encoder, task, batch_size=self.batch_size) for name, task in self._inputs.items()}
        report = {name: {"accuracy": value, "samples": samples} for name, (value, samples) in results.items()}
        return {**report, "average": {"accuracy": fmean(value for value, _ in results.values())}}

    def _as_encoder(self, model: nn.Module) -> nn.Module:
        """The encoder with the weights of a CLIP; any other module unchanged."""
        try:
            return self._family.encoder(model.state_dict())
        except CheckpointError:
            return model

    @cached_property
    def _family(self) -> Family:
        base = open_checkpoint(self.clip_model)
        return family("clip")(base.directory, base)

    @cached_property
    def _inputs(self) -> dict[str, TaskInputs]:
        return evaluation_set(self._family, self.pool.tasks)


def _shipped(group: str, name: str) -> dict[str, Any]:
    """The YAML of a pool that ships with suture, as a mapping."""
    from suture.pipeline.config import compose

    other = {"modelpool": "taskpool=null", "taskpool": "modelpool=glyphs8"}[group]
    return compose(["method=simple_average", f"{group}={name}", other])[group]
