"""A tiny Llama and fine-tunes of it on disk, as transformers saves them."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from suture.checkpoints import open_checkpoint


def save_base(folder, *, tied=False, dtype=torch.bfloat16, layers=3, shard_size="60KB", vocab=64):
    """A Llama of three layers, sharded, with a generation config and a tokenizer's file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    return folder


def save_tuned(folder, base, seed, *, scale=0.02):
    """A fine-tune: the base's files with noise on every weight."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        noisy = {
            name: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(t.dtype)
            for name, t in load_file(path).items()
        }
        save_file(noisy, folder / path.name, metadata={"format": "pt"})
    return folder


def tensors(path):
    """All tensors of a checkpoint, copied."""
    return {name: tensor.clone() for name, tensor in open_checkpoint(path).items()}
