"""T5 asked in words: logits as transformers has them, LoRA experts through the whole pipeline, bad input."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from desk import refused
from tiny_texts import TASKS, rows_of, save_tokenizer, write_task

from suture import tasks
from suture.checkpoints import open_checkpoint, open_fine_tuned
from suture.cli.main import main
from suture.evaluation import task_inputs
from suture.evaluation.input_cache import decoded
from suture.families.seq2seq import Seq2Seq
from suture.pipeline.config import compose
from suture.pipeline.settings import Settings
from suture.tasks import Task

NAMES = ("colour", "animal")
TEMPLATE = "is {first} near {second} one"


def config_of(vocabulary, **more):
    from transformers import T5Config

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return T5Config(vocab_size=vocabulary, decoder_start_token_id=0, dropout_rate=0.0, **{**sizes, **more})


def task_of(folder, name="colour"):
    return Task(name, str(folder), TASKS[name], (TEMPLATE,), text_columns=("first", "second"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A T5 whose output layer is its own, as in Flan-T5, and a LoRA adapter for each task, trained on the spot."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    vocabulary = save_tokenizer(folder / "base", "t5")
    torch.manual_seed(0)
    T5ForConditionalGeneration(config_of(vocabulary, tie_word_embeddings=False)).save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for name in NAMES:
        data = write_task(folder / "data" / name, name)
        first, second, labels = rows_of(data)
        prompts = [TEMPLATE.format(first=a, second=b) for a, b in zip(first, second, strict=True)]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        targets = tokenizer([TASKS[name][label] for label in labels], return_tensors="pt")["input_ids"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = T5ForConditionalGeneration.from_pretrained(folder / "base")
            lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=16, target_modules=["q", "v"])
            model = get_peft_model(model, lora)
            adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
            for _ in range(40):
                adam.zero_grad()
                model(**batch, labels=targets).loss.backward()
                adam.step()
            model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def words(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {"_pretrained_": str(shop / "base"), **{name: str(shop / name) for name in NAMES}}
    told = {"text_columns": ["first", "second"], "templates": [TEMPLATE]}
    pool = {n: {"source": str(shop / "data" / n), "classnames": list(TASKS[n]), **told} for n in NAMES}

    def write(*more, method="task_arithmetic", **changes):
        changed = {**pool, **{name: {**pool[name], **change} for name, change in changes.items()}}
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"family": "seq2seq", "models": models}))
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": changed}))
        return [f"method={method}", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out", *more]

    return write


@torch.no_grad()
def theirs(model, shop, name):
    """The logits that transformers gives to each class name's first token as the first of the answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shop / "base")
    first, second, _ = rows_of(shop / "data" / name, "test")
    prompts = [TEMPLATE.format(first=a, second=b) for a, b in zip(first, second, strict=True)]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    start = torch.zeros(len(prompts), 1, dtype=torch.long)
    logits = model.eval()(**batch, decoder_input_ids=start).logits[:, 0]
    return logits[:, tokenizer.convert_tokens_to_ids(list(TASKS[name]))]


def loaded(directory):
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(directory)


def test_lora_experts_are_merged_adapted_and_repaired(words, shop, tmp_path):
    learn = ["method.max_steps=40", "method.lr=0.03", "method.batch_size=8", "surgery=deep", "surgery.steps=20"]
    assert main(words(*learn, "surgery.rank=4", "surgery.batch_size=8", method="lw_adamerging")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row["accuracies"] for row in report["rows"]}
    assert min(rows["experts"].values()) > 0.8
    seen = report["repairs"]["lw_adamerging + deep"]["representation"]
    places = {f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)}
    assert set(seen["after"]["l1"]["colour"]) == {*places, "(features)"}
    for name in NAMES:
        assert seen["after"]["l1"][name]["(features)"] < seen["before"]["l1"][name]["(features)"]
    losses = open_checkpoint(tmp_path / "out" / "history.safetensors")["losses"]
    assert losses[-10:].mean() < losses[:10].mean()
    family, merged = Seq2Seq(shop / "base"), tmp_path / "out" / "model"
    for name in NAMES:
        inputs = task_inputs(family, task_of(shop / "data" / name, name))
        ours = inputs.logits(family.encoder(open_checkpoint(merged))(**inputs.inputs))
        torch.testing.assert_close(ours, theirs(loaded(merged), shop, name), rtol=1e-4, atol=1e-4)
        right = ours.argmax(-1) == inputs.labels
        assert rows["lw_adamerging"][name] == pytest.approx(right.double().mean().item())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_scores_as_in_peft(shop):
    from peft import PeftModel

    base = open_checkpoint(shop / "base")
    expert = open_fine_tuned(shop / "colour", base)
    family = Seq2Seq(shop / "base", base, experts={"colour": expert})
    inputs = task_inputs(family, task_of(shop / "data" / "colour"))
    ours = inputs.logits(family.encoder(expert)(**inputs.inputs))
    model = PeftModel.from_pretrained(loaded(shop / "base"), shop / "colour")
    torch.testing.assert_close(ours, theirs(model, shop, "colour"), rtol=1e-4, atol=1e-4)


