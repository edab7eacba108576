"""Draw glyphs with the fonts matplotlib ships, bend them, spoil the page, and standardise the contrast.

Everything is a function of tensors and a `torch.Generator`: one generator state gives one batch of images.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

CANVAS = 48
"""Side of the canvas a glyph is drawn on once; every image is a bent copy of it."""

PAGE = 32
"""Side at which the page is spoiled; halved by averaging at the end."""

SIDE = 16
"""Side of the images."""

MEAN, STD = 127.0, 64.0
"""Mean and standard deviation every image is given before it is stored (clipping moves them a little)."""

STYLES = ("ruled", "noise", "lighting", "outline", "gaps", "neighbours", "weave")


def draw_glyphs(font: str, characters: str) -> Tensor:
    """Each character once, centred, ink 1 on paper 0: float32 (characters, 48, 48)."""
    return torch.stack([_draw(font, character) for character in characters])


def covered(font: str, characters: str) -> str:
    """Those of the characters the font has a shape for."""
    known = _charmap(font)
    return "".join(character for character in characters if ord(character) in known)


def bend(glyphs: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear, shift and ripple each glyph at random: (n, 48, 48) -> (n, 32, 32)."""
    count = len(glyphs)

    def uniform(spread: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * spread * strength

    angle, shear, stretch = uniform(0.22), uniform(0.2), uniform(0.12)
    scale = 0.92 / (1 + uniform(0.18))
    row = torch.stack((angle.cos() * scale * (1 + stretch), (shear - angle.sin()) * scale, uniform(0.14)), 1)
    column = torch.stack((angle.sin() * scale, angle.cos() * scale * (1 - stretch), uniform(0.14)), 1)
    grid = F.affine_grid(torch.stack((row, column), 1), [count, 1, PAGE, PAGE], align_corners=False)
    ripple = (torch.rand(count, 2, 4, 4, generator=generator) * 2 - 1) * 0.09 * strength
    ripple = F.interpolate(ripple, size=(PAGE, PAGE), mode="bicubic", align_corners=True)
    return F.grid_sample(glyphs[:, None], grid + ripple.permute(0, 2, 3, 1), align_corners=False)[:, 0]


def spoil(pages: Tensor, style: str, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil pages (n, 32, 32) in one of `STYLES`; `strength` (n,) runs from 0, untouched, to 1."""
    return _SPOILERS[style](pages, strength[:, None, None], generator)


def standardise(pages: Tensor) -> Tensor:
    """Halve pages (n, 32, 32) to images, give each the same mean and contrast: uint8 (n, 16, 16)."""
    images = F.avg_pool2d(pages[:, None], PAGE // SIDE)[:, 0]
    mean = images.mean((1, 2), keepdim=True)
    std = images.std((1, 2), keepdim=True).clamp_min(1e-3)
    return ((images - mean) / std * STD + MEAN).round().clamp(0, 255).to(torch.uint8)


def _font_path(font: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


@functools.cache
def _charmap(font: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_path(font))).get_charmap())


@functools.cache
def _typeface(font: str, size: int):
    from PIL import ImageFont

    return ImageFont.truetype(str(_font_path(font)), size)


def _draw(font: str, character: str) -> Tensor:
    from PIL import Image, ImageDraw

    size = 40
    while True:
        face = _typeface(font, size)
        left, top, right, bottom = face.getbbox(character)
        if max(right - left, bottom - top) <= CANVAS - 6 or size <= 12:
            break
        size -= 4
    image = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2)
    ImageDraw.Draw(image).text(corner, character, fill=255, font=face)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(CANVAS, CANVAS).float() / 255


def _ruled(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Two ruled lines across the page, a little askew."""
    count = len(pages)
    rows, columns = _coordinates()
    lines = torch.zeros_like(pages)
    for _ in range(2):
        level = torch.rand(count, 1, 1, generator=generator) * PAGE
        slope = (torch.rand(count, 1, 1, generator=generator) - 0.5) * 0.5
        distance = (rows - level - slope * (columns - PAGE / 2)).abs()
        lines = torch.maximum(lines, (1.8 - distance).clamp(0, 1))
    return torch.maximum(pages, strength * lines)


def _noise(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, grain of one final pixel."""
    grain = torch.randn(len(pages), 1, SIDE, SIDE, generator=generator)
    return pages + 0.3 * strength * F.interpolate(grain, scale_factor=2)[:, 0]


def _lighting(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A slope of light across a page out of focus."""
    rows, columns = _coordinates()
    direction = torch.rand(len(pages), 1, 1, generator=generator) * 2 * torch.pi
    slope = (direction.cos() * rows + direction.sin() * columns) / PAGE
    soft = F.avg_pool2d(pages[:, None], 5, stride=1, padding=2)[:, 0]
    return torch.lerp(pages, soft, strength * 0.8) + strength * (slope - slope.mean((1, 2), keepdim=True))


def _outline(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Only the rim of the ink is left."""
    wide = F.max_pool2d(pages[:, None], 3, stride=1, padding=1)[:, 0]
    narrow = -F.max_pool2d(-pages[:, None], 3, stride=1, padding=1)[:, 0]
    return torch.lerp(pages, wide - narrow, strength)


def _gaps(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """The pen skips: blots of paper through the ink."""
    blots = torch.rand(len(pages), 1, 9, 9, generator=generator)
    blots = F.interpolate(blots, size=(PAGE, PAGE), mode="bilinear", align_corners=True)[:, 0]
    return pages * (1 - strength * ((blots - 0.55) * 10).clamp(0, 1))


def _neighbours(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Parts of other glyphs reach in from left and right."""
    for sign in (1, -1):
        order = torch.randperm(len(pages), generator=generator)
        shift = sign * 20
        other = torch.roll(pages[order], shift, dims=2)
        wrapped = slice(0, shift) if sign > 0 else slice(shift, None)
        other[:, :, wrapped] = 0
        pages = torch.maximum(pages, strength * other)
    return pages


def _weave(pages: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A woven background, each page at its own phase and pitch."""
    rows, columns = _coordinates()
    phase = torch.rand(2, len(pages), 1, 1, generator=generator) * 2 * torch.pi
    pitch = 0.5 + 0.3 * torch.rand(len(pages), 1, 1, generator=generator)
    return pages + 0.45 * strength * (rows * pitch + phase[0]).sin() * (columns * pitch + phase[1]).sin()


def _coordinates() -> tuple[Tensor, Tensor]:
    steps = torch.arange(PAGE, dtype=torch.float32)
    return steps[None, :, None], steps[None, None, :]


_SPOILERS = {
    "ruled": _ruled,
    "noise": _noise,
    "lighting": _lighting,
    "outline": _outline,
    "gaps": _gaps,
    "neighbours": _neighbours,
    "weave": _weave,
}
