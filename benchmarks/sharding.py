"""Memory and results of work on weights that are split over processes: python benchmarks/sharding.py

A Llama with 200 million parameters and two fine-tuned models, in files; on 1, 2 and 4 processes: 2 steps of AdaMerging,
repairs on 4 texts of 8 tokens a task, and scores. One model is 0.8 GB in float32. The memory is anonymous memory at its
peak, of the process where it is largest, above what interpreter and libraries had before. A process alone has whole
models in its memory, as on a device; mapped files, which several processes read their parts of, are not in it.

Promised are, of n processes: for AdaMerging (T + 2)/n models, because its base is mapped; for `final`, `deep` and
scores what runs at a time, merged model and expert, or the one that is scored; for `calibrate` a block of the student
and of an expert, and what lies before the blocks, which do not shrink with n: processes share tasks. Results are
compared with those of one process: coefficients, losses, a calibrated weight, features. Each row is a process of its
own.
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture import repair
from suture.adaptation import adapt
from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.core.fabric import Team, launch, make_fabric
from suture.evaluation import Scorer, TaskInputs

STEPS, TASKS, LENGTH, WORDS = 2, 2, 8, 12_000
DONE = threading.Event()  # until then memory is watched


def network() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 14, "num_attention_heads": 16}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)).eval().requires_grad_(False)


def with_buffers(module: nn.Module) -> nn.Module:
    """The module with its rotary frequencies, which no file has."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module.model.rotary_emb = LlamaRotaryEmbedding(module.config)  # type: ignore[union-attr]
    return module


def loaded(path: Path, processes: int) -> nn.Module:
    """A model: in memory for one process, in its mapped file for several."""
    module = with_buffers(network())
    tensors = {name: tensor.clone() if processes == 1 else tensor for name, tensor in open_checkpoint(path).items()}
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def write_models(folder: Path) -> list[Path]:
    shapes = {name: tensor.shape for name, tensor in network().state_dict().items()}
    base = {name: 0.02 * torch.randn(shape) if len(shape) > 1 else torch.ones(shape) for name, shape in shapes.items()}
    paths = [folder / f"{name}.safetensors" for name in ("base", *map(str, range(TASKS)))]
    for path in paths:
        noise = 0.0 if path is paths[0] else 0.002
        save_checkpoint({name: tensor + noise * torch.randn_like(tensor) for name, tensor in base.items()}, path)
    return paths


def texts() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {str(i): {"input_ids": torch.randint(WORDS, (4, LENGTH), generator=generator)} for i in range(TASKS)}


def feature(module: Any, inputs: Any) -> Tensor:
    return module.model(**inputs, use_cache=False).last_hidden_state[:, -1]


def adamerging(folder: Path, processes: int, fabric: Any, **options: Any) -> Tensor:
    models = {str(i): folder / f"{i}.safetensors" for i in range(TASKS)}
    module = with_buffers(network() if processes > 1 else network().to_empty(device="cpu"))
    forward = lambda module, inputs: module(**inputs, use_cache=False).logits[:, -1]
    given = (module, folder / "base.safetensors", models, {task: [rows] for task, rows in texts().items()})
    stop = lambda step, loss, values: DONE.set() if step == STEPS - 1 else None  # then the first process merges
    chosen: dict[str, Any] = {"max_steps": STEPS, "concatenate": False, "on_step": stop, **options}
    return adapt(*given, forward=forward, fabric=fabric, **chosen).history


def repaired(kind: str, **knobs: Any) -> Callable[[Path, int, Any], Tensor]:
    def work(folder: Path, processes: int, fabric: Any) -> Tensor:
        load = lambda name: loaded(folder / f"{name}.safetensors", processes)
        base = open_checkpoint(folder / "base.safetensors")
        options: dict[str, Any] = {"forward": feature, "base": base, "fabric": fabric, "encode_batch": 1}
        result = repair(load("0"), load, texts(), kind, **options, **knobs)
        if kind == "calibrate":
            return result.model.tensors["model.layers.7.mlp.down_proj.weight"].clone()
        return result.losses

    return work


def scored(folder: Path, processes: int, fabric: Any) -> Tensor:
    task = TaskInputs("0", texts()["0"], torch.zeros(4, dtype=torch.long))
    module = loaded(folder / "0.safetensors", processes)
    return Scorer(1, forward=feature, fabric=fabric).each_batch(module, task, lambda logits, labels: logits)


#: Work → the function, and the models that are promised for one process.
ROWS: dict[str, tuple[Callable[[Path, int, Any], Tensor], int | None]] = {
    "AdaMerging": (adamerging, TASKS + 2),
    "AdaMerging, recompute": (lambda *given: adamerging(*given, recompute=True), TASKS + 2),
    "final": (repaired("final", steps=20), 2),
    "deep": (repaired("deep", steps=STEPS, batch_size=4), 2),
    "calibrate": (repaired("calibrate"), None),
    "scoring": (scored, 1),
}


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(name: str, processes: int, folder: Path) -> tuple[Tensor, float, float, float]:
    """The result, the peak of memory of the process where it is largest, what it had before, and the seconds."""

    def watched(fabric: Any) -> tuple[Tensor, float, float, float]:
        with_buffers(network())  # imports what the network needs
        began, before, peak = time.perf_counter(), anonymous(), [0]

        def look() -> None:
            while not DONE.wait(0.01):
                peak[0] = max(peak[0], anonymous())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        result = ROWS[name][0](folder, processes, fabric)
        DONE.set()
        largest = max(Team(fabric).gather((peak[0] - before, before)))
        return result, *largest, time.perf_counter() - began

    return launch(make_fabric({"accelerator": "cpu", "devices": processes, "strategy": "fsdp"}), watched)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        name, processes, folder = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
        torch.set_num_threads(max(1, 2 // processes))
        torch.save(measured(name, processes, folder), folder / "measured.pt")
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        size = write_models(Path(folder))[0].stat().st_size
        print(f"{'':<22}{'processes':>10}{'memory':>10}{'promised':>10}{'before':>10}{'seconds':>9}{'difference':>12}")
        for name in sys.argv[1:] or ROWS:
            one = None
            for processes in (1, 2, 4):
                subprocess.run([sys.executable, __file__, "--one", name, str(processes), folder], check=True)
                result, memory, before, seconds = torch.load(Path(folder) / "measured.pt")
                one = result if one is None else one
                models = ROWS[name][1]
                promised = "" if models is None else f"{size * models / processes / 1e9:.2f} GB"
                off = ((result - one).abs().max() / one.abs().max()).item()
                sizes = f"{memory / 1e9:>7.2f} GB{promised:>10}{before / 1e9:>7.2f} GB"
                print(f"{name:<22}{processes:>10}{sizes}{seconds:>8.1f}s{off:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
