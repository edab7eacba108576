"""What a report claims: who is best and how sure that is, what harms, tables to copy, colours that stay apart."""

import csv
import io
import itertools
import json
import re

import pytest
import torch
from pages import HOSTILE, TASKS, a_report
from test_report_page import choose, figure, visit

from suture.evaluation import Row
from suture.reporting import Report, report, write
from suture.reporting.chart import INK, PALETTE, task_colours
from suture.reporting.charts.coefficients import accuracy_curve
from suture.reporting.figures import charts_of
from suture.reporting.glossary import explained, explained_name
from suture.reporting.harms import harms
from suture.reporting.page import page
from suture.reporting.paths import without_machine
from suture.reporting.run_folder import FinishedRun, read
from suture.reporting.scores import best_of_each_use, leaders, scored, top_names
from suture.reporting.seeds import by_seed
from suture.reporting.tables import as_csv, as_latex, as_markdown

NAMES = ("one", "two")


def row(name, first, second, count=1000, **kind):
    return Row(name, {"one": first, "two": second}, dict.fromkeys(NAMES, count), **kind)


def finished(*rows, **more):
    """The data of a run with these rows between pretrained (50 and 60%) and experts (90%)."""
    ends = [row("pretrained", 0.5, 0.6, role="pretrained"), row("experts", 0.9, 0.9, role="experts", needs_task=True)]
    data = Report("a run", [*ends, *rows], *ends, **more).as_data()
    return {**json.loads(json.dumps(data)), "search": None}


def text_of(data):
    return re.sub(r"<[^>]*>", "", page(FinishedRun("", data)).split("<main>")[1])


def test_the_headline_has_the_best_without_the_name_and_the_best_with_it():
    given = {"role": "repair", "needs_task": True, "learned": "modules", "split": "test"}
    data = finished(row("ties", 0.7, 0.7), row("avg", 0.55, 0.65), row("ties + final", 0.85, 0.8, **given))
    found = {named: [row["name"] for row in rows] for named, rows in best_of_each_use(data)}
    assert found == {False: ["ties"], True: ["ties + final"]}
    text = text_of(data)
    assert "Best without the task's name: ties, 70.0\N{NO-BREAK SPACE}% (67.9–72.0)" in text
    assert "Best with the task's name: ties + final, 82.5\N{NO-BREAK SPACE}%" in text
    assert "of the gap closed, learned from the test split." in text


def test_nothing_below_the_pretrained_model_is_ever_best():
    data = finished(row("avg", 0.4, 0.6), row("sum", 0.2, 0.3))
    assert [rows for _, rows in best_of_each_use(data)] == [[]]
    text = text_of(data)
    assert "Best without the task's name: nothing is above the pretrained model." in text
    assert "avg is below the pretrained model: 50.0 % against 55.0 % in the mean. Do not use it." in text


def test_models_within_each_others_intervals_are_not_ranked():
    near, far = row("near", 0.71, 0.70), row("far", 0.6, 0.65)
    data = finished(row("ties", 0.72, 0.70), near, far)
    assert [each["name"] for each in leaders(data, scored(data))] == ["ties", "near"]
    assert "Not told apart from it: near 70.5\N{NO-BREAK SPACE}%." in text_of(data)
    many = finished(*(row(n, *a, count=10**6) for n, a in (("ties", (0.72, 0.70)), ("near", (0.71, 0.70)))))
    many["samples"] = dict.fromkeys(NAMES, 10**6)
    assert [each["name"] for each in leaders(many, scored(many))] == ["ties"]


def test_a_best_model_within_the_interval_of_the_pretrained_one_is_not_told_apart_from_it():
    assert "Not told apart from it: the pretrained model." in text_of(finished(row("avg", 0.52, 0.6)))
    assert "the pretrained model." not in text_of(finished(row("avg", 0.72, 0.7)))


def language(name, bits, share, errors=(0.01, 0.01), **kind):
    """A row of a language model: bits per byte on `text`, a share of right choices on `quiz`."""
    metrics, known = {"text": "bits_per_byte", "quiz": "acc"}, dict(zip(("text", "quiz"), errors, strict=True))
    return Row(name, {"text": bits, "quiz": share}, {"text": 100, "quiz": 100}, metrics=metrics, errors=known, **kind)


