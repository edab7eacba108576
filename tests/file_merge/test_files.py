"""Merging files: what comes out, that it loads, and that nothing but the words decides its bytes."""

import json
import subprocess
import sys

import pytest
import tiny_llama
import torch

import suture
from suture import merge_files
from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError, IncompatibleModels, OutputError

METHODS = ["simple_average", "task_arithmetic", "ties_merging", "dare_ties", "della", "model_stock", "breadcrumbs"]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A tiny Llama in bf16 and two fine-tunes."""
    folder = tmp_path_factory.mktemp("llamas")
    base = tiny_llama.save_base(folder / "base")
    models = {name: tiny_llama.save_tuned(folder / name, base, seed) for name, seed in (("math", 1), ("code", 2))}
    return base, models


def words(llamas, *more):
    base, models = llamas
    return ["merge", f"base={base}", *(f"models.{name}={path}" for name, path in models.items()), *more]


def same(one, other):
    one, other = tiny_llama.tensors(one), other if isinstance(other, dict) else tiny_llama.tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_what_merging_in_memory_gives(llamas, tmp_path, method):
    base, models = llamas
    out = merge_files(base, models, method, tmp_path / "out", shard_size="20KB")
    assert same(out, suture.merge(base, models, method))
    assert len(list(out.glob("model-*.safetensors"))) > 2


def test_the_result_loads_in_transformers_with_its_configuration(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    base, models = llamas
    for size, dtype in (("20KB", torch.float16), ("1GB", None)):
        out = merge_files(base, models, "task_arithmetic", tmp_path / size, dtype=dtype, shard_size=size)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == (dtype or torch.bfloat16)
        assert model.generation_config.max_new_tokens == 7
        state, expected = model.state_dict(), suture.merge(base, models, "task_arithmetic")
        assert state.keys() == expected.keys()
        if dtype is None:
            assert all(torch.equal(state[name], expected[name]) for name in expected)
            assert (out / "model.safetensors").is_file()
            assert (out / "tokenizer_config.json").read_text() == (base / "tokenizer_config.json").read_text()


def test_a_tied_head_stays_tied(tmp_path):
    from transformers import AutoModelForCausalLM

    base = tiny_llama.save_base(tmp_path / "base", tied=True)
    models = [tiny_llama.save_tuned(tmp_path / name, base, i) for i, name in enumerate(("one", "two"))]
    model = AutoModelForCausalLM.from_pretrained(merge_files(base, models, "ties_merging", tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = suture.merge(base, models, "ties_merging")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, expected)


def test_the_index_and_the_provenance_say_what_is_there(llamas, tmp_path):
    base, models = llamas
    out = merge_files(base, models, "task_arithmetic", tmp_path / "out", shard_size="20KB", scaling_factor=0.5)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny_llama.tensors(out).values())
    assert all(name in open_checkpoint(out / file) for name, file in index["weight_map"].items())
    origin = json.loads((out / "suture_merge.json").read_text())
    assert origin["work"]["method"] == "task_arithmetic"
    assert origin["work"]["settings"] == {"scaling_factor": 0.5}
    assert set(origin["inputs"]) == {"_pretrained_", "math", "code"}
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert next(iter(origin["inputs"]["math"]["files"].values())) in card


def test_no_thread_count_memory_or_shard_size_changes_a_tensor(llamas, tmp_path):
    base, models = llamas
    for method in ("ties_merging", "dare", "della", "sce"):
        knobs = {"select_topk": 0.3} if method == "sce" else {}
        outs = [
            merge_files(base, models, method, tmp_path / f"{method}-{i}", **options, **knobs)
            for i, options in enumerate(
                [{"threads": 1}, {"threads": 3, "shard_size": "9KB"}, {"memory": "43MB", "shard_size": "30KB"}]
            )
        ]
        assert same(outs[0], outs[1])
        assert same(outs[0], outs[2])
        assert (outs[0] / "model.safetensors").read_bytes()


SHARES = """
import os, sys
import suture
folder, count = sys.argv[1], int(sys.argv[2])
models = [f"{folder}/{name}.safetensors" for name in ("one", "two")]
children = []
for i in range(1, count + 1):
    children.append(os.fork())
    if children[-1] == 0:
        suture.merge_files(f"{folder}/base.safetensors", models, "ties_merging", f"{folder}/out", shard_size="2MB",
                           memory="45MB", threads=1, shard=f"{i}/{count}")
        os._exit(0)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three checkpoints of 8 MB in bf16, in which columns cancel, and their merge."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(400, 500, generator=generator).bfloat16() for i in range(20)}
    for name in ("base", "one", "two"):
        noise = lambda t, name=name: t if name == "base" else t + 0.1 * torch.randn(t.shape, generator=generator)
        save_checkpoint({key: noise(t).bfloat16() for key, t in base.items()}, folder / f"{name}.safetensors")
    models = [folder / "one.safetensors", folder / "two.safetensors"]
    merge_files(folder / "base.safetensors", models, "ties_merging", folder / "whole", shard_size="2MB")
    assert same(folder / "whole", suture.merge(folder / "base.safetensors", models, "ties_merging"))
    return folder


