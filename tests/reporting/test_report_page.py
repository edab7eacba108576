"""report.html in a browser: it opens without a word on the console, answers to a pointer, and fits a phone."""

import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from desk import refused
from pages import HOSTILE, TASKS, a_report
from PIL import Image

from suture.cli.main import main
from suture.evaluation import Row
from suture.reporting import Report, report, write
from suture.reporting.figures import chart_of_run
from suture.reporting.points import points_of

SETTLED = """
const done = arguments[arguments.length - 1];
const painted = () => requestAnimationFrame(() => requestAnimationFrame(() => done("")));
window.drawn.then(painted, (error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(a_report(), folder)
    return folder


def left(report, folder):
    """What a run leaves of a report, but for the figures."""
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report.as_data()))
    (folder / "figures.json").write_text(json.dumps(points_of(report)))
    return folder


def visit(browser, page, *, width=1100, scheme="light"):
    """Open a page; nothing may be said on the console, and nothing asked of the network."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    assert browser.execute_async_script(SETTLED) == ""
    quiet(browser)


def quiet(browser):
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return window.harmed") is None


def shot(browser):
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"), dtype=float)


def figure(browser, title):
    found = [f for f in browser.find_elements("css selector", ".panel:not([hidden]) figure") if title in f.text]
    assert len(found) == 1, title
    return found[0]


def marks(browser, figure):
    """Where and how the marks of a chart are drawn."""
    return [
        (p.get_attribute("d"), p.get_attribute("transform")) for p in figure.find_elements("css selector", "svg path")
    ]


def choose(browser, select, option):
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    browser.execute_script(script, select, option)
    browser.execute_async_script("const done = arguments[0]; setTimeout(done, 120)")


def test_every_chart_is_drawn_and_nothing_is_said(browser, run):
    visit(browser, run / "report.html")
    figures = browser.find_elements("css selector", ".panel:not([hidden]) figure")
    titles = [f.find_element("css selector", "figcaption").text for f in figures]
    expected = [
        *("Accuracy by task", "Accuracy against scaling factor λ", "Every model on every task, accuracy in %"),
        *("Coefficients over steps", "Coefficients by layer and task", "Objective over steps", "Accuracy over steps"),
        *("Accuracy over steps", "Distance to the experts by layer", "Final features"),
    ]
    assert [title for title in titles if title in expected] == expected  # a new figure needs no line here
    assert all(len(f.find_elements("css selector", "svg path")) > 3 for f in figures)
    assert "NaN" not in browser.find_element("css selector", "body").text


def test_names_that_mean_harm_are_text(browser, run):
    visit(browser, run / "report.html")
    names = [cell.text for cell in browser.find_elements("css selector", "#accuracy tbody th")]
    assert names == ["pretrained", "experts", HOSTILE, f"{HOSTILE} + final"]
    assert HOSTILE in browser.title
    assert browser.find_element("class name", "command").text == "suture method=ties_merging output='<b>'"


def test_a_click_on_a_head_sorts(browser, run):
    visit(browser, run / "report.html")
    column = [cell.text for cell in browser.find_elements("css selector", "#accuracy thead th")].index("mean")
    button = browser.find_elements("css selector", "#accuracy thead button")[column]
    cells = f"#accuracy tbody td:nth-of-type({column})"
    values = lambda: [float(cell.text.split()[0]) for cell in browser.find_elements("css selector", cells)]
    for direction, reverse in (("descending", True), ("ascending", False)):
        button.click()
        assert values() == sorted(values(), reverse=reverse)
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == direction


@pytest.mark.parametrize(
    ("title", "parameter", "option"),
    [
        ("Accuracy by task", "measure", "gap closed (%)"),
        ("Distance to the experts", "task", TASKS[1]),
        ("Distance to the experts", "measure", "linear CKA to the expert"),
        ("Final features", "task", HOSTILE),
    ],
)
def test_a_selector_changes_what_is_drawn(browser, run, title, parameter, option):
    visit(browser, run / "report.html")
    chart = figure(browser, title)
    before = marks(browser, chart)
    choose(browser, chart.find_element("css selector", f"select[name={parameter}]"), option)
    after = marks(browser, chart)
    assert len(after) > 3
    assert before != after
    quiet(browser)


