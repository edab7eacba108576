"""Wrappers around merges of files: what comes out, whatever the threads, the memory and the shares; and refusals."""

import json

import pytest
import tiny_llama
import torch

from suture import merge, merge_files, plan_files
from suture.cli.main import main
from suture.errors import ConfigError
from suture.merging.wrapping import wrappers

METHODS = ["task_arithmetic", "ties_merging", "tsv_m", "model_stock"]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    base = tiny_llama.save_base(folder / "base")
    return base, {name: tiny_llama.save_tuned(folder / name, base, seed) for name, seed in (("math", 1), ("code", 2))}


def close(path, expected):
    found = tiny_llama.tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # bfloat16; the ratio may differ in its last bit
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4)
    return sum(int((found[name] != tensor).sum()) for name, tensor in expected.items()) <= 2


@pytest.mark.parametrize("wrapper", sorted(wrappers()))
@pytest.mark.parametrize("method", METHODS)
def test_files_hold_what_a_wrapped_merge_in_memory_gives(llamas, tmp_path, method, wrapper):
    base, models = llamas
    after = {wrapper: {"factors": [0.5, 1.5]} if wrapper == "depth_schedule" else {}}
    expected = merge(base, models, method, after=after)
    assert any(not torch.equal(t, merge(base, models, method)[name]) for name, t in expected.items())
    out = merge_files(base, models, method, tmp_path / "one", after=after, threads=1)
    assert close(out, expected)
    small = merge_files(base, models, method, tmp_path / "two", after=after, threads=2, memory="60MB")
    assert close(small, expected)


def test_shares_of_a_wrapped_merge_give_the_same_files(llamas, tmp_path):
    base, models = llamas
    options = {"after": {"svc": {"alpha": 0.2}, "lines": {"beta": 0.4}}}
    whole = merge_files(base, models, "ties_merging", tmp_path / "whole", **options)
    for shard in ("1/2", "2/2"):
        shared = merge_files(base, models, "ties_merging", tmp_path / "shared", shard=shard, **options)
    assert (whole / "model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()


def test_other_wrappers_are_another_merge_and_the_record_names_them(llamas, tmp_path, capsys):
    base, models = llamas
    words = ["merge", f"base={base}", *(f"models.{name}={path}" for name, path in models.items())]
    words += ["method=task_arithmetic", f"output={tmp_path / 'out'}"]
    assert main([*words, "method.after=[svc]"]) == 0
    assert main([*words, "method.after=[svc]"]) == 0  # the same merge: already there
    assert main([*words, "method.after=[svc,lines]"]) == 2
    assert "already exists" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "suture_merge.json").read_text())
    assert record["work"]["after"]["svc"]["alpha"] == 0.1
    assert "then [svc](https://arxiv.org/abs/2602.05536)" in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_counts_the_passes_of_wrappers_and_the_tensors_that_they_hold(llamas, tmp_path):
    base, models = llamas
    plain, svc, lines, both = (
        plan_files(base, models, "ties_merging", tmp_path / "out", after=after)
        for after in ([], ["svc"], ["lines"], ["svc", "lines"])
    )
    assert [each.passes - plain.passes for each in (svc, lines, both)] == [1, 2, 2]
    assert svc.matrix == both.matrix > lines.matrix == plain.matrix == 0


def test_wrappers_are_refused_where_they_do_not_fit(llamas, tmp_path):
    base, models = llamas
    with pytest.raises(ConfigError, match="'svd'"):
        merge_files(base, models, "task_arithmetic", tmp_path / "out", after=["svd"])
    with pytest.raises(ConfigError, match=r"nothing\.like\.it"):
        merge_files(
            base, models, "task_arithmetic", tmp_path / "out", after={"svc": {"as_matrix": ["nothing.like.it"]}}
        )
    assert not (tmp_path / "out").exists()
