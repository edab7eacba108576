"""A report with everything in it and with names that mean harm, and a browser to open its page in."""

import shutil

import pytest
import torch

from suture.adaptation import AdaMergingResult, Coefficients
from suture.evaluation import Row
from suture.repairs import Distances, RepairResult, Representation, SurgeryModel, SurgeryModules
from suture.repairs.network import FINAL
from suture.repairs.problem import ForwardPasses
from suture.reporting import Report

HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>"
TASKS = ("cars & vans", 'the "best"', HOSTILE)
LAYERS = tuple(f"vision_model.layers.{i}.weight" for i in range(4))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def row(name, *accuracies, **kind):
    return Row(name, dict(zip(TASKS, accuracies, strict=True)), dict.fromkeys(TASKS, 100), **kind)


def representation(generator):
    places = ("blocks.0", "blocks.1", "(features)")
    numbers = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    distances = lambda: Distances(numbers(3, 3), numbers(3, 3))
    scatter = {task: {side: numbers(20, 2) for side in ("merged", "repaired", "expert")} for task in TASKS}
    return Representation(TASKS, places, distances(), distances(), scatter, dict.fromkeys(TASKS, (0.3, 0.2)))


def a_report(title=f"a run of {HOSTILE}", scaling_factor=0.3):
    generator = torch.Generator().manual_seed(0)
    history = torch.rand(6, 3, 4, generator=generator)
    named, losses = Coefficients(history[-1], TASKS, LAYERS), torch.rand(5, generator=generator)
    learned = AdaMergingResult(named, history, losses, {}, {2: 0.4, 5: 0.6})
    repair = lambda kind: RepairResult(
        kind,
        SurgeryModel(torch.nn.Linear(2, 2), {FINAL: SurgeryModules(TASKS, 2, 1)}, TASKS),
        torch.tensor([[1.0] * len(TASKS), [0.5] * len(TASKS)]),
        added_parameters=64,
        passes=ForwardPasses(30, 30),
        warnings=("a module is dead",),
        scores={1: 0.5, 2: 0.7},
        representation=representation(generator),
    )
    rows = [
        row("pretrained", 0.2, 0.3, 0.4, role="pretrained"),
        row("experts", 0.9, 0.8, 1.0, role="experts"),
        row(HOSTILE, 0.5, 0.4, 0.9),
        row(f"{HOSTILE} + final", 0.6 + scaling_factor / 10, 0.7, 0.8, role="repair", merge=HOSTILE, repair="final"),
    ]
    return Report(
        title,
        rows,
        rows[0],
        rows[1],
        config={"method": {"name": "ties_merging", "scaling_factor": scaling_factor}, "repair": {"kind": "none"}},
        provenance={"inputs": {HOSTILE: "sha"}},
        profile={"merging weights": 1.0, "evaluation": 3.0},
        notes=[f"note of {HOSTILE}"],
        command="suture method=ties_merging output='<b>'",
        curves={"scaling_factor": {"ties_merging": {0.1: 0.5, 0.3: 0.6}}},
        learning={HOSTILE: learned},
        repairs={f"{HOSTILE} + final": repair("final"), "ties + deep": repair("deep")},
        matrix=[row(task, 0.9, 0.4, 0.2) for task in TASKS],
    )


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, which keeps what it says on its console."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()
