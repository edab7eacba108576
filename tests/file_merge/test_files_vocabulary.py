"""Models whose vocabularies differ: each choice by hand, and by token."""

import json

import pytest
import tiny_llama
import torch
from safetensors.torch import save_file

from suture import merge_files
from suture.errors import CheckpointError, IncompatibleModels
from suture.file_merge.vocabulary import _first, _runs

TA = {"scaling_factor": 1.0}


def model(rows, **others):
    return {"embed.weight": torch.tensor([[float(row), -float(row)] for row in rows]), **others}


BASE, SHORT, LONG = model([1, 2, 3]), model([11, 12]), model([21, 22, 23, 24])


def merged(tmp_path, base, models, **options):
    return tiny_llama.tensors(merge_files(base, models, "task_arithmetic", tmp_path / "out", **{**TA, **options}))


@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        ("base", [1 + 10 + 20, 2 + 10 + 20, 3 + 20]),
        ("crop", [1 + 10 + 20, 2 + 10 + 20]),
        ("pad", [1 + 10 + 20, 2 + 10 + 20, 3 + 20, 24]),
    ],
)
def test_each_choice_has_its_rows(tmp_path, choice, rows):
    found = merged(tmp_path, BASE, [SHORT, LONG], vocabulary=choice)["embed.weight"]
    assert found[:, 0].tolist() == rows
    assert found[:, 1].tolist() == [-row for row in rows]


def test_without_a_choice_it_is_refused_and_the_choices_are_named(tmp_path):
    with pytest.raises(IncompatibleModels, match="vocabulary=base, crop, pad or union"):
        merged(tmp_path, BASE, [SHORT])


def test_a_row_that_only_some_have_is_their_mean(tmp_path):
    found = merged(tmp_path, model([1]), [model([1, 4]), model([1, 8]), model([1])], vocabulary="pad")["embed.weight"]
    assert found[:, 0].tolist() == [1, 6]


def test_tied_tables_stay_tied_and_other_tensors_are_left_alone(tmp_path):
    def tied(rows):
        found = model(rows, w=torch.ones(2))
        return found | {"lm_head.weight": found["embed.weight"]}

    found = merged(tmp_path, tied([1, 2]), [tied([3, 4, 5])], vocabulary="pad")
    assert torch.equal(found["lm_head.weight"], found["embed.weight"])
    assert found["embed.weight"].shape == (3, 2)
    assert found["w"].tolist() == [1, 1]


@pytest.mark.parametrize("chunk", [3, 7, 1 << 17])
def test_slices_do_not_matter(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("suture.merging.task_vectors._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    rand = lambda rows: {"embed.weight": torch.randn(rows, 5, generator=generator).bfloat16()}
    base, models = rand(9), [rand(7), rand(12)]
    found = merged(tmp_path, base, models, vocabulary="pad")["embed.weight"]
    full = torch.cat([base["embed.weight"], models[1]["embed.weight"][9:]]).float()
    first = torch.cat([models[0]["embed.weight"].float(), full[7:]])
    expected = (full + ((first - full) + (models[1]["embed.weight"].float() - full))).bfloat16()
    assert torch.equal(found, expected)


def folder(path, tokens, rows, added=()):
    """A checkpoint with a tokenizer.json whose model has some tokens and to which some were added."""
    path.mkdir()
    save_file(model(rows), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(rows)}))
    found = {"model": {"vocab": {token: i for i, token in enumerate(tokens)}}}
    found["added_tokens"] = [{"content": token, "id": len(tokens) + i} for i, token in enumerate(added)]
    (path / "tokenizer.json").write_text(json.dumps(found))
    return path


def test_union_goes_by_token_whatever_its_number(tmp_path):
    base = folder(tmp_path / "base", ["a", "b"], [1, 2])
    swapped = folder(
        tmp_path / "swapped",
        ["b", "a"],
        [12, 11],
    )
    more = folder(tmp_path / "more", ["a", "b"], [1, 2, 50, 60], added=["<x>", "<y>"])
    found = merged(tmp_path, base, [swapped, more], vocabulary="union")["embed.weight"]
    assert found[:, 0].tolist() == [11, 12, 50, 60]
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 4
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["content"], token["id"]) for token in added] == [("<x>", 2), ("<y>", 3)]


def test_union_fills_rows_without_a_token_first_and_wants_tokenizers(tmp_path):
    base = folder(tmp_path / "base", ["a"], [1, 0, 0])
    more = folder(tmp_path / "more", ["a"], [1, 7], added=["<x>"])
    found = merged(tmp_path, base, [more], vocabulary="union")["embed.weight"]
    assert found[:, 0].tolist() == [1, 7, 0]
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json that can be read"):
        merge_files(base, [more], "task_arithmetic", tmp_path / "no", vocabulary="union")


def test_a_real_model_grows_and_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    base = tiny_llama.save_base(tmp_path / "base")
    (tmp_path / "larger").mkdir()
    larger = tiny_llama.save_base(tmp_path / "larger", vocab=70)
    out = merge_files(base, [larger], "task_arithmetic", tmp_path / "out", vocabulary="pad")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.vocab_size == 70
    rows = tiny_llama.tensors(larger)["model.embed_tokens.weight"][64:]
    assert torch.equal(loaded.state_dict()["model.embed_tokens.weight"][64:], rows)


def test_rows_that_follow_one_another_are_read_at_once():
    assert list(_runs(_first(3, 5), 10)) == [(10, 13), (13, 15)]


def test_chat_templates_that_differ_are_reported(tmp_path, capsys):
    from suture.cli.main import main

    base = tiny_llama.save_base(tmp_path / "base")
    for seed, name in enumerate(("same", "other"), start=1):
        tiny_llama.save_tuned(tmp_path / name, base, seed)
    for name in ("base", "same", "other"):
        (tmp_path / name / "chat_template.jinja").write_text("{{ other }}" if name == "other" else "{{ base }}")
    models = [f"models.{name}={tmp_path / name}" for name in ("same", "other")]
    assert (
        main(["merge", f"base={tmp_path / 'base'}", *models, "method=simple_average", f"output={tmp_path / 'o'}"]) == 0
    )
    printed = capsys.readouterr().out
    assert "note: 'other' has a chat template of its own; that of 'base' is kept." in printed
    assert "'same' has a chat template" not in printed


def test_a_reserved_row_that_two_models_use_for_different_tokens_is_refused_or_told_apart(tmp_path):
    base = folder(tmp_path / "base", ["a", "<reserved_1>"], [1, 2])
    one = folder(tmp_path / "one", ["a", "<x>"], [1, 30])
    two = folder(tmp_path / "two", ["a", "<y>"], [1, 40])
    with pytest.raises(IncompatibleModels, match=r"has the token '<y>' in row 1, where one has '<x>'"):
        merged(tmp_path, base, {"one": one, "two": two})
    found = merged(tmp_path, base, {"one": one, "two": two}, vocabulary="union")["embed.weight"]
    assert found[:, 0].tolist() == [1, 2, 30, 40]
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["content"], token["id"]) for token in added] == [("<x>", 2), ("<y>", 3)]
