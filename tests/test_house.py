"""Who may import whom, and how light `import suture` is."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import suture

ROOT = Path(suture.__file__).parent
#: The rooms from left to right: each imports only from floors to its left, never from a neighbour.
FLOORS = (
    ("errors",),
    ("core",),
    ("storage",),
    ("checkpoints",),
    ("merging", "tasks"),
    ("families", "adaptation"),
    ("evaluation", "repairs"),
    ("reporting",),
    ("analysis",),
    ("pipeline",),
    ("file_merge", "fusionbench"),
    ("zoo",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {
    *("torch", "numpy", "transformers", "hydra", "omegaconf", "matplotlib", "vl_convert", "sklearn"),
    *("pydantic", "rich", "huggingface_hub", "PIL"),
}
AT_HOME = {
    "hydra": ["pipeline/config.py", "pipeline/config_store.py"],
    "omegaconf": ["pipeline/config.py", "pipeline/pool_files.py"],
    "lightning_fabric": ["core/"],
    "transformers": ["families/"],
    "matplotlib": [],
    "vl_convert": ["reporting/"],
    "datasets": ["tasks/"],
    "h5py": ["tasks/"],
    "fsspec": ["storage/"],
    "scipy": ["tasks/"],
}


def imports(path):
    """What a file imports, wherever in it: modules, and the names taken from each."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def rooms_entered(path):
    """The rooms that a file imports from."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "suture" and len(parts) > 1 and parts[1] != "__version__":
            yield parts[1]


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.name == "errors.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_from_rooms_to_its_left(path):
    own = room_of(path)
    for entered in set(rooms_entered(path)) - {own}:
        assert entered in FLOOR_OF, f"{path} imports {entered}, which is no room"
        assert FLOOR_OF[entered] < FLOOR_OF[own], f"{path}: {own} imports {entered}"


def file_of(name):
    """The file that a module, or a name taken from one, comes from; None outside of suture."""
    parts = name.split(".")
    if parts[0] != "suture":
        return None
    candidates = [ROOT.joinpath(*parts[1:length]) for length in range(len(parts), 1, -1)]
    files = [file for path in candidates for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def test_no_files_import_each_other_in_a_circle():
    graph = {path: {file_of(name) for name in imports(path)} - {None, path} for path in FILES}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_nothing_lies_flat_but_the_errors():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py", "errors.py"]


def test_a_library_is_imported_in_its_own_room_only():
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for imported in {module.split(".")[0] for module in imports(path)} & set(AT_HOME):
            assert any(name.startswith(home) for home in AT_HOME[imported]), f"{name} imports {imported}"


def test_a_method_imports_nothing_of_ours_but_its_neighbours():
    for path in (ROOT / "merging" / "methods").glob("*.py"):
        assert set(rooms_entered(path)) <= {"errors", "core", "merging"}, path


def test_importing_suture_imports_nothing_heavy():
    program = f"import sys, suture; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_sorted_and_exist():
    assert sorted(suture.__all__) == suture.__all__
    assert all(hasattr(suture, name) for name in suture.__all__)


def test_no_room_gives_a_name_of_one_of_its_files_to_something_else():
    for init in ROOT.rglob("__init__.py"):
        files = {path.stem for path in init.parent.glob("*.py")}
        for node in ast.parse(init.read_text("utf-8")).body:
            taken = {alias.asname or alias.name for alias in getattr(node, "names", ())} & files
            assert not taken, f"{init} takes {taken}, which are files beside it"