def test_processes_share_one_output(large, tmp_path):
    for name in ("base", "one", "two"):
        (tmp_path / f"{name}.safetensors").symlink_to(large / f"{name}.safetensors")
    command = [sys.executable, "-c", SHARES, str(tmp_path), "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same_files(tmp_path / "out", large / "whole")
    assert not list(tmp_path.glob(".*"))


def test_shares_one_after_another_give_the_same_and_the_last_one_publishes(llamas, tmp_path):
    whole = merge_files(*llamas, "dare", tmp_path / "whole")
    for i in (2, 1, 3):
        assert not (tmp_path / "out").exists()
        merge_files(*llamas, "dare", tmp_path / "out", shard=f"{i}/3")
    assert same_files(whole, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def same_files(one, other):
    """Whether two results are equal byte by byte but for what says how they were made."""
    told = {"README.md", "suture_merge.json"}
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files if name not in told)


def test_cancelled_columns_follow_the_majority_of_all_tensors(tmp_path):
    for majority in (1, -1):
        votes = majority * torch.ones(5)
        base = {"a": torch.zeros(2), "b": torch.zeros(5)}
        one, two = {"a": torch.tensor([2.0, 0]), "b": votes}, {"a": torch.tensor([-2.0, 0]), "b": votes}
        knobs = {"threshold": 100, "scaling_factor": 1.0}
        for shard in ("1/2", "2/2"):
            out = merge_files(base, [one, two], "ties_merging", tmp_path / str(majority), shard=shard, **knobs)
        assert tiny_llama.tensors(out)["a"].tolist() == [2.0 * majority, 0.0]


def test_the_same_words_again_change_nothing_and_other_words_are_refused(llamas, tmp_path):
    out = merge_files(*llamas, "dare", tmp_path / "out")
    before = (out / "model.safetensors").stat().st_mtime_ns
    merge_files(*llamas, "dare", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="already exists and is not empty"):
        merge_files(*llamas, "dare", out, density=0.4)
    merge_files(*llamas, "dare", out, density=0.4, overwrite=True)
    assert same(out, suture.merge(*llamas, "dare", density=0.4))


def test_integers_scalars_empty_and_tied_tensors(tmp_path):
    weight = torch.randn(6, 4).bfloat16()
    base = {"head.weight": weight, "embed.weight": weight, "ids": torch.arange(5), "s": torch.tensor(2.0)}
    base |= {"none": torch.zeros(0, 3)}
    tuned = {name: t + 1 for name, t in base.items()} | {"ids": torch.arange(5)}
    tuned["head.weight"] = tuned["embed.weight"]
    out = merge_files(base, [tuned], "task_arithmetic", tmp_path / "out", scaling_factor=1.0, shard_size=60)
    found = open_checkpoint(out)
    assert dict(found.aliases) == {"head.weight": "embed.weight"}
    assert torch.equal(found["head.weight"], tuned["head.weight"])
    assert found["ids"].tolist() == [0, 1, 2, 3, 4]
    assert found["s"].item() == 3
    assert found["none"].shape == (0, 3)


def test_what_is_not_finite_is_refused_unless_it_is_allowed_by_name(tmp_path):
    base, tuned = {"a": torch.ones(8), "b": torch.ones(8)}, {"a": torch.ones(8), "b": torch.full((8,), 7e4)}
    with pytest.raises(IncompatibleModels, match=r"'b' would not be finite at entry 0 as float16"):
        merge_files(base, [tuned], "simple_average", tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())
    allowed = {"dtype": "float16", "allow_non_finite": ["b*"]}
    out = merge_files(base, [tuned], "simple_average", tmp_path / "out", **allowed)
    assert tiny_llama.tensors(out)["b"].isinf().all()
    tuned["a"][3] = float("nan")
    with pytest.raises(IncompatibleModels, match="'a' is not finite at entry 3 in 'model_1'"):
        merge_files(base, [tuned], "simple_average", tmp_path / "nan")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_methods_without_task_vectors_need_no_base(llamas, tmp_path):
    base, models = llamas
    out = merge_files(None, models, "simple_average", tmp_path / "out")
    assert same(out, suture.merge(base, models, "simple_average"))
    arc = merge_files(None, models, "slerp", tmp_path / "arc", t=0.3)
    assert same(arc, suture.merge(models["math"], [models["code"]], "slerp", t=0.3))
    with pytest.raises(ConfigError, match="dare needs the pretrained model"):
        merge_files(None, models, "dare", tmp_path / "no")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method=ties_mergin", "Did you mean 'ties_merging'"),
        ("method.densty=0.5", "Did you mean 'method.density'"),
        ("shard=3/2", "wanted i/n"),
        ("shard_size=5XB", "is no size"),
        ("memory=1MB", "is too little for 2 models. Remedy: give"),
        ("dtype=float8", "Unknown dtype 'float8'"),
        ("vocabulary=unoin", "Did you mean 'union'"),
        ("method.density=2", "does not fit dare"),
        ("models.other=/nowhere/at/all", "'other': '/nowhere/at/all' does not exist"),
        ("base=/nowhere/at/all", "'base': '/nowhere/at/all' does not exist"),
        ("output=", "Missing argument: output=…"),
    ],
)
def test_bad_words_are_one_line_and_nothing_is_written(llamas, tmp_path, capsys, word, message):
    told = words(llamas, "method=dare", f"output={tmp_path / 'out'}")
    told = [w for w in told if word.startswith("method.") or w.partition("=")[0] != word.partition("=")[0]]
    assert main([*told, word]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_words_of_the_command_line_reach_the_merge(llamas, tmp_path, capsys):
    out = tmp_path / "a b,c=d"
    assert main(words(llamas, "method=ties_merging", "method.scope=tensor", "dtype=float32", f"output={out}")) == 0
    assert f"The merged model is in {out}" in capsys.readouterr().out
    base, models = llamas
    wide = {name: {k: t.float() for k, t in open_checkpoint(path).items()} for name, path in models.items()}
    expected = suture.merge(
        {k: t.float() for k, t in open_checkpoint(base).items()}, wide, "ties_merging", scope="tensor"
    )
    assert same(out, expected)


def test_help_is_shown_and_lists_the_words(capsys):
    assert main(["merge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--plan", "--shard", "memory=", "models.NAME="))
