"""A finished run goes to a hub that runs on loopback: whole, again after an interruption, or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
import torch
import yaml
from huggingface_hub import constants

import suture
from suture import zoo
from suture.adaptation import AdaMergingResult, Coefficients
from suture.checkpoints import save_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError, OutputError
from suture.evaluation import Row
from suture.pipeline.config import compose
from suture.pipeline.model_card import card, write_card
from suture.reporting import Report
from suture.reporting.run_folder import read

# huggingface_hub's own way of sending a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves that learned coefficients and was repaired, as the pipeline writes it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(zoo.resolve("zoo:glyphs8/pretrained"), folder / "model")
    save_checkpoint({"latin.final.down": torch.ones(16, 8)}, folder / "surgery.safetensors")
    save_checkpoint({"coefficients": torch.tensor([0.25, 0.5])}, folder / "coefficients.safetensors")
    save_checkpoint({"coefficients": torch.zeros(2, 2)}, folder / "history.safetensors")
    words = ["method=tw_adamerging", "surgery=final", "modelpool=glyphs8", "taskpool=glyphs8", f"output={folder}"]
    rows = [
        Row(name, {"latin": 0.1 * i, "greek": 0.2 * i}, role=role)
        for i, (name, role) in enumerate((("pretrained",) * 2, ("experts",) * 2, ("merged", "merge")), 1)
    ]
    config = compose(words)
    inputs = {name: {"files": {str(folder.parent / f"{name}.pt"): 8 * name}} for name in config["modelpool"]["models"]}
    found = Coefficients(torch.tensor([0.25, 0.5]), ("latin", "greek"), None)
    learned = AdaMergingResult(found, torch.zeros(2, 2), torch.zeros(1), {})
    told = {"config": config, "learning": {"tw_adamerging": learned}, "command": f"suture {' '.join(words)}"}
    provenance = {"versions": {"suture": "0.1.0"}, "inputs": inputs}
    report = Report("two of two", rows, *rows[:2], provenance=provenance, **told)
    (folder / "report.json").write_text(json.dumps(report.as_data()))
    write_card(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.spoken_to(tmp_path / "repository", monkeypatch) as hub:
        yield hub


def card_of(text):
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def is_private(made):
    """Releases of huggingface_hub differ in how they ask."""
    return made["visibility"] == "private" if "visibility" in made else made["private"]


def line_of(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_run_is_one_commit_with_model_repair_coefficients_and_card(run, hub, capsys):
    capsys.readouterr()
    assert main(["push", str(run), "org/tiny"]) == 0
    assert f"The model is at {hub.address}/org/tiny" in capsys.readouterr().out
    (files,) = hub.commits
    assert {"README.md", "config.json", "model.safetensors", "surgery.safetensors", "coefficients.safetensors"} <= set(
        files
    )
    assert not {"report.json", "config.yaml", "history.safetensors"} & set(files)
    for path in (run / "model").iterdir():
        assert files[path.name] == path.read_bytes()
    assert files["surgery.safetensors"] == (run / "surgery.safetensors").read_bytes()
    (made,) = hub.made
    assert (made["name"], made["organization"], is_private(made)) == ("tiny", "org", False)


def test_a_private_model_and_a_branch_can_be_asked_for(run, hub):
    assert suture.push(run, "org/tiny", private=True, revision="v1") == f"{hub.address}/org/tiny/tree/v1"
    assert is_private(hub.made[0])
    assert hub.branches == ["v1"]


def test_what_the_hub_has_already_is_not_sent_again(run, hub):
    suture.push(run, "org/tiny")
    sent = len(hub.asked_to_put)
    suture.push(run, "org/tiny")
    assert len(hub.asked_to_put) == sent == 3  # model, repair, coefficients
    assert len(hub.commits) == 2


def test_the_card_says_what_was_merged_how_and_how_well(run):
    text = (run / "model" / "README.md").read_text()
    front, rest = card_of(text)
    assert front["tags"] == ["merge", "suture", "adamerging"]
    assert front["library_name"] == "transformers"
    report = json.loads((run / "report.json").read_text())
    for knob, value in report["config"]["method"].items():
        assert f"| method.{knob} | `{value}` |" in rest or knob in ("name", "cache_dir", "save_merging_weights")
    assert "| repair.rank | `16` |" in rest
    assert "## Coefficients after 1 step, one for each model" in rest
    assert "| greek | 0.500 | 0.500 | 0.500 |" in rest
    for row in report["rows"]:
        assert f"| {row['name']} | {100 * row['accuracies']['latin']:.1f} |" in rest
    for found in report["provenance"]["inputs"].values():
        (digest,) = found["files"].values()
        assert digest in rest
    assert "    suture method=" in rest
    assert str(run.parent) not in text


def test_models_and_data_of_a_hub_are_linked(run):
    found = read(run)
    models = {"_pretrained_": "openai/clip@main", "latin": "org/latin", "greek": "runs/greek.pt"}
    config = {**found.data["config"], "modelpool": {"family": "open_clip", "models": models}}
    config["taskpool"] = {"tasks": {"svhn": None, "latin": {"source": "org/letters"}, "greek": {"source": "zoo:x/y"}}}
    front, _ = card_of(card(replace(found, data={**found.data, "config": config})))
    assert front["base_model"] == ["openai/clip", "org/latin"]
    assert front["base_model_relation"] == "merge"
    assert front["datasets"] == ["ufldl-stanford/svhn", "org/letters"]
    assert front["library_name"] == "open_clip"


def test_a_card_names_no_repair_where_there_is_none(run):
    found = read(run)
    config = {**found.data["config"], "repair": {"kind": "none"}}
    assert "| repair" not in card(replace(found, data={**found.data, "config": config}))


def test_a_card_of_ones_own_is_kept_and_sent(run, hub, tmp_path):
    own = shutil.copytree(run, tmp_path / "own")
    (own / "model" / "README.md").write_text("---\ntags: [mine]\n---\nMine.\n")
    write_card(own)
    suture.push(own, "org/tiny")
    assert hub.commits[0]["README.md"].endswith(b"Mine.\n")
    (own / "model" / "README.md").unlink()
    suture.push(own, "org/tiny")
    assert b"base_model" in hub.commits[1]["README.md"] or b"suture" in hub.commits[1]["README.md"]


def test_a_merge_of_files_is_pushed_with_its_own_card_and_without_paths(hub, tmp_path):
    base = {"w": torch.zeros(3)}
    merged = suture.merge_files(base, {"one": {"w": torch.ones(3)}}, "task_arithmetic", tmp_path / "merged")
    suture.push(merged, "org/tiny")
    assert set(hub.commits[0]) == {"README.md", "model.safetensors"}
    front, _ = card_of(hub.commits[0]["README.md"].decode())
    assert front["tags"] == ["merge", "suture", "task_arithmetic"]


def test_what_cannot_be_pushed_is_one_line_before_anything_is_asked(run, hub, tmp_path, monkeypatch, capsys):
    capsys.readouterr()
    assert main(["push", str(tmp_path / "none"), "org/tiny"]) == 2
    assert "has no report.json" in line_of(capsys)
    assert main(["push", str(run), "tiny"]) == 2
    assert "'tiny' is no name of a model on the hub. Remedy: write it as org/name." in line_of(capsys)
    assert main(["push", str(run), "org/tiny", "--privat"]) == 2
    assert "Did you mean '--private'" in line_of(capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["push", str(run), "org/tiny"]) == 2
    assert "HF_HUB_OFFLINE is set" in line_of(capsys)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert main(["push", str(run), "org/tiny"]) == 2
    assert "without a token. Remedy: hf auth login, or set HF_TOKEN" in line_of(capsys)
    assert hub.made == hub.asked_to_put == hub.commits == []


def test_the_example_of_the_reference_uploads_a_run(run, hub, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "suture.push(" in block]
    monkeypatch.chdir(run.parent)
    exec(compile(block, "api.md", "exec"), {})
    assert len(hub.commits) == 1


def test_a_run_of_several_methods_names_them(tmp_path):
    for method in ("aswudi", "ties_merging"):
        (tmp_path / method / "model").mkdir(parents=True)
    (tmp_path / "report.json").write_text(json.dumps({"title": "", "rows": [], "tasks": []}))
    with pytest.raises(ConfigError, match=r"holds the models of several methods \(.*aswudi, .*ties_merging\)"):
        suture.push(tmp_path, "org/tiny")


def test_a_token_that_may_not_write_is_refused_before_the_transfer(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    with pytest.raises(OutputError, match="the hub refuses the token"):
        suture.push(run, "org/tiny")
    assert hub.asked_to_put == []


def test_an_upload_that_fails_leaves_the_model_on_the_hub_as_it_was(run, hub):
    hub.spoilt = (run / "surgery.safetensors").read_bytes()[:64]
    with pytest.raises(OutputError, match="is as it was: the upload broke off"):
        suture.push(run, "org/tiny")
    assert hub.commits == []


def test_an_upload_that_is_killed_goes_on_with_what_has_not_arrived(run, hub, tmp_path):
    hub.stuck = (run / "surgery.safetensors").read_bytes()[:64]
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
    command = [sys.executable, "-m", "suture", "push", str(run), "org/tiny"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while (len(hub.asked_to_put) < 3 or len(hub.blobs) < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert len(hub.blobs) == 2
    assert hub.commits == []
    hub.stuck, hub.asked_to_put = b"nothing begins like this", []
    suture.push(run, "org/tiny")
    assert len(hub.asked_to_put) == 1
    assert hub.commits[0]["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()


def test_a_hub_that_is_not_there_is_one_line(run, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match=r"could not be reached .*; nothing was sent"):
        suture.push(run, "org/tiny")
