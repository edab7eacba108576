"""The drop-in classes' pools of modules, with the pretrained one under `_pretrained_`."""

from collections.abc import Mapping

from torch import nn

from suture.errors import PRETRAINED, ConfigError


def split_pool(modelpool: Mapping[str, nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The pretrained module and the fine-tuned ones; raises `ConfigError` without `_pretrained_`."""
    models = dict(modelpool)
    if PRETRAINED not in models:
        raise ConfigError(f"The pool has no '{PRETRAINED}' (found: {', '.join(models) or 'nothing'}).")
    return models.pop(PRETRAINED), models
