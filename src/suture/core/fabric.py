"""Devices, processes, precision and loggers, through Lightning Fabric, which is imported here and in `loggers` only."""

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from suture.core.batches import call
from suture.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
_KEYS = ("accelerator", "devices", "strategy", "precision", "num_nodes", "loggers")
LOGGERS = ("csv", "tensorboard", "mlflow", "wandb", "none")
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class OneDevice:
    """The first of the devices that `fabric.*` ask for, in their precision: for what one process computes alone."""

    config: Mapping[str, Any]

    @cached_property
    def fabric(self):
        """Fabric with one device and no strategy."""
        return make_fabric({**self.config, "devices": 1, "strategy": "auto"})

    @property
    def device(self) -> torch.device:
        """Where models and inputs have to be."""
        return self.fabric.device

    @property
    def precision(self) -> str:
        """What passes are computed in: 32-true or bf16-mixed."""
        return _precision(self.config)

    def call(self, module: Any, inputs: Any) -> Tensor:
        """What the module gives for a batch, in float32 whatever it is computed in: (batch, …)."""
        if _precision(self.config) == PRECISIONS[0]:
            return call(module, inputs)
        with self.fabric.autocast():
            return call(module, inputs).float()


def make_fabric(config: Mapping[str, Any], devices: int = 1):
    """A Fabric as the keys `fabric.*` ask for; `devices` where they leave it open. `ConfigError` for what cannot be."""
    from lightning_fabric import Fabric

    check_fabric(config)
    asked = {key: config[key] for key in _KEYS if config.get(key) is not None and key not in ("devices", "loggers")}
    number = config["devices"] if config.get("devices") is not None else devices
    if asked.get("strategy", "auto") == "auto" and number not in (1, "1"):
        asked["strategy"] = "ddp_fork"  # in this process the run goes on: only the adaptation is shared out
    try:
        return Fabric(devices=number, **asked)
    except Exception as error:  # every kind of wrong word has an exception class of its own
        raise ConfigError(f"fabric: {' '.join(str(error).split())}") from None


def check_fabric(config: Mapping[str, Any]) -> None:
    """Refuse what can be seen to be wrong before anything is opened."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"fabric={config!r}: wanted keys below it, such as fabric.precision=bf16-mixed.")
    if not isinstance(loggers := config.get("loggers"), Mapping | None):
        raise ConfigError(f"fabric.loggers={loggers!r}: wanted keys below it, such as fabric.loggers.kind=csv.")
    for key in config:
        if key not in _KEYS:
            raise ConfigError(unknown_name("key of fabric", key, _KEYS))
    if "spawn" in str(config.get("strategy")):
        remedy = "Remedy: ddp_fork, or ddp, which starts the command once for each process."
        found = f"fabric.strategy={config['strategy']}"
        raise ConfigError(f"{found}: what runs cannot be handed to a new process. {remedy}")
    precision, kind = _precision(config), _logger_kind(config)
    if precision not in PRECISIONS:
        raise ConfigError(unknown_name("fabric.precision", precision, PRECISIONS))
    if kind not in LOGGERS:
        raise ConfigError(unknown_name("fabric.loggers.kind", kind, LOGGERS))


def make_logger(config: Mapping[str, Any], folder: Path):
    """The logger that `fabric.loggers` asks for, writing below `root_dir` or else below `folder`; None for "none"."""
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
        place = {"root_dir": root, "name": name, "version": ""}
        return CSVLogger(**place) if kind == "csv" else TensorBoardLogger(**place)
    return MlflowLogger(root, name) if kind == "mlflow" else WandbLogger(root, name)


def _precision(config: Mapping[str, Any]) -> str:
    return str(config.get("precision") or PRECISIONS[0])


def _logger_kind(config: Mapping[str, Any]) -> str:
    return str((config.get("loggers") or {}).get("kind") or "csv")


class Team:
    """Device, precision and sums over processes. `rank` is this process, of `world`."""

    def __init__(self, fabric: "Fabric | None" = None):
        self.fabric = fabric
        self.rank, self.world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
        self.device = fabric.device if fabric else None
        found = fabric.strategy.precision.precision if fabric else PRECISIONS[0]
        if found not in PRECISIONS:
            raise ConfigError(f"fabric.precision={found}: wanted one of {', '.join(PRECISIONS)}.")

    def autocast(self) -> AbstractContextManager:
        """The context of the forward and backward passes."""
        return self.fabric.autocast() if self.fabric else nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.fabric is None or self.world == 1:
            return tensor
        total = self.fabric.all_reduce(tensor.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.to("cpu", torch.float64)


def launch(fabric: "Fabric", function: "Callable[[Fabric], T]") -> T:
    """Run `function(fabric)` in every process of Fabric's strategy, and give what process 0 gives.

    Strategies fork processes for this (`ddp_fork`), or start the whole command once for each (`ddp`, torchrun, Slurm).
    Of the latter, all but process 0 end here: what follows is one process's work.
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
    return torch.load(io.BytesIO(fabric.launch(_packed, function)), weights_only=False)  # type: ignore[arg-type]


def _forks(fabric: "Fabric") -> bool:
    launcher = fabric.strategy.launcher
    return launcher is not None and launcher.is_interactive_compatible


def _packed(fabric: "Fabric", function: "Callable[[Fabric], T]") -> bytes:
    """The result as bytes: tensors would be handed over by a process that is gone when they are read."""
    buffer = io.BytesIO()
    torch.save(function(fabric), buffer)
    return buffer.getvalue()
