"""Names shortened for tables and figures."""

import re
from collections.abc import Sequence

from suture.repairs.network import FINAL


def label(name: str, most: int = 24) -> str:
    """The beginning of a name, in at most `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def end_label(text: str, most: int) -> str:
    """The end of a tensor's name, where such names differ, in at most `most` characters."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def short_names(names: Sequence[str], *, keep: int = 0) -> list[str]:
    """Dotted names without the levels that all of them begin with, except the last `keep` of these.

    >>> short_names(["vision.layers.0.bias", "vision.layers.1.bias"], keep=1)
    ['layers.0.bias', 'layers.1.bias']
    """
    parts = [name.split(".") for name in names]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [".".join(levels[max(0, shared - keep) :]) for levels in parts]


def layer_names(layers: Sequence[str]) -> dict[str, str]:
    """Layer → its short name; the final feature is called "final".

    >>> layer_names(["vision.layers.0", "vision.layers.1", "(features)"])
    {'vision.layers.0': 'layers.0', 'vision.layers.1': 'layers.1', '(features)': 'final'}
    """
    blocks = [layer for layer in layers if layer != FINAL]
    short = dict(zip(blocks, short_names(blocks, keep=1), strict=True))
    return {layer: short.get(layer, "final") for layer in layers}


def file_name(figure: str, name: str) -> str:
    """The name of a figure's file, safe for any model name.

    >>> file_name("coefficients", "../my model + final")
    'coefficients_my_model_final'
    """
    return f"{figure}_{re.sub(r'[^0-9A-Za-z.-]+', '_', name).strip('._-')[:80]}"
