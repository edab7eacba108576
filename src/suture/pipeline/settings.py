"""The settings of one run, checked as far as is possible without opening a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suture.core.batch_sizes import BatchSize
from suture.core.fabric import check_fabric
from suture.errors import ConfigError
from suture.pipeline.generations import Generation
from suture.pipeline.harness import Harness
from suture.pipeline.methods import Method, chosen_method
from suture.pipeline.pools import ModelPool, TaskPool, check_filled
from suture.pipeline.repairs import JOIN, Repair
from suture.storage.atomic import new_folder

_RANGES = {"threads": (0, 4096), "batch_size": (1, 2**31), "seed": (0, 2**63 - 1)}
_WORDS = {"batch_size": "auto"}  # that may stand for a number


@dataclass(frozen=True)
class Settings:
    """The settings of one run: a pool, a method with its knobs, repairs, output and computation."""

    pool: ModelPool
    taskpool: TaskPool | None
    method: Method
    output: Path
    repairs: tuple[Repair, ...] = ()
    overwrite: bool = False
    reuse: bool = False
    dry_run: bool = False
    threads: int = 0
    batch_size: BatchSize = 256
    fast: bool = False
    seed: int = 0
    fabric: Mapping[str, Any] = field(default_factory=dict)
    harness: Harness | None = None
    generation: Generation | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read a composed configuration; raises `ConfigError` for the first invalid value."""
        values = dict(config["method"])
        method = chosen_method(values.pop("name"), values)
        for key, (least, most) in _RANGES.items():
            if config[key] == _WORDS.get(key, ...):
                continue
            if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < least:
                word = f", or {_WORDS[key]}" if key in _WORDS else ""
                raise ConfigError(f"{key}={config[key]!r}: wanted a whole number, {least} or more{word}.")
            if config[key] > most:
                raise ConfigError(f"{key}={config[key]}: wanted at most {most}.")
        for key in ("overwrite", "reuse", "dry_run", "fast_dev_run"):
            if not isinstance(config[key], bool):
                raise ConfigError(f"{key}={config[key]!r}: wanted true or false.")
        check_filled(config["modelpool"], config.get("taskpool"))
        check_fabric(config["fabric"])
        check_output(config["output"])
        repairs = _repairs(config, method)
        if repairs and not config.get("taskpool"):
            own = f"method={config['method']['name']}" if method.repairs else f"repair={JOIN.join(repairs[0].chain)}"
            raise ConfigError(f"{own} needs unlabelled inputs. Remedy: name a taskpool=…")
        return cls(
            pool=ModelPool.from_config(config["modelpool"]),
            taskpool=TaskPool.from_config(config["taskpool"]) if config.get("taskpool") else None,
            method=method,
            output=Path(config["output"] or _default_output(config, method.label)),
            repairs=repairs,
            overwrite=bool(config["overwrite"]),
            reuse=bool(config["reuse"]),
            dry_run=bool(config["dry_run"]),
            threads=config["threads"],
            batch_size=config["batch_size"],
            fast=bool(config["fast_dev_run"]),
            seed=config["seed"],
            fabric=config["fabric"],
            harness=Harness.from_config(config.get("evaluate"), config["modelpool"].get("family", "clip")),
            generation=Generation.from_config(config.get("generate"), config["modelpool"].get("family", "clip")),
        )

    @property
    def channels_last(self) -> bool:
        """Whether pictures and kernels have their channels last."""
        return bool(self.fabric.get("channels_last"))

    @property
    def tasks(self) -> tuple[Any, ...]:
        """The tasks on which models are scored; none without a task pool."""
        return self.taskpool.tasks if self.taskpool else ()

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(task.name for task in self.tasks)


def _repairs(config: Mapping[str, Any], method: Method) -> tuple[Repair, ...]:
    """The repair of `repair=…`, or those that are part of the method."""
    chosen = Repair.from_config(config["repair"])
    if chosen and method.repairs:
        raise ConfigError(
            f"repair={JOIN.join(chosen.chain)}, but the method has a repair of its own. Remedy: leave one of them out."
        )
    return (chosen,) if chosen else method.repairs


def check_output(output: Any) -> None:
    """Raise `ConfigError` unless `output` is None or the path of a new folder."""
    if output is None:
        return
    if not isinstance(output, str | Path):
        raise ConfigError(f"output={output!r}: wanted the path of a folder. Remedy: output=./{output}")
    if Path(output).name in ("", ".."):
        raise ConfigError(f"output={output}: wanted the path of a new folder, not one that others are in.")


def _default_output(config: Mapping[str, Any], label: str) -> Path:
    pool = str((config.get("choices") or {}).get("modelpool", "<modelpool>")).split("/")[-1]
    pool = "pool" if pool.startswith("<") else pool.removesuffix(".yaml").removesuffix(".yml")  # <: a mapping
    return new_folder(f"{pool}/{label}")
