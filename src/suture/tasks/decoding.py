"""Pictures from files and bytes: of the common formats, of bounded size, as RGB."""

import threading
import warnings
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from suture.errors import DataError, data_refusal, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485  # Pillow's own bound, above which it warns
#: Others are left out: Pillow hands EPS, for one, to a program that runs what is in the file.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_WARNINGS = threading.Lock()  # their filters belong to the process, pictures are decoded by several threads


def decoded(source: Path | bytes, name: object, *, turned: bool = False) -> "Image":
    """A picture as RGB; `turned` as its EXIF orientation says. `name` is what messages call it.

    Raises `DataError` for what is no regular file, no picture of a common format, or larger than 89 million pixels.
    """
    from PIL import ImageOps

    if isinstance(source, Path) and not source.is_file():
        raise data_refusal(name, "is no regular file", "replace or remove it")
    try:
        with _opened(source) as image:
            if image.width * image.height > MOST_PIXELS:
                problem = f"has {image.width} × {image.height} pixels, more than {MOST_PIXELS:,}"
                raise data_refusal(name, problem, "make it smaller or remove it")
            image.load()
            return (ImageOps.exif_transpose(image) if turned else image).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # each format's decoder has errors of its own
        problem = f"cannot be decoded ({type(error).__name__}: {one_line(error)})"
        raise data_refusal(name, problem, "replace or remove it") from error


def _opened(source: Path | bytes) -> "Image":
    from PIL import Image

    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by the caller
        return Image.open(source if isinstance(source, Path) else BytesIO(source), formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
