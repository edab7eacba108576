"""`suture init`: the YAML files of the models and data that lie in some folders."""

import json
from pathlib import Path

import pytest
import yaml

import suture
from suture import zoo
from suture.cli.main import main
from suture.errors import ConfigError, OutputError

GLYPHS = zoo.resolve("zoo:glyphs8")


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """Models and data as somebody has them, with links to the zoo's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "pretrained").symlink_to(GLYPHS / "pretrained")
    for name in ("greek", "latin"):
        (tmp_path / "models" / name).symlink_to(GLYPHS / "experts" / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "greek").symlink_to(GLYPHS / "data" / "greek")
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / "Latin" / split / label).mkdir(parents=True)
            (tmp_path / "data" / "Latin" / split / label / "1.png").write_bytes(b"")
    return tmp_path


def test_the_files_say_what_was_found_and_what_to_fill_in(desk):
    started = suture.init(["models", "data"], "mine")
    models = yaml.safe_load(started.modelpool.read_text("utf-8"))
    assert models["family"] == "clip"
    assert {name: Path(path).name for name, path in models["models"].items()} == {
        "_pretrained_": "pretrained",
        "greek": "greek",
        "latin": "latin",
    }
    tasks = (desk / "mine" / "tasks.yaml").read_text("utf-8")
    assert 'classnames: ["cat", "dog"]' in tasks
    assert "# fill in, in the order of the labels" in tasks  # greek is in IDX files, which have no names


def test_the_model_pool_runs_as_it_is(desk, capsys):
    assert main(["init", "models", "--output", "mine"]) == 0
    assert "Next: suture check modelpool=mine/models.yaml" in capsys.readouterr().out
    assert main(["check", "modelpool=mine/models.yaml"]) == 0
    assert "everything fits" in capsys.readouterr().out


def test_what_cannot_be_known_is_asked_for_in_one_line(desk):
    with pytest.raises(ConfigError, match=r"Which is the pretrained model\? Found: greek, latin\. Remedy: .*--base"):
        suture.init(["models/greek", "models/latin"])
    with pytest.raises(ConfigError, match="There is no fine-tuned model in models/pretrained"):
        suture.init(["models/pretrained"])
    with pytest.raises(ConfigError, match="'nowhere' does not exist"):
        suture.init(["nowhere"])
    for name in ("odd", "odder"):
        (desk / name).mkdir()
        (desk / name / "config.json").write_text(json.dumps({"architectures": ["Odd"]}))
    with pytest.raises(ConfigError, match=r"is of no known family\. Remedy: name one with --family"):
        suture.init(["odd", "odder"], base="odd")
    assert suture.init(["models"], base="models/greek", family="clip").modelpool == Path("models.yaml")
    with pytest.raises(OutputError, match=r"'models.yaml' exists"):
        suture.init(["models"])


def test_every_key_that_is_left_to_fill_in_is_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "cats", "dogs"):
        (tmp_path / f"{name}.pt").write_bytes(b"")
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.csv").write_text("first,second,third\na,b,c\n")
    assert main(["init", ".", "data", "--family", "sequence_classification", "--base", "base.pt"]) == 0
    pools = ["modelpool=models.yaml", "taskpool=tasks.yaml"]
    capsys.readouterr()
    assert main(["check", *pools]) == 2
    keys = [f"taskpool.tasks.{name}.{key}" for name in ("cats", "dogs") for key in ("classnames", "text_columns")]
    line = capsys.readouterr().err
    assert line == f"suture: 4 keys have no value: {', '.join(keys)}. Remedy: fill them in.\n"
    text = (tmp_path / "tasks.yaml").read_text()
    (tmp_path / "tasks.yaml").write_text(text.replace("source:", "sorce:", 1))
    assert main(["check", *pools]) == 2
    line = capsys.readouterr().err
    assert line.startswith("suture: Unknown key of taskpool.tasks.cats 'sorce'. Did you mean 'source' or")
    (tmp_path / "tasks.yaml").write_text(text)
    (tmp_path / "models.yaml").write_text((tmp_path / "models.yaml").read_text().replace("sequence_class", "module #"))
    assert main(["check", *pools]) == 2
    assert capsys.readouterr().err.startswith("suture: 5 keys have no value: modelpool.module, taskpool.tasks.cats")


def test_nothing_is_written_where_one_file_exists(desk):
    (desk / "tasks.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        suture.init(["models", "data"])
    assert not (desk / "models.yaml").exists()


def written(folder, name, architecture, **more):
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps({"architectures": [architecture], **more}))


def test_classifiers_on_a_base_with_another_head_need_nothing_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert = {"model_type": "bert"}
    written(tmp_path / "berts", "pretrained", "BertForMaskedLM", **bert)
    written(tmp_path / "berts", "mood", "BertForSequenceClassification", **bert)
    names = {"1": "animal", "0": "vehicle", "2": "plant"}
    written(tmp_path / "berts", "topic", "BertForSequenceClassification", id2label=names, **bert)
    for task, header, line in (("mood", "text,label", "fine,1"), ("topic", "first,second,label", "a,b,0")):
        (tmp_path / "texts" / task).mkdir(parents=True)
        (tmp_path / "texts" / task / "test.csv").write_text(f"{header}\n{line}\n")
    started = suture.init(["berts", "texts"])
    assert yaml.safe_load(started.modelpool.read_text("utf-8"))["family"] == "sequence_classification"
    tasks = yaml.safe_load(started.taskpool.read_text("utf-8"))["tasks"]
    source = str(Path("texts", "mood"))
    assert tasks["mood"] == {"source": source, "text_columns": ["text"], "classnames": ["LABEL_0", "LABEL_1"]}
    assert tasks["topic"]["text_columns"] == ["first", "second"]
    assert tasks["topic"]["classnames"] == ["vehicle", "animal", "plant"]
    assert started.lines == ("family sequence_classification; 2 fine-tuned models: mood, topic",)


def test_tasks_of_language_models_have_a_score_instead_of_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "german"):
        written(tmp_path, name, "LlamaForCausalLM", model_type="llama")
    (tmp_path / "data" / "german").mkdir(parents=True)
    (tmp_path / "data" / "german" / "test.jsonl").write_text('{"text": "Guten Tag", "id": "1"}\n')
    started = suture.init(["base", "german", "data"])
    tasks = yaml.safe_load(started.taskpool.read_text("utf-8"))["tasks"]
    source = str(Path("data", "german"))
    assert tasks == {"german": {"source": source, "text_columns": ["text"], "score": "bits_per_byte"}}
