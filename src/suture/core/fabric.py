"""Devices, processes, precision and loggers, through Lightning Fabric. The only room that knows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.core.batches import call
from suture.errors import ConfigError, unknown_name

_KEYS = ("accelerator", "devices", "strategy", "precision", "num_nodes", "loggers")
_LOGGERS = ("csv", "tensorboard", "mlflow", "wandb", "none")
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
    if kind not in _LOGGERS:
        raise ConfigError(unknown_name("fabric.loggers.kind", kind, _LOGGERS))


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
