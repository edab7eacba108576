"""Plain texts of manual pages and of Python's standard library, with every page in one split in all languages."""

import gzip
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from suture.errors import DataError

FOLDER = Path("/usr/share/man")
LANGUAGES = {"german": "de", "french": "fr", "spanish": "es", "italian": "it", "polish": "pl"}
ENGLISH, CODE = "english", "code"
_HELD_OUT = 10  # one page in so many is for tests
_SKIPPED = {"TH", "Dd", "Dt", "Os", "ds", "nr", "ad", "in", "ta", "sp", "if", "ie", "el", "so", "SH", "hy", "de", "ig"}
_GLYPHS = {"aq": "'", "dq": '"', "em": "—", "en": "–", "lq": "“", "rq": "”", "bu": "•", "co": "©", "ti": "~", "ha": "^"}


def texts(data: Path, name: str, *, held_out: bool, longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters of every page of a corpus, cut at paragraphs.

    `data` is a folder such as /usr/share/man. Raises `DataError` where it has no pages in that language.
    """
    documents = _sources() if name == CODE else _pages(data, name)
    for page, text in documents:
        if (int(hashlib.sha256(page.encode()).hexdigest(), 16) % _HELD_OUT == 0) == held_out:
            yield from _pieces(text, longest)


def plain(roff: str) -> str:
    """A manual page without its markup: paragraphs, separated by empty lines.

    >>> plain('.TH A 1\\n.SH NAME\\n\\\\fBa\\\\fP \\\\- is\\n.B bold\\n.PP\\nEnd.')
    'NAME\\n\\na - is bold\\n\\nEnd.'
    """
    paragraphs: list[list[str]] = [[]]
    for line in roff.split("\n"):
        macro = re.match(r"[.']\s*(\w+|\\\")?", line)
        if macro is None:
            paragraphs[-1].append(_unescaped(line))
            continue
        name, rest = macro[1] or "", line[macro.end() :].strip()
        if name in ("SH", "SS", "Sh"):
            paragraphs += [[_unescaped(rest.strip('"'))], []]
        elif name in ("B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM"):
            joint = " " if len(name) == 1 else ""
            paragraphs[-1].append(_unescaped(joint.join(re.findall(r'"[^"]*"|\S+', rest)).replace('"', "")))
        elif name in ("PP", "P", "LP", "TP", "IP", "HP", "br", "Pp", ""):
            paragraphs.append([])
    joined = (" ".join(" ".join(lines).split()) for lines in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph)


def _unescaped(line: str) -> str:
    line = re.sub(r'\\".*|\\f(\[\w*\]|\(..|.)|\\[&%/,:|^]|\\s[-+]?\d', "", line)
    line = re.sub(r"\\\((..)|\\\[(\w+)\]", lambda m: _GLYPHS.get(m[1] or m[2], ""), line)
    return line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\'", "'").replace("\\~", " ")


def _pages(data: Path, name: str) -> Iterator[tuple[str, str]]:
    folder = data if name == ENGLISH else data / LANGUAGES[name]
    files = sorted(folder.glob("man*/*.gz"))
    if not files:
        package = "manpages manpages-dev" if name == ENGLISH else f"manpages-{LANGUAGES[name]}"
        remedy = f"apt-get download {package}, dpkg-deb -x each into a folder, and --data FOLDER/usr/share/man"
        raise DataError(f"{folder} has no manual pages in {name.capitalize()}. Remedy: {remedy}.")
    for file in files:
        if not file.is_file():  # a link to a page of another package
            continue
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as stream:
            roff = stream.read()
        if not roff.startswith(".so "):
            yield file.stem, plain(roff)


def _sources() -> Iterator[tuple[str, str]]:
    """The modules of this Python's standard library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if not {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3"} & set(parts):
            yield "/".join(parts), file.read_text("utf-8", errors="replace")


def _pieces(text: str, longest: int) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > longest:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        while len(piece) > longest:
            yield piece[:longest]
            piece = piece[longest:]
    if piece:
        yield piece
