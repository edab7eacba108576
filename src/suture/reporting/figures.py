"""The figures of a report, each as PNG and SVG."""

from pathlib import Path

from suture.adaptation import AdaMergingResult
from suture.repairs import RepairResult
from suture.reporting import learning_figures, repair_figures
from suture.reporting.canvas import COLOURS, file_name, in_percent, label, save, save_figure
from suture.reporting.data import Report


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has data for; returns the SVG files, whose PNG twins lie beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if report.tasks:
        drawn.append(save(folder / "accuracy", _accuracy, report, (2.2 + 0.9 * len(report.tasks), 3.6)))
    for knob, curves in report.curves.items():
        drawn.append(save(folder / file_name("accuracy_over", knob), _curves, (report, knob, curves)))
    for name, learning in report.learning.items():
        drawn += _draw_learning(name, learning, folder)
    for name, repair in report.repairs.items():
        drawn += _draw_repair(name, repair, folder)
    if report.matrix:
        size = 2.4 + 0.55 * len(report.tasks), 1.6 + 0.42 * len(report.matrix)
        drawn.append(save(folder / "expert_matrix", _expert_matrix, report, size))
    return drawn


def _draw_learning(name: str, learning: AdaMergingResult, folder: Path) -> list[Path]:
    drawn = []
    if len(learning.losses):
        drawn.append(
            save(
                folder / file_name("coefficients_over_steps", name), learning_figures.coefficients_over_steps, learning
            )
        )
        drawn.append(
            save(folder / file_name("objective_over_steps", name), learning_figures.objective_over_steps, learning)
        )
    if learning.scores:
        drawn.append(save(folder / file_name("accuracy_over_steps", name), _accuracy_over_steps, learning.scores))
    if learning.coefficients.layers is not None:
        size = 2.6 + 0.5 * len(learning.coefficients.tasks), 1.4 + 0.11 * len(learning.coefficients.layers)
        drawn.append(save(folder / file_name("coefficients", name), learning_figures.coefficients, learning, size))
    return drawn


def _draw_repair(name: str, repair: RepairResult, folder: Path) -> list[Path]:
    drawn = []
    if repair.scores:
        drawn.append(save(folder / file_name("accuracy_over_steps", name), _accuracy_over_steps, repair.scores))
    if repair.representation is not None:
        size = repair_figures.size_of_scatter(repair)
        drawn.append(save(folder / file_name("l1_by_layer", name), repair_figures.l1_by_layer, repair))
        drawn.append(save_figure(folder / file_name("representation", name), repair_figures.scatter, repair, size))
    return drawn


def _accuracy(axes, report: Report) -> None:
    """Bars per task and for the mean, one colour a model."""
    groups = [*report.tasks, "mean"]
    width = 0.8 / len(report.rows)
    for i, row in enumerate(report.rows):
        heights = [100 * row.accuracies.get(task, float("nan")) for task in report.tasks] + [100 * row.mean]
        places = [g + (i - (len(report.rows) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(places, heights, width * 0.92, label=label(row.name), color=COLOURS[i % len(COLOURS)])
    axes.set_xticks(range(len(groups)), map(label, groups), rotation=20, ha="right")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    letters = 13 * axes.figure.get_figwidth()  # what a line of the legend has room for, with its patches
    across = int(letters / (8 + max(len(label(row.name)) for row in report.rows)))
    axes.figure.legend(loc="outside upper center", ncols=max(1, min(across, len(report.rows))), frameon=False)


def _curves(axes, content) -> None:
    """Mean accuracy against a knob, with pretrained and experts as lines to compare with."""
    report, knob, curves = content
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(
            *in_percent(curve), marker="o", markersize=3.5, label=label(name), color=COLOURS[(i + 2) % len(COLOURS)]
        )
    for row, style in ((report.pretrained, ":"), (report.experts, "--")):
        if row is not None:
            axes.axhline(100 * row.mean, linestyle=style, color=COLOURS[1], linewidth=1, label=label(row.name))
    axes.set_xlabel("scaling factor λ" if knob == "scaling_factor" else knob.replace("_", " "))
    if min(curves[name]) > 0 and max(curves[name]) >= 20 * min(curves[name]):
        axes.set_xscale("log")
    axes.set_ylabel("mean accuracy (%)")
    axes.figure.legend(loc="outside upper center", ncols=4, frameon=False)


def _expert_matrix(axes, report: Report) -> None:
    """Heat map, models down and tasks across, with the accuracy in each cell."""
    values = [[100 * row.on(task) for task in report.tasks] for row in report.matrix]
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for down, line in enumerate(values):
        for across, value in enumerate(line):
            colour = "white" if value > 60 else "black"
            axes.text(across, down, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(report.tasks)), map(label, report.tasks), rotation=40, ha="right")
    axes.set_yticks(range(len(report.matrix)), [label(row.name) for row in report.matrix])
    axes.set_xlabel("task")
    axes.set_ylabel("model")
    axes.figure.colorbar(image, ax=axes, label="accuracy (%)")


def _accuracy_over_steps(axes, scores) -> None:
    axes.plot(*in_percent(scores), marker="o", markersize=3.5, color=COLOURS[2])
    axes.set_xlabel("step")
    axes.set_ylabel("mean accuracy (%)")
