"""The memory's ceiling, held by every method with tensors larger than it."""

import json
import subprocess
import sys

import pytest
import torch
from gguf_writing import write as write_gguf
from safetensors.torch import save_file

from suture import merge_files, methods, plan_files, save_checkpoint
from suture.errors import ConfigError

CEILING = 60_000_000
SEVERAL = {
    "sce": [{}, {"select_topk": 0.3}],
    "dare_ties": [{}, {"rescale": "l1"}],
    "della": [{}, {"rescale": "l1"}],
    "ties_merging": [{}, {"scope": "tensor", "merge_func": "mean", "weights": [1.0, 0.5]}],
}
PROGRAM = """
import ctypes, gc, json, shutil, sys, threading, time
from pathlib import Path
import suture
folder, work, ceiling = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
status = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
base = suture.open_checkpoint(folder / "base.safetensors")
small = {"w": base.flat(max(base, key=lambda name: base.specs[name].numel))[:1000].clone()}
suture.merge_files(small, [small], "ties_merging", folder / "warm")
del small, base
gc.collect()
before, peak, done, peaks = status("RssAnon"), [0], [], {}
def watch():
    while not done:
        peak[0] = max(peak[0], status("RssAnon") - before)
        time.sleep(0.002)
watcher = threading.Thread(target=watch, daemon=True); watcher.start()
models = sorted(folder.glob("model_*"))
for i, (method, knobs) in enumerate(work):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the merge before has left in the heap is not this one's
    peak[0] = 0
    count = int(min(len(models), suture.get_method(method).num_models[1]))
    suture.merge_files(folder / "base.safetensors", models[:count], method, folder / f"out{i}", memory=ceiling,
                       threads=2, **knobs)
    peaks[f"{method} {knobs}"] = peak[0]
    shutil.rmtree(folder / f"out{i}")
done.append(1); watcher.join()
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base and two fine-tunes whose one matrix has 64 MB, more than the ceiling."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 4000, generator=generator)
    save_checkpoint({"w": base}, folder / "base.safetensors")
    for i in (1, 2):
        save_checkpoint({"w": base + 0.1 * torch.randn(4000, generator=generator)}, folder / f"model_{i}.safetensors")
    return folder


def peaks(folder, work):
    """Anonymous memory that each of some merges took beyond what was there before the first, in bytes."""
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(work), str(CEILING)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_slices_of_a_large_tensor_stay_below_the_ceiling(large):
    found = peaks(large, [("task_arithmetic", {}), ("ties_merging", {}), ("slerp", {})])
    assert max(found.values()) < CEILING, found


def fp8_codes(weights):
    codes = (weights * 100).to(torch.float8_e4m3fn)
    return {"w": codes, "w_scale_inv": torch.full((32, 32), 0.01)}


def int8_codes(weights):
    return {"w": (weights * 30).round().clamp(-127, 127).to(torch.int8), "w_scale": torch.full((4000, 1), 1 / 30)}


def mxfp4_codes(weights):
    """Experts (4, 4000, 1000), decoded."""
    codes = (weights * 99).to(torch.uint8).view(4, 1000, 125, 32)[..., :16].contiguous()
    return {"w_blocks": codes, "w_scales": torch.full((4, 1000, 125), 125, dtype=torch.uint8)}


def nf4_codes(weights):
    state = {"quant_type": "nf4", "shape": [4000, 4000], "blocksize": 64, "dtype": "bfloat16"}
    return {
        "w": (weights.view(-1, 1)[: weights.numel() // 2] * 99).to(torch.uint8),
        "w.absmax": torch.ones(weights.numel() // 64),
        "w.quant_map": torch.linspace(-1, 1, 16),
        "w.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def gptq_codes(weights):
    """Codes (in, out) packed along the inputs, in groups of 125."""
    codes = (weights.view(8, -1)[0] * 2**29).to(torch.int32).view(500, 4000)
    scales, zeros = torch.full((32, 4000), 0.01, dtype=torch.float16), torch.full((32, 500), 0x77777777)
    return {"w.qweight": codes, "w.qzeros": zeros.to(torch.int32), "w.scales": scales}


def awq_codes(weights):
    """Codes (in, out) packed along the outputs."""
    found = gptq_codes(weights)
    return found | {"w.qweight": found["w.qweight"].view(4000, 500)}


def fused_experts(weights):
    """Experts in one tensor; the base has them one by one."""
    return {"mlp.experts.gate_up_proj": weights.view(4, 2000, 2000), "mlp.experts.down_proj": torch.zeros(4, 2000, 1)}


def single_experts(weights):
    sources = {f"mlp.experts.{i}.gate_proj.weight": weights.view(8, 1000, 2000)[2 * i].clone() for i in range(4)}
    sources |= {f"mlp.experts.{i}.up_proj.weight": weights.view(8, 1000, 2000)[2 * i + 1].clone() for i in range(4)}
    return sources | {f"mlp.experts.{i}.down_proj.weight": torch.zeros(2000, 1) for i in range(4)}


def gguf_blocks(weights):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(weights.numpy(), kind), kind


READ_ONLY = (gguf_blocks, gptq_codes, awq_codes, fused_experts)
FORMS = [mxfp4_codes, gguf_blocks]
SLOW = (fp8_codes, fused_experts, int8_codes, nf4_codes, gptq_codes, awq_codes)
FORMS += [pytest.param(each, marks=pytest.mark.slow) for each in SLOW]


@pytest.mark.parametrize("form", FORMS, ids=lambda each: each.__name__)
def test_other_forms_of_weights_are_read_and_written_again_below_the_ceiling(form, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "model_1", "model_2"):
        weights = torch.randn(4000, 4000, generator=generator)
        stored = single_experts(weights) if (form, name) == (fused_experts, "base") else form(weights)
        path = tmp_path / f"{name}.safetensors"
        if isinstance(stored, dict):
            save_file(stored, path)
        else:
            write_gguf(path, {}, {"w": stored})
    again = {} if form in READ_ONLY else {"encode": "input"}
    found = peaks(tmp_path, [("task_arithmetic", again), ("ties_merging", {"scope": "tensor"}), ("slerp", again)])
    assert max(found.values()) < CEILING, found


IN_SLICES = sorted(name for name, method in methods().items() if not method.matrices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "knobs"), [(method, knobs) for method in IN_SLICES for knobs in SEVERAL.get(method, [{}])]
)
def test_every_method_in_slices_stays_below_the_ceiling(large, method, knobs):
    found = peaks(large, [(method, knobs)])
    assert max(found.values()) < CEILING, found


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """Checkpoints of six matrices of 2 to 6 MB, and a vector."""
    folder, generator = tmp_path_factory.mktemp("matrices"), torch.Generator().manual_seed(0)
    shapes = {f"{i}.w": [(700, 700), (2000, 700), (700, 1000)][i % 3] for i in range(6)}
    shapes["w"] = (1000,)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_checkpoint(base, folder / "base.safetensors")
    for i in (1, 2):
        tuned = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        save_checkpoint(tuned, folder / f"model_{i}.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(name for name, method in methods().items() if method.matrices))
def test_a_method_on_matrices_holds_no_more_than_its_plan_says(matrices, method, tmp_path):
    models = sorted(matrices.glob("model_*"))
    knobs = {"steps": 3} if method == "wudi" else {}
    plan = plan_files(matrices / "base.safetensors", models, method, tmp_path / "out", memory=CEILING, threads=2)
    assert plan.matrix <= plan.memory
    found = peaks(matrices, [(method, knobs)])
    assert max(found.values()) < plan.memory, (found, plan)


def test_rows_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    base = {"w": torch.zeros(2, 400_000)}
    with pytest.raises(
        ConfigError, match=r"memory=9000000 is too little for rows of 400000 entries. Remedy: give \d+MB"
    ):
        merge_files(base, [base], "della", tmp_path / "out", memory=9_000_000)
    assert not list(tmp_path.iterdir())
