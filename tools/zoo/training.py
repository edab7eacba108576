"""Train the zoo's CLIP: contrastive pretraining on captioned glyphs, then one vision tower per task.

Randomness comes from one generator per stage, seeded by name, so that no stage depends on the order.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.core.random import generator_for
from tools.zoo.alphabets import TASK_TEMPLATES
from tools.zoo.clip_files import CAPTION_LENGTH, as_pixels, round_to_half
from tools.zoo.glyphs import CaptionedGlyphs
from tools.zoo.recipe import Recipe

Advance = Callable[[], None]


def pretrain(model: Any, tokenizer, recipe: Recipe, seed: int, advance: Advance) -> None:
    """Contrastive training of both towers, as CLIP's; leaves weights that float16 holds exactly."""
    stream, generator = CaptionedGlyphs(tokenizer, recipe), generator_for(seed, "pretraining")
    optimizer = torch.optim.AdamW(_groups(model), lr=recipe.pretraining_rate, betas=(0.9, 0.98))
    target = torch.arange(recipe.pretraining_batch)
    for step in range(recipe.pretraining_steps):
        _set_rate(optimizer, recipe.pretraining_rate, step, recipe.pretraining_steps)
        images, tokens = stream.batch(generator)
        with half_precision():
            logits = model(input_ids=tokens, pixel_values=as_pixels(images)).logits_per_image.float()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        _step(loss, model, optimizer)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        advance()
    round_to_half(model)


def finetune(
    pretrained: Any,
    head: Tensor,
    batches: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    recipe: Recipe,
    generator: torch.Generator,
    advance: Advance,
) -> Any:
    """A copy whose vision tower has learned one task; text tower, projections and `head` stay as they are.

    The weights returned are the mean over the last half of the steps.
    """
    model = copy.deepcopy(pretrained)
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    start = [parameter.detach().clone() for parameter in model.vision_model.parameters()]
    mean = [torch.zeros_like(parameter) for parameter in start]
    optimizer = torch.optim.AdamW(model.vision_model.parameters(), lr=recipe.finetuning_rate, weight_decay=0.0)
    kept = recipe.finetuning_steps - recipe.finetuning_steps // 2
    for step in range(recipe.finetuning_steps):
        _set_rate(optimizer, recipe.finetuning_rate, step, recipe.finetuning_steps)
        images, labels = batches(generator)
        loss = F.cross_entropy(image_logits(model, images, head), labels)
        _step(loss, model, optimizer)
        _pull_back(model.vision_model, start, recipe.finetuning_pull * optimizer.param_groups[0]["lr"])
        if step >= recipe.finetuning_steps - kept:
            for total, parameter in zip(mean, model.vision_model.parameters(), strict=True):
                total += parameter.detach() / kept
        advance()
    with torch.no_grad():
        for parameter, total in zip(model.vision_model.parameters(), mean, strict=True):
            parameter.copy_(total)
    round_to_half(model)
    return model


def image_logits(model: Any, images: Tensor, head: Tensor) -> Tensor:
    """Zero-shot logits of uint8 images (n, 16, 16): float32 (n, classes)."""
    with half_precision():
        pooled = model.vision_model(pixel_values=as_pixels(images)).pooler_output
        features = model.visual_projection(pooled)
    return model.logit_scale.exp() * F.normalize(features.float(), dim=-1) @ head.T


@torch.no_grad()
def zero_shot_head(
    model: Any, tokenizer, classnames: tuple[str, ...], templates: tuple[str, ...] = TASK_TEMPLATES
) -> Tensor:
    """The mean of the normalised caption embeddings of each class, normalised: (classes, projection)."""
    rows = []
    for name in classnames:
        captions = [template.format(name) for template in templates]
        tokens = tokenizer(captions, padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt")
        pooled = model.text_model(input_ids=tokens["input_ids"]).pooler_output
        rows.append(F.normalize(F.normalize(model.text_projection(pooled), dim=-1).mean(0), dim=-1))
    return torch.stack(rows)


@contextlib.contextmanager
def half_precision() -> Iterator[None]:
    """bfloat16 products on processors with units for them, float32 elsewhere (emulation is slower)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
        yield


def _groups(model: Any) -> list[dict[str, object]]:
    """Weight decay for matrices alone, as CLIP was trained."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """A straight climb over the first twelfth, then half a cosine down to zero."""
    climb = max(1, steps // 12)
    done = (step + 1 - climb) / max(1, steps - climb)
    rate = peak * min((step + 1) / climb, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def _step(loss: Tensor, model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


@torch.no_grad()
def _pull_back(module: nn.Module, start: list[Tensor], share: float) -> None:
    """Weight decay on the difference from the start, not on the weights: it keeps task vectors short."""
    if share:
        for parameter, origin in zip(module.parameters(), start, strict=True):
            parameter.lerp_(origin, share)
