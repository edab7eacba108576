"""Text classifiers: heads as transformers has them, a merge that it loads, AdaMerging by the book, bad input."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from desk import refused
from tiny_texts import TASKS, bert_config, rows_of, save_tokenizer, write_task
from torch.func import functional_call

from suture import tasks
from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.core.batches import ShuffledBatches, take
from suture.errors import CheckpointError, ConfigError, DataError
from suture.evaluation import evaluate, task_inputs
from suture.evaluation.input_cache import decoded
from suture.families.sequence_classification import SequenceClassification
from suture.tasks import Task


def task_of(folder, name="colour", **more):
    return Task(name, str(folder), TASKS[name], text_columns=("first", "second"), **more)


def family_of(folder, names=("colour",), **settings):
    experts = {name: open_checkpoint(folder / name) for name in names}
    return SequenceClassification(folder / "base", settings=settings, experts=experts)


def model_of(directory):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(directory).eval()


@torch.no_grad()
def logits_of(directory, tokenizer, data, split="test"):
    """What transformers itself makes of a split."""
    first, second, labels = rows_of(data, split)
    model = model_of(directory)
    return model(**tokenizer(first, second, padding=True, return_tensors="pt")).logits, labels


def tokenizer_of(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_an_expert_scores_as_in_transformers(text_shop):
    family = family_of(text_shop)
    inputs = task_inputs(family, task_of(text_shop / "data" / "colour"))
    ours = inputs.logits(family.encoder(open_checkpoint(text_shop / "colour"))(**inputs.inputs))
    theirs, labels = logits_of(text_shop / "colour", tokenizer_of(text_shop / "base"), text_shop / "data" / "colour")
    torch.testing.assert_close(ours, theirs)
    right = (theirs.argmax(-1) == labels).double().mean().item()
    assert evaluate(family.encoder(open_checkpoint(text_shop / "colour")), inputs).value == right > 0.8


@pytest.mark.parametrize("kind", ["Roberta", "DistilBert", "Electra", "Albert", "DebertaV2"])
def test_heads_with_layers_of_their_own_are_found_by_running_the_model(tmp_path, kind):
    import transformers

    vocabulary = save_tokenizer(tmp_path / "base")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    if kind in ("Electra", "Albert"):
        sizes["embedding_size"] = 8
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, max_position_embeddings=40, **sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "base")
    config.num_labels = 3
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "three")
    family = family_of(tmp_path, ("three",))
    head = family.head(Task("three", "", ("a", "b", "c"), text_columns=("first",)))
    names = {"input_ids": torch.randint(4, vocabulary, (5, 7)), "attention_mask": torch.ones(5, 7).long()}
    with torch.no_grad():
        torch.testing.assert_close(
            head(family.encoder(open_checkpoint(tmp_path / "three"))(**names)), model(**names).logits
        )
    assert (head.before is None) == (kind == "Albert")


def test_a_run_merges_adapts_repairs_and_reports(texts):
    learn = ["method.max_steps=60", "method.lr=0.02", "method.batch_size=8", "surgery=deep", "surgery.steps=30"]
    assert main(texts.words(*learn, "surgery.rank=4", "surgery.batch_size=8", method="lw_adamerging")) == 0
    report = report_of(texts.folder / "out")
    rows = {row["name"]: row["accuracies"] for row in report["rows"]}
    assert list(rows) == [
        "pretrained",
        "experts",
        "lw_adamerging",
        "lw_adamerging + deep",
        "lw_adamerging + deep, routed",
    ]
    assert report["samples"] == {"animal": 48, "colour": 48}
    assert min(rows["experts"].values()) > 0.8
    repair = report["repairs"]["lw_adamerging + deep"]["representation"]
    for name in ("colour", "animal"):
        assert set(repair["after"]["l1"][name]) == {"bert.encoder.layer.0", "bert.encoder.layer.1", "(features)"}
        assert repair["after"]["l1"][name]["(features)"] < repair["before"]["l1"][name]["(features)"]
    history = open_checkpoint(texts.folder / "out" / "history.safetensors")["losses"]
    assert history[-10:].mean() < history[:10].mean()


def test_final_surgery_brings_the_accuracy_back(texts):
    words = ["surgery=final", "surgery.steps=300", "surgery.lr=0.02", "surgery.router=none", "surgery.compare=0"]
    assert main(texts.words(*words, method="simple_average")) == 0
    rows = {row["name"]: row["accuracies"] for row in report_of(texts.folder / "out")["rows"]}
    mean = {name: sum(row.values()) / 2 for name, row in rows.items()}
    assert mean["simple_average"] < mean["simple_average + final"]


def test_each_task_of_the_merge_loads_in_transformers_with_equal_logits(texts):
    assert main(texts.words("method.scaling_factor=0.4")) == 0
    out, tokenizer = texts.folder / "out" / "model", tokenizer_of(texts.shop / "base")
    rows = {row["name"]: row["accuracies"] for row in report_of(texts.folder / "out")["rows"]}
    family = family_of(texts.shop, ("colour", "animal"))
    encoder = family.encoder(open_checkpoint(out))
    for name in ("colour", "animal"):
        theirs, labels = logits_of(out / "tasks" / name, tokenizer, texts.shop / "data" / name)
        task = task_of(texts.shop / "data" / name, name)
        inputs = task_inputs(family, task)
        torch.testing.assert_close(inputs.logits(encoder(**inputs.inputs)), theirs)
        assert rows["task_arithmetic"][name] == (theirs.argmax(-1) == labels).double().mean().item()
        assert model_of(out / "tasks" / name).config.num_labels == 2
        expert = model_of(texts.shop / name)
        torch.testing.assert_close(model_of(out / "tasks" / name).classifier.weight, expert.classifier.weight)
    base, experts = (
        open_checkpoint(texts.shop / "base"),
        [open_checkpoint(texts.shop / n) for n in ("colour", "animal")],
    )
    merged = open_checkpoint(out)
    assert all(name.startswith("bert.") for name in merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, base[name] + 0.4 * sum(e[name] - base[name] for e in experts))
    shared = (out / "model.safetensors").stat()
    assert (out / "tasks" / "colour" / "model-00001-of-00002.safetensors").stat().st_ino == shared.st_ino


def test_adamerging_follows_the_textbook_loop(texts):
    steps, lr, names = 4, 0.05, ("animal", "colour")
    words = [f"method.max_steps={steps}", f"method.lr={lr}", "method.batch_size=6"]
    assert main(texts.words(*words, method="lw_adamerging")) == 0
    found = open_checkpoint(texts.folder / "out" / "history.safetensors")
    models = {name: model_of(texts.shop / name) for name in names}
    base = open_checkpoint(texts.shop / "base")
    shared = [name for name, _ in models["colour"].named_parameters() if name in base]
    values = torch.full((2, len(shared)), 0.3, requires_grad=True)
    adam, family = torch.optim.Adam([values], lr=lr), family_of(texts.shop, names)
    streams = {}
    for name in names:
        tokens = decoded(family, tasks.load(task_of(texts.shop / "data" / name, name), "test"))
        streams[name] = ShuffledBatches(tokens, 6, seed=0, name=name)
    losses = []
    for step in range(steps):
        adam.zero_grad()
        tau = lambda t, p: models[names[t]].get_parameter(p).detach() - base[p]
        state = {p: base[p] + sum(values[t, i] * tau(t, p) for t in range(2)) for i, p in enumerate(shared)}
        loss = torch.zeros(())
        for name in names:
            logits = functional_call(models[name], state, kwargs=dict(streams[name][step])).logits
            loss = loss - (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    torch.testing.assert_close(found["losses"], torch.tensor(losses).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["coefficients"][-1].float(), values.detach(), rtol=1e-4, atol=1e-4)


def test_texts_are_tokenized_once(text_shop, monkeypatch):
    family, calls = family_of(text_shop), []
    tokens = family.tokens
    monkeypatch.setattr(family, "tokens", lambda *a: calls.append(1) or tokens(*a))
    found = [decoded(family, tasks.load(task_of(text_shop / "data" / "animal", "animal"), "train")) for _ in range(2)]
    assert len(calls) == 1
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert {tensor.dtype for tensor in found[0].values()} == {torch.int32}


def test_padding_changes_neither_features_nor_what_repairs_see(text_shop):
    from suture.repairs import Problem, find_blocks

    rows = {}
    for padding in ("batch", "max_length"):
        family = family_of(text_shop, max_length=24, padding=padding)
        tokens = decoded(family, tasks.load(task_of(text_shop / "data" / "colour"), "test"))
        encoder = family.encoder()
        blocks = find_blocks(encoder, tokens)
        assert [block.path for block in blocks] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        problem = Problem(encoder, {"colour": encoder}, {"colour": tokens}, encode_batch=5)
        rows[padding] = problem.merged_rows("colour", tokens, blocks)
    assert family.reader.max_length == tokens["input_ids"].shape[1] == 24
    torch.testing.assert_close(rows["batch"], rows["max_length"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fit", ["joint", "layerwise"])
def test_deep_surgery_is_fitted_on_padded_texts(texts, fit):
    words = ["surgery=deep", "surgery.steps=8", "surgery.rank=2", f"surgery.fit={fit}", "surgery.variant=standard"]
    assert main(texts.words(*words)) == 0
    assert report_of(texts.folder / "out")["repairs"]["task_arithmetic + deep"]["representation"]


def test_a_csv_file_and_one_column_will_do(tmp_path, text_shop):
    task = replace(task_of(write_task(tmp_path / "csv", "colour", "csv")), text_columns="second")
    assert task.text_columns == ("second",)
    found = tasks.load(task, "train")
    assert list(found.columns) == ["second"]
    assert found.labels.tolist() == [i % 2 for i in range(48)]
    assert set(decoded(family_of(text_shop), found)) == {"input_ids", "attention_mask", "token_type_ids"}


def test_old_spellings_and_bare_models_have_the_same_canonical_names(text_shop):
    family = family_of(text_shop)
    names = list(family.canonical_names(family.weights))
    old = [n.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma") for n in names]
    assert list(family.canonical_names([*old, "cls.predictions.bias"])) == names
    assert not any("classifier" in name or "cls" in name for name in names)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_its_head_is_an_expert(text_shop, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(text_shop / "base", num_labels=2)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    from suture.checkpoints import open_fine_tuned

    base = open_checkpoint(text_shop / "base")
    expert = open_fine_tuned(tmp_path / "adapter", base)
    family = SequenceClassification(text_shop / "base", experts={"colour": expert})
    tokens = decoded(family, tasks.load(task_of(text_shop / "data" / "colour"), "test").first(5))
    head = family.head(task_of(text_shop / "data" / "colour"))
    with torch.no_grad():
        theirs = adapted.eval()(**tokens).logits
        torch.testing.assert_close(head(family.encoder(expert)(**tokens)), theirs, rtol=1e-4, atol=1e-5)


def cut(path, out, *left_out):
    save_checkpoint({n: t for n, t in open_checkpoint(path).items() if n not in left_out}, out)
    return str(out)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_length": 9999}, "max_length=9999, but the model has 32 positions"),
        ({"max_length": "long"}, "max_length='long': wanted a number of tokens"),
        ({"padding": "left"}, "padding='left': wanted batch or max_length"),
    ],
)
def test_a_check_says_of_the_tokenizers_settings_what_a_run_would(texts, setting, message, capsys):
    texts.pool |= setting
    assert main(["check", *texts.words()]) == 2
    assert capsys.readouterr().out.count(message) == 1


CHECK = """
import sys
from suture.cli.main import main
code = main(["--json", "check", *sys.argv[1:]])
print("transformers" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def checked(words, cache):
    """A check in a process of its own: its exit code, its findings, and whether it imported transformers."""
    environment = {**os.environ, "SUTURE_CACHE": str(cache)}
    command = [sys.executable, "-c", CHECK, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    findings = {key: value for key, value in json.loads(done.stdout).items() if key != "disk_free"}
    return done.returncode, findings, done.stderr.split()[-1] == "True"


def unwritten(texts):
    return [word for word in texts.words() if not word.startswith("output=")]


def test_a_second_check_finds_the_same_without_transformers(texts, tmp_path):
    words = unwritten(texts)
    first, second = checked(words, tmp_path), checked(words, tmp_path)
    assert first == (0, second[1], True)
    assert second == (0, first[1], False)
    for file in (tmp_path / "architectures").iterdir():
        file.write_text("{")
    assert checked(words, tmp_path) == first


def test_a_check_sees_what_has_changed_since_the_last_one(texts, tmp_path):
    assert checked(unwritten(texts), tmp_path)[0] == 0
    base = Path(texts.pool["models"]["_pretrained_"])
    changed = shutil.copytree(base, texts.folder / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    texts.pool["models"]["_pretrained_"] = str(changed)
    code, findings, _ = checked(unwritten(texts), tmp_path)
    assert code == 2
    assert (
        "is missing from '_pretrained_'; wanted the weights that its config.json describes" in findings["problems"][0]
    )
    shutil.copyfile(base / "config.json", changed / "config.json")
    (changed / "tokenizer.json").write_text("{")
    code, findings, _ = checked(unwritten(texts), tmp_path)
    assert code == 2
    assert "has no usable tokenizer" in findings["problems"][0]


def test_a_check_says_that_there_is_a_class_name_too_few(texts, capsys):
    texts.tasks["colour"]["classnames"] = ["blue"]
    assert main(["check", *texts.words()]) == 2
    assert "has the label 1 in row" in capsys.readouterr().out


def test_bad_input_is_one_line(texts, capsys):
    colour = texts.tasks["colour"]
    columns = colour.pop("text_columns")
    assert "Task 'colour' has no text_columns, but family=sequence_classification reads texts" in refused(
        capsys, texts.words()
    )
    colour["text_columns"] = ["first", "third"]
    assert "there is no column 'third' (found: first, second, label). Remedy: name it under `text_columns`" in refused(
        capsys, texts.words()
    )
    colour["text_columns"] = columns
    colour["classnames"] = ["blue", "red", "green"]
    assert "has 3 class names but the head of its model has 2 classes" in refused(capsys, texts.words())
    colour["classnames"] = ["blue", "red"]
    texts.tasks["number"] = texts.tasks["animal"]
    assert "Task 'number' has no model of its name, whose head would be its" in refused(capsys, texts.words())
    del texts.tasks["number"]
    texts.pool["models"]["colour"] = cut(
        texts.shop / "colour", texts.folder / "headless.safetensors", "classifier.bias"
    )
    assert "'classifier.bias' is missing from 'colour'" in refused(capsys, texts.words())
    texts.pool["models"]["colour"] = str(texts.shop / "colour")
    texts.pool["max_length"] = 500
    assert "max_length=500, but the model has 32 positions" in refused(capsys, texts.words())
    texts.pool["max_length"] = 16
    texts.pool["models"]["_pretrained_"] = str(texts.shop / "base" / "model.safetensors")
    assert main([*texts.words(), "dry_run=true"]) == 0  # a file in a model's directory knows the directory


def test_a_base_without_its_directory_or_of_no_known_kind_is_refused(texts, capsys, tmp_path):
    texts.pool["models"]["_pretrained_"] = cut(texts.shop / "base", tmp_path / "bare.safetensors")
    assert "is no model directory" in refused(capsys, texts.words())
    from transformers import CLIPConfig

    save_tokenizer(tmp_path / "clip")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    cut(texts.shop / "base", tmp_path / "clip" / "model.safetensors")
    texts.pool["models"]["_pretrained_"] = str(tmp_path / "clip")
    assert "holds no model for family=sequence_classification" in refused(capsys, texts.words())


def test_a_text_that_is_none_is_named(tmp_path, text_shop):
    folder = write_task(tmp_path / "data", "colour")
    lines = (folder / "test.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "first": None})
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="Row 3 has no text in column 'first' but a NoneType"):
        decoded(family_of(text_shop), tasks.load(task_of(folder), "test"))


def test_a_tokenizer_without_padding_and_a_wrong_setting_are_refused(tmp_path, text_shop):
    with pytest.raises(ConfigError, match="padding='left': wanted batch or max_length"):
        _ = family_of(text_shop, padding="left").reader
    bert = bert_config(save_tokenizer(tmp_path / "base"))
    bert.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    with pytest.raises(CheckpointError, match="has no token to pad with"):
        _ = SequenceClassification(tmp_path / "base").reader


def test_first_inputs_of_a_task_of_texts(text_shop):
    inputs = task_inputs(family_of(text_shop), task_of(text_shop / "data" / "colour"))
    few = inputs.first(3)
    assert len(few) == 3
    assert torch.equal(few.inputs["input_ids"], take(inputs.inputs, slice(0, 3))["input_ids"])