def test_a_name_that_is_picked_in_the_legend_stands_out(browser, run):
    visit(browser, run / "report.html")
    chart = figure(browser, "Final features")
    faint = lambda: len(chart.find_elements("css selector", 'svg path[opacity="0.06"]'))
    assert faint() == 0
    button = chart.find_element("css selector", ".legend button")
    for expected in (40, 0):
        browser.execute_script("arguments[0].click()", button)
        browser.execute_async_script("const done = arguments[0]; setTimeout(done, 120)")
        assert faint() == expected  # the 20 points of each of the two others
    quiet(browser)


def test_another_panel_is_drawn_when_it_is_chosen(browser, run):
    visit(browser, run / "report.html")
    select = browser.find_elements("css selector", "select.panels")[-1]
    choose(browser, select, "ties + deep")
    browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    chart = figure(browser, "Final features")
    assert "deep: 64 parameters added" in browser.find_element("css selector", "main").text
    assert len(marks(browser, chart)) > 60
    quiet(browser)


@pytest.mark.parametrize("width", [1100, 390])
def test_both_themes_show_something_and_differ(browser, run, width):
    pictures = {}
    for scheme in ("light", "dark"):
        visit(browser, run / "report.html", width=width, scheme=scheme)
        pictures[scheme] = shot(browser)
        assert pictures[scheme].std() > 5
    assert pictures["light"].mean() > 180 > 80 > pictures["dark"].mean()
    browser.find_element("id", "theme").click()
    assert shot(browser).mean() > 180


