"""What all figures share: colours, and a figure that is saved as PNG and SVG."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

COLOURS = (
    *("#9aa5b1", "#3e4c59", "#2f6f9f", "#d9822b", "#3f9c6b", "#a154a1", "#c44536", "#5c6ac4"),
    *("#8c6d46", "#6fb1d6", "#e8b56b", "#93cfae", "#cfa3cf", "#e59a90", "#b0b6e6", "#c7b08f"),
)
_STYLE: Any = {
    **{"svg.hashsalt": "suture", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False},
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


def save(stem: Path, paint: Callable[[Any, Any], None], content: Any, size: tuple[float, float] = (6.0, 3.6)) -> Path:
    """Let `paint(axes, content)` draw, save as PNG and SVG, and return the SVG's path. `size` is in inches."""
    return save_figure(stem, lambda figure, shown: paint(figure.subplots(), shown), content, size)


def save_figure(stem: Path, paint: Callable[[Any, Any], None], content: Any, size: tuple[float, float]) -> Path:
    """Like `save` for figures of several panels: `paint(figure, content)`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")  # no window system and no global state knows of it
        paint(figure, content)
        figure.savefig(stem.with_suffix(".png"), dpi=140)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    return stem.with_suffix(".svg")


def in_percent(curve: Mapping[Any, float]) -> tuple[list[float], list[float]]:
    """The two coordinates of a curve of accuracies."""
    return list(curve), [100 * value for value in curve.values()]


def label(name: str, most: int = 24) -> str:
    """A name as a figure has room for it."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def end_label(text: str, most: int) -> str:
    """The end of a tensor's name as a figure has room for it: such names differ at their ends."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def file_name(figure: str, name: str) -> str:
    """The name of a figure's file, whatever the model is called.

    >>> file_name("coefficients", "../my model + final")
    'coefficients_my_model_final'
    """
    return f"{figure}_{re.sub(r'[^0-9A-Za-z.-]+', '_', name).strip('._-')[:80]}"
