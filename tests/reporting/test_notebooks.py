"""Results as a notebook shows them: short, as a table, as a frame, as a picture."""

import pytest
import torch
from torch import nn

import suture
from suture.core.notebooks import in_notebook, table_html
from suture.reporting.data import Report

pandas = pytest.importorskip("pandas", reason="pip install pandas")
ROW = suture.Row("mine", {"a": 0.5, "b": 0.75}, {"a": 2, "b": 4})
BASE, TUNED = nn.Linear(2, 2), nn.Linear(2, 2)


def test_a_row_and_a_report_are_tables():
    assert repr(ROW) == "Row('mine', 2 tasks, mean 62.5 %)"
    assert ROW.to_pandas().loc["b"].tolist() == [0.75, 4]
    report = Report("r", [ROW])
    assert repr(report) == "Report('r', 1 models, 2 tasks)"
    assert report.to_pandas().loc["mine", "mean"] == 0.625
    assert "<td>75.0</td>" in report._repr_html_()
    assert "<td>75.0</td>" in ROW._repr_html_()


def test_scores_that_are_no_accuracies_keep_their_unit():
    row = suture.Row("m", {"a": 20.0}, {"a": 100}, metrics={"a": "perplexity"})
    assert repr(row) == "Row('m', 1 tasks, mean 20)"
    assert "<td>20</td><td>perplexity</td>" in row._repr_html_()
    assert row.interval("a") is row.mean_interval is None


def test_text_from_users_is_escaped():
    assert "<script>" not in table_html(("<script>",), [("<script>",)], "<script>")


def test_an_analysis_is_a_frame_and_a_picture():
    finding = suture.analysis.similarity(BASE, {"one": TUNED, "other": BASE})
    assert repr(finding) == "Finding('similarity': cosine similarity of task vectors, 2 rows)"
    assert list(finding.to_pandas().index) == ["one", "other"]
    assert finding.plot()._repr_mimebundle_()["image/svg+xml"].startswith("<svg")
    assert "<caption>cosine" in finding._repr_html_()


def test_coefficients_and_losses_are_frames():
    adapted = suture.adapt(BASE, BASE, {"t": TUNED}, {"t": torch.randn(8, 2)}, granularity="layer", max_steps=2)
    assert repr(adapted) == "AdaMergingResult(1 × 2 coefficients of t, 2 steps)"
    assert adapted.to_pandas().shape == (2, 1)
    repaired = suture.repair(BASE, {"t": TUNED}, {"t": torch.randn(8, 2)}, rank=1, steps=3)
    assert repr(repaired) == "RepairResult('final' of t, 3 steps)"
    assert repaired.to_pandas().shape == (3, 1)


def test_a_run_shows_its_table_and_its_figures(tmp_path):
    experts = {name: f"zoo:glyphs8/experts/{name}" for name in ("greek", "latin")}
    pool = {"family": "clip", "models": {"_pretrained_": "zoo:glyphs8/pretrained", **experts}}
    result = suture.run(method="simple_average", modelpool=pool, output=tmp_path / "out", fast_dev_run=True)
    assert repr(result) == f"RunResult('{tmp_path / 'out'}', 0 models)"
    assert "<table>" in result._repr_html_()
    with pytest.raises(suture.SutureError, match="Unknown figure 'accuracy'"):
        result.plot()


def test_a_page_is_shown_inline(tmp_path):
    data = {"t": (torch.randn(8, 2), torch.randint(2, (8,)))}
    page = suture.report({"base": BASE}, tmp_path / "report", tasks=data, module=BASE)
    assert page.is_file()
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!')


def test_this_is_no_notebook():
    assert not in_notebook()
