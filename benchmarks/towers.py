"""CLIP vision towers of random weights, for the benchmarks that compare a merged tower with its experts."""

import torch
from torch import nn


def tower(seed: int, width: int = 768, layers: int = 12, image: int = 224) -> nn.Module:
    """A tower with heads of 64 dimensions; an expert is the merged tower (seed 0) and a little noise."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "projection_dim": 512}
    config = CLIPVisionConfig(**sizes, num_attention_heads=max(1, width // 64), image_size=image, patch_size=32)
    module = CLIPVisionModelWithProjection(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters() if seed else ():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    return module


def embeds(module: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The projected feature."""
    return module(pixel_values=pixels).image_embeds
