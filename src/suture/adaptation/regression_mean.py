"""RegMean and RegMean++: each layer the least-squares fit to what the experts' layers give on their own inputs.

https://arxiv.org/abs/2212.09849, https://arxiv.org/abs/2508.03121. With G_t the mean of x xᵀ over the inputs of a layer
on task t, Wᵀ = W̄ᵀ + (ΣG_t)⁺ ΣG_t (W_t − W̄)ᵀ, where W̄ is the mean of the W_t: the papers' (ΣG_t)⁻¹ ΣG_t W_tᵀ where
that exists, and the mean in directions that no input has.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from suture.adaptation.blocks import Blocks, find_blocks, submodule
from suture.adaptation.grams import InputGrams, Positions
from suture.adaptation.layer_calls import Call, Layer, LayerCalls
from suture.adaptation.layer_weights import matrix_of, write_layer
from suture.adaptation.loaded import InputMerge, LoadedModel, check_inputs
from suture.adaptation.walk import Walk, make_plan, new_store, probe_of
from suture.checkpoints import Source
from suture.core.batches import Forward, Inputs, call, device_of, size, split, take, to_device
from suture.core.progress import Track, untracked
from suture.errors import DataError
from suture.merging.task_vectors import open_task_vectors

_CUT = 1e-10  # of the largest eigenvalue: smaller ones belong to directions that no input has
_BYTES = 2 << 30  # of Gram matrices gathered in one pass
_RAW = 4  # a kernel over so few channels reads the input itself, and is merged like an embedding


@torch.no_grad()
def regmean(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    inputs: Mapping[str, Inputs],
    *,
    off_diagonal: Annotated[float, Ge(0), Le(1)] = 0.95,
    forward: Forward = call,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    batch_size: int = 64,
    track: Track = untracked,
) -> InputMerge:
    """Merge every linear layer and convolution by RegMean, and all other tensors by their mean.

    `module` provides the architecture, `inputs[task]` (N, …) or a mapping of such tensors the unlabelled inputs of each
    model's task. The entries of each G_t off the diagonal are multiplied by `off_diagonal`. Inputs are those of the
    expert's own forward pass, padding left out. Kernels over up to four channels read the raw input and are merged by
    the mean. Gram matrices are gathered by task, for as many layers in one pass as fit in 2 GB.

    Raises `ConfigError` for inputs that do not match the models, and `IncompatibleModels` for weights that do not fit.

    >>> module, x = nn.Linear(2, 1, bias=False), torch.eye(2)
    >>> one, two = {"weight": torch.tensor([[2.0, 0.0]])}, {"weight": torch.tensor([[0.0, 4.0]])}
    >>> regmean(module, {"weight": torch.zeros(1, 2)}, {"a": one, "b": two}, {"a": x[:1], "b": x[1:]}).merged["weight"]
    tensor([[2., 4.]])
    """
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    check_inputs(vectors, inputs)
    model = LoadedModel(module, vectors)
    batches = {task: list(split(rows, batch_size)) for task, rows in inputs.items()}
    model.load(next(iter(inputs)))
    layers = merged_layers(model, forward, next(iter(batches.values()))[0])
    groups = list(layer_groups(model, layers))
    warnings: list[str] = []
    solved: dict[Layer, Tensor] = {}
    with track("RegMean", len(groups) * sum(map(size, inputs.values()))) as advance:
        for group in groups:
            fit = Fit(off_diagonal, model.exact_means(layer.weight for layer in group))
            for task, parts in batches.items():
                model.load(task)
                grams = InputGrams()
                for part in parts:
                    grams.add(watched(model.module, forward, part, group), Positions.of(part, size(part)))
                    advance(size(part))
                fit.add(task, grams, {name: model.tensor(name) for name in {layer.weight for layer in group}})
            solved |= fit.solve(warnings)
    for layer, weight in solved.items():
        write_layer(layer, model.module, weight, None)
    silent = [layer.weight for layer in layers if layer not in solved]
    warnings += [f"No input reaches '{name}': merged by the mean." for name in silent]
    return InputMerge(model.merged([layer.weight for layer in solved]), tuple(warnings))


@torch.no_grad()
def regmean_pp(
    module: nn.Module,
    base: Source,
    models: Mapping[str, Source] | Sequence[Source],
    inputs: Mapping[str, Inputs],
    *,
    off_diagonal: Annotated[float, Ge(0), Le(1)] = 0.95,
    after_blocks: Literal["mean", "base"] = "mean",
    blocks: Blocks = None,
    forward: Forward = call,
    frozen: Sequence[str] = (),
    mixed_dtypes: bool = False,
    batch_size: int = 64,
    cache: Any = None,
    track: Track = untracked,
) -> InputMerge:
    """Merge block by block by RegMean on the inputs that the merged blocks before give.

    Each expert's block runs on what comes through the merged blocks before it, which gives the G_t of all its layers at
    once. Biases, norms and whatever lies outside of the blocks are merged by the mean; `after_blocks="base"` leaves
    what follows the blocks pretrained, as the authors' code does. `blocks`: see `find_blocks`. With a folder `cache`
    the states between blocks are kept in mapped files there. The other arguments are those of `regmean`.
    """
    vectors = open_task_vectors(base, models, frozen=frozen, mixed_dtypes=mixed_dtypes)
    check_inputs(vectors, inputs)
    merged, expert = LoadedModel(module, vectors), LoadedModel(module, vectors)
    merged.write({name: merged.mean(name) for name in merged.names})
    batches = {task: list(split(rows, batch_size)) for task, rows in inputs.items()}
    first = next(iter(inputs.values()))
    paths = [block.path for block in find_blocks(merged.module, first, forward=forward, blocks=blocks)]
    plan = make_plan(merged.module, forward, paths, probe_of(inputs))
    warnings: list[str] = []
    chosen: list[str] = []
    with new_store(cache) as store, track("RegMean++", len(paths) * len(batches)) as advance:
        walks = {task: Walk(merged.module, forward, plan, parts, store) for task, parts in batches.items()}
        for i, path in enumerate(paths):
            fit = Fit(off_diagonal, merged.exact_means(name for name in merged.names.values() if name.startswith(path)))
            for task, walk in walks.items():
                expert.load(task, f"{path}.")
                grams = _block_grams(walk, i, expert, f"{path}.")
                fit.add(task, grams, {layer.weight: expert.tensor(layer.weight) for layer in grams.sources})
                advance(1)
            for layer, weight in fit.solve(warnings).items():
                write_layer(layer, merged.module, weight, None)
                chosen.append(layer.weight)
            for walk in walks.values() if i + 1 < len(paths) else ():
                for batch in range(len(walk.batches)):
                    walk.keep(i, batch, walk.run(i, batch))
    result = merged.merged(chosen)
    if after_blocks == "base":
        later = _later(merged.module, forward, paths, take(first, slice(0, 1)))
        result |= {name: vectors.base[name].clone() for name, target in merged.names.items() if target in later}
    return InputMerge(result, tuple(warnings))


class Fit:
    """ΣG_t and ΣG_t (W_t − W̄)ᵀ of some layers, task by task; `means`: the W̄ by name, in float64."""

    def __init__(self, off_diagonal: float, means: Mapping[str, Tensor]):
        self.off_diagonal, self.means = off_diagonal, means
        self._grams: dict[Layer, Tensor] = {}
        self._right: dict[Layer, Tensor] = {}
        self._source: dict[Layer, Layer] = {}
        self._rows: dict[Layer, int] = defaultdict(int)

    def add(self, task: str, grams: InputGrams, weights: Mapping[str, Tensor]) -> None:
        """Add the Gram matrices of a task and its expert's weights; raises `DataError` if they are not finite."""
        own: dict[Layer, Tensor] = {}
        for source, total in grams.grams.items():
            if not total.isfinite().all():
                raise DataError(
                    f"Task {task!r}: the inputs of '{source.weight}' are not finite. "
                    "Remedy: check the inputs and the model, or run in float32."
                )
            if grams.rows[source]:
                own[source] = _shrunk(total / grams.rows[source], self.off_diagonal)
                self._grams[source] = self._grams[source] + own[source] if source in self._grams else own[source]
                self._rows[source] += grams.rows[source]
        for layer, source in grams.sources.items():
            if source in own:
                self._source[layer] = source
                difference = matrix_of(layer, weights) - matrix_of(layer, self.means)
                more = own[source] @ difference.mT
                self._right[layer] = self._right[layer] + more if layer in self._right else more

    def solve(self, warnings: list[str]) -> dict[Layer, Tensor]:
        """Layer → weight (group, out, in), in float64."""
        roots: dict[Layer, tuple[Tensor, Tensor]] = {}
        solved = {}
        for layer, source in self._source.items():
            if source not in roots:
                roots[source] = self._inverse(source, warnings)
            vectors, inverse = roots[source]
            step = vectors @ (inverse[..., None] * (vectors.mT @ self._right[layer]))
            solved[layer] = matrix_of(layer, self.means) + step.mT
        return solved

    def _inverse(self, source: Layer, warnings: list[str]) -> tuple[Tensor, Tensor]:
        """Eigenvectors of ΣG_t, and the inverse eigenvalues, 0 for directions that no input has."""
        values, vectors = torch.linalg.eigh(self._grams[source])
        if self._rows[source] < values.shape[-1]:
            warnings.append(
                f"'{source.weight}' has {self._rows[source]} input rows for {values.shape[-1]} columns: "
                "it stays at the mean in the other directions. Remedy: more inputs."
            )
        used = values > _CUT * values.amax(-1, keepdim=True).clamp_min(0)
        return vectors, torch.where(used, 1 / torch.where(used, values, 1), 0)