def language_run(*rows):
    ends = [language("pretrained", 2.0, 0.3, role="pretrained"), language("experts", 1.0, 0.9, role="experts")]
    return {**json.loads(json.dumps(Report("a run", [*ends, *rows], *ends).as_data())), "search": None}


def test_scores_in_several_units_are_bold_where_they_are_not_told_apart_from_the_best():
    data = language_run(language("ties", 1.20, 0.5), language("near", 1.22, 0.6), language("far", 1.30, 0.61))
    assert top_names(data) == {"text": {"ties", "near"}, "quiz": {"near", "far"}, "mean": set()}
    shown = page(FinishedRun("", data))
    assert "<strong>1.200 ±0.010</strong>" in shown
    assert "<strong>50.0 ±1.0</strong>" not in shown
    assert "id=intervals" not in shown  # there are none to show
    one_unit = {**data, "rows": [{**each, "mean": each["accuracies"]["text"]} for each in data["rows"]]}
    assert top_names(one_unit)["mean"] == {"ties", "near"}


def test_scores_in_several_units_have_the_headline_of_both_uses():
    named = language("ties + final", 1.1, 0.8, role="repair", needs_task=True, learned="modules", split="test")
    text = text_of(language_run(language("ties", 1.2, 0.5), language("near", 1.21, 0.5), named))
    ties = "Best without the task's name: ties, 56.7\N{NO-BREAK SPACE}% of the gap closed. Not told apart from it: near"
    assert ties in text
    assert "Best with the task's name: ties + final, 86.7\N{NO-BREAK SPACE}% of the gap closed, learned from" in text
    assert "nothing is above the pretrained model" in text_of(language_run(language("bad", 2.5, 0.2)))


def test_a_task_without_a_gap_is_named_below_the_figure():
    ends = [language("pretrained", 2.0, 0.5, role="pretrained"), language("experts", 1.0, 0.5, role="experts")]
    data = Report("a run", [*ends, language("ties", 1.5, 0.5)], *ends).as_data()
    drawn = {each.file: each.chart for each in charts_of(FinishedRun("", data))}
    assert drawn["accuracy"].title == "Scores by task"
    assert "No gap to close on quiz" in drawn["accuracy"].about


def test_a_share_that_is_no_accuracy_is_not_called_one():
    answers = {"metrics": {"sums": "exact_match"}, "samples": {"sums": 100}}
    rows = [Row(name, {"sums": share}, **answers, role=name) for name, share in (("pretrained", 0.1), ("experts", 0.9))]
    data = json.loads(json.dumps(Report("a run", rows, *rows).as_data()))
    drawn = {each.file: each.chart for each in charts_of(FinishedRun("", data))}
    assert drawn["accuracy"].choices[0].options == ["score (%)", "relative to the expert (%)", "gap closed (%)"]


def test_many_bars_become_a_heat_map_and_small_changes_keep_a_readable_axis():
    names = [f"task {i}" for i in range(20)]
    rows = [Row(f"m{i}", dict.fromkeys(names, 0.5), dict.fromkeys(names, 100)) for i in range(5)]
    drawn = {each.file: each.chart for each in charts_of(FinishedRun("", Report("a run", rows).as_data()))}
    assert drawn["accuracy"].legend == {}
    low, high = accuracy_curve({"1": 0.5, "2": 0.501}).spec["encoding"]["y"]["scale"]["domain"]
    assert (low, high) == pytest.approx((49.05, 51.05))


def test_harm_is_said_on_single_tasks_beyond_both_intervals():
    assert harms(finished(row("ties", 0.9, 0.59))) == []
    assert harms(finished(row("ties", 0.9, 0.5))) == ["ties is below the pretrained model on two (10.0 points)."]


def test_a_router_that_harms_is_named():
    repaired = {"role": "repair", "merge": "ties", "routed": True, "routing": {"one": 0.9, "two": 0.2}}
    lines = harms(finished(row("ties", 0.8, 0.8), row("ties + final, routed", 0.75, 0.65, **repaired)))
    assert any("is below its merge without a repair: 70.0 % against 80.0 %" in line for line in lines)
    assert any("less than half of the inputs: two 20 %" in line for line in lines)


