"""What MLflow and Weights & Biases were given is read back from the files that they wrote."""

import json

import pytest
from desk import refused

from suture.cli.main import main

RUN = ["method.max_steps=3", "method.batch_size=4", "fabric.loggers.root_dir=logged", "fabric.loggers.name=mine"]


def losses(desk):
    report = json.loads((desk.folder / "out" / "report.json").read_text())
    return report["learning"]["lw_adamerging"]["losses"]


def test_mlflow_reads_what_was_logged(desk, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracking = pytest.importorskip("mlflow.tracking", reason="pip install 'suture[mlflow]'")
    assert main(desk.words(*RUN, "fabric.loggers.kind=mlflow", method="lw_adamerging")) == 0
    client = tracking.MlflowClient((desk.folder / "logged" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED"
    found = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda metric: metric.step)
    assert [metric.step for metric in found] == [0, 1, 2]
    assert [metric.value for metric in found] == pytest.approx(losses(desk), rel=1e-5)
    assert {"train/weight_max", "train/weight_min", "train/weight_mean"} <= set(run.data.metrics)


def test_wandb_keeps_what_was_logged_without_a_network(desk, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb", reason="pip install 'suture[wandb]'")
    assert main(desk.words(*RUN, "fabric.loggers.kind=wandb", method="lw_adamerging")) == 0
    (written,) = (desk.folder / "logged" / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert content.count(b"train/loss") >= 3
    assert b"train/weight_mean" in content


def test_a_logger_that_is_not_known_is_refused(desk, capsys):
    words = desk.words("fabric.loggers.kind=mlflwo", method="lw_adamerging")
    assert "Did you mean 'mlflow'" in refused(capsys, words)