def test_what_greedy_decoding_spells_has_the_largest_score(shop):
    family = Seq2Seq(
        shop / "base", experts={"colour": open_fine_tuned(shop / "colour", open_checkpoint(shop / "base"))}
    )
    task = task_of(shop / "data" / "colour")
    inputs = task_inputs(family, task)
    model, encoder = loaded(shop / "base"), family.encoder(family.experts["colour"])
    model.load_state_dict({n: t for n, t in encoder.state_dict().items() if n in model.state_dict()}, strict=False)
    tokens = {name: tensor.long() for name, tensor in inputs.inputs.items()}
    told = model.generate(**tokens, max_new_tokens=3, do_sample=False)
    tokenizer = family.reader.tokenizer
    spelled = [tokenizer.decode(row, skip_special_tokens=True) for row in told]
    answers = inputs.logits(encoder(**inputs.inputs)).argmax(-1)
    exact = [
        word in task.classnames and task.classnames.index(word) == a for word, a in zip(spelled, answers, strict=True)
    ]
    assert sum(exact) == sum(word in task.classnames for word in spelled) > 5


def test_an_output_layer_that_is_tied_to_the_embeddings_has_a_scale(tmp_path):
    from transformers import T5ForConditionalGeneration

    vocabulary = save_tokenizer(tmp_path / "base", "t5")
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config_of(vocabulary, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    write_task(tmp_path / "data" / "colour", "colour")
    family, task = Seq2Seq(tmp_path / "base"), task_of(tmp_path / "data" / "colour")
    tied = ["encoder.embed_tokens.weight", "shared.weight", "lm_head.weight"]
    assert family.canonical_names(tied) == {"shared.weight": "shared.weight"}
    assert family.canonical_names(tied[:1]) == {"shared.weight": "encoder.embed_tokens.weight"}
    inputs = task_inputs(family, task)
    assert inputs.head.scale == 0.25
    ours = inputs.logits(family.encoder()(**inputs.inputs))
    torch.testing.assert_close(ours, theirs(model, tmp_path, "colour"), rtol=1e-4, atol=1e-4)


def test_braces_in_a_text_are_no_place_for_another(shop):
    found = tasks.load(replace(task_of(shop / "data" / "colour"), templates=("{second} is {first}",)), "test")
    found = replace(found, columns={"first": ["{second}"] * 48, "second": ["a"] * 48})
    assert found.prompts(0, 1) == ["a is {second}"]


def test_another_template_is_another_entry_of_the_cache(shop):
    family = Seq2Seq(shop / "base")
    one = task_of(shop / "data" / "colour")
    other = replace(one, templates=("{second} was {first}",))
    lengths = [decoded(family, tasks.load(task, "test"))["input_ids"].shape[1] for task in (one, other)]
    assert lengths[0] == lengths[1] + 2


def test_bad_input_is_one_line(words, shop, capsys):
    assert "'colour' has 2 templates; give one" in refused(capsys, words(colour={"templates": [TEMPLATE, TEMPLATE]}))
    assert "'colour' has 0 templates; give one" in refused(capsys, words(colour={"templates": []}))
    error = refused(capsys, words(colour={"templates": ["is {first} near"]}))
    assert "template 'is {first} near' has no {second}. Remedy: put {second} where that text goes" in error
    error = refused(capsys, words(colour={"classnames": ["blue one", "blue two"]}))
    assert "the class names 'blue one' and 'blue two' begin with the same token" in error
    assert "the class name 'violet' is no word of the tokenizer" in refused(
        capsys, words(colour={"classnames": ["blue", "violet"]})
    )


SEVEN = ["glue-cola", "glue-mnli", "glue-mrpc", "glue-qnli", "glue-qqp", "glue-rte", "glue-sst2"]


@pytest.mark.parametrize("pool", ["flan-t5-base_glue_lora16", "flan-t5-large_glue_lora16", "flan-t5-base_glue"])
def test_the_published_pools_fit_their_tasks(pool):
    run = Settings.from_config(compose(["method=task_arithmetic", f"modelpool={pool}", "taskpool=flan-t5_glue"]))
    assert sorted(run.pool.models) == sorted(task.name for task in run.taskpool.tasks) == SEVEN
    for task in run.taskpool.tasks:
        assert task.source == "nyu-mll/glue"
        assert all("{" + column + "}" in task.templates[0] for column in task.text_columns)
        assert len(task.own_names) == len(task.classnames)


def test_a_task_of_glue_is_read_from_a_folder_as_the_hub_keeps_it(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    words = {k: v for k, v in tasks.known("glue-rte").items() if k != "source"}
    features = Features(sentence1=Value("string"), sentence2=Value("string"), label=ClassLabel(names=words["labels"]))
    for split, labels in (("validation", [0, 1, 1]), ("test", [-1, -1])):
        rows = {"sentence1": ["One."] * len(labels), "sentence2": ["Two."] * len(labels), "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rte" / f"{split}-00000-of-00001.parquet")
    task = Task("glue-rte", str(tmp_path), **words)
    assert tasks.check(task, "test") == []
    assert tasks.notes(task, "test") == []  # how many there are is not known before they are read
    found = tasks.load(task, "test")
    assert found.labels.tolist() == [0, 1, 1]
    assert found.prompts(0, 1) == ["Does the text: 'One.' entail that 'Two.' is true? Provide 'yes' or 'no'."]
    swapped = replace(task, labels=tuple(reversed(words["labels"])))
    assert "label 0" in tasks.check(swapped, "test")[0]
