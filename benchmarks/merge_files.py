"""Merge sharded checkpoints of 1.1 B parameters in bf16: suture against plain reading and writing, and mergekit.

    python benchmarks/merge_files.py [--folder DIR] [--repeats 3] [--cold] [--mergekit PYTHON] [--layers 22]
        [--form FORM] [--memory SIZE] [--device cpu|cuda|stand-in]

A base and two fine-tunes of TinyLlama's shape (2.2 GB each, random weights) are made on the spot and removed
afterwards. "Plain" reads every byte of the inputs once and writes as many as the result has, and waits for the disk.
Every measurement is a process of its own: wall time of the work (imports excluded; mergekit's command includes its own)
and the peak of its anonymous memory above what the imports took. Files are read from the page cache, or with --cold
from the disk. --mergekit names a Python that has mergekit 0.1.5. --form stores the same weights otherwise: fp8 codes
with a scale for each block of 128 × 128, as DeepSeek's, or experts, eight of them fused in one tensor. --memory is
`merge_files`'s. --device stand-in is the tests' device, which computes on the CPU: the memory is that of both.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from watching import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import far_tensors

STAND_IN = "stand-in"
SHARD = 500_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
METHODS = {
    "simple_average": {},
    "task_arithmetic": {},
    "ties_merging, scope=tensor": {"scope": "tensor"},
    "ties_merging, scope=model": {"scope": "model"},
    "dare": {},
}
MERGEKIT = {"linear": "", "task_arithmetic": "", "ties": "      density: 0.2\n", "dare_linear": "      density: 0.5\n"}


def shapes(layers: int, form: str = "dense") -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama; with fused experts, eight that share the width of its feed-forward layers."""
    hidden, inner, keys = 2048, 5632, 256
    found = {"model.embed_tokens.weight": (32000, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        found |= {f"{prefix}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
        found |= {f"{prefix}.self_attn.{n}.weight": (size, hidden) for n, size in rows.items()}
        if form == "experts":
            found[f"{prefix}.mlp.experts.gate_up_proj"] = (8, inner // 4, hidden)
            found[f"{prefix}.mlp.experts.down_proj"] = (8, hidden, inner // 8)
            continue
        found |= {f"{prefix}.mlp.{n}.weight": (inner, hidden) for n in ("gate_proj", "up_proj")}
        found |= {f"{prefix}.mlp.down_proj.weight": (hidden, inner)}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}


def stored(name: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """A weight as it is in a file: bf16, or fp8 codes with a scale for each block."""
    if form != "fp8" or ".layers." not in name or weight.dim() < 2:
        return {name: weight.bfloat16()}
    blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def make(folder: Path, layers: int, form: str = "dense") -> None:
    """A base and two fine-tunes, in shards with an index."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers, form).items():
        if 2 * sum(math.prod(shape) for shape in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    models, tensors = ("base", "one", "two"), {}
    for model in models:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in names.items()}
        for model in models:
            scale = 0.0 if model == "base" else 1e-3
            noisy = lambda w, scale=scale: (w + scale * torch.randn(w.shape, generator=generator)) if scale else w
            tensors = {k: t for n, w in base.items() for k, t in stored(n, noisy(w), form).items()}
            save_file(tensors, folder / model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    for model in models:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))


def plain_io(folder: Path) -> None:
    """Read every byte of the inputs once into one buffer, and write as many as the result has."""
    buffer = bytearray(1 << 24)
    for path in sorted(folder.glob("*/model-*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in sorted(folder.glob("base/model-*.safetensors")):
        with open(folder / f"{path.name}.plain", "wb", buffering=0) as file:
            for start in range(0, path.stat().st_size, len(buffer)):
                file.write(buffer[: min(len(buffer), path.stat().st_size - start)])
            os.fsync(file.fileno())


def suture(folder: Path, name: str) -> None:
    """What `suture merge` runs, with the inputs' hashes already known, as they are from the second merge on."""
    from suture import merge_files

    models = {model: folder / model for model in ("one", "two")}
    out = folder.with_name(f"{folder.name}-merged")
    options = {"device": os.environ.get("SUTURE_BENCHMARK_DEVICE", "cpu")}
    if memory := os.environ.get("SUTURE_BENCHMARK_MEMORY"):
        options["memory"] = memory
    with pytest.MonkeyPatch.context() as patch:
        if options["device"] == STAND_IN:
            far_tensors.reach(patch)
            options["device"] = "cuda"
        merge_files(folder / "base", models, name.split(",")[0], out, shard_size="500MB", **METHODS[name], **options)


def mergekit(folder: Path, method: str, python: str) -> None:
    """mergekit's command as its documentation has it, out of core, on the processor."""
    models = "".join(
        f"  - model: {folder / m}\n    parameters:\n      weight: 0.3\n{MERGEKIT[method]}" for m in ("one", "two")
    )
    base = "" if method == "linear" else f"base_model: {folder / 'base'}\n"
    config = folder.with_name(f"{folder.name}-mergekit.yml")
    config.write_text(f"merge_method: {method}\n{base}models:\n{models}dtype: bfloat16\n")
    out = folder.with_name(f"{folder.name}-merged")
    command = [
        python,
        "-m",
        "mergekit.scripts.run_yaml",
        str(config),
        str(out),
        "--lazy-unpickle",
        "--no-copy-tokenizer",
    ]
    subprocess.run(command, check=True, capture_output=True)


def one(name: str, folder: Path, python: str | None) -> dict[str, float]:
    """One measurement in this process."""
    if name == "plain":
        return measure(lambda: plain_io(folder))
    kind, _, method = name.partition(" ")
    if kind == "mergekit":
        return measure(lambda: mergekit(folder, method, str(python)))
    import suture as _  # noqa: F401, RUF100

    return measure(lambda: suture(folder, method))


def tidy(folder: Path) -> None:
    """Remove what a measurement has written."""
    import shutil

    for path in folder.glob("*.plain"):
        path.unlink()
    shutil.rmtree(folder.with_name(f"{folder.name}-merged"), ignore_errors=True)


def forget(folder: Path) -> None:
    """Take the inputs out of the page cache."""
    for path in folder.glob("*/model-*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--form", choices=["dense", "fp8", "experts"], default="dense")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda", STAND_IN], help="where suture merges")
    parser.add_argument("--memory", help="the ceiling, such as 300MB")
    parser.add_argument("--mergekit")
    parser.add_argument("--only", help="measure only what has this in its name, beside plain")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for key in ("device", "memory"):
        if value := getattr(options, key):
            os.environ[f"SUTURE_BENCHMARK_{key.upper()}"] = value
    if options.one:
        print(json.dumps(one(options.one, options.folder, options.mergekit)))
        return
    if options.folder and (options.folder / "base").exists():
        compare(options.folder, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as outer:
        folder = Path(outer) / "models"
        folder.mkdir()
        make(folder, options.layers, options.form)
        compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    names = ["plain", *(f"suture {name}" for name in METHODS)]
    names += [f"mergekit {name}" for name in MERGEKIT] if options.mergekit else []
    names = [name for name in names if not options.only or name == "plain" or options.only in name]
    command = [sys.executable, __file__, "--folder", str(folder), "--mergekit", options.mergekit or "", "--one"]
    environment = {**os.environ, "SUTURE_CACHE": str(folder.with_name("cache"))}
    runs = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:  # interleaved, so that a noisy minute hits all of them
            if options.cold:
                forget(folder)
            done = subprocess.run([*command, name], capture_output=True, text=True, check=True, env=environment)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            tidy(folder)
    size = sum(path.stat().st_size for path in folder.glob("base/*.safetensors"))
    where = "the disk" if options.cold else "the page cache"
    there = torch.cuda.get_device_name() if options.device == "cuda" else options.device or "the CPU"
    print(f"on {there}, memory={options.memory or 'the default'}")
    print(f"model size {size / 1e9:.2f} GB, three models read from {where}; median of {options.repeats} (min – max)")
    for name, measured in runs.items():
        seconds = [run["seconds"] for run in measured]
        memory = statistics.median(run["memory"] for run in measured)
        ratios = [run["seconds"] / plain["seconds"] for run, plain in zip(measured, runs["plain"], strict=True)]
        spread = f"{statistics.median(seconds):7.2f} s ({min(seconds):.2f} – {max(seconds):.2f})"
        used = statistics.median(run["processor"] for run in measured)
        spread = f"{spread}   {statistics.median(ratios):5.2f} × plain"
        print(f"{name:34s} {spread}   {used:6.2f} processor seconds   {memory / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()