def test_warnings_of_rows_and_repairs_are_on_the_page():
    data = finished(row("ties", 0.8, 0.8, warnings=("its inputs are shared",)))
    assert "ties: its inputs are shared" in harms(data)
    assert any("a module is dead" in line for line in harms(read_back(a_report())))


def read_back(made):
    return json.loads(json.dumps(made.as_data()))


def test_csv_has_every_number_with_its_interval():
    data = finished(row('ties, "mine"', 0.7, 0.75, seconds=2.5, learned="weights", split="train", added_parameters=3))
    lines = list(csv.DictReader(io.StringIO(as_csv(data))))
    assert [line["model"] for line in lines] == ["pretrained", "experts", 'ties, "mine"']
    mine = lines[2]
    assert float(mine["one"]) == 0.7
    assert float(mine["one low"]) < 0.7 < float(mine["one high"])
    assert float(mine["mean low"]) < 0.725 < float(mine["mean high"])
    assert (mine["learned from"], mine["added parameters"], mine["seconds"]) == ("train", "3", "2.5")
    assert lines[1]["task's name"] == "needed"


def test_latex_is_escaped_and_bold_where_nothing_is_told_apart():
    text = as_latex(finished(row("a_b & 50%", 0.72, 0.7), row("near", 0.71, 0.2)))
    assert r"a\_b \& 50\% & \textbf{72.0} & \textbf{70.0} & \textbf{71.0} & 45.7 \\" in text
    assert r"near & \textbf{71.0} & 20.0 & 45.5 & -27.1 \\" in text
    assert text.count(r"\midrule") == 2
    hostile = as_latex(read_back(a_report()))
    assert all(line.startswith("%") or len(re.findall(r"(?<!\\)&", line)) in (0, 5) for line in hostile.splitlines())


def test_markdown_keeps_its_columns():
    text = as_markdown(finished(row("a | b", 0.7, 0.7)))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {13}
    assert "| 70.0 (67.9–72.0) |" in text


def test_the_tables_are_files_of_the_run(tmp_path):
    write(a_report(), tmp_path)
    data = read(tmp_path).data
    assert (tmp_path / "table.csv").read_text("utf-8") == as_csv(data)
    assert (tmp_path / "table.tex").read_text("utf-8") == as_latex(data)
    assert as_markdown(data).strip() in (tmp_path / "report.md").read_text("utf-8")


def test_runs_that_differ_in_their_seed_are_summed_up(tmp_path):
    folders = []
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        config = {"method": {"name": "dare", "seed": seed}, "seed": seed, "output": str(seed)}
        write(Report("r", [row("dare", accuracy, accuracy)], config=config), tmp_path / f"{seed}" / "run")
        folders.append(tmp_path / f"{seed}" / "run")
    assert by_seed([read(folder).data for folder in folders]).keys() == {"dare"}
    assert by_seed([read(folder).data for folder in folders[:1] * 2]) == {}
    text = report(folders, tmp_path / "all.html").read_text("utf-8")
    assert "<h2>Over seeds</h2>" in text
    assert "<td>3</td><td>60.0 ± 24.8</td>" in text


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}" / "run").mkdir(parents=True)


def test_paths_of_the_machine_lose_their_beginning_and_nothing_else_changes():
    assert without_machine("suture a=/home/me/models/ties b=c/d") == "suture a=…/models/ties b=c/d"
    assert without_machine(r"C:\Users\me\models\ties") == "…/models/ties"
    assert without_machine({"/data/x/y.pt": ["file:///home/me/a b.pt", 3]}) == {"…/x/y.pt": ["…/me/a b.pt", 3]}
    for same in ("accuracy / expert", "https://arxiv.org/abs/1", "a/b", "~/models/x", "zoo:glyphs8/pretrained", "1/2"):
        assert without_machine(same) == same


