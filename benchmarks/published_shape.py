"""The published benchmark's shape from end to end: CLIP ViT-B/32 with eight fine-tunes, on image folders, by command.

    python benchmarks/published_shape.py [--images 200] [--steps 5] [--folder DIR] [--device cuda]

The weights are random (151 M parameters, the sizes of openai/clip-vit-base-patch32; fine-tunes 1e-3 away from them),
the images generated: JPEG files of 256 x 256, eight tasks of ten classes in `<split>/<class>/`. So accuracies mean
nothing here; what is seen is that the whole way runs at that size, and where its time goes. Three commands: TIES with
final surgery, layer-wise AdaMerging with final and with deep surgery. The images are decoded by the first. Each
command's profile is printed with the share of the seconds that each activity took. On a GPU the commands run again with
bf16, channels last, batch sizes that are found, and steps that are recorded as CUDA graphs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

TASKS, CLASSES = 8, 10
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def save_models(folder: Path) -> dict[str, str]:
    """A pretrained CLIP and its fine-tuned vision towers, as `transformers` saves them: name → path."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModel
    from transformers.utils import logging

    from suture import zoo

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = CLIPTokenizer.from_pretrained(zoo.resolve("zoo:glyphs8/pretrained"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=ends, vision_config={"patch_size": 32}))
    model.save_pretrained(folder / "pretrained")
    CLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer).save_pretrained(folder / "pretrained")
    for task in range(TASKS):
        tower = CLIPVisionModel.from_pretrained(folder / "pretrained")
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
        tower.save_pretrained(folder / f"task{task}")
    return {name: str(folder / name) for name in ("pretrained", *(f"task{task}" for task in range(TASKS)))}


def save_images(folder: Path, each: int) -> None:
    """So many pictures of a task and split: a coarse pattern of the class, with noise."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for task in range(TASKS):
        patterns = noise.integers(0, 256, (CLASSES, 8, 8, 3))
        for split in ("train", "test"):
            for label, name in enumerate(NAMES):
                place = folder / f"task{task}" / split / name
                place.mkdir(parents=True)
                for i in range(each // CLASSES):
                    grid = np.clip(patterns[label] + noise.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(grid).resize((256, 256)).save(place / f"{i:04}.jpg")


def write_pools(folder: Path, models: dict[str, str]) -> tuple[Path, Path]:
    """The two YAML files that a user would write."""
    import yaml

    pool = {"family": "clip", "models": {"_pretrained_": models.pop("pretrained"), **models}}
    words = {"classnames": NAMES, "templates": ["a glyph of {}."]}
    tasks = {"tasks": {name: {"source": str(folder / "images" / name), **words} for name in models}}
    for name, content in (("models.yaml", pool), ("tasks.yaml", tasks)):
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "models.yaml", folder / "tasks.yaml"


def run(folder: Path, name: str, *overrides: str) -> None:
    """One command, and what it says of its time."""
    pools = [f"modelpool={folder / 'models.yaml'}", f"taskpool={folder / 'tasks.yaml'}", f"output={folder / name}"]
    environment = {**os.environ, "SUTURE_CACHE": str(folder / "cache")}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "suture", *overrides, *pools], check=True, env=environment, cwd=folder)
    seconds = time.perf_counter() - start
    report = json.loads((folder / name / "report.json").read_text())
    profile = report["profile_seconds"]
    print(f"\n{' '.join(overrides)}: {seconds:.0f} s")
    for activity, spent in profile.items():
        print(f"  {activity:28s} {spent:8.1f} s {spent / seconds:6.1%}")
    print(*(note for note in report["notes"] if note.startswith("batch_size=auto")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="of each task and split")
    parser.add_argument("--steps", type=int, default=5, help="of AdaMerging and of deep surgery")
    parser.add_argument("--folder", type=Path, help="keep everything there")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        save_images(folder / "images", options.images)
        write_pools(folder, save_models(folder / "models"))
        adamerging = ["method=lw_adamerging", f"method.max_steps={options.steps}"]
        deep = ["surgery=deep", f"surgery.steps={options.steps}"]
        where = [f"fabric.accelerator={options.device}"]
        run(folder, "ties", "method=ties_merging", "surgery=final", *where)
        run(folder, "final", *adamerging, "surgery=final", *where)
        run(folder, "deep", *adamerging, *deep, *where)
        if options.device != "cpu":
            where += ["fabric.precision=bf16-mixed", "fabric.channels_last=true", "batch_size=auto"]
            graphs = ["method.capture=true", "surgery.capture=true"]
            run(folder, "fast ties", "method=ties_merging", "surgery=final", *where, *graphs[1:])
            run(folder, "fast final", *adamerging, "surgery=final", *where, *graphs)
            run(folder, "fast deep", *adamerging, *deep, *where, *graphs)


if __name__ == "__main__":
    main()
