"""Names of tensors as a library's models have them today, for those that checkpoints were saved with.

transformers stores many models under older names than its modules have (`vit.encoder.layer.0.…`, `LayerNorm.gamma`) and
maps them when it loads a checkpoint. The same mapping is used here, where there is one.
"""

import re
from collections.abc import Callable
from typing import Any

_OLD = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))


def spelling_of(model: Any) -> Callable[[str], str]:
    """A function from stored names to those of a model's modules; names that change with a tensor's shape stay."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before version 5 all but these were stored as they are
        return _by_rules
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]

    def today(name: str) -> str:
        for change in renamings:
            name = change.rename_source_key(name)[0]
        return _by_rules(name)

    return today


def _by_rules(name: str) -> str:
    for pattern, spelling in _OLD:
        name = pattern.sub(spelling, name)
    return name
