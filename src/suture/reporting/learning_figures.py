"""Figures of learned coefficients: over steps, over layers and tasks, and the objective on the way."""

from collections.abc import Sequence

from suture.adaptation import AdaMergingResult
from suture.core.names import natural
from suture.reporting.canvas import COLOURS, label


def coefficients_over_steps(axes, learning: AdaMergingResult) -> None:
    """One line a task; for several layers their mean, with the range from the lowest to the highest behind it."""
    history = (learning.history if learning.coefficients.layers else learning.history[..., None]).numpy()
    steps = range(len(history))
    for i, task in enumerate(learning.coefficients.tasks):
        colour, values = COLOURS[i % len(COLOURS)], history[:, i]
        axes.plot(steps, values.mean(1), label=label(task), color=colour, linewidth=1.4)
        if learning.coefficients.layers:
            axes.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.08, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("coefficient" + (", mean and range over layers" if learning.coefficients.layers else ""))
    axes.figure.legend(loc="outside upper center", ncols=4, frameon=False)


def objective_over_steps(axes, learning: AdaMergingResult) -> None:
    """The objective of every batch, and its running mean."""
    losses = learning.losses
    window = max(1, len(losses) // 20)
    axes.plot(range(len(losses)), losses.numpy(), color=COLOURS[0], linewidth=0.7, label="one batch a task")
    mean = losses.unfold(0, window, 1).mean(1)
    axes.plot(
        range(window - 1, len(losses)), mean.numpy(), color=COLOURS[2], linewidth=1.6, label=f"mean of {window} steps"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("objective, summed over tasks")
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False)


def coefficients(axes, learning: AdaMergingResult) -> None:
    """Heat map, layers down and tasks across, white at the mean."""
    layers = learning.coefficients.layers or ()
    order = sorted(range(len(layers)), key=lambda i: natural(layers[i]))
    values = learning.coefficients.values.numpy()[:, order]
    middle = values.mean()
    reach = max(abs(values - middle).max(), 1e-6)
    image = axes.imshow(values.T, aspect="auto", cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach)
    axes.set_xticks(
        range(len(learning.coefficients.tasks)), map(label, learning.coefficients.tasks), rotation=40, ha="right"
    )
    axes.set_yticks(range(len(layers)), short_names([layers[i] for i in order]), fontsize=5)
    axes.figure.colorbar(image, ax=axes, label="coefficient")


def short_names(layers: Sequence[str]) -> list[str]:
    """Names without what they all begin with."""
    parts = [layer.split(".") for layer in layers]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [".".join(names[shared:]) for names in parts]
