"""Masks for tasks from files: equal to those in memory, whatever the memory; loading, the record, and refusals."""

import json

import pytest
import tiny_llama
import torch

from suture import TaskMasks, emr_masks, merge_files, plan_files, tall_masks
from suture.cli.main import main
from suture.errors import ConfigError, OutputError

CASES = [("tall_masks", {}, tall_masks), ("tall_masks", {"over": "ties"}, tall_masks), ("emr", {}, emr_masks)]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    base = tiny_llama.save_base(folder / "base")
    return base, {name: tiny_llama.save_tuned(folder / name, base, seed) for name, seed in (("math", 1), ("code", 2))}


@pytest.mark.parametrize(("method", "knobs", "make"), CASES)
def test_files_hold_the_masks_that_are_made_in_memory(llamas, tmp_path, method, knobs, make):
    base, models = llamas
    out = merge_files(base, models, method, tmp_path / "out", memory="60MB", threads=2, **knobs)
    found, expected = TaskMasks.load(out, base), make(base, models, **knobs)
    assert found.tasks == expected.tasks == ("math", "code")
    assert torch.equal(found.scales, expected.scales)
    for task in found.tasks:
        weights, wanted = found.for_task(task), expected.for_task(task)
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    bits = sum(t.nbytes for t in found.bits.values())
    assert bits <= 2 * (found.entries // 8 + len(found.update))


def test_a_merge_of_masks_is_recorded_and_done_once(llamas, tmp_path):
    base, models = llamas
    words = ["merge", f"base={base}", *(f"models.{name}={path}" for name, path in models.items())]
    words += ["method=tall_masks", f"output={tmp_path / 'out'}"]
    assert main(words) == main(words) == 0
    assert json.loads((tmp_path / "out" / "suture_merge.json").read_text())["work"]["method"] == "tall_masks"
    assert 'for_task("math")' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(OutputError, match="already exists"):
        merge_files(base, models, "emr_merging", tmp_path / "out")
    merge_files(base, models, "emr_merging", tmp_path / "out", overwrite=True)
    assert TaskMasks.load(tmp_path / "out", base).kind == "emr_merging"


def test_a_file_of_masks_refuses_what_it_cannot_follow(llamas, tmp_path):
    base, models = llamas
    refused = [
        {"dtype": "float32"},
        {"shard": "1/2"},
        {"after": ["svc"]},
        {"vocabulary": "base"},
        {"allow_non_finite": ["*"]},
        {"mask_threshold": -1.0},
        {"scaling_factor": 1.0},
    ]
    for options in refused:
        with pytest.raises(ConfigError, match=next(iter(options))):
            merge_files(base, models, "tall_masks", tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="no plan"):
        plan_files(base, models, "tall_masks", tmp_path / "out")
    with pytest.raises(ConfigError, match="needs the pretrained model"):
        merge_files(None, models, "tall_masks", tmp_path / "out")
    assert not (tmp_path / "out").exists()
