"""Analyses of weights: similarity, size and conflicts of task vectors.

Models are read as a stream, with one slice of each in memory at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor

from suture.analysis.finding import Finding, draws, finite
from suture.analysis.registry import analysis_kind
from suture.checkpoints import Source
from suture.core.names import sort_key
from suture.merging.methods.ties_merging import THRESHOLD, trim_thresholds
from suture.merging.streams import inner_products, total
from suture.merging.task_vectors import TaskVectors, open_task_vectors
from suture.reporting.chart import (
    Chart,
    Choice,
    coloured,
    colours,
    heat_map,
    names_across,
    names_down,
    number,
    specification,
    tip,
)
from suture.reporting.labels import short_names

Models = Mapping[str, Source] | Sequence[Source]


@analysis_kind(reads="weights")
def similarity(base: Source, models: Models, *, frozen: Sequence[str] = ()) -> Finding:
    """Cosine similarities of all pairs of task vectors over the whole model, and their norms, in float64.

    `values`: "cosine" (model, model), nan for a model that equals the base; "norm" (model,). Raises
    `IncompatibleModels` for models that do not fit together.

    >>> one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
    >>> finding = similarity({"w": torch.zeros(2)}, {"one": one, "other": other})
    >>> [round(value, 3) for value in finding.values["cosine"][0].tolist()]
    [1.0, 0.707]
    """
    vectors = open_task_vectors(base, models, frozen=frozen)
    products, names = inner_products(vectors.stream()), list(vectors.models)
    norms = products.diagonal().sqrt()
    cosine = products / torch.outer(norms, norms)
    rows = [(name, norm, *line) for name, norm, line in zip(names, norms.tolist(), cosine.tolist(), strict=True)]
    values = {"cosine": cosine, "norm": norms}
    title = "cosine similarity of task vectors"
    return Finding("similarity", title, ("model", "norm", *names), rows, values, {"models": names})


@analysis_kind(reads="weights")
def layers(base: Source, models: Models, *, frozen: Sequence[str] = ()) -> Finding:
    """The size of the task vectors in each tensor, and how much they disagree about the direction.

    `values`: "norm" (tensor, model), the norms of the task vectors; "relative" (tensor,), their mean divided by the
    base's norm; "conflict" (tensor,), the share of entries that two models move in opposite directions, averaged over
    pairs: 1/2 if signs are independent; "agreement" (tensor,), Σ|Σ_t τ| / Σ Σ_t |τ|: 1 if all move the same way, about
    1/√T for T independent models.

    >>> one, other = {"w": torch.tensor([2.0, 2.0])}, {"w": torch.tensor([2.0, 0.0])}
    >>> finding = layers({"w": torch.ones(2)}, {"one": one, "other": other})
    >>> finding.values["conflict"].item(), finding.values["agreement"].item()
    (0.5, 0.5)
    """
    vectors = open_task_vectors(base, models, frozen=frozen)
    names = sorted(vectors.names, key=sort_key)
    sums = torch.stack([total(vectors.stream([name]), _moments) for name in names])
    count = len(vectors.models)
    squares, (own, conflict, net, mass) = sums[:, :count], sums[:, count:].T
    entries = _entries(vectors, names)
    norm = squares.sqrt()
    values = {
        "norm": norm,
        "relative": norm.mean(1) / own.sqrt(),
        "conflict": conflict / (entries * count * (count - 1) / 2),
        "agreement": net / mass,
    }
    columns = [values["norm"].mean(1), *(values[key] for key in ("relative", "conflict", "agreement"))]
    rows = list(zip(names, map(int, entries), *(column.tolist() for column in columns), strict=True))
    heads = ("tensor", "entries", "mean norm", "norm / base", "conflict", "agree")
    labels = {"tensors": names, "models": list(vectors.models)}
    return Finding("layers", "task vectors, tensor by tensor", heads, rows, values, labels)


@analysis_kind(
    reads="weights",
    keys={"threshold": "percentage of entries that TIES keeps", "scope": "what the percentage is of: model or tensor"},
)
def trimming(
    base: Source,
    models: Models,
    *,
    threshold: Annotated[float, Gt(0), Le(100)] = THRESHOLD,
    scope: Literal["model", "tensor"] = "model",
    frozen: Sequence[str] = (),
) -> Finding:
    """The share of each tensor that TIES keeps, and the sign conflicts among the surviving entries.

    `values`: "kept" (tensor, model), the share of entries that survive the trim; "collide" (tensor,), the share of
    entries that some survivors raise and others lower; "lost" (tensor,), the share of survivors that lose the election
    of signs (none where they cancel exactly). `threshold` and `scope` are those of `ties_merging`.
    """
    vectors = open_task_vectors(base, models, frozen=frozen)
    knobs = {"threshold": threshold, "scope": scope}
    whole = trim_thresholds(vectors.stream(), **knobs).thresholds if scope == "model" else None
    names, sums = sorted(vectors.names, key=sort_key), []
    for name in names:
        stream = vectors.stream([name])
        least = trim_thresholds(stream, **knobs).thresholds if whole is None else whole
        sums.append(total(stream, lambda _, rows, least=least: _survivors(rows, least)))
    values = _shares(torch.stack(sums), _entries(vectors, names))
    shares = values["kept"]
    columns = [shares.mean(1), shares.amin(1), shares.amax(1), values["collide"], values["lost"]]
    rows = list(zip(names, *(column.tolist() for column in columns), strict=True))
    heads = ("tensor", "kept", "least", "most", "collide", "lost")
    title = f"what TIES keeps at threshold {threshold:g}, scope={scope}"
    return Finding("trimming", title, heads, rows, values, {"tensors": names, "models": list(vectors.models)})


def _moments(base: Float[Tensor, " chunk"], rows: Float[Tensor, "task chunk"]) -> Float[Tensor, " moment"]:
    """Σ τ² of each model, Σ θ₀², pairs of opposite signs, Σ|Σ_t τ|, Σ Σ_t |τ|."""
    rows = rows.double()
    pairs = (rows > 0).sum(0) * (rows < 0).sum(0)
    whole = [base.double().square().sum(), pairs.sum().double(), rows.sum(0).abs().sum(), rows.abs().sum()]
    return torch.cat([rows.square().sum(1), torch.stack(whole)])


def _survivors(rows: Float[Tensor, "task chunk"], least: Float[Tensor, " task"]) -> Float[Tensor, " count"]:
    """The number of survivors of each model, of columns where they collide, and of survivors on the losing side."""
    trimmed = torch.where(rows.abs() >= least[:, None], rows, 0.0)
    collide = (trimmed > 0).any(0) & (trimmed < 0).any(0)
    lost = trimmed.sign() * trimmed.sum(0).sign() < 0
    return torch.cat([(trimmed != 0).sum(1), torch.stack([collide.sum(), lost.sum()])]).double()


def _shares(sums: Float[Tensor, "tensor count"], entries: Float[Tensor, " tensor"]) -> dict[str, Tensor]:
    survivors, (collide, lost) = sums[:, :-2], sums[:, -2:].T
    return {"kept": survivors / entries[:, None], "collide": collide / entries, "lost": lost / survivors.sum(1)}


def _entries(vectors: TaskVectors, names: Sequence[str]) -> Float[Tensor, " tensor"]:
    return torch.tensor([vectors.specs[name].numel for name in names], dtype=torch.float64)


@draws("similarity")
def _similarity_chart(finding: Finding) -> Chart:
    names = finding.labels["models"]
    cosine = finding.values["cosine"].tolist()
    rows = [
        {"model": one, "other": other, "value": finite(cosine[i][j])}
        for i, one in enumerate(names)
        for j, other in enumerate(names)
    ]
    scale = {"scheme": "redblue", "reverse": True, "domain": [-1, 1]}
    spec = heat_map(
        rows,
        names_across("other", names),
        names_down("model", names),
        {"scale": scale, "legend": {"title": "cosine", "gradientLength": 120}},
        tips=[tip("model", "nominal"), tip("other", "nominal"), tip("value", format=".3f")],
        height=max(80, 34 * len(names)),
        numbers=".2f",
    )
    return Chart("Cosine similarity of task vectors", spec, width=max(160, 40 * len(names)))


@draws("layers")
def _layers_chart(finding: Finding) -> Chart:
    columns = {"norm / base": "relative", "sign conflict": "conflict", "agreement": "agreement"}
    return _by_tensor("Task vectors, tensor by tensor", finding, columns)


@draws("trimming")
def _trimming_chart(finding: Finding) -> Chart:
    columns = {"kept": "kept", "collide": "collide", "lost": "lost"}
    return _by_tensor(finding.title[:1].upper() + finding.title[1:], finding, columns)


def _by_tensor(title: str, finding: Finding, columns: dict[str, str]) -> Chart:
    """Bars of several measures side by side, one row per tensor."""
    names = short_names(finding.labels["tensors"])
    rows = []
    for measure, key in columns.items():
        values = finding.values[key]
        means = (values if values.ndim == 1 else values.mean(1)).tolist()
        rows += [{"tensor": n, "measure": measure, "value": finite(v)} for n, v in zip(names, means, strict=True)]
    height = max(60, round(max(3.0, min(12.0, 1100 / len(names))) * len(names)))
    choice = Choice("measure", "show", list(columns), height, ("x",))
    legend = colours(columns)
    spec = specification(
        rows,
        transform=[choice.filter],
        mark="bar",
        height=height,
        encoding={
            "x": number("value", zero=True, tickCount=4),
            "y": names_down("tensor", names, "44", labelFontSize=8),
            **coloured("measure", legend),
        },
    )
    return Chart(title, spec, choices=[choice], width=900)
