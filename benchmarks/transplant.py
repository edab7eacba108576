"""Give a model another tokenizer of 32,000 tokens, of which nine in ten are shared: processor seconds.

    python benchmarks/transplant.py [--width 1024] [--atoms 64] [--tokens 32000]

The two models are an embedding and a head of random numbers in bf16, made on the spot and removed afterwards.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from watching import measure


def make(folder: Path, tokens: int, width: int, own: int) -> Path:
    """A model whose last `own` tokens are its own."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(own)
    table = lambda: torch.randn(tokens, width, generator=generator).bfloat16()
    save_file({"model.embed_tokens.weight": table(), "lm_head.weight": table()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": tokens}))
    names = [f"t{i}" if i < tokens * 9 // 10 else f"{folder.name}{i}" for i in range(tokens)]
    content = {"model": {"vocab": {name: i for i, name in enumerate(names)}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--atoms", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32000)
    options = parser.parse_args()
    from suture import transplant

    with tempfile.TemporaryDirectory() as outer:
        model, donor = (make(Path(outer) / name, options.tokens, options.width, i) for i, name in enumerate("ab"))
        found = measure(lambda: transplant(model, donor, Path(outer) / "out", atoms=options.atoms))
    print(f"{options.tokens} tokens, a tenth new, width {options.width}, {options.atoms} atoms, embedding and head:")
    print(f"{found['processor']:.1f} processor seconds, {found['memory'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