@pytest.mark.parametrize("page", ["report.html", "still.html"])
def test_nothing_is_wider_than_a_phone(browser, run, page):
    report([run], run / "still.html", interactive=False)
    visit(browser, run / page, width=390)
    widths = browser.execute_script("return [document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(widths) <= 390


def on_tasks(count, folder):
    """A finished run on so many tasks, with names of a usual length."""
    tasks = [f"data-set_{i:02}" for i in range(count)]
    scores = lambda share: {task: share + 0.01 * (i % 9) for i, task in enumerate(tasks)}
    made = lambda name, share, **kind: Row(name, scores(share), dict.fromkeys(tasks, 100), seconds=1.5, **kind)
    rows = [made("pretrained", 0.1, role="pretrained"), made("experts", 0.9, role="experts")]
    rows += [made("lw_adamerging", 0.6), made("lw_adamerging + final, routed", 0.5, learned="modules of rank 16")]
    matrix = [made(task, 0.9 * i / count) for i, task in enumerate(tasks)]
    return left(Report("a run", rows, rows[0], rows[1], matrix=matrix), folder)


EDGES = """
const edges = (cell) => { const { left, right } = cell.getBoundingClientRect(); return [left, right]; };
return [...document.querySelector("#accuracy tbody tr:last-child").cells].slice(0, 3).map(edges);
"""


def test_eight_tasks_fit_a_laptop_and_with_twenty_name_and_mean_stay_in_sight(browser, tmp_path):
    visit(browser, report([on_tasks(8, tmp_path / "8")], tmp_path / "8.html"), width=1280)
    wide = "const box = document.getElementById('accuracy').parentElement; "
    assert browser.execute_script(f"{wide} return box.scrollWidth - box.clientWidth") == 0
    for width in (390, 1280):
        visit(browser, report([on_tasks(20, tmp_path / f"20-{width}")], tmp_path / f"{width}.html"), width=width)
        name, mean, first = browser.execute_script(EDGES)
        assert name[0] >= 0
        assert mean == pytest.approx([name[1], first[0]], abs=1)  # nothing is covered at first
        browser.execute_script(f"{wide} box.scrollLeft = 500")
        assert browser.execute_script(EDGES)[:2] == [name, mean]
        assert mean[1] < 0.6 * width


def test_what_each_model_takes_is_a_table_of_its_own_that_sorts(browser, tmp_path):
    visit(browser, report([on_tasks(3, tmp_path / "run")], tmp_path / "page.html"))
    table = browser.find_elements("css selector", "table.sortable")[1]
    lines = lambda: [row.text for row in table.find_elements("css selector", "tbody tr")]
    heads = [head.text for head in table.find_elements("css selector", "thead th")]
    assert heads == ["model", "learned", "seconds"]  # what is known of any
    assert lines() == ["lw_adamerging – 1.5", "lw_adamerging + final, routed modules of rank 16 1.5"]
    button = table.find_elements("css selector", "thead button")[1]
    button.click()
    button.click()
    assert lines()[0].startswith("lw_adamerging + final")


def test_the_last_number_of_an_axis_is_written_on_a_phone(browser, run):
    visit(browser, run / "report.html", width=390)
    numbers = figure(browser, "Accuracy by task").find_elements("css selector", "svg .role-axis-label text")
    assert {"0", "100"} <= {number.text for number in numbers}


def test_numbers_in_cells_can_be_read(tmp_path):
    picture = ElementTree.fromstring(chart_of_run(on_tasks(8, tmp_path / "run"), "expert_matrix").svg())
    marks = lambda kind: [g for g in picture.iter() if f"mark-{kind} role-mark" in g.get("class", "")][-1]
    cells = [luminance(path.get("fill")) for path in marks("rect")]
    letters = [{"white": 1.0, "black": 0.0}[text.get("fill")] for text in marks("text")]
    assert len(cells) == len(letters) == 64
    assert len(set(letters)) == 2
    assert min((max(pair) + 0.05) / (min(pair) + 0.05) for pair in zip(cells, letters, strict=True)) > 4.4


def luminance(colour):
    """The relative luminance of rgb(…), as WCAG has it."""
    parts = np.array([int(part) / 255 for part in re.findall(r"\d+", colour)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


def test_a_still_page_has_the_pictures(browser, run):
    visit(browser, report([run], run / "still.html", interactive=False))
    sizes = browser.execute_script("return [...document.images].map((image) => image.naturalWidth)")
    assert len(sizes) == len(list((run / "figures").glob("*.svg")))
    assert min(sizes) > 100


def test_runs_side_by_side(browser, tmp_path):
    folders = [left(a_report("one", factor), tmp_path / str(factor)) for factor in (0.1, 0.3)]
    visit(browser, report(folders, tmp_path / "both.html"))
    names = [cell.text for cell in browser.find_elements("css selector", "#accuracy tbody th")]
    assert len(names) == 6  # the references come once
    assert names[2] == f"{HOSTILE} scaling_factor=0.1"
    assert names[4] == f"{HOSTILE} scaling_factor=0.3"
    assert len(browser.find_elements("css selector", "details.run")) == 2
    assert "method.scaling_factor" in browser.find_element("css selector", "main").text
    figure(browser, "Accuracy against scaling factor")


def test_the_page_is_made_anew_from_a_finished_folder(desk, capsys):
    assert main(desk.words()) == 0
    page = (desk.folder / "out" / "report.html").read_text("utf-8")
    (desk.folder / "out" / "report.html").unlink()
    assert main(["report", "out"]) == 0
    assert (desk.folder / "out" / "report.html").read_text("utf-8") == page
    assert main(["report", "out", "out", "--output=two.html", "--still"]) == 0
    assert "<img" in (desk.folder / "two.html").read_text("utf-8")


def test_what_is_no_run_is_refused(desk, capsys):
    assert "no report.json" in refused(capsys, ["report", "nowhere"])
    assert "RUN is missing" in refused(capsys, ["report"])
    assert "'--output'" in refused(capsys, ["report", "--outptu=x", "y"])
    (desk.folder / "report.json").write_text("{}")
    assert "not what a run leaves" in refused(capsys, ["report", "."])


def test_runs_on_other_tasks_are_not_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        left(a_report(), tmp_path / name)
    data = json.loads((tmp_path / "two" / "report.json").read_text())
    (tmp_path / "two" / "report.json").write_text(json.dumps({**data, "tasks": ["flowers"]}))
    assert "scored on flowers" in refused(capsys, ["report", "one", "two"])
