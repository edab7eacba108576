"""Devices, processes, precision and loggers through Lightning Fabric, which only this module and `loggers` import."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

from suture.core.batches import call, channels_last
from suture.core.machine import give_back_freed_memory
from suture.core.sharding import Placed
from suture.errors import ConfigError, SutureError, check_known

if TYPE_CHECKING:
    from lightning_fabric import Fabric

S = TypeVar("S")
T = TypeVar("T")
_KEYS = ("accelerator", "devices", "strategy", "precision", "num_nodes", "loggers", "tf32", "channels_last")
_OWN_KEYS = ("devices", "loggers", "tf32", "channels_last")  # which Fabric does not take
LOGGERS = ("csv", "tensorboard", "mlflow", "wandb", "none")
PRECISIONS = ("32-true", "bf16-mixed")
SHARDED = "fsdp"  # the strategy in which each process holds a part of every weight


@dataclass(frozen=True)
class OneDevice:
    """The first device that the `fabric.*` keys name, and their precision, for work that one process does alone."""

    config: Mapping[str, Any]

    @cached_property
    def fabric(self):
        """Fabric with one device and no strategy."""
        return make_fabric({**self.config, "devices": 1, "strategy": "auto"})

    @property
    def device(self) -> torch.device:
        """The device that models and inputs must be on."""
        return self.fabric.device

    @cached_property
    def replicas(self) -> tuple[torch.device, ...]:
        """The accelerators of this machine that the keys name, if they are several: copies of a model share work."""
        if self.device.type == "cpu" or self.config.get("devices") in (None, 1, "1"):
            return ()
        return tuple(getattr(make_fabric(self.config).strategy, "parallel_devices", None) or ())

    @property
    def precision(self) -> str:
        """The rounding of forward passes: "32-true" or "bf16-mixed", and what else the keys turn on."""
        more = {"tf32": " with TF32", "channels_last": ", channels last"}
        return _precision(self.config) + "".join(words for key, words in more.items() if self.config.get(key))

    def call(self, module: Any, inputs: Any) -> Tensor:
        """The module's output for a batch, (batch, …), in float32 whatever the precision."""
        if _precision(self.config) == PRECISIONS[0]:
            return self.plain_call(module, inputs)
        with self.fabric.autocast():
            return self.plain_call(module, inputs).float()

    def plain_call(self, module: Any, inputs: Any) -> Tensor:
        """The module's output for a batch in the precision of the context around it, pictures in the chosen order."""
        return call(module, channels_last(inputs) if self.config.get("channels_last") else inputs)


def make_fabric(config: Mapping[str, Any], devices: int = 1):
    """The Fabric that the `fabric.*` keys describe, with `devices` unless they give a number.

    `tf32` lets a GPU round the operands of float32 products to 10 bits, for the rest of the process; it is off unless
    the keys turn it on. Raises `ConfigError` for an invalid key or value.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    check_fabric(config)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it tells is in the report
    _set_tf32(bool(config.get("tf32")))
    options = {key: config[key] for key in _KEYS if config.get(key) is not None and key not in _OWN_KEYS}
    number = config["devices"] if config.get("devices") is not None else devices
    if sharded := options.get("strategy") == SHARDED:
        options["strategy"] = "ddp_fork" if forks(config) else "ddp"
    if options.get("strategy", "auto") == "auto" and number not in (1, "1"):
        options["strategy"] = "ddp_fork"  # only the adaptation runs in several processes; this one does the rest
    if number in (1, "1") and options.get("strategy") == "ddp_fork":
        options["strategy"] = "auto"
    if _in_slurm() and started_processes() is None:
        options["plugins"] = LightningEnvironment()  # Slurm's has as many processes as the job has tasks: one
    try:
        fabric = Fabric(devices=number, **options)
        fabric.strategy.sharded = sharded  # type: ignore[attr-defined]
        return fabric
    except Exception as error:  # Lightning raises a different class for each kind of wrong value
        raise ConfigError(f"fabric: {' '.join(str(error).split())}") from None


def forks(config: Mapping[str, Any]) -> bool:
    """Whether the processes of a sharded run are forked, stage by stage, and not started with the whole command."""
    return started_processes() is None and config.get("num_nodes") in (None, 1, "1")


def started_processes() -> int | None:
    """The number of processes in which torchrun or Slurm runs this command; None for one process that may fork.

    A task of Slurm that is alone in its step is such a process.
    """
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")) if _in_slurm() else "1"
    return int(tasks) if tasks != "1" else None


def _in_slurm() -> bool:
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment.detect()


def _set_tf32(on: bool) -> None:
    """Allow or forbid TF32; without a GPU there is none."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = on
        torch.backends.cudnn.allow_tf32 = on


