"""Memory and time of AdaMerging with weights split over processes: python benchmarks/sharding.py

A Llama with 200 million parameters and two fine-tuned models, in files; 2 steps on 1, 2 and 4 processes. One model is
0.8 GB in float32. The memory is anonymous memory at its peak in the loop, of the process where it is largest, above
what interpreter and libraries had before `adapt`; mapped files, of which the base is one, are not in it, so that
(T + 2)/n models are promised beside the layers in flight. Coefficients are compared with those of one process. Each row
is a process of its own.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from suture.adaptation import adapt
from suture.checkpoints import save_checkpoint
from suture.core.fabric import Team, launch, make_fabric

STEPS, TASKS, LENGTH = 2, 2, 8


def network() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 14, "num_attention_heads": 16}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=12_000, **sizes)).eval().requires_grad_(False)


def with_buffers(module: nn.Module) -> nn.Module:
    """The module with its rotary frequencies, which no file has."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module.model.rotary_emb = LlamaRotaryEmbedding(module.config)  # type: ignore[union-attr]
    return module


def write_models(folder: Path) -> list[Path]:
    shapes = {name: tensor.shape for name, tensor in network().state_dict().items()}
    base = {name: 0.02 * torch.randn(shape) if len(shape) > 1 else torch.ones(shape) for name, shape in shapes.items()}
    paths = [folder / f"{name}.safetensors" for name in ("base", *map(str, range(TASKS)))]
    for path in paths:
        noise = 0.0 if path is paths[0] else 0.002
        save_checkpoint({name: tensor + noise * torch.randn_like(tensor) for name, tensor in base.items()}, path)
    return paths


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(paths: list[Path], processes: int, options: dict) -> tuple[torch.Tensor, float, float, float]:
    base, *tuned = paths
    tokens = torch.randint(12_000, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = {str(i): [{"input_ids": tokens}] for i in range(len(tuned))}

    def learn(fabric):
        import threading

        with_buffers(network())  # imports what the network needs
        began, before, peak, done = time.perf_counter(), anonymous(), [0], threading.Event()

        def look():
            while not done.wait(0.01):
                peak[0] = max(peak[0], anonymous())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        stop = lambda step, loss, values: done.set() if step == STEPS - 1 else None
        models = {str(i): path for i, path in enumerate(tuned)}
        forward = lambda module, inputs: module(**inputs, use_cache=False).logits[:, -1]
        result = adapt(
            with_buffers(network() if processes > 1 else network().to_empty(device="cpu")),
            base,
            models,
            batches,
            forward=forward,
            fabric=fabric,
            max_steps=STEPS,
            on_step=stop,
            **options,
        )
        largest = max(Team(fabric).gather((peak[0] - before, before)))
        return result.history, *largest, time.perf_counter() - began

    keys = {"accelerator": "cpu", "devices": processes, "strategy": "fsdp"}
    return launch(make_fabric(keys), learn)


def main() -> None:
    if len(sys.argv) > 1:
        folder, processes, recompute = Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))
        paths = sorted(folder.glob("*.safetensors"), key=lambda path: path.stem != "base")
        torch.set_num_threads(max(1, 2 // processes))
        torch.save(measured(paths, processes, {"concatenate": False, "recompute": recompute}), folder / "measured.pt")
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths, one = write_models(Path(folder)), None
        print(f"{'processes':<14}{'memory':>9}{'(T+2)/n models':>16}{'before':>9}{'seconds':>9}{'difference':>12}")
        for processes, recompute in ((1, 0), (2, 0), (4, 0), (4, 1)):
            subprocess.run([sys.executable, __file__, folder, str(processes), str(recompute)], check=True)
            history, memory, before, seconds = torch.load(Path(folder) / "measured.pt")
            one = history if one is None else one
            promised = paths[0].stat().st_size * (TASKS + 2) / processes
            name = f"{processes}{', recompute' * recompute}"
            off = (history - one).abs().max().item()
            sizes = f"{memory / 1e9:>6.2f} GB{promised / 1e9:>13.2f} GB{before / 1e9:>6.2f} GB"
            print(f"{name:<14}{sizes}{seconds:>8.1f}s{off:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