def _shrunk(matrix: Tensor, factor: float) -> Tensor:
    """A matrix with its entries off the diagonal multiplied by a factor."""
    return factor * matrix + (1 - factor) * torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


def watched(
    module: nn.Module, forward: Forward, inputs: Any, layers: Container[Layer] | None = None
) -> dict[Layer, list[Call]]:
    """The uses of some layers, by default all, in one pass."""
    calls, watching = _watching(module, lambda layer: layers is None or layer in layers)
    with watching:
        forward(module, to_device(inputs, device_of(module)))
    return calls


def _watching(module: nn.Module, wanted: Callable[[Layer], bool]) -> tuple[dict[Layer, list[Call]], LayerCalls]:
    """The uses of the wanted layers, without their outputs, which fill up in the context that is returned with them."""
    calls: dict[Layer, list[Call]] = defaultdict(list)

    def see(call: Call) -> None:
        if wanted(call.layer):
            calls[call.layer].append(call if call.window else replace(call, output=None))

    return calls, LayerCalls(module, see)


def merged_layers(model: LoadedModel, forward: Forward, inputs: Any) -> list[Layer]:
    """The layers that are merged by RegMean, in the order of their use by a batch."""
    targets = set(model.names.values())
    return [layer for layer in watched(model.module, forward, inputs) if is_merged(layer, model, targets)]


