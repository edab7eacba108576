"""The glyphs of the zoo: the classes it is pretrained on, and its eight tasks.

Class names are the lower-cased Unicode names ("greek small letter alpha"), so captions need no table of ours.
Every font is one that matplotlib ships; the tasks are drawn in fonts that the pretraining never sees.
"""

import unicodedata
from dataclasses import dataclass

PRETRAINING_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
"""Upright faces only; bold, italic and oblique faces are left to the tasks (one bold face aside)."""

TEMPLATES = (
    "{}",
    "a glyph of {}",
    "a picture of {}",
    "the character {}",
    "a drawing of {}",
    "a small image of {}",
)
"""Captions of the pretraining: a template filled with a class name."""

TASK_TEMPLATES = ("a glyph of {}", "a picture of {}", "a drawing of {}")
"""Zero-shot heads average these."""


@dataclass(frozen=True)
class GlyphTask:
    """One task of rendered glyphs: its characters, their fonts, and how the page is spoiled."""

    name: str
    characters: str
    fonts: tuple[str, ...]
    style: str

    @property
    def classnames(self) -> tuple[str, ...]:
        return tuple(class_name(character) for character in self.characters)


def class_name(character: str) -> str:
    """The lower-cased Unicode name of a character."""
    return unicodedata.name(character).lower()


def _span(first: str, last: str, without: str = "") -> str:
    return "".join(chr(code) for code in range(ord(first), ord(last) + 1) if chr(code) not in without)


_ARROWS = "←↑→↓↔↕↖↗↘↙⇐⇑⇒⇓⇔⇕↩↪↰↱↺↻⇄⇆"
_OPERATORS = "∀∂∃∆∇∈∋∏∑√∝∞∠∧∨∩∪∫≈≠≡≤≥⊂⊃⊕⊗⊥"

GLYPH_TASKS = (
    GlyphTask(
        "latin",
        _span("a", "z"),
        ("STIXGeneralItalic", "STIXGeneralBolIta", "cmti10", "DejaVuSerif-Italic"),
        "ruled",
    ),
    GlyphTask("greek", _span("α", "ω", "ς"), ("STIXGeneralItalic", "STIXGeneralBol", "DejaVuSerif-Italic"), "noise"),
    GlyphTask(
        "cyrillic",
        _span("А", "Я", "ЙЩ"),
        ("STIXGeneralBolIta", "DejaVuSerif-BoldItalic", "STIXGeneralBol"),
        "lighting",
    ),
    GlyphTask("armenian", _span("ա", "ր", "չջ"), ("DejaVuSans-BoldOblique", "DejaVuSerif-Bold"), "outline"),
    GlyphTask("georgian", _span("ა", "ხ"), ("DejaVuSansMono-BoldOblique", "DejaVuSerif-Italic"), "gaps"),
    GlyphTask(
        "arrows",
        _ARROWS,
        ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "DejaVuSans-Oblique"),
        "neighbours",
    ),
    GlyphTask("operators", _OPERATORS, ("STIXGeneralBol", "DejaVuSerif-Bold", "DejaVuSans-BoldOblique"), "weave"),
)

DIGITS = "digits"
"""The eighth task: scikit-learn's handwritten digits, real and not rendered."""

DIGIT_CLASSNAMES = tuple(class_name(digit) for digit in "0123456789")

TASK_NAMES = (*(task.name for task in GLYPH_TASKS), DIGITS)


def pretraining_characters() -> str:
    """About 480 characters of all the scripts above and some more; without repeats, in a fixed order."""
    spans = (
        "0123456789", _span("a", "z"), _span("A", "Z"), _span("α", "ω", "ς"), _span("Α", "Ω", "\u03a2"),
        _span("а", "я"), _span("А", "Я"), _span("ա", "ֆ"), _span("Ա", "Ֆ"), _span("ა", "ჰ"),
        _ARROWS, _span("↞", "↡"), _span("↦", "↨"), _span("⇁", "⇙"),
        _OPERATORS, _span("∀", "∢"), _span("≃", "≓"), _span("⊏", "⊢"),
        _span("■", "◯", _span("◐", "◡")),
    )  # fmt: skip
    return "".join(dict.fromkeys("".join(spans)))


def classnames_of(task: str) -> tuple[str, ...]:
    """The class names of one of `TASK_NAMES`, in the order of its labels."""
    if task == DIGITS:
        return DIGIT_CLASSNAMES
    return next(entry.classnames for entry in GLYPH_TASKS if entry.name == task)
