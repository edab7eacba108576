"""Four architectures of language models from two YAML files to the hub, each by the commands that a user types."""

import json

import hub_server
import pytest
import torch
from language_shop import SENTENCES, build_shop, write_pools

from suture.cli.main import main

pytestmark = [
    pytest.mark.slow,
    # huggingface_hub's own way of sending a file.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.spoken_to(tmp_path / "repository", monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mixtral"])
def test_a_model_goes_from_two_yaml_files_to_the_hub(kind, hub, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    pools = write_pools(build_shop(tmp_path / "shop", kind), tmp_path)
    method = ["method=lw_adamerging", "method.max_steps=2", "method.batch_size=8"]
    repairs = ["repair=calibrate+final", "repair.final.steps=2"]
    assert main(["check", *method, *pools]) == 0
    assert main([*method, *repairs, *pools, "output=adapted"]) == 0
    assert main(["method=ties_merging", *pools, "output=ties"]) == 0
    assert main(["evaluate", "model=ties/model", "matrix=true", *pools, "output=scores"]) == 0
    assert main(["report", "adapted", "ties", "--output", "comparison.html"]) == 0
    assert main(["push", "adapted", "org/merged"]) == 0

    rows = {name: json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("adapted", "ties")}
    assert [row["role"] for row in rows["adapted"]] == ["pretrained", "experts", "merge", "repair", "repair"]
    assert all(row["accuracies"].keys() == set(SENTENCES) for each in rows.values() for row in each)
    scores = json.loads((tmp_path / "scores" / "report.json").read_text())["rows"]
    assert scores[-1]["accuracies"] == pytest.approx(rows["ties"][-1]["accuracies"], rel=1e-5)
    assert all(label in (tmp_path / "comparison.html").read_text() for label in ("lw_adamerging", "ties_merging"))
    (files,) = hub.commits
    for name, content in files.items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "surgery.safetensors"} <= set(files)
    there, here = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("downloaded", "adapted/model"))
    tokens = torch.arange(2, 12)[None]
    assert torch.equal(there(input_ids=tokens).logits, here(input_ids=tokens).logits)
