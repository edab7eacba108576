"""Stored names of tensors mapped to the current names of a model's modules.

transformers stores many models under older names than its modules have (`vit.encoder.layer.0.…`, `LayerNorm.gamma`) and
maps them when it loads a checkpoint. The same mapping is used here, where there is one.
"""

import re
from collections.abc import Callable
from typing import Any

_OLD = ((re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"), (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"))


def spelling_of(model: Any) -> Callable[[str], str]:
    """A function from stored names to the names in a model's modules. It leaves names whose tensors change shape."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before version 5 only these names differed
        return _by_rules
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]

    def current(name: str) -> str:
        for change in renamings:
            name = change.rename_source_key(name)[0]
        return _by_rules(name)

    return current


def _by_rules(name: str) -> str:
    for pattern, spelling in _OLD:
        name = pattern.sub(spelling, name)
    return name
