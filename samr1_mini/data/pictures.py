"""Picture files: open them, read their heads, find them in a folder.

Every fault is an OSError or a ValueError.
"""

import os
import re
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, 5 to 8 exchange width and height


# ---------------------------------------------------------------------------------------------------- paths


def plain_path(name: str) -> str:
    """Return a path inside a folder in its shortest form, so that one file has one name.

    Raises ValueError for a path that is absolute, or that leads out of the folder by "..".
    """
    path = Path(os.path.normpath(name))
    if path.anchor or path.parts[:1] == ("..",) or "\0" in name:
        raise ValueError(f"{name!r} leads out of the folder; write a path inside the folder")
    return unicodedata.normalize("NFC", path.as_posix())


def inside(folder: Path, name: str) -> Path:
    """Return the file `name` in `folder`.

    The file may be a link. Raises ValueError where there is none.

    Systems write "é" as one sign or as two (NFC or NFD). Both are tried.
    """
    path = plain_path(name)
    for form in ("NFC", "NFD"):
        file = folder / unicodedata.normalize(form, path)
        if file.is_file():
            return file
    raise ValueError(f"{name}: no such file in {folder}")


# ---------------------------------------------------------------------------------------------------- pictures


@contextmanager
def opened(file):
    """Open a picture file with Pillow. Files of several pages or frames are refused."""
    try:
        with Image.open(file) as image:
            if (
                getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
            ):  # MPO: photo and preview
                raise ValueError(
                    f"this {image.format} has {image.n_frames} pages; save one page alone"
                )
            yield image
    except UnidentifiedImageError:
        raise ValueError("this is no picture that can be read") from None
    except Image.DecompressionBombError as error:
        pixels, limit = re.findall(r"\d+", str(error))[:2]
        raise ValueError(
            f"{int(pixels) / 1e6:.0f} megapixels are too many: "
            f"make the picture smaller than {int(limit) / 1e6:.0f}"
        ) from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # SyntaxError, struct.error, EOFError, ...: it depends on the format
        raise ValueError(f"this picture cannot be read ({error})") from None


def open_picture(file) -> Image.Image:
    """Read a picture as people see it: turned as its EXIF says, in RGB.

    `file` is a path or an open file.
    """
    with opened(file) as image:
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow a picture")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            return from_deep_grey(np.asarray(image, float))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def from_deep_grey(grey: np.ndarray) -> Image.Image:
    """Convert greys of 12, 16 or 32 bits [H, W] to RGB.

    Pillow's own conversion makes all above 255 white.
    """
    grey = np.nan_to_num(grey).clip(0)
    white = grey.max()
    for depth in (65535, 4095, 255, 1):
        if grey.max() <= depth:
            white = depth
    return Image.fromarray((grey / white * 255).astype(np.uint8)).convert("RGB")


@dataclass
class Head:
    """What the first bytes of a picture file tell."""

    size: tuple[int, int]  # width and height as people see the picture
    stored: tuple[int, int]  # width and height before the turn by EXIF
    turned: bool  # EXIF turns or mirrors the picture
    format: str


def read_head(file) -> Head:
    """Read the head of a picture file. Its pixels are not decoded."""
    with opened(file) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        size = image.size
        if orientation in (5, 6, 7, 8):
            size = size[::-1]
        return Head(size, image.size, orientation in range(2, 9), image.format)
