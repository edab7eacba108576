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

from suture.randomness import generator_for
from suture.zoo import alphabets, drawing
from suture.zoo.clip_files import CAPTION_LENGTH, as_pixels, round_to_half
from suture.zoo.recipe import Recipe

Advance = Callable[[], None]


class CaptionedGlyphs:
    """The pretraining's stream: batches of images of distinct classes, each with one caption."""

    def __init__(self, tokenizer, recipe: Recipe):
        characters = alphabets.pretraining_characters()
        self.recipe = recipe
        self.bank, self.choices = _bank(characters, alphabets.PRETRAINING_FONTS)
        names = [alphabets.class_name(character) for character in characters]
        captions = [template.format(name) for name in names for template in alphabets.TEMPLATES]
        tokens = tokenizer(captions, padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt")
        self.tokens = tokens["input_ids"].view(len(characters), len(alphabets.TEMPLATES), CAPTION_LENGTH)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """uint8 images (n, 16, 16) and token ids (n, 24)."""
        recipe = self.recipe
        chosen = torch.randperm(len(self.tokens), generator=generator)[: recipe.pretraining_batch]
        pages = drawing.bend(self.bank[_pick(self.choices[chosen], generator)], recipe.pretraining_bend, generator)
        pages = self._spoil_some(pages, generator)
        template = torch.randint(self.tokens.shape[1], (len(chosen),), generator=generator)
        return drawing.standardise(pages), self.tokens[chosen, template]

    def _spoil_some(self, pages: Tensor, generator: torch.Generator) -> Tensor:
        styles = len(drawing.STYLES)
        lot = (torch.rand(len(pages), generator=generator) / self.recipe.spoiled_share * styles).long()
        for index, style in enumerate(drawing.STYLES):
            members = (lot == index).nonzero()[:, 0]
            strength = torch.rand(len(members), generator=generator) * self.recipe.spoiled_strength
            pages[members] = drawing.spoil(pages[members], style, strength, generator)
        return pages


class TaskGlyphs:
    """The images of one rendered task, as many as asked for."""

    def __init__(self, task: alphabets.GlyphTask, recipe: Recipe):
        self.task, self.recipe = task, recipe
        self.bank, self.choices = _bank(task.characters, task.fonts)

    def batch(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 images (n, 16, 16) of the given classes."""
        pages = drawing.bend(self.bank[_pick(self.choices[labels], generator)], self.recipe.task_bend, generator)
        strength = 0.6 + 0.4 * torch.rand(len(pages), generator=generator)
        return drawing.standardise(drawing.spoil(pages, self.task.style, strength, generator))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One batch to learn from: uint8 images (n, 16, 16) of random classes, and their labels."""
        labels = torch.randint(len(self.task.characters), (self.recipe.finetuning_batch,), generator=generator)
        return self.batch(labels, generator), labels

    def split(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A fixed set of `count` images, classes as equal as can be, shuffled."""
        labels = torch.arange(count) % len(self.task.characters)
        labels = labels[torch.randperm(count, generator=generator)]
        return self.batch(labels, generator), labels


class HandwrittenDigits:
    """scikit-learn's digits: 8 x 8 pixels doubled to 16 x 16, bent a little when trained on."""

    def __init__(self, recipe: Recipe, seed: int):
        from sklearn.datasets import load_digits

        self.recipe = recipe
        digits: Any = load_digits()
        pages = torch.from_numpy(digits.images).float()[:, None] / 16
        self.pages = F.interpolate(pages, size=(drawing.PAGE, drawing.PAGE), mode="bicubic")[:, 0].clamp(0, 1)
        self.labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(self.labels), generator=generator_for(seed, "digits/split"))
        tests = min(recipe.test_images, len(order) - 900)
        self.test, self.train = order[:tests], order[tests:][: recipe.train_images]

    def split(self, members: Tensor) -> tuple[Tensor, Tensor]:
        return drawing.standardise(self.pages[members]), self.labels[members]

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training digits, lightly bent: uint8 images (n, 16, 16) and labels."""
        members = self.train[torch.randint(len(self.train), (self.recipe.finetuning_batch,), generator=generator)]
        padded = F.pad(self.pages[members], [(drawing.CANVAS - drawing.PAGE) // 2] * 4)
        return drawing.standardise(drawing.bend(padded, 0.5, generator)), self.labels[members]


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
def zero_shot_head(model: Any, tokenizer, classnames: tuple[str, ...]) -> Tensor:
    """The mean of the normalised caption embeddings of each class, normalised: (classes, projection)."""
    rows = []
    for name in classnames:
        captions = [template.format(name) for template in alphabets.TASK_TEMPLATES]
        tokens = tokenizer(captions, padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt")
        pooled = model.text_model(input_ids=tokens["input_ids"]).pooler_output
        rows.append(F.normalize(F.normalize(model.text_projection(pooled), dim=-1).mean(0), dim=-1))
    return torch.stack(rows)


@contextlib.contextmanager
def half_precision() -> Iterator[None]:
    """bfloat16 products on processors with units for them, float32 elsewhere (emulation is slower)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
        yield


def _bank(characters: str, fonts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """All glyphs (m, 48, 48); for each character the rows of the fonts that have it, in turn: (n, 60)."""
    drawn, rows = [], [[] for _ in characters]
    for font in fonts:
        present = drawing.covered(font, characters)
        first = sum(len(part) for part in drawn)
        for offset, character in enumerate(present):
            rows[characters.index(character)].append(first + offset)
        drawn.append(drawing.draw_glyphs(font, present))
    return torch.cat(drawn), torch.tensor([(row * 60)[:60] for row in rows])


def _pick(choices: Tensor, generator: torch.Generator) -> Tensor:
    column = torch.randint(choices.shape[1], (len(choices), 1), generator=generator)
    return choices.gather(1, column)[:, 0]


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
