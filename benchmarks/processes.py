"""Results and memory of repairs, AdaMerging and scores on 1, 2 and 4 processes: python benchmarks/processes.py

A Llama with 24 million parameters (95 MB in float32), four fine-tuned models in files, and 32 texts of 16 tokens for
each. The difference is the largest of a number of the result (a coefficient, a repaired feature, a logit) from that of
one process, divided by the largest such number. The memory is anonymous memory at its peak, of the process where it is
largest, above that before the work. Each row is processes of its own; texts are encoded 8 at a time.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suture import evaluate, repair
from suture.adaptation import adapt
from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.core.fabric import Team, launch, make_fabric
from suture.evaluation import Scorer, TaskInputs

TASKS, TEXTS, LENGTH, WORDS = 4, 32, 16, 4000
NUMBERS = (1, 2, 4)


class Encoder(nn.Module):
    """The states of a Llama after the last token."""

    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7, "num_attention_heads": 8}
        self.llama = LlamaModel(LlamaConfig(vocab_size=WORDS, **sizes))
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.llama(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1]


def write_models(folder: Path) -> None:
    torch.manual_seed(0)
    base = Encoder().state_dict()
    for name in ("base", *map(str, range(TASKS))):
        noise = 0.0 if name == "base" else 0.01
        tensors = {key: tensor + noise * torch.randn_like(tensor) for key, tensor in base.items()}
        save_checkpoint(tensors, folder / f"{name}.safetensors")


def texts(seed: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): {"input_ids": torch.randint(WORDS, (TEXTS, LENGTH), generator=generator)} for i in range(TASKS)}


def loaded(path: Path) -> Encoder:
    module = Encoder()
    module.load_state_dict(dict(open_checkpoint(path)))
    return module


def merged(folder: Path) -> Encoder:
    module, states = Encoder(), [open_checkpoint(folder / f"{i}.safetensors") for i in range(TASKS)]
    module.load_state_dict({name: sum(state[name] for state in states) / TASKS for name in states[0]})
    return module


def repaired(kind: str, **knobs: Any) -> Callable[[Path, Any], Tensor]:
    def work(folder: Path, fabric: Any) -> Tensor:
        expert = lambda task: loaded(folder / f"{task}.safetensors")
        options = {"base": dict(open_checkpoint(folder / "base.safetensors")), "encode_batch": 8, "fabric": fabric}
        result = repair(merged(folder), expert, texts(0), kind, **options, **knobs)
        with torch.no_grad():
            return torch.cat([result.model.for_task(task)(rows) for task, rows in texts(1).items()])

    return work


def adamerging(folder: Path, fabric: Any) -> Tensor:
    models = {str(i): folder / f"{i}.safetensors" for i in range(TASKS)}
    options = {"lr": 0.01, "max_steps": 3, "batch_size": 8, "fabric": fabric, "concatenate": False}
    return adapt(Encoder(), folder / "base.safetensors", models, texts(0), **options).history


def scoring(folder: Path, fabric: Any) -> Tensor:
    module = merged(folder)
    tasks = {task: TaskInputs(task, rows, torch.arange(TEXTS) % 512) for task, rows in texts(1).items()}
    scores = evaluate(module, tasks, batch_size=8, fabric=fabric).accuracies
    scorer = Scorer(8, fabric=fabric)
    logits = [scorer.each_batch(module, task, lambda logits, labels: logits) for task in tasks.values()]
    return torch.cat([*logits, torch.tensor(list(scores.values()))[:, None].expand(-1, 512)])


ROWS: dict[str, tuple[Callable[[Path, Any], Tensor], str]] = {
    "AdaMerging": (adamerging, "ddp_fork"),
    "AdaMerging, fsdp": (adamerging, "fsdp"),
    "final": (repaired("final", steps=100), "ddp_fork"),
    "deep": (repaired("deep", steps=5, batch_size=8), "ddp_fork"),
    "calibrate": (repaired("calibrate"), "ddp_fork"),
    "distil": (repaired("distil", steps=3, batch_size=8, lr=1e-4), "ddp_fork"),
    "scoring": (scoring, "ddp_fork"),
}


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(name: str, number: int, folder: Path) -> tuple[Tensor, float]:
    """The result, and the peak of memory of the process where it is largest."""
    work, strategy = ROWS[name]

    def watched(fabric: Any) -> tuple[Tensor, float]:
        before, peak, done = anonymous(), [0], threading.Event()

        def look() -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        result = work(folder, fabric)
        done.set()
        return result, max(Team(fabric).gather(peak[0] - before))

    Encoder()  # imports what it needs
    return launch(make_fabric({"accelerator": "cpu", "devices": number, "strategy": strategy}), watched)


def main() -> None:
    if len(sys.argv) > 1:
        name, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
        torch.set_num_threads(1)
        torch.save(measured(name, number, folder), folder / "measured.pt")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        print(f"{'processes':<18}" + "".join(f"{number:>9}" for number in NUMBERS) + "   largest difference of 2, 4")
        for name in ROWS:
            results, memory = [], []
            for number in NUMBERS:
                subprocess.run([sys.executable, __file__, name, str(number), folder], check=True)
                result, peak = torch.load(Path(folder) / "measured.pt")
                results.append(result)
                memory.append(peak)
            sizes = "".join(f"{peak / 1e6:>6.0f} MB" for peak in memory)
            off = [((each - results[0]).abs().max() / results[0].abs().max()).item() for each in results[1:]]
            print(f"{name:<18}{sizes}   {off[0]:.1e}, {off[1]:.1e}", flush=True)


if __name__ == "__main__":
    main()
