"""Time and memory of scoring a language model and of calibrating one, against the plain forward passes they need.

    python benchmarks/language.py [--layers 6] [--width 256] [--texts 64] [--length 128] [--choices 4]

A random Llama, random tokens. Each measurement runs in a process of its own, whose largest resident set is reported.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from suture.evaluation.language import LanguageScorer
from suture.families.shared.next_token import NextToken
from suture.families.shared.requests import Choice, Requests, Window
from suture.repairs import Problem
from suture.repairs.calibrate import calibrate
from suture.tasks import Scoring

MEASURES = ("forward", "score texts", "choices one by one", "choices, prompts shared", "calibrate")
VOCABULARY = 4096


def encoder(options: argparse.Namespace) -> NextToken:
    """A random Llama as an encoder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": options.width, "intermediate_size": 2 * options.width, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=options.layers, **sizes)
    model = LlamaForCausalLM(config)
    return NextToken(model, lambda names: {name: name for name in names}, 1.0, None).eval().requires_grad_(False)


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of one measurement, the largest resident set in MB, and how much of it is the work's."""
    model, work = encoder(options), prepared(name, options)
    with torch.inference_mode():
        model(**{key: part[:1] for key, part in inputs(options).items()})  # kernels are chosen at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    work(model)
    seconds = time.process_time() - began
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": most / 1024, "more": (most - before) / 1024}


def inputs(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Tokens (texts, length) and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (options.texts, options.length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prepared(name: str, options: argparse.Namespace) -> Any:
    """The work of a measurement, as a function of the model."""
    batch = inputs(options)
    rows = [tuple(row) for row in batch["input_ids"].tolist()]
    if name == "forward":
        parts = [
            {key: part[start : start + 64] for key, part in batch.items()} for start in range(0, options.texts, 64)
        ]
        return lambda model: [torch.inference_mode()(model)(**part) for part in parts]
    if name == "score texts":
        windows = [Window(i, row, len(row) - 1) for i, row in enumerate(rows)]
        sizes = [4 * options.length] * len(rows)
        requests = Requests(Scoring("bits_per_byte"), windows=windows, bytes=sizes, words=sizes)
        return lambda model: LanguageScorer().score(model, requests)
    if name.startswith("choices"):
        choices = [
            Choice(i, row[:-8], (*row[-8:-1], choice + 2), 32, 32)
            for i, row in enumerate(rows)
            for choice in range(options.choices)
        ]
        requests = Requests(Scoring("acc"), choices=choices, answers=[0] * len(rows))
        return lambda model: LanguageScorer(share_prompts="shared" in name).score(model, requests)
    base = {key: value.clone() for key, value in encoder(options).state_dict().items()}
    return lambda model: calibrate(Problem(model, {"one": encoder(options)}, {"one": batch}, base=base))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"layers": 6, "width": 256, "texts": 64, "length": 128, "choices": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only, options)))
        return
    first = 0.0
    print(f"{'':26}{'CPU seconds':>12}{'× forward':>12}{'MB':>8}{'MB more':>10}")
    for name in MEASURES:
        command = [sys.executable, *sys.argv, "--only", name]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
        result = json.loads(line)
        first = first or result["seconds"]
        share, most = f"{result['seconds'] / first:.2f}", f"{result['megabytes']:.0f}"
        print(f"{name:26}{result['seconds']:>12.2f}{share:>12}{most:>8}{result['more']:>10.0f}")


if __name__ == "__main__":
    main()