def check_fabric(config: Mapping[str, Any]) -> None:
    """Check the `fabric.*` keys without starting anything; raises `ConfigError` for an unknown key or value."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"fabric={config!r}: wanted keys below it, such as fabric.precision=bf16-mixed.")
    if not isinstance(loggers := config.get("loggers"), Mapping | None):
        raise ConfigError(f"fabric.loggers={loggers!r}: wanted keys below it, such as fabric.loggers.kind=csv.")
    check_known("key of fabric", config, _KEYS)
    if "spawn" in str(config.get("strategy")):
        remedy = "Remedy: ddp_fork, or ddp, which starts the command once for each process."
        raise ConfigError(f"fabric.strategy={config['strategy']}: a run cannot be handed to a new process. {remedy}")
    for key in ("tf32", "channels_last"):
        if not isinstance(config.get(key), bool | None):
            raise ConfigError(f"fabric.{key}={config[key]}: wanted true or false.")
    check_known("fabric.precision", [_precision(config)], PRECISIONS)
    check_known("fabric.loggers.kind", [_logger_kind(config)], LOGGERS)


def make_logger(config: Mapping[str, Any], folder: Path):
    """The logger that `fabric.loggers` names, writing below its `root_dir`, or else below `folder`; None for "none"."""
    kind, settings = _logger_kind(config), config.get("loggers") or {}
    if kind == "none":
        return None
    root, name = settings.get("root_dir") or folder, settings.get("name") or ""
    try:
        return _logger(kind, root, name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"fabric.loggers.kind={kind} needs {error.name}: pip install 'suture[{kind}]'.") from None


def _logger(kind: str, root: Any, name: str):
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    from suture.core.loggers import MlflowLogger, WandbLogger

    if kind in ("csv", "tensorboard"):
        logger = CSVLogger if kind == "csv" else TensorBoardLogger
        return logger(root_dir=root, name=name, version="")
    return MlflowLogger(root, name) if kind == "mlflow" else WandbLogger(root, name)


def _precision(config: Mapping[str, Any]) -> str:
    return str(config.get("precision") or PRECISIONS[0])


def _logger_kind(config: Mapping[str, Any]) -> str:
    return str((config.get("loggers") or {}).get("kind") or "csv")


class Team:
    """The processes of one run: their device and precision, and sums over all of them.

    `rank` is the number of this process among `world`. `sharded`: whether weights are split over the processes.
    `first_of_host`: whether it is the first process of its machine.
    """

    def __init__(self, fabric: "Fabric | None" = None):
        self.fabric = fabric
        self.rank, self.world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
        self.device = fabric.device if fabric else None
        self.sharded = self.world > 1 and getattr(fabric and fabric.strategy, "sharded", False)
        self.first_of_host = fabric is None or fabric.local_rank == 0
        precision = fabric.strategy.precision.precision if fabric else PRECISIONS[0]
        if precision not in PRECISIONS:
            raise ConfigError(f"fabric.precision={precision}: wanted one of {', '.join(PRECISIONS)}.")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of forward and backward passes, between which weights may be written.

        Autocast would keep its converted weights until the context ends, whatever is written meanwhile.
        """
        with self.fabric.autocast() if self.fabric else nullcontext():
            kept = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)
            try:
                yield
            finally:
                torch.set_autocast_cache_enabled(kept)

    def scoring(self) -> AbstractContextManager:
        """The context of passes without gradients. Tensors of inference mode could not be gathered into."""
        return torch.no_grad() if self.sharded else torch.inference_mode()

    def share(self, count: int) -> tuple[slice, float]:
        """The positions of this process among `count`, and their weight in a mean over all of them.

        Where there are fewer positions than processes, the others get the first one again, with a weight of 0.

        >>> Team().share(5)
        (slice(0, None, 1), 1.0)
        """
        if self.rank >= count:
            return slice(0, 1), 0.0
        own = slice(self.rank, None, self.world)
        return own, len(range(*own.indices(count))) / count

    def placed(self, module: Any) -> Placed:
        """A module, or one that is placed already, where it can run: where weights are split, a frozen copy in parts.

        The copy is on the device of the processes; the module itself may lie in mapped files.
        """
        if isinstance(module, Placed):
            return module
        if not self.sharded or not isinstance(module, torch.nn.Module):
            return Placed.whole(module)
        assert self.device is not None
        return Placed.in_parts(module, self.device)

    def each(self, function: "Callable[[S], T]", items: Iterable[S], *, together: bool = False) -> Iterator[T]:
        """`function(item)` of every item, in their order, in every process; each process computes its share of them.

        Results go from process to process one at a time, so their tensors are to be on the CPU. All processes must take
        all results. With `together`, for functions that run a module in parts, a process without an item of its own
        computes the last one too.
        """
        turns = iter(items)
        while turn := list(islice(turns, self.world)):
            last = len(turn) - 1
            own = function(turn[min(self.rank, last)]) if together or self.rank <= last else None
            for number in range(len(turn)):
                yield cast("T", self._told(own, number))
            del own  # before the next one is computed

    def _told(self, value: "T", source: int) -> "T":
        """The value that the process `source` has."""
        if self.world == 1:
            return value
        told: list[Any] = [value if self.rank == source else None]
        torch.distributed.broadcast_object_list(told, src=source)
        return told[0]

    def alike(self, function: "Callable[[], T]") -> "T":
        """`function()`, which the first process computes for all."""
        return self._told(function() if self.rank == 0 else None, 0)  # type: ignore[arg-type]

    def gather(self, value: "T") -> "list[T]":
        """The values of all processes, in their order; tensors among them are to be on the CPU."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def scattered(self, parts: "Sequence[T] | None", source: int) -> "T":
        """The part for this process of those that the process `source` gives; tensors are to be on the CPU."""
        told: list[Any] = [None]
        torch.distributed.scatter_object_list(told, None if parts is None else list(parts), src=source)
        return told[0]

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.gather(None)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, on their device and in their dtype."""
        for tensor in tensors if self.world > 1 else ():
            torch.distributed.all_reduce(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.fabric is None or self.world == 1:
            return tensor
        total = self.fabric.all_reduce(tensor.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.to("cpu", torch.float64)


def launch(fabric: "Fabric", function: "Callable[[Fabric], T]") -> T:
    """Run `function(fabric)` in every process of Fabric's strategy and return the result of process 0.

    A strategy either forks processes (`ddp_fork`) or starts the whole command once for each (`ddp`, torchrun, Slurm).
    In the second case every process but 0 exits here, because the rest of the run is one process's work.
    """
    if fabric.world_size == 1 or not _forks(fabric):
        fabric.launch()
        result = function(fabric)
        if fabric.global_rank > 0:
            raise SystemExit(0)
        return result
    if torch.cuda.is_initialized():
        remedy = "Remedy: fabric.strategy=ddp, which starts the command once for each process, or fabric.devices=1."
        raise ConfigError(f"fabric: this process has used the GPU already and cannot be forked. {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        result, refusal = Path(folder) / "result.pt", Path(folder) / "refusal.pt"
        try:
            fabric.launch(_saved, function, result, refusal)  # type: ignore[arg-type]
        except ProcessException:
            if refusal.exists():  # what a process refused is one line here too
                raise torch.load(refusal, weights_only=False) from None
            raise
        return torch.load(result, weights_only=False)


def _forks(fabric: "Fabric") -> bool:
    launcher = fabric.strategy.launcher
    return launcher is not None and launcher.is_interactive_compatible


def _saved(fabric: "Fabric", function: "Callable[[Fabric], T]", path: Path, refusal: Path) -> None:
    """Save the result of process 0 in a file, or the error of the process that refuses first in another.

    Shared tensors could not be read after the process that made them has ended, and Lightning waits for the processes
    before it reads what they return, so that a process with more than a pipe holds would never end.
    """
    if getattr(fabric.strategy, "sharded", False):
        give_back_freed_memory()
    Team(fabric).wait()  # the first process has the addresses of all, and may end before the last has asked for them
    try:
        result = function(fabric)
    except SutureError as error:
        written = refusal.with_suffix(f".{fabric.global_rank}")
        torch.save(error, written)
        os.replace(written, refusal)
        raise
    if fabric.global_rank == 0:
        torch.save(result, path)
