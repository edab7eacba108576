"""What the drop-in classes have in common: a mapping of modules, the pretrained one under its own name."""

from collections.abc import Mapping

from torch import nn

from suture.errors import PRETRAINED, ConfigError


def split_pool(modelpool: Mapping[str, nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The pretrained module and the fine-tuned ones; `ConfigError` without `_pretrained_`."""
    models = dict(modelpool)
    if PRETRAINED not in models:
        raise ConfigError(f"The pool has no '{PRETRAINED}' (found: {', '.join(models) or 'nothing'}).")
    return models.pop(PRETRAINED), models
