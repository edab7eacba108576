"""The scores of a search over each knob, with the point that was chosen."""

from typing import Any

from suture.reporting.chart import PALETTE, Chart, number, specification, tip
from suture.reporting.figures import figure
from suture.reporting.run_folder import FinishedRun


@figure("search", section="Search")
def search(run: FinishedRun) -> Chart | None:
    """The score of every point over each knob; a knob has a panel of its own."""
    found: dict[str, Any] | None = run.data["search"]
    if found is None:
        return None
    trials, best = found["trials"], found["best"]
    rows = [
        {"trial": i, "knob": knob, "value": value, "score": trial["score"], "chosen": i == best}
        for i, trial in enumerate(trials)
        for knob, value in trial["point"].items()
    ]
    knobs = list(trials[0]["point"])
    tips = [tip("trial"), tip("value", format=".4g"), tip("score", format=".4g")]
    colour = {"condition": {"test": "datum.chosen", "value": PALETTE[1]}, "value": PALETTE[0]}
    size = {"condition": {"test": "datum.chosen", "value": 140}, "value": 45}
    panels = [
        {
            "transform": [{"filter": {"field": "knob", "equal": knob}}],
            "mark": {"type": "point", "filled": True, "opacity": 0.85},
            "encoding": {
                "x": number("value", knob),
                "y": number("score", found["score"]),
                "color": colour,
                "size": size,
                "tooltip": tips,
            },
            "height": 220,
        }
        for knob in knobs
    ]
    labels = "with" if found["labels"] else "without"
    inputs = f"{found['num_inputs']:,} {found['split']} inputs a task, {labels} labels"
    about = f"Scored by {found['score']} on {inputs}. The large point was chosen."
    whole = panels[0] if len(panels) == 1 else {"vconcat": panels}
    return Chart("Search", specification(rows, **whole), about=about)
