"""Merge eight ViT-B/32-sized checkpoints: suture against the textbook TIES and against plain reading and writing.

    python benchmarks/merge.py [--folder DIR] [--repeats 3] [--models 8] [--scale 1.0] [--matrices [METHOD ...]]

The checkpoints are made on the spot (vision tower of CLIP ViT-B/32, 87 M parameters, float32, random weights). Every
measurement is a process of its own: wall time of the work (imports excluded) and the peak of its anonymous memory above
what the imports took. Files are read from the page cache in all of them. --matrices measures the methods on whole
matrices instead (all but wudi, or those named), beside TIES.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from watching import measure

from suture.checkpoints import allocate_checkpoint
from suture.merging.compiled.loading import SWITCH
from suture.merging.merge import merge_task_vectors
from suture.merging.registry import get_method, methods
from suture.merging.task_vectors import open_task_vectors


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """The tensors of CLIP ViT-B/32's vision tower."""
    width, layers = int(768 * scale), 12
    found = {"class_embedding": (width,), "patch.weight": (width, 3, 32, 32), "position.weight": (50, width)}
    for name in ("pre_norm", "post_norm", *(f"{i}.norm{j}" for i in range(layers) for j in (1, 2))):
        found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for i in range(layers):
        for name, rows, columns in [
            *((f"{p}_proj", width, width) for p in "qkvo"),
            ("fc1", 4 * width, width),
            ("fc2", width, 4 * width),
        ]:
            found |= {f"{i}.{name}.weight": (rows, columns), f"{i}.{name}.bias": (rows,)}
    return found


def make(folder: Path, models: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes(scale).items()}
    save_file(base, folder / "base.safetensors")
    for i in range(models):
        tuned = {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in base.items()}
        save_file(tuned, folder / f"model_{i}.safetensors")


def suture(folder: Path, method: str, device: str = "cpu") -> None:
    """What `suture` runs: memory-mapped in, streamed, memory-mapped out."""
    chosen = get_method(method)
    models = {path.stem: path for path in sorted(folder.glob("model_*.safetensors"))}
    vectors = open_task_vectors(folder / "base.safetensors", models, device=device)
    with allocate_checkpoint(vectors.specs, folder / "merged.safetensors") as out:
        merge_task_vectors(vectors, chosen, chosen.knobs.validate({}), out)


def plainly(folder: Path, method: str) -> None:
    """The same without the compiled loops."""
    os.environ[SWITCH] = "0"
    suture(folder, method)


def textbook_ties(folder: Path) -> None:
    """The published way: flatten every model, stack, kthvalue, elect, disjoint sum, and back to a state dict."""
    base = load_file(folder / "base.safetensors")
    flatten = lambda state: torch.nn.utils.parameters_to_vector([state[name] for name in sorted(state)])
    flat = flatten(base)
    rows = torch.vstack([flatten(load_file(path)) for path in sorted(folder.glob("model_*.safetensors"))]) - flat
    kept = int(rows.shape[1] * 0.2)
    thresholds = rows.abs().kthvalue(rows.shape[1] - kept, dim=1, keepdim=True).values
    rows = rows * (rows.abs() >= thresholds)
    side = torch.sign(rows.sum(0))
    side[side == 0] = torch.sign(side.sum())
    agrees = torch.where(side > 0, rows > 0, rows < 0)
    merged = flat + 0.3 * (rows * agrees).sum(0)
    state = {name: base[name].clone() for name in sorted(base)}
    torch.nn.utils.vector_to_parameters(merged, list(state.values()))
    save_file({n: w.contiguous() for n, w in state.items()}, folder / "merged.safetensors")


def plain_io(folder: Path) -> None:
    """Read every byte of the inputs once into one buffer, and write as many bytes as the result has."""
    buffer = bytearray(1 << 24)
    for path in [folder / "base.safetensors", *folder.glob("model_*.safetensors")]:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    size = (folder / "base.safetensors").stat().st_size
    with open(folder / "merged.safetensors.tmp", "wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(buffer[: min(len(buffer), size - start)])
        file.flush()
        os.fsync(file.fileno())


WORK = {
    "plain input and output": plain_io,
    "suture simple_average": lambda folder: suture(folder, "simple_average"),
    "suture task_arithmetic": lambda folder: suture(folder, "task_arithmetic"),
    "suture dare": lambda folder: suture(folder, "dare"),
    "suture ties_merging": lambda folder: suture(folder, "ties_merging"),
    "ties without the loops": lambda folder: plainly(folder, "ties_merging"),
    "ties, device=cuda": lambda folder: suture(folder, "ties_merging", "cuda"),
    "textbook ties": textbook_ties,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--scale", type=float, default=1.0, help="width relative to ViT-B/32")
    parser.add_argument("--matrices", nargs="*", metavar="METHOD")
    parser.add_argument(
        "--only", nargs="*", choices=list(WORK), help="measure these alone, with plain input and output"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = WORK.get(options.one) or (lambda folder: suture(folder, options.one.removeprefix("suture ")))
        print(json.dumps(measure(lambda: work(options.folder))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make(Path(folder), options.models, options.scale)
        if options.matrices is None:
            compare(Path(folder), options.repeats, options.only)
        else:
            compare_matrices(Path(folder), options.repeats, options.matrices)


def measured(folder: Path, repeats: int, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """The runs of each piece of work, printed as their median."""
    command = [sys.executable, __file__, "--folder", str(folder), "--one"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:  # interleaved, so that a noisy minute hits all of them
            done = subprocess.run([*command, name], capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
    size = (folder / "base.safetensors").stat().st_size
    print(f"model size {size / 1e6:.0f} MB; median of {repeats} (min – max)")
    for name, each in runs.items():
        seconds = [run["seconds"] for run in each]
        memory = statistics.median(run["memory"] for run in each)
        spread = f"{statistics.median(seconds):7.2f} s ({min(seconds):.2f} – {max(seconds):.2f})"
        used = statistics.median(run["processor"] for run in each)
        print(f"{name:24s} {spread}   {used:6.2f} processor seconds   {memory / size:5.2f} model sizes")
    return runs


def ratio(runs: dict[str, list[dict[str, float]]], one: str, other: str) -> float:
    """How much longer one piece of work took than another in the same round."""
    return statistics.median(x["seconds"] / y["seconds"] for x, y in zip(runs[one], runs[other], strict=True))


def compare(folder: Path, repeats: int, only: Sequence[str] | None) -> None:
    names = [
        name
        for name in ([*dict.fromkeys(["plain input and output", *only])] if only else WORK)
        if torch.cuda.is_available() or "cuda" not in name
    ]
    print(f"on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'the CPU, no GPU'}")
    runs = measured(folder, repeats, names)
    for name in names:
        print(f"{name} / plain input and output: {ratio(runs, name, 'plain input and output'):.2f}")
    if only:
        return
    print(f"textbook TIES / suture TIES: {ratio(runs, 'textbook ties', 'suture ties_merging'):.1f}")


def compare_matrices(folder: Path, repeats: int, names: Sequence[str]) -> None:
    names = names or [name for name, method in methods().items() if method.matrices and name != "wudi"]
    runs = measured(folder, repeats, ["suture ties_merging", *(f"suture {name}" for name in names)])
    for name in names:
        print(f"{name} / TIES: {ratio(runs, f'suture {name}', 'suture ties_merging'):.1f}")


if __name__ == "__main__":
    main()
