"""Streams of glyphs: captioned ones for the pretraining, and those of one rendered task."""

import torch
from torch import Tensor

from tools.zoo import alphabets, drawing
from tools.zoo.clip_files import CAPTION_LENGTH
from tools.zoo.recipe import Recipe


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
