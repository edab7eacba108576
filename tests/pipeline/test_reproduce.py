"""Published figures: every command composes, and a run is held against those that are its own, and no others."""

import json

import pytest

from suture.cli.main import main
from suture.errors import ConfigError
from suture.pipeline.config import compose
from suture.pipeline.reproduce import compare, published
from suture.pipeline.settings import Settings


@pytest.fixture
def run(tmp_path):
    """A finished run's folder with chosen means, of the words of one published figure."""

    def make(figure, means, *more):
        config = compose([*figure.words, *more])
        words = dict(word.split("=", 1) for word in figure.words)
        config["choices"] = {group: f"Folder/{words[group].split('/')[-1]}" for group in ("modelpool", "taskpool")}
        rows = [{"name": name, "mean": mean} for name, mean in means.items()]
        (tmp_path / "report.json").write_text(json.dumps({"rows": rows, "config": config}))
        return tmp_path

    return make


def figure(name):
    return next(one for one in published() if one.id == name)


def test_every_command_is_a_valid_run_and_every_name_is_one_figure():
    assert len({one.id for one in published()}) == len(published()) == 29
    for one in published():
        assert Settings.from_config(compose(one.words)).pool.models.keys() >= {"sun397", "dtd"}


def test_a_run_is_held_against_the_figures_of_its_own_method(run):
    folder = run(figure("C-ties"), {"pretrained": 0.482, "experts": 0.91, "ties_merging": 0.7249})
    found = {one.published.id: one.within for one in compare(folder)}
    assert found == {"C-pretrained": True, "C-experts": False, "C-ties": True}


def test_a_run_with_another_knob_is_not_the_published_one(run):
    folder = run(figure("C-ties"), {"ties_merging": 0.72}, "method.scaling_factor=0.4")
    assert compare(folder) == []


def test_where_things_are_kept_does_not_matter(run):
    folder = run(figure("A-layer-wise"), {"lw_adamerging": 0.80}, "method.cache_dir=elsewhere")
    assert [one.published.id for one in compare(folder)] == ["A-layer-wise"]


def test_the_command_lists_and_checks(run, capsys):
    assert main(["reproduce", "--list"]) == 0
    assert "suture method=ties_merging modelpool=clip-vit-base-patch32_TA8" in capsys.readouterr().out
    assert main(["reproduce", "--check", str(run(figure("C-ties"), {"ties_merging": 0.722}))]) == 0
    assert "within" in capsys.readouterr().out
    assert main(["reproduce", "--check", str(run(figure("C-ties"), {"ties_merging": 0.7}))]) == 1
    assert "outside" in capsys.readouterr().out


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds no report"):
        compare(tmp_path)
    assert main(["reproduce", "--check", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
