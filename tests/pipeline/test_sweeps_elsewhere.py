"""Sweeps whose jobs are processes of a launcher: the table of one process, and nothing done twice."""

import json
import os
import subprocess
import sys

import pytest

from suture.cli.main import main
from suture.storage.cache import making, once

pytestmark = pytest.mark.filterwarnings("ignore")
DYING = """
import os, sys, threading
if "submitit.core._submit" in " ".join(sys.orig_argv):
    try:
        os.close(os.open(os.environ["DIES_ONCE"], os.O_CREAT | os.O_EXCL))
        threading.Timer(1, os._exit, [9]).start()
    except FileExistsError:
        pass
"""

DYING_MIDWAY = """
import json, os, pathlib, sys, threading, time
command = " ".join(sys.orig_argv)
def die():
    while True:
        time.sleep(0.05)
        done = [p for p in pathlib.Path(os.environ["SWEEP"]).glob("[0-9]*/report.json")]
        if len(done) >= 10:
            try:
                file = os.open(os.environ["DIES_ONCE"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return
            os.write(file, json.dumps({str(path): path.stat().st_mtime_ns for path in done}).encode())
            os._exit(9)
if "submitit.core._submit" in command or "default_worker.py" in command:
    threading.Thread(target=die, daemon=True).start()
"""


def rows(folder):
    reports = sorted(folder.glob("[0-9]*/report.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text())["rows"] for path in reports]


def without_seconds(tables):
    return [[{key: value for key, value in row.items() if key != "seconds"} for row in table] for table in tables]


def words(desk, folder, *more):
    ours = [word for word in desk.words(method="task_arithmetic") if not word.startswith("output=")]
    if not any(word.startswith("method.scaling_factor=") for word in more):
        ours.append("method.scaling_factor=0.1,0.2,0.3")
    return ["run", "-m", *ours, f"hydra.sweep.dir={folder}", *more]


def test_what_two_ask_for_is_made_once(tmp_path):
    code = "import sys, time; from pathlib import Path; from suture.storage.cache import once\n"
    code += "def make():\n time.sleep(0.5); open('made', 'a').write('x'); return 'text'\n"
    code += "assert once(Path('cache/key.json'), make) == 'text'"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"
    with making(tmp_path / "cache" / "key.json"):
        assert once(tmp_path / "cache" / "key.json", lambda: pytest.fail("made again")) == "text"


def test_a_second_run_takes_the_references_from_the_cache(desk, monkeypatch):
    assert main(words(desk, "first")) == 0
    monkeypatch.setattr("suture.pipeline.scoring._score_references", lambda *a: pytest.fail("scored again"))
    assert main(words(desk, "second")) == 0
    assert without_seconds(rows(desk.folder / "first")) == without_seconds(rows(desk.folder / "second"))


def test_a_sweep_through_submitit_resumes_after_a_killed_worker(desk, monkeypatch, capsys):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'suture[submitit]'")
    two = "method.scaling_factor=0.1,0.2"
    assert main(words(desk, "here", two)) == 0
    (desk.folder / "dying").mkdir()
    (desk.folder / "dying" / "sitecustomize.py").write_text(DYING)
    environment = {
        "DIES_ONCE": str(desk.folder / "dead"),
        "PYTHONPATH": f"{desk.folder}/dying:{os.environ.get('PYTHONPATH', '')}",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    there = words(desk, "there", two, "hydra/launcher=submitit_local")
    assert main(there) == 2
    assert "A job of the sweep was lost" in capsys.readouterr().err
    first = {path: path.stat().st_mtime_ns for path in (desk.folder / "there").glob("[0-9]*/report.json")}
    assert main(there) == 0
    assert (desk.folder / "dead").exists()
    assert all(path.stat().st_mtime_ns == changed for path, changed in first.items())
    assert without_seconds(rows(desk.folder / "there")) == without_seconds(rows(desk.folder / "here"))


@pytest.mark.slow
def test_a_sweep_on_ray_has_the_same_table(desk):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install 'suture[ray]'")
    assert main(words(desk, "here")) == 0
    assert main(words(desk, "there", "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")) == 0
    assert without_seconds(rows(desk.folder / "there")) == without_seconds(rows(desk.folder / "here"))


LAUNCHERS = {
    "submitit": ["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=2"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_of_24_jobs_with_a_worker_killed_midway_has_the_same_table_and_does_nothing_twice(
    desk, monkeypatch, launcher
):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher", reason=f"pip install 'suture[{launcher}]'")
    factors = f"method.scaling_factor={','.join(str(i / 24) for i in range(1, 25))}"
    here, there = (words(desk, folder, factors) for folder in ("here", "there"))
    assert main(here) == 0
    (desk.folder / "dying").mkdir()
    (desk.folder / "dying" / "sitecustomize.py").write_text(DYING_MIDWAY)
    environment = {
        "SUTURE_CACHE": str(desk.folder / "cache"),
        "SWEEP": str(desk.folder / "there"),
        "DIES_ONCE": str(desk.folder / "dead"),
        "PYTHONPATH": f"{desk.folder}/dying:{os.environ.get('PYTHONPATH', '')}",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if launcher == "ray":
        import ray

        ray.shutdown()  # the workers of another test have its environment
    there += LAUNCHERS[launcher]
    assert main(there) == 0 or main(there) == 0  # Ray starts a lost job again by itself
    done = json.loads((desk.folder / "dead").read_text())
    assert len(done) >= 10
    assert all(os.stat(path).st_mtime_ns == changed for path, changed in done.items())
    assert len(list((desk.folder / "cache" / "references").glob("*.json"))) == 1
    assert len(rows(desk.folder / "there")) == 24
    assert without_seconds(rows(desk.folder / "there")) == without_seconds(rows(desk.folder / "here"))
