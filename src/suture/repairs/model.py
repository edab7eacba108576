"""The repaired model: a backbone with its surgery modules. Tasks are given by name or by row, or chosen by a router."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from suture.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from suture.core.batches import Forward, call, device_of
from suture.errors import CheckpointError, check_known, shown, unknown_name
from suture.repairs.affine_maps import AffineMaps
from suture.repairs.modules import SurgeryModules, Variant
from suture.repairs.network import FINAL, Block, Network, layers_of
from suture.repairs.router import ROUTERS, Router, route

Modules = SurgeryModules | AffineMaps
_KEYS = ("kind", "tasks", "rank", "blocks", "variant")


class SurgeryModel(nn.Module):
    """`backbone` with the modules of every task: inputs → repaired features (B, dim).

    The backbone is copied without its parameters' memory, so the copy is free and the original is never changed.
    `repairs`: layer → modules, for the `blocks`, if any, and the final feature. The attribute `router` chooses the task
    where none is given.

    >>> import torch
    >>> model = SurgeryModel(nn.Linear(3, 4), {FINAL: SurgeryModules(["mnist"], dim=4, rank=2)}, ["mnist"])
    >>> model(torch.zeros(5, 3), "mnist").shape
    torch.Size([5, 4])
    """

    router: Router | None

    def __init__(
        self,
        backbone: nn.Module,
        repairs: Mapping[str, Modules],
        tasks: Sequence[str],
        *,
        forward: Forward = call,
        blocks: Sequence[Block] = (),
        router: Router | None = None,
        kind: str | None = None,
    ):
        super().__init__()
        self.tasks, self.layers = tuple(tasks), tuple(layers_of(blocks))
        self.kind = kind or ("deep" if blocks else "final")
        self.network = Network(backbone, forward, blocks)
        self.repairs = nn.ModuleList([repairs[layer] for layer in self.layers]).requires_grad_(False)
        self.router = router
        self.eval()

    @property
    def features_suffice(self) -> bool:
        """Whether `repair(features, task)` is the whole repair, because no module lies inside the backbone."""
        return not self.network.blocks

    @property
    def added_parameters(self) -> int:
        """The number of parameters of the modules, for all tasks."""
        return sum(tensor.numel() for tensor in self.repairs.state_dict().values())

    @property
    def repair_at(self) -> dict[str, Modules]:
        """Layer → modules."""
        return dict(zip(self.layers, cast(Iterable[Modules], self.repairs), strict=True))

    def forward(self, inputs: Any, task: str | Int[Tensor, " row"] | None = None) -> Float[Tensor, "row dim"]:
        """The repaired features. `task`: one name for the batch, a task index per row, or None for the router.

        With a router, modules after blocks need a second pass. Raises `ConfigError` for an unknown task.
        """
        if self.network.blocks and task is not None:
            return self._repaired(inputs, self.which(task))
        features = self.encode(inputs)
        which = self.route(features) if task is None else self.which(task)
        return self._repaired(inputs, which) if self.network.blocks else self.repair(features, which)

    def encode(self, inputs: Any) -> Float[Tensor, "row dim"]:
        """The backbone's features, without repair."""
        return self.network(inputs)

    def repair(self, features: Float[Tensor, "row dim"], task: str | slice | Tensor) -> Float[Tensor, "row dim"]:
        """Encoded features, corrected by the final module."""
        return self.repairs[-1](features[:, None], self.which(task))[:, 0]

    def route(self, features: Float[Tensor, "row dim"]) -> Int[Tensor, " row"]:
        """The task index that the router chooses for each row; raises `ConfigError` without a router."""
        return route(self.router, features)

    def for_task(self, task: str) -> "TaskModel":
        """The model of one task as a plain module, inputs → features, for `torch.export` and ONNX."""
        index = self._index(task)
        repairs = [repair.only(index) for repair in self.repair_at.values()]
        return TaskModel(Network(self.network.module, self.network.encode, self.network.blocks), repairs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the modules (and the router) without the backbone, as safetensors of a few kilobytes."""
        tensors = {
            f"{p}/{n}": tensor for p, repair in self.repair_at.items() for n, tensor in repair.state_dict().items()
        }
        last = self.repair_at[FINAL]
        facts: dict[str, Any] = {"kind": self.kind, "tasks": self.tasks, "blocks": self.network.blocks}
        variants = {layer: repair.variant for layer, repair in self.repair_at.items()}
        facts |= {"rank": last.rank, "variant": last.variant if len(set(variants.values())) == 1 else variants}
        router, name = router_state(self.router)
        save_checkpoint(tensors | router, path, {key: json.dumps(value) for key, value in facts.items()} | name)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: nn.Module, *, forward: Forward = call) -> "SurgeryModel":
        """The model with saved modules and the backbone that they were fitted to.

        Raises `CheckpointError` for any other file, and `IncompatibleModels` for a backbone without the blocks.
        """
        with open_checkpoint(path) as file:
            facts = _facts(file)
            blocks = [Block(*block) for block in facts["blocks"]]
            home = device_of(backbone)
            repairs = {layer: _read_modules(file, layer, facts).to(home) for layer in layers_of(blocks)}
            router = read_router(file, facts["router"], len(facts["tasks"])).to(home) if "router" in facts else None
        return cls(backbone, repairs, facts["tasks"], forward=forward, blocks=blocks, router=router, kind=facts["kind"])

    def _repaired(self, inputs: Any, which: slice | Tensor) -> Tensor:
        return self.network(inputs, lambda i, rows: self.repairs[i](rows, which))

    def which(self, task: str | slice | Tensor) -> slice | Tensor:
        """The index of a task's module in the stacks, or that of each row's."""
        if isinstance(task, str):
            index = self._index(task)
            return slice(index, index + 1)
        return task if isinstance(task, slice) else task.to(device_of(self.repair_at[FINAL]))

    def _index(self, task: str) -> int:
        check_known("task", [task], self.tasks)
        return self.tasks.index(task)


class TaskModel(nn.Module):
    """A network with one task's modules: inputs → repaired features (B, dim)."""

    def __init__(self, network: Network, repairs: Sequence[Modules]):
        super().__init__()
        self.network, self.repairs = network, nn.ModuleList(repairs)
        self.eval()

    def forward(self, inputs: Any) -> Tensor:
        return self.network(inputs, lambda i, rows: self.repairs[i](rows, slice(0, 1)))


def _facts(file: Checkpoint) -> dict[str, Any]:
    try:
        facts = {key: json.loads(value) for key, value in file.metadata.items() if key in (*_KEYS, "router")}
    except ValueError:
        facts = {}
    if missing := [key for key in _KEYS if key not in facts]:
        raise CheckpointError(
            f"'{file.label}' holds no surgery modules: its metadata has no {missing[0]!r}. "
            f"Remedy: name a file that SurgeryModel.save wrote."
        )
    return facts


def _read_modules(file: Checkpoint, layer: str, facts: Mapping[str, Any]) -> Modules:
    if facts["kind"] == "affine":
        return _read_maps(file, len(facts["tasks"]))
    if f"{layer}/down" not in file:
        raise CheckpointError(f"'{file.label}' has no modules for {layer!r}. Remedy: save the model again.")
    down = file[f"{layer}/down"]
    variant: Any = facts["variant"].get(layer) if isinstance(facts["variant"], Mapping) else facts["variant"]
    if variant not in get_args(Variant):
        raise CheckpointError(f"'{file.label}': {unknown_name('variant', shown(variant), get_args(Variant))}")
    modules = SurgeryModules(facts["tasks"], down.shape[2], facts["rank"], variant=variant, dtype=down.dtype)
    try:
        modules.load_state_dict({name: file[f"{layer}/{name}"].clone() for name in modules.state_dict()})
    except (KeyError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"'{file.label}': the modules for {layer!r} are damaged: {problem}") from None
    return modules


def _read_maps(file: Checkpoint, tasks: int) -> AffineMaps:
    names = [f"{FINAL}/{name}" for name in ("weight", "bias")]
    if missing := [name for name in names if name not in file]:
        raise CheckpointError(f"'{file.label}' has no {missing[0]!r}. Remedy: save the model again.")
    weight, bias = (file[name].clone() for name in names)
    if weight.shape != (tasks, *bias.shape[1:], *bias.shape[1:]) or bias.shape != weight.shape[:2]:
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise CheckpointError(f"'{file.label}': affine maps of the shapes {shapes} are none of {tasks} tasks.")
    return AffineMaps(weight, bias)


def router_state(router: Router | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A router's tensors and metadata in a file of a repair; both are empty for None."""
    if router is None:
        return {}, {}
    return {f"router/{name}": t for name, t in router.state_dict().items()}, {"router": json.dumps(router.name)}


def read_router(file: Checkpoint, name: Any, tasks: int) -> Router:
    """The router for so many tasks in a file of a repair; raises `CheckpointError` for an unknown or damaged one."""
    if not isinstance(name, str) or name not in ROUTERS:
        raise CheckpointError(f"'{file.label}': {unknown_name('router', shown(name), ROUTERS)}")
    state = {key.removeprefix("router/"): file[key].clone() for key in file if key.startswith("router/")}
    try:
        router = ROUTERS[name](**state)
    except TypeError:
        router = None
    if router is None or not router.fits(tasks):
        raise CheckpointError(f"'{file.label}': the router is damaged. Remedy: save the model again.")
    return router
