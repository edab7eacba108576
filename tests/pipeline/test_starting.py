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
    (desk / "odd").mkdir()
    (desk / "odd" / "config.json").write_text(json.dumps({"architectures": ["Odd"]}))
    with pytest.raises(ConfigError, match=r"is of no known family\. Remedy: name one with --family"):
        suture.init(["models"], base="odd")
    assert suture.init(["models"], base="models/greek", family="clip").modelpool == Path("models.yaml")
    with pytest.raises(OutputError, match=r"'models.yaml' exists"):
        suture.init(["models"])


def test_nothing_is_written_where_one_file_exists(desk):
    (desk / "tasks.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        suture.init(["models", "data"])
    assert not (desk / "models.yaml").exists()
