"""The figures of a run: on the page, as PNG and as SVG, from one specification."""

import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from pages import HOSTILE, TASKS, a_report
from PIL import Image

from suture.analysis import save, similarity
from suture.errors import OutputError
from suture.reporting import Report, charts, write
from suture.reporting.figures import charts_of, draw, figures
from suture.reporting.run_folder import read

OF_A_MERGE = ("coefficients_over_steps", "coefficients", "objective_over_steps", "accuracy_over_steps")
OF_A_REPAIR = ("accuracy_over_steps", "l1_by_layer", "representation")
TOY = """
from suture.reporting.chart import Chart, line
from suture.reporting.figures import figure


@figure("toy", section="Toys")
def toy(run):
    rows = [{"step": i, "value": row["mean"]} for i, row in enumerate(run.data["rows"])]
    return Chart("A toy", line(rows, "mean")) if len(rows) > 1 else None
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(a_report(), folder)
    return folder


def test_every_figure_is_a_file_of_both_kinds(run):
    hostile = "script_script_window.harmed_1_script_img_src_x_onerror_window.harmed_1"
    expected = {"accuracy", "accuracy_over_scaling_factor", "expert_matrix"}
    expected |= {f"{figure}_{hostile}" for figure in OF_A_MERGE}
    expected |= {f"{figure}_{name}" for figure in OF_A_REPAIR for name in (f"{hostile}_final", "ties_deep")}
    files = {path.name for path in (run / "figures").iterdir()}
    drawn = {each.file for each in charts_of(read(run))}
    assert expected <= drawn
    assert files == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    draw(read(run), tmp_path)
    for path in (run / "figures").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_picture_stands_alone(run):
    """White background, title, legend, and names as text of the file."""
    for path in (run / "figures").glob("*.png"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert (picture[0] == 255).all()
        assert picture.std() > 5
    accuracy = texts(run / "figures" / "accuracy.svg")
    assert accuracy[-2:] == ["Accuracy by task", "accuracy (%)Lines are 95% intervals (Wilson)."]
    assert {"pretrained", "experts", *TASKS[:2], "mean"} <= set(accuracy)
    scatter = texts(run / "figures" / "representation_ties_deep.svg")
    assert {"merged", "repaired", "expert", *TASKS[:2]} <= set(scatter)
    assert {"axis 1: 30% of the variance →", "↑ axis 2: 20%"} <= set(scatter)
    assert any(text.startswith("Final features: ties + deep") for text in scatter)


def texts(path):
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_names_that_mean_harm_are_text_in_pictures(run):
    for path in (run / "figures").glob("*.svg"):
        for element in ElementTree.parse(path).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "image", "img", "foreignObject", "a"), path.name
            assert not [name for name in element.attrib if name.startswith("on") or name.endswith("href")], path.name
    assert any(HOSTILE[:9] in text for text in texts(run / "figures" / "accuracy.svg"))


def test_a_new_figure_is_one_file(run, tmp_path, monkeypatch):
    (tmp_path / "toys.py").write_text(TOY)
    monkeypatch.setattr(charts, "__path__", [*charts.__path__, str(tmp_path)])
    figures.cache_clear()
    try:
        write(a_report(), shutil.copytree(run, tmp_path / "run"))
    finally:
        figures.cache_clear()
    assert {"toy.png", "toy.svg"} <= {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Toys" in page
    assert "<figcaption>A toy</figcaption>" in page
    assert "![toy](figures/toy.png)" in (tmp_path / "run" / "report.md").read_text()


def test_one_name_has_one_colour(run):
    """One name here is a task's and a model's, which are never in one legend."""
    legends = [drawn.chart.legend for drawn in charts_of(read(run))]
    colours = {name: {legend[name] for legend in legends if name in legend} for name in set().union(*legends)}
    assert {name: found for name, found in colours.items() if len(found) != 1}.keys() == {HOSTILE}


def test_a_report_of_nothing_has_no_figures(tmp_path):
    write(Report("nothing", []), tmp_path)
    assert list((tmp_path / "figures").iterdir()) == []
    assert read(tmp_path).data["rows"] == []


def test_what_is_not_finite_is_null_in_the_files(tmp_path):
    report = a_report()
    learned = next(iter(report.learning.values()))
    learned.losses[1] = float("nan")
    learned.history[2] = float("inf")
    write(report, tmp_path)
    assert "NaN" not in (text := (tmp_path / "report.json").read_text() + (tmp_path / "figures.json").read_text())
    assert "Infinity" not in text
    assert None in read(tmp_path).points["objective"][HOSTILE]["loss"]


def test_a_finding_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    finding = similarity({"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])}])
    with pytest.raises(OutputError, match="file"):
        save(finding, tmp_path / "file")
