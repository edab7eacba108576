"""Fabric loggers for MLflow and Weights & Biases. They need only the two clients and write to local folders."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger


class MlflowLogger(Logger):
    """Metrics in MLflow's file store below `root_dir`/mlruns, or at MLFLOW_TRACKING_URI where that is set."""

    def __init__(self, root_dir: str | Path, name: str):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow refuses to write plain files without it
        from mlflow.tracking import MlflowClient

        store = (Path(root_dir) / "mlruns").absolute().as_uri()
        self._name, self._client = name or "suture", MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store)
        experiment = self._client.get_experiment_by_name(self._name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self._name)
        self._run: str = self._client.create_run(experiment_id).info.run_id

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._name

    @property
    def version(self) -> str:
        """The run's id."""
        return self._run

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log the metrics of one step."""
        for key, value in metrics.items():
            self._client.log_metric(self._run, key, value, step=step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the run's settings."""
        for key, value in (vars(params) if isinstance(params, Namespace) else params).items():
            self._client.log_param(self._run, key, value)

    def finalize(self, status: str) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FINISHED" if status == "success" else "FAILED")


class WandbLogger(Logger):
    """Metrics in an offline Weights & Biases run below `root_dir`/wandb, to upload with `wandb sync`.

    The environment variable WANDB_MODE overrides the offline mode.
    """

    def __init__(self, root_dir: str | Path, name: str):
        import wandb

        Path(root_dir).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True)
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project="suture", name=name or None, dir=str(root_dir), mode=mode, settings=settings, reinit="create_new"
        )

    @property
    def name(self) -> str | None:
        """The run's name."""
        return self._run.name

    @property
    def version(self) -> str:
        """The run's id."""
        return self._run.id

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log the metrics of one step."""
        self._run.log(metrics, step=step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the run's settings."""
        self._run.config.update(vars(params) if isinstance(params, Namespace) else params)

    def finalize(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if status == "success" else 1)
