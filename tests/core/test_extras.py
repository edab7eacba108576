"""Libraries that are optional: what a verb that needs one says without it."""

import pytest

import suture
from suture.core import extras
from suture.errors import ConfigError


@pytest.fixture
def bare(monkeypatch):
    """An installation without the extra `run`."""
    monkeypatch.setattr(extras, "find_spec", lambda module: None)


POOLS = {"modelpool": "glyphs8", "taskpool": "glyphs8"}


@pytest.mark.parametrize(
    "call",
    [
        lambda: suture.run(method="simple_average", **POOLS),
        lambda: suture.demo(),
        lambda: suture.search(method="tsv_m", over={"method.alpha": [1, 2]}, **POOLS),
        lambda: suture.evaluate_pool(**POOLS),
        lambda: suture.analyse("similarity", **POOLS),
    ],
    ids=["run", "demo", "search", "evaluate", "analyse"],
)
def test_a_missing_library_is_one_line_with_the_command(bare, call):
    with pytest.raises(ConfigError, match=r"^suture \w+ needs transformers, .*Remedy: pip install 'suture\[run\]'\.$"):
        call()


def test_a_report_says_what_draws_its_figures(bare):
    with pytest.raises(ConfigError, match=r"suture report needs vl_convert\. Remedy: pip install 'suture\[run\]'\."):
        suture.report(["run"])


def test_checks_and_merges_of_files_need_no_extra(bare, tmp_path):
    assert suture.check(method="simple_average", modelpool="glyphs8").problems == []
    experts = {name: f"zoo:glyphs8/experts/{name}" for name in ("greek", "latin")}
    merged = suture.merge_files(experts["greek"], experts, "simple_average", output=tmp_path / "out")
    assert (merged / "model.safetensors").is_file()