def test_words_are_explained_where_they_stand():
    assert explained("gap closed").startswith('<dfn tabindex=0 title="(model − pretrained)')
    assert explained("<b>") == "&lt;b&gt;"
    name = explained_name("ties_merging + final, routed")
    assert name.count("<dfn") == 3
    assert re.sub("<[^>]*>", "", name) == "ties_merging + final, routed"
    assert "https://arxiv.org" in name
    assert "<wbr>" not in "".join(re.findall(r'title="[^"]*"', name))


def linear(colour):
    parts = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """https://bottosson.github.io/posts/oklab"""
    cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    axes = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    seen = torch.tensor(cones, dtype=torch.float64) @ rgb.clamp(0, 1)
    return torch.tensor(axes, dtype=torch.float64) @ seen.pow(1 / 3)


BLINDNESS = {  # Machado et al. 2009, severity 1
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_the_first_eight_colours_stay_apart_for_everybody(blindness):
    seen = torch.tensor(BLINDNESS[blindness], dtype=torch.float64)
    points = [oklab(seen @ linear(colour)) for colour in PALETTE[:8]]
    nearest = min((a - b).norm().item() for a, b in itertools.combinations(points, 2))
    assert nearest > 0.125


@pytest.mark.parametrize("background", ["#ffffff", "#14181d"])
def test_the_first_eight_colours_stand_out_from_both_backgrounds(background):
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    luminance = lambda colour: (weights @ linear(colour)).item() + 0.05
    for colour in PALETTE[:8]:
        low, high = sorted((luminance(colour), luminance(background)))
        assert high / low > 1.95, colour


def test_a_task_has_one_colour_on_the_whole_page(tmp_path):
    write(a_report(), tmp_path)
    run = read(tmp_path)
    palette = task_colours(run.data["tasks"])
    by_task = [each.chart for each in charts_of(run) if set(each.chart.legend) == set(TASKS)]
    assert by_task
    assert all(chart.legend == palette for chart in by_task)
    chips = re.findall(r'class=chip style="--colour:(#\w+)"', (tmp_path / "report.html").read_text("utf-8"))
    assert chips == list(palette.values())
    assert INK not in palette.values()


def test_many_tasks_are_told_apart_by_dashes_too(tmp_path):
    from suture.reporting.chart import dash_names, dashed

    names = [f"task {i}" for i in range(20)]
    dashes = [str(dash) for dash in dashed("task", names)["strokeDash"]["scale"]["range"]]
    assert len(set(zip(task_colours(names).values(), dashes, strict=True))) == 20
    assert set(dash_names(names).values()) == {"dashed", "dotted"}
    assert dashed("task", names[:8]) == {}


@pytest.fixture
def opened(browser, tmp_path):
    (tmp_path / "run").mkdir()
    write(a_report(), tmp_path / "run")
    visit(browser, tmp_path / "run" / "report.html")
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "file"), [("CSV", "table.csv"), ("LaTeX", "table.tex")])
def test_a_button_copies_the_table(browser, opened, name, file):
    browser.execute_script("document.execCommand = () => { window.copied = document.activeElement.value; return true }")
    browser.execute_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    button = browser.find_element("css selector", f'button.copy[data-text="{name}"]')
    button.click()
    browser.execute_async_script("const done = arguments[0]; setTimeout(done, 60)")
    assert button.text == "copied"
    assert browser.execute_script("return window.copied") == (opened / file).read_text("utf-8")


def test_a_switch_shows_the_intervals_of_every_task(browser, opened):
    small = browser.find_element("css selector", "#accuracy tbody td:nth-of-type(2) small")
    assert not small.is_displayed()
    browser.find_element("id", "intervals").click()
    assert small.is_displayed()
    assert small.text == "13.3–28.9"


def test_a_word_in_focus_shows_its_meaning(browser, opened):
    script = "const word = document.querySelector('thead dfn'); word.focus(); "
    script += "return getComputedStyle(word, '::after').content"
    assert "The unweighted mean over tasks" in browser.execute_script(script)


def test_the_axes_of_a_projection_name_their_variance(browser, opened):
    chart = figure(browser, "Final features")
    assert "axis 1: 30% of the variance" in chart.text
    choose(browser, chart.find_element("css selector", "select"), HOSTILE)
    assert "↑ axis 2: 20%" in chart.text
