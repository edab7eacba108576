"""Representation bias: the distance of a merged model to its experts, layer by layer, before any repair.

As in Representation Surgery: https://arxiv.org/abs/2402.02705
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from suture.analysis.finding import Finding, draws
from suture.analysis.registry import analysis_kind
from suture.core.batches import Forward, Inputs, call
from suture.core.progress import Track, untracked
from suture.errors import ConfigError
from suture.repairs import linear_cka
from suture.repairs.network import Block, Blocks, by_layer, find_blocks, layers_of
from suture.repairs.problem import Experts, Problem
from suture.reporting.chart import INK, Chart, Choice, coloured, colours, names_across, number, specification
from suture.reporting.labels import layer_names


@analysis_kind(reads="features")
def bias(
    merged: nn.Module,
    experts: Experts,
    inputs: Mapping[str, Inputs],
    *,
    blocks: Blocks = None,
    forward: Forward = call,
    batch_size: int = 64,
    track: Track = untracked,
) -> Finding:
    """Mean |merged − expert| and linear CKA after every block and at the final feature, on each task's inputs.

    `experts` is a mapping task → module, or a function that returns a task's module. `blocks` are as for `find_blocks`;
    by default those that are found, if any. A block's representation is its mean over positions. `values`: "l1" and
    "cka", each (task, layer).
    """
    problem = Problem(merged, experts, inputs, forward, encode_batch=batch_size, track=track)
    observed = _blocks(problem, blocks)
    layers = layers_of(observed)
    l1, cka = [], []
    for task in problem.tasks:
        ours = by_layer(problem.merged_rows(task, inputs[task], observed), observed)
        pairs = zip(ours, by_layer(problem.expert_rows(task, inputs[task], observed), observed), strict=True)
        distances = [((one.double() - other.double()).abs().mean(), linear_cka(one, other)) for one, other in pairs]
        l1.append(torch.stack([pair[0] for pair in distances]))
        cka.append(torch.stack([pair[1] for pair in distances]))
    values = {"l1": torch.stack(l1), "cka": torch.stack(cka)}
    rows = [
        (layer, values["l1"][:, i].mean().item(), values["cka"][:, i].mean().item(), *values["l1"][:, i].tolist())
        for i, layer in enumerate(layers)
    ]
    heads = ("place", "L1", "CKA", *(f"L1 {task}" for task in problem.tasks))
    notes = ("L1 and CKA are means over tasks; the columns behind them are each task's L1.",)
    title = "distance of the merged model to its experts"
    return Finding("bias", title, heads, rows, values, {"tasks": problem.tasks, "places": layers}, notes)


def _blocks(problem: Problem, blocks: Blocks) -> tuple[Block, ...]:
    if blocks is not None and len(blocks) == 0:
        return ()
    first = problem.inputs[problem.tasks[0]]
    try:
        return find_blocks(problem.module, first, forward=problem.forward, blocks=blocks)
    except ConfigError:
        if blocks is not None:
            raise
        return ()  # a module without lists of blocks is compared at its final feature


@draws("bias")
def _bias_chart(finding: Finding) -> Chart:
    tasks, layers = finding.labels["tasks"], layer_names(finding.labels["places"])
    measures, mean = {"mean |merged − expert|": "l1", "linear CKA": "cka"}, "mean over tasks"
    rows = []
    for measure, key in measures.items():
        curves = dict(zip(tasks, finding.values[key].tolist(), strict=True))
        curves[mean] = finding.values[key].mean(0).tolist()
        for task, curve in curves.items():
            cells = zip(layers.values(), curve, strict=True)
            rows += [{"measure": measure, "task": task, "layer": layer, "value": v} for layer, v in cells]
    measure = Choice("measure", "show", list(measures), 220, ("y",))
    legend = colours([*tasks, mean], {mean: INK})
    heavy = {"condition": {"test": f"datum.task === '{mean}'", "value": 3}, "value": 1.3}
    encoding: dict[str, Any] = {"x": names_across("layer", list(layers.values())), "y": number("value")}
    spec = specification(
        rows,
        transform=[measure.filter],
        mark={"type": "line", "point": {"size": 24, "filled": True}},
        height=240,
        encoding={**encoding, "strokeWidth": heavy, **coloured("task", legend)},
    )
    return Chart("Distance of the merged model to its experts", spec, legend, [measure], width=760)
