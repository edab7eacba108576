"""The pictures of docs/gallery.md: python -m tools.gallery [NAME ...] makes them anew, each by its command.

All are of the zoo `glyphs8`. Without names all are made, which takes some minutes; a command that several pictures
share runs once.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from suture.cli.main import main as suture

IMAGES = Path(__file__).parent.parent / "docs" / "images"
_ZOO = "modelpool=glyphs8 taskpool=glyphs8"
_WEIGHTS = "modelpool=glyphs8 taskpool=null"
_REPAIR = f"method=task_arithmetic repair=deep repair.rank=64 repair.lr=0.003 {_ZOO}"
_FEATURES = f"method=task_arithmetic repair=final repair.compare=24 {_ZOO}"  # few points, for a small file
_ADAMERGING = f"method=lw_adamerging method.schedule=fast method.max_steps=60 {_ZOO}"
_STEPS = f"method=task_arithmetic repair=final repair.steps=500 repair.eval_iterations=50 {_ZOO}"

#: Picture → the arguments of suture that draw it, and its file below the output folder.
PICTURES: dict[str, tuple[str, str]] = {
    "demo": ("demo", "figures/accuracy.svg"),
    "accuracy_bars": (_REPAIR, "figures/accuracy.svg"),
    "accuracy_over": (
        f"-m method=task_arithmetic method.scaling_factor=0.2,0.5,0.8 {_ZOO}",
        "figures/accuracy_over_scaling_factor.svg",
    ),
    "expert_matrix": (f"evaluate matrix=true {_ZOO}", "figures/expert_matrix.svg"),
    "search": (f"search method=tsv_m method.alpha=0.5..1.5 trials=16 {_ZOO}", "figures/search.svg"),
    "coefficients": (_ADAMERGING, "figures/coefficients_lw_adamerging.svg"),
    "coefficients_over_steps": (_ADAMERGING, "figures/coefficients_over_steps_lw_adamerging.svg"),
    "objective_over_steps": (_ADAMERGING, "figures/objective_over_steps_lw_adamerging.svg"),
    "accuracy_over_steps": (_STEPS, "figures/accuracy_over_steps_task_arithmetic_final.svg"),
    "l1_by_layer": (_REPAIR, "figures/l1_by_layer_task_arithmetic_deep.svg"),
    "representation": (_FEATURES, "figures/representation_task_arithmetic_final.svg"),
    "similarity": (f"analyse similarity {_WEIGHTS}", "similarity.svg"),
    "layers": (f"analyse layers {_WEIGHTS}", "layers.svg"),
    "trimming": (f"analyse trimming threshold=20 {_WEIGHTS}", "trimming.svg"),
    "interpolation": (f"analyse interpolation points=0,0.25,0.5,0.75,1 {_ZOO}", "interpolation.svg"),
    "landscape": (f"analyse landscape models=latin,cyrillic {_ZOO}", "landscape.svg"),
    "bias": (f"analyse bias method=task_arithmetic {_ZOO}", "bias.svg"),
}


def make(names: list[str]) -> None:
    """Run the commands of these pictures and copy what they draw into docs/images."""
    with tempfile.TemporaryDirectory() as place:
        folders: dict[str, Path] = {}
        for name in names:
            command, file = PICTURES[name]
            if command not in folders:
                folders[command] = run(command, Path(place) / str(len(folders)))
            shutil.copyfile(folders[command] / file, IMAGES / f"{name}.svg")


def run(command: str, folder: Path) -> Path:
    """The output folder of a command; raises SystemExit where it fails."""
    verb, *words = command.split()
    output = ["--output", str(folder)] if verb == "demo" else [f"hydra.sweep.dir={folder}"] * (verb == "-m")
    if code := suture([verb, *words, *(output or [f"output={folder}"])]):
        raise SystemExit(code)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    make(parser.parse_args().names or list(PICTURES))
