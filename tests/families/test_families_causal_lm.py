"""Causal language models: scores as transformers gives them, the whole pipeline, and bad input."""

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from desk import refused
from language_shop import SCORES, SENTENCES, build_shop, load, new_model, save_tokenizer, texts, write_pools

import suture
from suture.adaptation.options import AdaMergingOptions
from suture.adaptation.vectors import LowRank, task_vector_rows
from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.errors import CheckpointError
from suture.evaluation.inputs import task_inputs
from suture.evaluation.language import LanguageScorer
from suture.evaluation.rows import Row
from suture.families.causal_lm import CausalLM
from suture.families.seq2seq import Seq2Seq
from suture.families.shared.next_token import NextToken
from suture.pipeline.models import open_models
from suture.pipeline.pools import ModelPool
from suture.tasks import Scoring, Task

KINDS = ("llama", "qwen3", "gemma", "gemma2", "granitemoe", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module", params=KINDS)
def any_shop(request, tmp_path_factory):
    return build_shop(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return build_shop(tmp_path_factory.mktemp("llama"), "llama")


def task_of(shop, kind, name="colour", **changes):
    return Task(name, str(shop / "data" / name), **{**SCORES[kind], **changes})


def tokenizer_of(shop):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shop / "base")


def rows_of(shop, name="colour"):
    return [json.loads(line) for line in (shop / "data" / name / "test.jsonl").read_text().splitlines()]


@torch.no_grad()
def log_likelihood(model, prompt, continuation):
    """Σ log p of the continuation, by one plain forward pass."""
    ids = torch.tensor([[*prompt, *continuation]])
    logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation))


def scored(shop, kind, model="colour", family=None, **changes):
    family = family or CausalLM(shop / "base")
    inputs = task_inputs(family, task_of(shop, kind, **changes))
    encoder = family.encoder(open_checkpoint(shop / model))
    return LanguageScorer().score(encoder, inputs.requests), inputs, encoder


def test_bits_per_byte_are_those_of_plain_forward_passes(any_shop):
    score, _, _ = scored(any_shop, "text")
    model, tokenizer, rows = load(any_shop / "colour"), tokenizer_of(any_shop), rows_of(any_shop)
    total = sum(log_likelihood(model, [tokenizer.bos_token_id], tokenizer(r["text"])["input_ids"]) for r in rows)
    size = sum(len(r["text"].encode()) for r in rows)
    assert score.estimates["bits_per_byte"].value == pytest.approx(-total / size / math.log(2), rel=1e-5)
    words = sum(len(r["text"].split()) for r in rows)
    assert score.estimates["word_perplexity"].value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert score.samples == len(rows)
    assert 0 < score.estimates["bits_per_byte"].error < 1


def test_a_prompt_that_is_run_once_for_its_choices_gives_the_same_log_likelihoods(any_shop):
    from suture.core.sharding import Placed
    from suture.evaluation.language import _Run
    from suture.families.shared.next_token import output_layer

    _, inputs, encoder = scored(any_shop, "choice")
    model, choices = load(any_shop / "colour"), inputs.requests.choices
    expected = torch.tensor([log_likelihood(model, c.prompt, c.continuation) for c in choices])
    for shared in (True, False):
        run = _Run(
            Placed.whole(encoder), output_layer(encoder), LanguageScorer(share_prompts=shared, batch_tokens=300), 0
        )
        with torch.inference_mode():
            values = torch.tensor(run.choices(choices, ""))
        torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_best_choice_by_log_likelihood_and_by_byte_is_compared_with_the_answer(shop):
    score, inputs, _ = scored(shop, "choice")
    model, rows = load(shop / "colour"), rows_of(shop)
    by_row = {}
    for choice in inputs.requests.choices:
        by_row.setdefault(choice.row, []).append((log_likelihood(model, choice.prompt, choice.continuation), choice))
    plain = [max(range(4), key=lambda i, each=each: each[i][0]) for each in by_row.values()]
    normed = [max(range(4), key=lambda i, each=each: each[i][0] / each[i][1].bytes) for each in by_row.values()]
    answers = [row["answer"] for row in rows]
    for metric, chosen in (("acc", plain), ("acc_norm", normed)):
        share = sum(a == b for a, b in zip(chosen, answers, strict=True)) / len(rows)
        assert score.estimates[metric].value == share
        assert score.estimates[metric].error == pytest.approx(math.sqrt(share * (1 - share) / (len(rows) - 1)))


