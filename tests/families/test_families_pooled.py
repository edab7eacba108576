"""Text encoders without a head: linear heads in files, and sentence encoders by class names or with heads."""

import json
import shutil

import pytest
import torch
import yaml
from desk import refused
from tiny_texts import TASKS, bert_config, rows_of, save_tokenizer, write_task
from torch.nn.functional import normalize

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.core.head import Head
from suture.families.sentence_encoder import SentenceEncoder
from suture.families.shared.pooled import POOLINGS
from suture.pipeline.starting import init
from suture.tasks import Task

NAMES = ("colour", "animal")


def encoder(seed):
    from transformers import BertModel

    torch.manual_seed(0)
    model = BertModel(bert_config(20))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.03 * seed * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make_sentence(folder, *, dense=None, normalised=True, mode="mean"):
    """What sentence-transformers writes beside the transformer."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense is not None else []), *(["Normalize"] * normalised)]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 16, f"pooling_mode_{mode}_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if dense is not None:
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text(
            '{"in_features": 16, "out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"}'
        )
        save_checkpoint(
            {"linear.weight": dense, "linear.bias": torch.zeros(len(dense))}, folder / "2_Dense" / "model.safetensors"
        )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    for seed, name in enumerate(("base", *NAMES)):
        encoder(seed).save_pretrained(folder / name)
        save_tokenizer(folder / name)
        if name != "base":
            write_task(folder / "data" / name, name)
            generator = torch.Generator().manual_seed(seed)
            weight, bias = torch.randn(2, 16, generator=generator), torch.randn(2, generator=generator)
            save_checkpoint({"weight": weight, "bias": bias}, folder / f"{name}-head.safetensors")
    return folder


@pytest.fixture
def words_of(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shelf, tmp_path / "shelf")

    def write(family="sequence_classification", with_heads=True, **pool):
        models = {"_pretrained_": "shelf/base", **{name: f"shelf/{name}" for name in NAMES}}
        files = {"heads": {name: f"shelf/{name}-head.safetensors" for name in NAMES}} if with_heads else {}
        tasks = {
            name: {"source": f"shelf/data/{name}", "text_columns": "second", "classnames": list(TASKS[name])}
            for name in NAMES
        }
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"family": family, "models": models} | files | pool))
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
        return ["method=task_arithmetic", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out"]

    return write


@torch.no_grad()
def features(directory, texts):
    """Means over tokens, with transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(directory)(list(texts), padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    return (AutoModel.from_pretrained(directory).eval()(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)


def accuracies(folder, row):
    report = json.loads((folder / "out" / "report.json").read_text())
    return next(each["accuracies"] for each in report["rows"] if each["name"] == row)


def by_hand(folder, name, head):
    _, texts, labels = rows_of(folder / "shelf" / "data" / name, "test")
    return (head(features(folder / "out" / "model", texts)).argmax(1) == labels).double().mean().item()


def test_backbones_without_a_head_are_merged_and_scored_with_heads_in_files(words_of, tmp_path):
    assert main(words_of()) == 0
    for name in NAMES:
        state = open_checkpoint(tmp_path / "shelf" / f"{name}-head.safetensors")
        head = Head(state["weight"], state["bias"])
        assert accuracies(tmp_path, "task_arithmetic")[name] == by_hand(tmp_path, name, head)
        assert torch.equal(
            open_checkpoint(tmp_path / "out/model/heads" / f"{name}.safetensors")["weight"], head.weights
        )
    base, out = open_checkpoint(tmp_path / "shelf" / "base"), open_checkpoint(tmp_path / "out" / "model")
    assert set(out) == set(base)


def test_a_backbone_without_pooler_weights_is_as_good(words_of, tmp_path):
    for name in ("base", *NAMES):
        file = tmp_path / "shelf" / name / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in open_checkpoint(file).items() if "pooler" not in key}
        save_checkpoint(tensors, file)
    assert main(words_of()) == 0
    assert not [name for name in open_checkpoint(tmp_path / "out" / "model") if "pooler" in name]


def test_a_sentence_encoder_is_scored_by_the_embeddings_of_its_class_names(words_of, tmp_path):
    for name in ("base", *NAMES):
        make_sentence(tmp_path / "shelf" / name)
    assert main(words_of("sentence_encoder", with_heads=False)) == 0
    for name in NAMES:
        directions = normalize(features(tmp_path / "shelf" / name, TASKS[name]), dim=-1)
        assert accuracies(tmp_path, "task_arithmetic")[name] == by_hand(
            tmp_path, name, Head(directions, normalised=True)
        )
    out = tmp_path / "out" / "model"
    assert json.loads((out / "modules.json").read_text())[1]["path"] == "1_Pooling"
    assert (out / "1_Pooling" / "config.json").is_file()
    assert SentenceEncoder.recognises(out)


def test_dense_layers_and_normalisation_belong_to_the_head(words_of, tmp_path):
    dense = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))
    for name in ("base", *NAMES):
        make_sentence(tmp_path / "shelf" / name, dense=dense)
    for name in NAMES:
        weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(len(name)))
        save_checkpoint({"weight": weight}, tmp_path / "shelf" / f"{name}-head.safetensors")
    assert main(words_of("sentence_encoder")) == 0
    for name in NAMES:
        weight = open_checkpoint(tmp_path / "shelf" / f"{name}-head.safetensors")["weight"]

        def head(rows, weight=weight):
            return normalize(torch.tanh(rows @ dense.T), dim=-1) @ weight.T

        assert accuracies(tmp_path, "task_arithmetic")[name] == by_hand(tmp_path, name, head)


