"""The documentation is tried: its Python runs, its commands compose, and the site builds without a warning."""

import importlib.util
import re
import shlex
import subprocess
import sys
from inspect import getdoc, ismodule
from pathlib import Path

import pytest
import small_zoo

import suture
from suture.cli.main import main
from suture.cli.verbs import VERBS
from suture.merging.registry import methods
from suture.pipeline import config
from suture.pipeline.config_store import with_own_knobs
from suture.pipeline.methods import all_methods
from suture.pipeline.settings import Settings
from suture.repairs import repair_kinds

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = [
    (page.name, block)
    for page in PAGES
    if page.name not in ("tutorial.md", "berts.md", "adapters.md", "extending.md")  # tests of their own, and below
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    if "from nets import" not in block and "suture.push(" not in block  # test_own.py, test_pushing.py
]
PROSE = [*(page for page in PAGES if page.name != "benchmarks.md"), ROOT / "README.md"]  # there are printed tables
LINES = [
    (page.name, line) for page in PROSE for line in re.findall(r"^    suture (.*)$", page.read_text("utf-8"), re.M)
]
COMMANDS = list({line: (name, line) for name, line in LINES if "…" not in line}.values())


def kind(line):
    """The verb, the analysis, the method and the repair of a command."""
    return tuple(word for word in line.split() if "=" not in word or re.match(r"(method|repair|surgery|matrix)=", word))


#: Commands of each kind that are run as they stand, but made short; others like them are only composed.
ON_THE_ZOO = {
    kind(line): (name, line)
    for name, line in COMMANDS
    if "glyphs8" in line and not line.startswith(("-m", "zoo")) and "weights=[" not in line and name != "tutorial.md"
}


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_in_the_docs_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [([f"method={name}", "fast_dev_run=true"], ()) for name in ("simple_average", "task_arithmetic")]
    monkeypatch.setattr("suture.pipeline.demo._SHORT", short)  # instead of a minute
    exec(compile(block, page, "exec"), {})


def test_the_extensions_in_the_docs_run(tmp_path):
    """In a process of their own, as they register a method, a repair and an analysis."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text("utf-8"), re.S)
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert len(blocks) == 4
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "analysis").iterdir()} == {
        f"largest_entry.{kind}" for kind in ("json", "csv", "png", "svg")
    }


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_in_the_docs_are_known(page, line):
    arguments = shlex.split(re.sub(r" [>#].*", "", line))
    verb = arguments.pop(0) if arguments and "=" not in arguments[0] and not arguments[0].startswith("-") else "run"
    arguments = [word for word in arguments if not word.startswith("--")]
    if verb == "merge":
        config.compose_merging(arguments)
    elif verb in ("run", "check", "evaluate", "analyse"):
        own = ("points=", "models=", "threshold=", "scope=", "model=", "matrix=", "-m")
        arguments = arguments[verb == "analyse" :]
        if not any(name in line for name in ("real3", "mine.yaml", "models.yaml", "base=")):
            composed(word for word in arguments if not word.startswith(own))
    else:
        assert verb in VERBS


def composed(arguments):
    """Compose and check the first of the runs that the arguments ask for."""
    arguments = [re.sub(r"=([^\[{]*?),.*", r"=\1", word) for word in with_own_knobs(list(arguments))]
    default = [] if any(word.startswith("method=") for word in arguments) else ["method=simple_average"]
    Settings.from_config(config.compose([*default, *arguments]))


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    return small_zoo.write_pools(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize(("page", "line"), ON_THE_ZOO.values())
def test_commands_on_the_zoo_run(page, line, pools, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(small_zoo.shortened(line, pools)) == 0
    assert capsys.readouterr().out


def test_there_is_something_to_try():
    assert len(BLOCKS) >= 3
    assert len(COMMANDS) >= 50
    assert len(ON_THE_ZOO) >= 12


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="pip install 'suture[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "site" / "methods" / "ties_merging" / "index.html").exists()


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("mkdocs", reason="pip install 'suture[docs]'")
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "docs" / "method_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_and_repair_has_its_formula_cost_and_knobs(pages):
    made = {name: pages.method_page(method) for name, method in all_methods().items()}
    made |= {f"repair={kind}": pages.repair_page(kind) for kind in repair_kinds()}
    assert all("## Knobs" in page or "no knobs" in page for page in made.values())
    for name, formula in pages.FORMULAS.items():
        assert "## What it costs" in made[name], name
        assert f"    {formula.splitlines()[0]}" in made[name], name


def test_every_public_name_has_an_entry_in_the_reference():
    entries = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M))
    for name in set(suture.__all__) - {"__version__"}:
        public = getattr(suture, name)
        paths = (
            [public.__name__] if ismodule(public) else [f"{public.__module__}.{public.__qualname__}", public.__module__]
        )
        assert entries & set(paths), name


@pytest.mark.parametrize("name", [name for name in suture.__all__ if ismodule(getattr(suture, name))])
def test_a_public_module_is_there_in_a_process_that_has_imported_nothing_else(name):
    subprocess.run([sys.executable, "-c", f"import suture; suture.{name}.__doc__"], check=True, timeout=60)


def test_every_public_name_has_an_example_that_a_test_runs():
    code = [
        block
        for page in [*PAGES, ROOT / "README.md"]
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    ]
    used = set(re.findall(r"(?:\bsuture\.|^@)(\w+)", "\n".join(code), re.M))
    public = {name: getattr(suture, name) for name in set(suture.__all__) - {"__version__"}}
    used |= {name for name, value in public.items() if ">>>" in (getdoc(value) or "")}
    used |= {name for name, value in public.items() if ismodule(value)}  # their functions have examples
    assert sorted(set(public) - used) == []


def test_methods_are_shown_beside_the_published_results(pages):
    shown = [name for name, method in methods().items() if "| published |" in pages.method_page(method)]
    assert shown == ["breadcrumbs", "model_stock", "sce", "simple_average", "slerp", "task_arithmetic", "ties_merging"]
    for name in shown:
        difference = re.search(r"largest difference of an entry is ([\d.e+-]+\d)", pages.method_page(methods()[name]))
        assert float(difference[1]) < 1e-6, name
    assert "| C-ties | 72.2 |" in pages.method_page(methods()["ties_merging"])
