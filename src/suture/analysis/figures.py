"""The figure of each finding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from suture.analysis import Finding
from suture.reporting.canvas import COLOURS, end_label, label, save_figure
from suture.reporting.learning_figures import short_names


def draw(found: Finding, folder: Path) -> Path:
    """Paint the figure of a finding as PNG and SVG; returns the SVG's path."""
    paint, size = _PAINTERS[found.name], _SIZES[found.name](found)
    return save_figure(folder / found.name, paint, found, size)


def _similarity(figure: Any, found: Finding) -> None:
    names, cosine = found.labels["models"], found.values["cosine"].numpy()
    axes = figure.subplots()
    image = axes.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, line in enumerate(cosine):
        for j, value in enumerate(line):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), map(label, names), rotation=40, ha="right")
    axes.set_yticks(range(len(names)), map(label, names))
    figure.colorbar(image, ax=axes, label="cosine")


def _down_the_tensors(*lines: tuple[str, str]) -> Callable[[Any, Finding], None]:
    """A painter of several columns beside each other, tensors down."""

    def paint(figure: Any, found: Finding) -> None:
        names = short_names(found.labels["tensors"])
        panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
        for panel, (key, title), colour in zip(panels, lines, COLOURS[2:], strict=False):
            values = found.values[key]
            values = values if values.ndim == 1 else values.mean(1)
            finite = values.nan_to_num(nan=0.0, posinf=0.0).numpy()  # a bias that is zero in the base has no scale
            panel.barh(range(len(names)), finite, color=colour)
            panel.set_xlabel(title)
        panels[0].set_yticks(range(len(names)), [end_label(name, 40) for name in names], fontsize=5)
        panels[0].invert_yaxis()

    return paint


def _interpolation(figure: Any, found: Finding) -> None:
    axes, points = figure.subplots(), found.labels["points"]
    for i, (name, curve) in enumerate(zip(found.labels["models"], found.values["alone"], strict=True)):
        axes.plot(points, 100 * curve.numpy(), color=COLOURS[(i + 2) % len(COLOURS)], linewidth=1, label=label(name))
    mean = 100 * found.values["together"].mean(0).numpy()
    axes.plot(points, mean, color=COLOURS[1], linewidth=2.2, marker="o", markersize=4, label="all, on all tasks")
    axes.set_xlabel("λ")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)


def _landscape(figure: Any, found: Finding) -> None:
    (first, other), points = found.labels["models"], found.labels["points"]
    mean = 100 * found.values["accuracy"].mean(0).T.numpy()
    axes = figure.subplots()
    image = axes.contourf(points, points, mean, levels=12, cmap="viridis") if len(points) > 1 else axes.imshow(mean)
    for at, name in (((0, 0), "pretrained"), ((1, 0), first), ((0, 1), other)):
        axes.plot(*at, marker="o", color="white", markeredgecolor="black", clip_on=False)
        align = {"ha": "right" if at[0] else "left", "va": "top" if at[1] else "bottom"}
        offset = {"xytext": (-6 if at[0] else 6, -6 if at[1] else 6), "textcoords": "offset points"}
        axes.annotate(label(name), at, fontsize=8, color="white", **align, **offset)
    axes.set_xlabel(f"λ {label(first)}")
    axes.set_ylabel(f"λ {label(other)}")
    figure.colorbar(image, ax=axes, label="mean accuracy on the two tasks (%)")


def _bias(figure: Any, found: Finding) -> None:
    places = ["final" if place == "(features)" else place for place in found.labels["places"]]
    panels = figure.subplots(1, 2)
    for panel, key, title in zip(panels, ("l1", "cka"), ("mean |merged − expert|", "linear CKA"), strict=True):
        for i, (task, line) in enumerate(zip(found.labels["tasks"], found.values[key], strict=True)):
            panel.plot(line.numpy(), color=COLOURS[(i + 2) % len(COLOURS)], linewidth=0.9, label=label(task))
        panel.plot(found.values[key].mean(0).numpy(), color=COLOURS[1], marker="o", markersize=4, label="mean")
        panel.set_ylabel(title)
        panel.set_xticks(range(len(places)), [".".join(p.split(".")[-2:]) for p in places], rotation=40, ha="right")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)


_tall = lambda found: (8.0, 1.4 + 0.095 * len(found.labels["tensors"]))
_square = lambda found: (2.6 + 0.55 * len(found.labels["models"]), 1.9 + 0.5 * len(found.labels["models"]))
_PAINTERS: dict[str, Callable[[Any, Finding], None]] = {
    "similarity": _similarity,
    "layers": _down_the_tensors(("relative", "norm / base"), ("conflict", "sign conflict"), ("agreement", "agreement")),
    "trimming": _down_the_tensors(("kept", "kept"), ("collide", "collide"), ("lost", "lost")),
    "interpolation": _interpolation,
    "landscape": _landscape,
    "bias": _bias,
}
_SIZES: dict[str, Callable[[Finding], tuple[float, float]]] = {
    **{"similarity": _square, "layers": _tall, "trimming": _tall},
    **{name: (lambda found: (6.0, 4.4)) for name in ("interpolation", "landscape")},
    "bias": lambda found: (8.4, 4.0),
}