@pytest.mark.parametrize("strategy", ["ddp_fork", "fsdp"])
@pytest.mark.parametrize("kind", ["text", "choice", "answer"])
def test_processes_score_as_one_does(shop, kind, strategy):
    from suture.core.fabric import Team, launch, make_fabric

    changes = {"score": {"metric": "exact_match", "max_new_tokens": 6}} if kind == "answer" else {}
    one, inputs, encoder = scored(shop, kind, **changes)

    def score(fabric):
        result = LanguageScorer(batch_tokens=60, team=Team(fabric)).score(encoder, inputs.requests)
        return {name: estimate.value for name, estimate in result.estimates.items()}, list(result.answers)

    values, answers = launch(make_fabric({"accelerator": "cpu", "devices": 2, "strategy": strategy}), score)
    assert values == pytest.approx({name: estimate.value for name, estimate in one.estimates.items()}, rel=1e-6)
    assert answers == list(one.answers)


def test_generated_answers_are_those_of_greedy_generation(any_shop):
    score, inputs, _ = scored(any_shop, "answer", score={"metric": "exact_match", "max_new_tokens": 6})
    model, tokenizer = load(any_shop / "colour"), tokenizer_of(any_shop)
    for prompt, answer in zip(inputs.requests.prompts, score.answers, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_an_answer_is_cut_at_a_stop_text_and_found_by_its_pattern():
    scoring = Scoring.of("sums", {"metric": "exact_match", "stop": "\n\n", "pattern": r"#### (-?\d+)"})
    assert scoring.extracted("6 + 1\n#### 7\n\n#### 8") == "7"
    assert scoring.extracted("none") == ""


def test_windows_cover_a_long_text_once(shop):
    text = " ".join(texts("colour", 40))
    (shop / "long").mkdir(exist_ok=True)
    (shop / "long" / "test.txt").write_text(text)
    family = CausalLM(shop / "base")
    inputs = task_inputs(family, Task("colour", str(shop / "long"), score="perplexity"))
    windows, tokens = inputs.requests.windows, tokenizer_of(shop)(text, verbose=False)["input_ids"]
    predicted = [token for window in windows for token in window.tokens[len(window.tokens) - window.predicted :]]
    assert predicted == tokens
    assert len(windows) > 2
    assert all(len(window.tokens) == 49 for window in windows)  # the context, and the last token that is only predicted


def test_less_is_better_and_the_gap_closed_has_the_right_sign():
    base = Row("pretrained", {"a": 4.0, "b": 0.2}, metrics={"a": "bits_per_byte", "b": "acc"})
    expert = Row("experts", {"a": 2.0, "b": 0.6}, metrics=base.metrics)
    model = Row("merge", {"a": 3.0, "b": 0.5}, metrics=base.metrics)
    assert model.gaps_closed(base, expert) == pytest.approx({"a": 0.5, "b": 0.75})
    assert model.gap_closed(base, expert) == pytest.approx(0.625)
    assert model.normalised(expert) == pytest.approx({"a": 2 / 3, "b": 5 / 6})
    assert math.isnan(model.mean)


def run(shop, folder, kinds, *words, **pool):
    return main([*words, *write_pools(shop, folder, kinds, **pool), f"output={folder / 'out'}"])


def report_of(folder):
    return json.loads((folder / "out" / "report.json").read_text())


PIPELINES = (
    ("text", ["method=lw_adamerging", "method.granularity=block", "method.objective=expert_kl", "method.max_steps=2"]),
    ("choice", ["method=task_arithmetic"]),
)


@pytest.mark.parametrize("number", range(2))
def test_every_architecture_goes_through_the_whole_pipeline(any_shop, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    kind, words = PIPELINES[number]
    repair = ["repair=calibrate+final", "repair.final.steps=3"] if number else ["repair=deep", "repair.steps=2"]
    assert main(["check", *words, *write_pools(any_shop, tmp_path, kind)]) == 0
    assert run(any_shop, tmp_path, kind, *words, *repair) == 0
    report = report_of(tmp_path)
    rows = {row["name"]: row for row in report["rows"]}
    assert {row["role"] for row in rows.values()} == {"pretrained", "experts", "merge", "repair"}
    assert report["metrics"]["colour"]["lower"] is (kind == "text")
    assert report["samples"] == {"animal": 16, "colour": 16}
    assert all(row["errors"].keys() == {"animal", "colour"} for row in rows.values())
    assert rows["pretrained"]["gap_closed"] in (0, None)
    merged = load(tmp_path / "out" / "model")  # as transformers loads it, with nothing of ours
    tokenizer_of(any_shop).from_pretrained(tmp_path / "out" / "model")
    family = CausalLM(any_shop / "base")
    inputs = task_inputs(family, task_of(any_shop, kind))
    again = LanguageScorer().score(family.encoder(open_checkpoint(tmp_path / "out" / "model")), inputs.requests)
    label = next(row["name"] for row in report["rows"] if row["role"] == "merge")
    assert again.estimates[SCORES[kind]["score"] if kind == "text" else "acc_norm"].value == pytest.approx(
        rows[label]["accuracies"]["colour"], rel=1e-5
    )
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in load(any_shop / "base").parameters())
    assert "Scores" in (tmp_path / "out" / "report.html").read_text()


SPLIT = ("gemma2", "qwen3_moe")  # one tied and with soft caps, one with experts and two tables


@pytest.mark.parametrize("kind", ["text", pytest.param("choice", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "any_shop", [k if k in SPLIT else pytest.param(k, marks=pytest.mark.slow) for k in KINDS], indirect=True
)
def test_a_run_of_weights_that_are_split_over_processes_is_that_of_one(any_shop, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    words = ["method=task_arithmetic", "repair=calibrate+deep", "repair.deep.steps=3"]
    found = []
    for more in ([], ["fabric.strategy=fsdp", "fabric.devices=2", "fabric.accelerator=cpu", "overwrite=true"]):
        assert run(any_shop, tmp_path, kind, *words, *more) == 0
        found.append({row["name"]: row["accuracies"] for row in report_of(tmp_path)["rows"]})
    one, two = found
    assert list(two) == list(one)
    assert len(one) == 5
    for name, scores in one.items():
        assert two[name] == pytest.approx(scores, rel=1e-4), name


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_lie_apart_are_merged_as_stacks_and_written_apart_again(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop = build_shop(tmp_path / "shop", kind)
    assert run(shop, tmp_path, "text", "method=task_arithmetic", "method.scaling_factor=0.4", "repair=calibrate") == 0
    base, saved = open_checkpoint(shop / "base"), open_checkpoint(tmp_path / "out" / "model")
    experts = [open_checkpoint(shop / name) for name in SENTENCES]
    assert saved.specs == base.specs
    assert any(".experts.2." in name for name in saved)
    for name in base:
        expected = base[name] + 0.4 * sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-6)
    family = CausalLM(shop / "base")
    for folder in ("model", "model_calibrate"):
        tokens = torch.arange(2, 12)[None]
        checkpoint = open_checkpoint(tmp_path / "out" / folder)
        ours = family.encoder(checkpoint)
        logits = ours.next_token_logits(ours(tokens, torch.ones_like(tokens), scored=torch.ones_like(tokens).bool()))
        torch.testing.assert_close(logits, load(tmp_path / "out" / folder)(input_ids=tokens).logits[0])
    state = {name: tensor + 1 for name, tensor in family.encoder().state_dict().items()}
    family.save(state, tmp_path / "again")
    again = open_checkpoint(tmp_path / "again" / "model.safetensors")
    assert again.specs == base.specs
    assert all(torch.equal(again[name], base[name] + 1) for name in base)


def test_adapters_are_merged_and_the_experts_are_the_adapted_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop = build_shop(tmp_path / "shop", "llama", lora=True)
    assert run(shop, tmp_path, "text", "method=task_arithmetic") == 0
    from peft import PeftModel

    rows, tokenizer = {row["name"]: row for row in report_of(tmp_path)["rows"]}, tokenizer_of(shop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the shop
        model = PeftModel.from_pretrained(load(shop / "base"), shop / "colour").eval()
    data = rows_of(shop)
    total = sum(log_likelihood(model, [tokenizer.bos_token_id], tokenizer(r["text"])["input_ids"]) for r in data)
    bits = -total / sum(len(r["text"].encode()) for r in data) / math.log(2)
    assert rows["experts"]["accuracies"]["colour"] == pytest.approx(bits, rel=1e-4)


def test_a_pool_says_which_adapter_was_trained_on_another_base_and_refuses_one_that_does_not_fit(tmp_path):
    shop = build_shop(tmp_path / "shop", "llama", lora=True)
    pool = {"family": "causal_lm", "models": {"_pretrained_": str(shop / "base"), "colour": str(shop / "colour")}}
    assert not suture.check(modelpool=pool, method="simple_average").notes
    file = shop / "colour" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(shop / "animal")}))
    (note,) = suture.check(modelpool=pool, method="simple_average").notes
    assert note.startswith(f"'colour' was trained on '{shop / 'animal'}', by its adapter_config.json; the base is ")
    file.write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(CheckpointError, match=r"'colour': .* has factors of rank 4 for 'model.layers.0.self_attn"):
        suture.check(modelpool=pool, method="simple_average")


def test_padding_does_not_change_the_next_token_entropy_that_adamerging_learns_from(shop):
    family = CausalLM(shop / "base", settings={"learn_on": "all"})
    inputs = task_inputs(family, task_of(shop, "text")).inputs
    encoder, logits = family.encoder(), family.merged_logits()
    with torch.no_grad():
        rows = logits(encoder, {name: part.clone() for name, part in inputs.items()}, "colour")
        wider = {name: torch.nn.functional.pad(part, (0, 5)) for name, part in inputs.items()}
        assert len(rows) == int(inputs["attention_mask"].sum())
        torch.testing.assert_close(logits(encoder, wider, "colour"), rows)
        one = {name: part[:1, : int(inputs["attention_mask"][0].sum())] for name, part in inputs.items()}
        torch.testing.assert_close(encoder(**inputs)[:1], encoder(**one), rtol=1e-4, atol=1e-5)


def test_a_chat_template_surrounds_the_prompt(tmp_path):
    shop = build_shop(tmp_path / "shop", "llama", chat=True)
    score = {**SCORES["choice"]["score"], "chat_template": True}
    inputs = task_inputs(CausalLM(shop / "base"), task_of(shop, "choice", score=score))
    prompt = tokenizer_of(shop).decode(inputs.requests.choices[0].prompt)
    assert prompt.startswith("<user>the colour")
    assert prompt.endswith("</><a>")


BAD = {
    "no token": ("choice", {"endings": ["red.", ""]}, {}, "choice 1 is empty"),
    "too long": ("choice", {"beginning": "the red cat " * 40}, {}, "but the context has 48"),
    "bad answer": ("choice", {"answer": 9}, {}, "wanted the number of one of 4 choices"),
    "no text": ("text", {"text": ""}, {}, "is empty; wanted a text"),
    "no column": ("text", {}, {"text_columns": ["body"]}, "there is no column 'body'"),
    "no template": (
        "choice",
        {},
        {"score": {"metric": "acc", "choices_column": "endings", "chat_template": True}},
        "has no template",
    ),
    "generation": ("text", {}, {"score": {"metric": "perplexity", "stop": ["."]}}, "belongs to exact_match"),
    "metric": ("text", {}, {"score": "perplexty"}, "perplexity"),
    "no score": ("text", {}, {"score": None, "classnames": ["a", "b"], "text_columns": ["text"]}, "has no score"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_before_any_work(shop, tmp_path, monkeypatch, capsys, case):
    import yaml

    monkeypatch.chdir(tmp_path)
    kind, row, task, line = BAD[case]
    folder = tmp_path / "data"
    folder.mkdir()
    rows = rows_of(shop)
    rows[3] |= row
    (folder / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    words = write_pools(shop, tmp_path, kind)
    pool = yaml.safe_load((tmp_path / "tasks.yaml").read_text())
    pool["tasks"]["colour"] |= {"source": str(folder), **task}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(pool))
    assert line in refused(capsys, ["method=simple_average", *words, "output=out"])
    assert not Path("out").exists()


def test_an_expert_with_another_tokenizer_is_refused(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "shop"
    shutil.copytree(shop, other)
    save_tokenizer(other / "animal", turned=True)
    assert "has the token" in refused(capsys, ["method=simple_average", *write_pools(other, tmp_path), "output=out"])


def test_a_score_is_refused_by_other_families():
    line = Seq2Seq(None).problems(Task("t", ".", score="acc"))[0]
    assert "family: causal_lm" in line


def test_only_and_keep_say_which_tensors_are_merged(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool = {"only": ["model.layers.*"], "keep": ["*norm*"]}
    assert run(shop, tmp_path, "text", "method=task_arithmetic", **pool) == 0
    base, merged = open_checkpoint(shop / "base"), open_checkpoint(tmp_path / "out" / "model")
    for name in base:
        moved = "layers" in name and "norm" not in name
        assert torch.equal(base[name], merged[name]) is not moved, name
    capsys.readouterr()
    words = write_pools(shop, tmp_path, keep=["*vision_tower*"])
    assert "is the name of no tensor" in refused(capsys, ["method=simple_average", *words, "output=other"])


def test_companions_and_code_come_from_the_named_model_only_when_asked(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "modeling_own.py").write_text("raise SystemExit")
    assert run(shop, tmp_path, "text", "method=simple_average", companions=str(other)) == 0
    model = tmp_path / "out" / "model"
    assert (model / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (model / "modeling_own.py").exists()
    assert (
        run(shop, tmp_path, "text", "method=simple_average", "overwrite=true", companions=str(other), copy_code=True)
        == 0
    )
    assert (model / "modeling_own.py").exists()


def test_continuations_stand_side_by_side_on_page_and_card(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["method=task_arithmetic", "generate.prompts=['the colour red is','<b>']", "generate.max_new_tokens=4"]
    assert run(shop, tmp_path, "text", *words) == 0
    first = report_of(tmp_path)["generations"][0]
    assert list(first["continuations"]) == ["pretrained", "expert animal", "expert colour", "task_arithmetic"]
    model, tokenizer = load(tmp_path / "out" / "model"), tokenizer_of(shop)
    ids = torch.tensor([tokenizer("the colour red is")["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert first["continuations"]["task_arithmetic"] == expected
    assert "&lt;b&gt;" in (tmp_path / "out" / "report.html").read_text()
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "## Continuations" in card
    assert "## Tokens and templates" in card


def test_adamerging_learns_from_factors_of_adapters_what_it_learns_from_whole_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop, whole = build_shop(tmp_path / "shop", "llama", lora=True), tmp_path / "whole"
    from peft import PeftModel

    shutil.copytree(shop / "base", whole / "base")
    shutil.copytree(shop / "data", whole / "data")
    for name in SENTENCES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in the shop
            PeftModel.from_pretrained(load(shop / "base"), shop / name).merge_and_unload().save_pretrained(whole / name)
    words = ["method=lw_adamerging", "method.objective=expert_kl", "method.max_steps=4", "method.lr=0.05"]
    coefficients = []
    for folder in (shop, whole):
        (tmp_path / folder.name).mkdir(exist_ok=True)
        assert run(folder, tmp_path / folder.name, "text", *words) == 0
        coefficients.append(
            open_checkpoint(tmp_path / folder.name / "out" / "coefficients.safetensors")["coefficients"]
        )
    torch.testing.assert_close(coefficients[0], coefficients[1], rtol=1e-4, atol=1e-6)
    assert (coefficients[0] - 0.3).abs().max() > 0.05
    pool = ModelPool(str(shop / "base"), {name: str(shop / name) for name in SENTENCES}, "causal_lm")
    vectors = open_models(pool).vectors()
    rows = task_vector_rows(vectors, AdaMergingOptions())
    assert all(isinstance(each, LowRank) for each in rows.values())
    held = sum(each.up.numel() + each.down.numel() for each in rows.values())
    spread_out = len(SENTENCES) * sum(spec.numel for spec in vectors.specs.values())
    assert held < spread_out / 5


@pytest.mark.parametrize("stacked", [True, False])
def test_adapters_of_experts_are_read_whether_they_know_stacks_or_experts_one_by_one(stacked, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    save = tmp_path / "base"
    new_model("mixtral", 300).save_pretrained(save)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the shop
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
        config.target_parameters = names if stacked else None
        get_peft_model(load(save), config).save_pretrained(tmp_path / "lora")
        tuned = PeftModel.from_pretrained(load(save), tmp_path / "lora").merge_and_unload().state_dict()
    if not stacked:
        add_an_old_adapter(tmp_path / "lora", tuned)
    models = open_models(ModelPool(str(save), {"lora": str(tmp_path / "lora")}, "causal_lm"))
    assert set(models.experts["lora"]) == set(models.base) == set(tuned)
    for name, tensor in models.experts["lora"].items():
        torch.testing.assert_close(tensor, tuned[name], msg=name)


def add_an_old_adapter(folder, tuned):
    """Factors for one expert's w3, under its name from when experts were modules, and what they make of a model."""
    stored = open_checkpoint(folder / "adapter_model.safetensors")
    up, down = torch.randn(48, 4), torch.randn(4, 32)
    module = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3"
    factors = {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
    save_checkpoint(
        {name: tensor.clone() for name, tensor in stored.items()} | factors, folder / "adapter_model.safetensors"
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "w3"]}))
    tuned["model.layers.1.mlp.experts.gate_up_proj"][2, 48:] += config["lora_alpha"] / 4 * up @ down


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_the_language_part_of_a_model_that_sees_is_merged_and_its_vision_tower_kept(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop = build_shop(tmp_path / "shop", kind)
    for name in SENTENCES:
        change_the_eyes(load(shop / name)).save_pretrained(shop / name)
    only = {"only": ["model.language_model.*", "lm_head.weight"]}
    kinds = {"colour": "text", "animal": "choice"}
    method = ["method=task_arithmetic", "method.scaling_factor=0.5"]
    assert main(["check", *method, *write_pools(shop, tmp_path, kinds, **only)]) == 0
    assert run(shop, tmp_path, kinds, *method, "repair=calibrate", **only) == 0
    base, merged = (load(folder).state_dict() for folder in (shop / "base", tmp_path / "out" / "model"))
    experts = [load(shop / name).state_dict() for name in SENTENCES]
    for name, tensor in base.items():
        seeing = not name.startswith(("model.language_model.", "lm_head"))
        expected = tensor + (0 if seeing else 0.5) * sum(expert[name] - tensor for expert in experts)
        torch.testing.assert_close(merged[name], expected, msg=name)
    stored = open_checkpoint(tmp_path / "out" / "model")
    assert stored.specs == open_checkpoint(shop / "base").specs

    row = next(row for row in report_of(tmp_path)["rows"] if row["role"] == "merge")
    model, tokenizer, data = load(tmp_path / "out" / "model"), tokenizer_of(shop), rows_of(shop)
    total = sum(log_likelihood(model, [tokenizer.bos_token_id], tokenizer(r["text"])["input_ids"]) for r in data)
    bits = -total / sum(len(r["text"].encode()) for r in data) / math.log(2)
    assert row["accuracies"]["colour"] == pytest.approx(bits, rel=1e-5)
    choices = task_inputs(CausalLM(shop / "base"), task_of(shop, "choice", "animal")).requests
    by_row = {}
    for choice in choices.choices:
        value = log_likelihood(model, choice.prompt, choice.continuation) / choice.bytes
        by_row.setdefault(choice.row, []).append(value)
    best = [max(range(4), key=values.__getitem__) for values in by_row.values()]
    right = sum(a == b for a, b in zip(best, choices.answers, strict=True))
    assert row["accuracies"]["animal"] == right / len(best)


@torch.no_grad()
def change_the_eyes(model):
    """The model after a fine-tuning that also reached its vision tower."""
    for name, parameter in model.named_parameters():
        if not name.startswith(("model.language_model.", "lm_head")):
            parameter += 0.1
    return model


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_model_gives_it(name):
    """transformers 5.24 calls it `cache`, earlier ones `past_key_values`."""
    seen = {}

    class Model(torch.nn.Module):
        base_model_prefix, config = "model", None

        def __init__(self):
            super().__init__()
            self.model, self.lm_head = torch.nn.Module(), torch.nn.Linear(4, 5, bias=False)

        def get_output_embeddings(self):
            return self.lm_head

    def renamed(input_ids, attention_mask, use_cache=False, cache=None):
        seen["cache"] = cache
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 4))

    def former(input_ids, attention_mask, use_cache=False, past_key_values=None):
        seen["past_key_values"] = past_key_values
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 4))

    model = Model()
    model.model.forward = renamed if name == "cache" else former
    network = NextToken(model, lambda names: {}, 1.0, None)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    network(ids, torch.ones_like(ids), past_key_values="kept")
    assert seen == {name: "kept"}
