"""What one run is told, checked for what can be checked without opening a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suture.core.fabric import check_fabric
from suture.errors import ConfigError
from suture.merging.registry import MergeMethod
from suture.pipeline.methods import LearnedMethod, find_method
from suture.pipeline.pools import ModelPool, TaskPool
from suture.pipeline.repairs import Repair
from suture.storage.atomic import new_folder

_RANGES = {"threads": (0, 4096), "batch_size": (1, 2**31), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True)
class Run:
    """One pool, one method with its knobs, repairs, and how and where to run it. `label` is its row in the table."""

    pool: ModelPool
    taskpool: TaskPool | None
    method: MergeMethod | LearnedMethod
    knobs: Mapping[str, Any]
    output: Path
    label: str = ""
    repairs: tuple[Repair, ...] = ()
    overwrite: bool = False
    reuse: bool = False
    threads: int = 0
    batch_size: int = 256
    fast: bool = False
    seed: int = 0
    fabric: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Run":
        """Read a composed configuration; raises `ConfigError` for the first value that does not fit."""
        method, knobs = _method(config["method"])
        for key, (least, most) in _RANGES.items():
            if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < least:
                raise ConfigError(f"{key}={config[key]!r}: wanted a whole number, {least} or more.")
            if config[key] > most:
                raise ConfigError(f"{key}={config[key]}: wanted at most {most}.")
        for key in ("overwrite", "reuse", "dry_run", "fast_dev_run"):
            if not isinstance(config[key], bool):
                raise ConfigError(f"{key}={config[key]!r}: wanted true or false.")
        check_fabric(config["fabric"])
        check_output(config["output"])
        repairs = _repairs(config, knobs)
        label = "adamerging" if "surgery_steps" in knobs else knobs.get("name", method.name)
        if repairs and not config.get("taskpool"):
            raise ConfigError(f"surgery={repairs[0].kind} needs unlabelled inputs. Remedy: name a taskpool=…")
        return cls(
            pool=ModelPool.from_config(config["modelpool"]),
            taskpool=TaskPool.from_config(config["taskpool"]) if config.get("taskpool") else None,
            method=method,
            knobs=knobs,
            output=Path(config["output"] or _default_output(config, label)),
            label=label,
            repairs=repairs,
            overwrite=bool(config["overwrite"]),
            reuse=bool(config["reuse"]),
            threads=config["threads"],
            batch_size=config["batch_size"],
            fast=bool(config["fast_dev_run"]),
            seed=config["seed"],
            fabric=config["fabric"],
        )

    @classmethod
    def of(cls, modelpool: Any, taskpool: Any, name: str, knobs: Mapping[str, Any]) -> "Run":
        """A run that leaves no folder: pools, or what their YAML holds; a method's name; its checked knobs."""
        pool, tasks = getattr(modelpool, "pool", modelpool), getattr(taskpool, "pool", taskpool)  # of drop-in classes
        pool = pool if isinstance(pool, ModelPool) else ModelPool.from_config(pool)
        tasks = tasks if isinstance(tasks, TaskPool) else TaskPool.from_config(tasks)
        repairs = _own_repair(knobs) if "surgery_steps" in knobs else ()
        return cls(pool, tasks, find_method(name), knobs, Path("outputs"), name, repairs)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The tensors that stay at the base."""
        return (*self.pool.frozen, *self.knobs.get("remove_keys", ()))


def _method(config: Mapping[str, Any]) -> tuple[MergeMethod | LearnedMethod, dict[str, Any]]:
    """The method and its knobs; `name` is one of them where a method's names stand for different things."""
    method, told = find_method(config["name"]), dict(config)
    if "name" not in method.knobs.defaults or told["name"] == method.name:
        del told["name"]
    return method, method.knobs.validate(told)


def _repairs(config: Mapping[str, Any], knobs: Mapping[str, Any]) -> tuple[Repair, ...]:
    """The repair that `surgery=…` asks for, or the one that is part of the method."""
    asked = Repair.from_config(config["surgery"])
    if "surgery_steps" not in knobs:
        return (asked,) if asked else ()
    if asked:
        raise ConfigError(f"surgery={asked.kind}, but the method has a surgery of its own. Remedy: leave one out.")
    return _own_repair(knobs)


def _own_repair(knobs: Mapping[str, Any]) -> tuple[Repair, ...]:
    own = {"steps": knobs["surgery_steps"], "lr": knobs["surgery_lr"], "rank": knobs["surgery_rank"]}
    own |= {"eval_iterations": knobs["eval_iterations"], "split": knobs["split"], "cache_dir": knobs["cache_dir"]}
    repair = Repair.from_config({**Repair.defaults("final"), **own})
    return (replace(repair, row="surgery"),) if repair else ()


def check_output(output: Any) -> None:
    """Refuse what is not the path of a folder that can be made."""
    if output is None:
        return
    if not isinstance(output, str | Path):
        raise ConfigError(f"output={output!r}: wanted the path of a folder. Remedy: output=./{output}")
    if Path(output).name in ("", ".."):
        raise ConfigError(f"output={output}: wanted the path of a new folder, not one that others are in.")


def _default_output(config: Mapping[str, Any], label: str) -> Path:
    pool = str((config.get("choices") or {}).get("modelpool", "pool")).split("/")[-1]
    pool = pool.removesuffix(".yaml").removesuffix(".yml")
    return new_folder(f"{pool}/{label}")
