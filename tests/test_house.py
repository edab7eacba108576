"""Who may import whom, and how light `import suture` is."""

import ast
import subprocess
import sys
from pathlib import Path

import suture

ROOT = Path(suture.__file__).parent
HEAVY = {"transformers", "hydra", "omegaconf", "matplotlib", "sklearn", "pydantic", "rich", "huggingface_hub", "PIL"}
AT_HOME = {
    "hydra": ["config.py"],
    "omegaconf": ["config.py"],
    "transformers": ["families/", "zoo/"],
    "matplotlib": ["report/", "zoo/"],
    "datasets": ["tasks/"],
    "h5py": ["tasks/"],
    "scipy": ["tasks/"],
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_a_library_is_imported_in_its_own_room_only():
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for imported in {module.split(".")[0] for module in imports(path)} & set(AT_HOME):
            assert any(name.startswith(home) for home in AT_HOME[imported]), f"{name} imports {imported}"


def test_a_method_imports_nothing_of_ours_but_its_neighbours():
    for path in (ROOT / "methods").glob("*.py"):
        ours = {module for module in imports(path) if module.startswith("suture")}
        assert all(
            module in ("suture.errors", "suture.knobs") or module.startswith("suture.methods") for module in ours
        ), path


def test_importing_suture_imports_nothing_heavy():
    program = f"import sys, suture; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_sorted_and_exist():
    assert sorted(suture.__all__) == suture.__all__
    assert all(hasattr(suture, name) for name in suture.__all__)
