"""Documentation pages of methods and repairs, made from signatures, docstrings, formulas and reference vectors.

Formulas are in `formulas.yaml`; a method without one gets a page all the same. Figures are computed from the reference
vectors of `tests/golden`, or read from suture's list of published figures.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mkdocs.structure.files import File
from safetensors.torch import load_file

import suture
from suture.core.names import in_bytes
from suture.merging.registry import MergeMethod
from suture.merging.roles import Role
from suture.merging.task_vectors import chunk_for, matrix_memory, memory_of
from suture.pipeline.methods import LearnedMethod, all_methods
from suture.pipeline.repairs import Repair
from suture.pipeline.reproduce import published
from suture.repairs import get_repair_kind, repair_kinds

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
FORMULAS: dict[str, str] = yaml.safe_load((ROOT / "docs" / "formulas.yaml").read_text("utf-8"))
MODELS, THREADS = 8, 2  # of the merge whose memory a page states
LARGEST = (3072, 768)  # of ViT-B/32's matrices
_SHOWN = 4  # entries of a reference case


def on_files(files, config):
    """Add methods.md and a page for each method and repair to the site."""
    methods = {f"methods/{name.replace('/', '_')}.md": method for name, method in all_methods().items()}
    repairs = {f"repairs/{kind}.md": kind for kind in repair_kinds()}
    lines = [f"| [`{m.name}`]({page}) | [paper]({m.paper}) | {m.knobs.summary} |" for page, m in methods.items()]
    index = ["# Methods", "\n".join(["| name | | what it does |", "|---|---|---|", *lines]), "## Repairs"]
    index += ["A repair follows any method: `repair=KIND`."]
    index += ["\n".join(f"- [`{k}`]({page}): {get_repair_kind(k).knobs.summary}" for page, k in repairs.items())]
    files.append(File.generated(config, "methods.md", content="\n\n".join(index) + "\n"))
    for page, method in methods.items():
        files.append(File.generated(config, page, content=method_page(method)))
    for page, kind in repairs.items():
        files.append(File.generated(config, page, content=repair_page(kind)))
    return files


def method_page(method: MergeMethod | LearnedMethod) -> str:
    """Description, formula, cost, knobs, a small case, reference results and published figures."""
    aliases = f"Also: {', '.join(f'`{alias}`' for alias in method.aliases)}." if method.aliases else ""
    static = isinstance(method, MergeMethod)
    line = f"    suture method={method.name} modelpool=glyphs8 taskpool=glyphs8"
    if static and method.num_models[1] == 1:
        line = f"    suture merge base=BASE models.one=ONE method={method.name} output=merged"
    cost = _cost(method) if static else _COST_BY_NAME.get(method.name, _COST_OF_LEARNING)
    parts = [f"# {method.name}", _described(method.knobs.function), aliases, f"Paper: <{method.paper}>"]
    parts += [_formula(method.name), "## What it costs", cost, _table("method", method.knobs.defaults), line]
    parts += [*_by_hand(method.knobs.function), *_references(method.name), *_figures(method)]
    return "\n\n".join(filter(None, parts)) + "\n"


def repair_page(kind: str) -> str:
    """Description, formula, cost, knobs, references and published figures of a repair."""
    defaults = {knob: value for knob, value in Repair.defaults(kind).items() if knob != "kind"}
    chosen = get_repair_kind(kind)
    line = f"    suture method=task_arithmetic repair={kind} modelpool=glyphs8 taskpool=glyphs8"
    parts = [f"# repair={kind}", _described(chosen.function), f"Paper: <{chosen.paper}>"]
    cost = f"## What it costs\n\n{_COST_OF_REPAIRS[kind]}" if kind in _COST_OF_REPAIRS else ""
    parts += [_formula(f"repair={kind}"), cost, _table("repair", defaults), line]
    parts += [*_references(f"repair={kind}"), *_table_of_figures(f"repair={kind}")]
    return "\n\n".join(filter(None, parts)) + "\n"


def _described(function: Callable) -> str:
    return (inspect.getdoc(function) or "").split(">>>")[0].strip()


def _formula(name: str) -> str:
    if name not in FORMULAS:
        return ""
    lines = "\n".join(f"    {line}" for line in FORMULAS[name].strip().splitlines())
    legend = "θ₀: the pretrained weights. θ_t: those fine-tuned for task t. τ_t = θ_t − θ₀."
    return f"{lines}\n\n{'' if '=' in name else legend}".strip("\n")


def _cost(method: MergeMethod) -> str:
    """Passes over the files and memory, from what the method is registered as."""
    if method.matrices:
        role, sizes = Role("matrix", 1, *LARGEST), " × ".join(map(str, LARGEST))
        held = in_bytes(matrix_memory(method, MODELS, role, torch.float32))
        return (
            f"One pass over the files. Each thread holds one matrix of every model: {held} for one of {sizes}, "
            f"with {MODELS} models. Tensors that are no matrices are merged in slices."
        )
    if method.gather is None:
        passes = "One pass over the files."
    elif "scope" in method.knobs.defaults:
        passes = (
            "Two passes over the files with `scope=model`; with `scope=tensor` one, each tensor read twice in a row."
        )
    else:
        passes = "One pass over the files, each tensor read twice in a row."
    count = int(min(MODELS, method.num_models[1]))
    threads, chunk = chunk_for(300_000_000, method, count, THREADS)
    held, models = in_bytes(memory_of(method, count, threads, chunk)), f"{count} model{'s' * (count > 1)}"
    return f"{passes} At most {held} beside the result, with {models} and {THREADS} threads, whatever their size."


_COST_OF_LEARNING = """Each step takes a forward and a backward pass of every task's batch. Beside the activations,
memory holds the task vectors (half of it with `vectors_dtype=bfloat16`, none with `stream_vectors=true`), the base, the
merged weights and one gradient."""
_MASKS = ("emr_merging", "tall_masks")
_COST_OF_MASKS = """One pass over the files. Beside the pretrained model one update is stored, in its dtype, and one bit
a weight and task. An input takes one encoder, whose weights are switched when the task changes; a routed input takes
two, that of the merged model and that of its task."""
_COST_OF_INPUTS = """The inputs pass forward through every expert, for the Gram matrices of as many layers at once as
fit in 2 GB. Memory: these, one expert, and the merged model. Nothing at inference."""
_COST_BY_NAME = dict.fromkeys(_MASKS, _COST_OF_MASKS) | dict.fromkeys(("esm", "regmean"), _COST_OF_INPUTS)
_COST_OF_REPAIRS = {
    "final": "Each input that a step uses passes once through merged model and expert, forward only.",
    "prob_surgery": "Each input that a step uses passes once through merged model and expert, forward only.",
    "deep": "Each input passes once through its expert; a step is a forward and a backward pass of the merged model.",
    "distil": (
        "Each input passes once through its expert; a step is a forward and a backward pass of the merged model. "
        "Memory: the weights in float32, twice that for Adam, and one gradient. Nothing at inference."
    ),
    "affine": "Each input passes once through merged model and expert, forward only; one eigendecomposition a task.",
    "online": "Each input passes once through the merged model and once through its expert, forward only.",
    "blend": "Each input passes once through the merged model and every expert, forward only. All run at inference.",
}


def _table(group: str, defaults: Mapping[str, Any]) -> str:
    lines = [f"| `{group}.{knob}` | `{_word(value)}` |" for knob, value in defaults.items()]
    return "## Knobs\n\n| knob | default |\n|---|---|\n" + "\n".join(lines) if lines else "This method has no knobs."


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(list(value) if isinstance(value, tuple) else value)


def _by_hand(function: Callable) -> Iterator[str]:
    """The small case of the docstring, which the tests run."""
    example = (inspect.getdoc(function) or "").partition(">>>")[2]
    if example:
        yield f"## By hand\n\n```pycon\n>>>{example.rstrip()}\n```"


def _references(name: str) -> Iterator[str]:
    """Results on the reference vectors, beside those of the published implementation."""
    prefix, knobs_of = _REFERENCES.get(name, ("", None))
    index = json.loads((GOLDEN / "index.json").read_text("utf-8"))
    cases = sorted(case for case in index if prefix and re.match(prefix, case))
    if not cases:
        return
    yield "## Reference"
    if knobs_of is None:
        yield f"The tests reproduce {len(cases)} whole trajectories of `tests/golden` (`{cases[0]}` and later)."
        return
    compared = {case: _compared(name, case, knobs_of(index[case])) for case in cases}
    largest = max((ours - theirs).abs().max().item() for _, _, ours, theirs in compared.values())
    sources = " and ".join(sorted({" ".join(index[case]["source"].split(";")[0].split()[:2]) for case in cases}))
    yield (
        f"{len(cases)} reference case{'s' * (len(cases) > 1)} of {sources}; "
        f"the largest difference of an entry is {largest:.1e}. "
        f"The first entries of `{cases[0]}`, with {_knobs(knobs_of(index[cases[0]]))}:"
    )
    base, models, ours, theirs = compared[cases[0]]
    rows = {"base": base, **models, "published": theirs, "suture": ours}
    lines = [
        f"| {row} | {' | '.join(f'{value:.4f}' for value in values[:_SHOWN].tolist())} |"
        for row, values in rows.items()
    ]
    yield "\n".join(["| | " + " | ".join(map(str, range(_SHOWN))) + " |", "|---|" + "---:|" * _SHOWN, *lines])


def _compared(name: str, case: str, knobs: Mapping[str, Any]):
    """(base, models, suture's result, the published one), each flattened in the order of its names."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    labels = sorted({key.split("/")[0] for key in tensors if key.startswith("model_")})
    models = {label: part(f"{label}/") for label in labels}
    base = part("base/") or models[labels[0]]  # an average has none
    merged, published_result = suture.merge(base, models, name, **knobs), part("merged/")
    flat = lambda state: torch.cat([state[key].flatten() for key in sorted(base)])
    return flat(base), {label: flat(model) for label, model in models.items()}, flat(merged), flat(published_result)


def _knobs(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"`{knob}={value}`" for knob, value in knobs.items()) or "defaults"


def _ties(case: Mapping[str, Any]) -> dict[str, Any]:
    if case["scope"] == "model":
        return {key: case[key] for key in ("threshold", "merge_func", "scaling_factor")}
    given = case["parameters"]
    func = "mean" if given["normalize"] else "sum"
    return {"scope": "tensor", "threshold": given["density"], "merge_func": func, "scaling_factor": given["weight"]}


_given = lambda *names: lambda case: {name: case["parameters"][name] for name in names}
#: Method → the names of its reference cases, and the knobs of a case; without knobs the tests alone run them.
_REFERENCES: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]] | None]] = {
    "simple_average": ("tensor_linear", lambda case: {}),
    "task_arithmetic": ("tensor_task_arithmetic", lambda case: {"scaling_factor": case["parameters"]["weight"]}),
    "ties_merging": ("ties_global|tensor_ties", _ties),
    "breadcrumbs": (
        "tensor_breadcrumbs",
        lambda case: {"scaling_factor": case["parameters"]["weight"], **_given("density", "gamma")(case)},
    ),
    "model_stock": ("tensor_model_stock", lambda case: {}),
    "sce": ("tensor_sce", _given("select_topk")),
    "slerp": ("tensor_slerp", _given("t")),
    "adamerging": ("adamerging_", None),
    "repair=final": ("surgery_v1", None),
    "repair=deep": ("surgery_v2", None),
}


def _figures(method: MergeMethod | LearnedMethod) -> Iterator[str]:
    yield from _table_of_figures(*(f"method={name}" for name in (method.name, *method.aliases)))


def _table_of_figures(*words: str) -> Iterator[str]:
    """The published figures of the runs with one of these arguments; `surgery=` stands for `repair=` there."""
    arguments = lambda figure: {re.sub("^surgery", "repair", word) for word in figure.words}
    figures = [one for one in published() if set(words) & arguments(one) and one.row not in ("pretrained", "experts")]
    if figures:
        yield (
            "## Published\n\nMean accuracies in % as published, not measured here. They are of two families of "
            "[checkpoints](../published.md#two-families-of-checkpoints), which must not be compared with each other."
        )
        lines = [f"| {one.id} | {one.mean:.1f} | `{one.command}` |" for one in figures]
        yield "\n".join(["| | mean | run |", "|---|---:|---|", *lines])