def test_poolings_by_hand():
    hidden = torch.tensor([[[1.0], [5.0], [-100.0]], [[2.0], [4.0], [9.0]]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])[..., None]
    results = {name: pool(hidden, mask).flatten().tolist() for name, pool in POOLINGS.items()}
    expected = {"cls": [1, 2], "max": [5, 9], "mean": [3, 5], "lasttoken": [5, 9]}
    expected |= {"mean_sqrt_len": [6 / 2**0.5, 15 / 3**0.5], "weightedmean": [11 / 3, 37 / 6]}
    assert results == {name: pytest.approx(values) for name, values in expected.items()}


def test_init_recognises_a_sentence_encoder_whatever_its_architecture(words_of, tmp_path):
    for name in ("base", *NAMES):
        make_sentence(tmp_path / "shelf" / name)
        config = json.loads((tmp_path / "shelf" / name / "config.json").read_text())
        config["architectures"] = ["BertForSequenceClassification"]
        (tmp_path / "shelf" / name / "config.json").write_text(json.dumps(config))
    started = init([tmp_path / "shelf"], tmp_path / "pools")
    assert yaml.safe_load(started.modelpool.read_text())["family"] == "sentence_encoder"


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"pooling": "median"}, "wanted cls, max"),
        ({"pooling": ["mean", "cls"]}, "16 numbers but the feature has 32"),
        ({"heads": {"colour": "shelf/colour-head.safetensors"}}, "Unknown task under modelpool.heads 'animal'"),
        ({"heads": dict.fromkeys(NAMES, "shelf/base")}, "wanted one linear layer"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words_of, capsys, pool, message):
    assert message in refused(capsys, words_of(**pool))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("modules.json", "{}", "no list of modules"),
        ("modules.json", '[{"type": "a.Transformer", "path": "../x"}]', "wanted folders beside it"),
        ("modules.json", '[{"type": "a.Transformer", "path": "0_T"}]', "not at the top"),
        ("modules.json", '[{"type": "a.Transformer", "path": ""}, {"type": "a.CNN", "path": "1"}]', "'CNN'"),
        ("1_Pooling/config.json", "{}", "no pooling that is known"),
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "query"}', "default prompt"),
    ],
)
def test_layouts_that_are_not_read_are_refused(words_of, tmp_path, capsys, file, text, message):
    for name in ("base", *NAMES):
        make_sentence(tmp_path / "shelf" / name)
        (tmp_path / "shelf" / name / file).write_text(text)
    assert message in refused(capsys, words_of("sentence_encoder", with_heads=False))


def test_a_head_without_file_or_expert_is_made_by_the_pretrained_model(words_of, tmp_path):
    make_sentence(tmp_path / "shelf" / "base")
    family = SentenceEncoder(tmp_path / "shelf" / "base")
    head = family.head(Task("number", "", TASKS["number"], text_columns=("second",)))
    expected = normalize(features(tmp_path / "shelf" / "base", TASKS["number"]), dim=-1)
    torch.testing.assert_close(head.weights, expected)