def is_merged(layer: Layer, model: LoadedModel, targets: Container[str]) -> bool:
    raw = layer.kind == "conv" and model.tensor(layer.weight).shape[1] * layer.groups <= _RAW
    return layer.weight in targets and not raw


def layer_groups(model: LoadedModel, layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Layers whose Gram matrices, of one task and of the sum, are gathered in one pass over the inputs."""
    group: list[Layer] = []
    taken = 0
    for layer in layers:
        groups, _, width = matrix_of(layer, {layer.weight: model.tensor(layer.weight)}).shape
        needed = 2 * 8 * groups * width**2
        if group and taken + needed > _BYTES:
            yield group
            group, taken = [], 0
        group.append(layer)
        taken += needed
    if group:
        yield group


def _block_grams(walk: Walk, block: int, expert: LoadedModel, prefix: str) -> InputGrams:
    """The Gram matrices of an expert's block on the states of a walk."""
    grams, targets = InputGrams(), set(expert.names.values())

    def wanted(layer: Layer) -> bool:
        return layer.weight.startswith(prefix) and is_merged(layer, expert, targets)

    for batch, inputs in enumerate(walk.batches):
        calls, watching = _watching(expert.module, wanted)
        walk.run(block, batch, watching, expert.module)
        grams.add(calls, Positions.of(inputs, size(inputs)))
    return grams


def _later(module: nn.Module, forward: Forward, paths: Sequence[str], inputs: Any) -> set[str]:
    """The tensors of modules that only run after the last block."""
    started: dict[str, bool] = {}
    finished = False

    def start(name: str, *_: Any) -> None:
        started.setdefault(name, finished)

    def finish(*_: Any) -> None:
        nonlocal finished
        finished = True

    hooks = [part.register_forward_pre_hook(partial(start, name)) for name, part in module.named_modules()]
    hooks.append(submodule(module, paths[-1]).register_forward_hook(finish))
    try:
        forward(module, to_device(inputs, device_of(module)))
    finally:
        for hook in hooks:
            hook.remove()
    later = [name for name, after in started.items() if after]
    parts = ((name, module.get_submodule(name)) for name in later)
    return {f"{name}.{own}" for name, part in parts for own in part.state_dict()}
