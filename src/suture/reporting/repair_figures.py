"""Figures of a repair: how far each layer is from the expert's, and where the final features went."""

from typing import Any

from suture.repairs import RepairResult, Representation
from suture.repairs.network import FINAL
from suture.reporting.canvas import label

_BEFORE, _AFTER, _EXPERT = "#c44536", "#2f6f9f", "#3e4c59"
_ACROSS = 4


def l1_by_layer(axes, repair: RepairResult) -> None:
    """Mean L1 to the expert at each place, before and after: the mean over tasks, and each task in the background."""
    found = repair.representation
    assert found is not None
    places = range(len(found.places))
    for distances, colour, side in ((found.before, _BEFORE, "merged"), (found.after, _AFTER, "repaired")):
        values = distances.l1.numpy()
        axes.plot(places, values.T, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(places, values.mean(0), color=colour, marker="o", markersize=3.5, label=side)
    axes.set_yscale("log")
    axes.set_xticks(places, [_short(place) for place in found.places], rotation=40, ha="right", fontsize=7)
    axes.set_ylabel("mean |model − expert|")
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False)


def scatter(figure: Any, repair: RepairResult) -> None:
    """The final features of merged, repaired and expert on the two main axes of all three, one panel a task."""
    found = repair.representation
    assert found is not None
    rows = -(-len(found.tasks) // _ACROSS)
    panels = figure.subplots(rows, min(_ACROSS, len(found.tasks)), squeeze=False).ravel()
    for panel, task in zip(panels, found.tasks, strict=False):
        _panel(panel, found, task)
    for panel in panels[len(found.tasks) :]:
        panel.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)


def size_of_scatter(repair: RepairResult) -> tuple[float, float]:
    """Width and height in inches."""
    tasks = len(repair.representation.tasks) if repair.representation else 1
    return 2.1 * min(_ACROSS, tasks) + 0.6, 2.1 * -(-tasks // _ACROSS) + 0.5


def _panel(panel, found: Representation, task: str) -> None:
    for name, colour in (("expert", _EXPERT), ("merged", _BEFORE), ("repaired", _AFTER)):
        points = found.scatter[task][name].numpy()
        panel.scatter(points[:, 0], points[:, 1], s=5, alpha=0.45, color=colour, label=name, linewidths=0)
    panel.set_title(f"{label(task)} ({found.explained[task]:.0%})", fontsize=8)
    panel.set_xticks([])
    panel.set_yticks([])


def _short(place: str) -> str:
    return "final" if place == FINAL else ".".join(place.split(".")[-2:])
