"""Open picture files, read their headers, and find them in a folder.

All functions raise ValueError for a broken file.
"""

import os
import unicodedata
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..files import is_pointer

ORIENTATION = 0x0112  # EXIF's tag
Size = tuple[int, int]  # of a picture: width and height in pixels


# -------------------------------------------------------------------------------- paths


def normal_path(name: str) -> str:
    """Return a path inside a folder in its shortest form, so that one file has one name.

    Raises ValueError for a path that is absolute, or that leads out of the folder by "..".
    """
    path = Path(os.path.normpath(name))
    if path.anchor or path.parts[:1] == ("..",) or "\0" in name:
        raise ValueError(f"{name!r} leads out of the folder; write a path inside the folder")
    return unicodedata.normalize("NFC", path.as_posix())


def inside(folder: Path, name: str) -> Path:
    """Return the file `name` in `folder`. The file may be a link.

    Raises ValueError if there is no such file.
    """
    file = folder
    with suppress(OSError):  # such as a name that is too long
        for part in Path(normal_path(name)).parts:
            file = child(file, part)
        if file.is_file():
            return file
        if file.is_symlink():
            raise ValueError(f"{name:.80} is a broken link; copy the file itself")
    raise ValueError(
        f"{name:.80}: no such file in {folder}; write the path inside this folder, with / between names"
    )


def child(folder: Path, name: str) -> Path:
    """Return the path of `name` in the Unicode form (NFC or NFD) that the disk uses.

    Some systems write "é" as one character, others as two.
    """
    if name.isascii():  # only one form, so no look on the disk
        return folder / name
    other = folder / unicodedata.normalize("NFD", name)
    if other.exists():
        return other
    return folder / unicodedata.normalize("NFC", name)


def check_size(what: str, size, expected, advice: str = "") -> None:
    """Refuse a size (width, height) that differs from `expected`. If that is None, accept all."""
    if expected and tuple(size) != tuple(expected):
        width, height = size
        raise ValueError(
            f"{what} is {width} x {height} pixels, but must have {expected[0]} x {expected[1]}{advice}"
        )


# -------------------------------------------------------------------------------- pictures


@contextmanager
def opened(file):
    """Open a picture file with Pillow. Files of several pages or frames are refused.

    Errors start with the file name, including errors raised inside the `with` block.
    """
    name, stream = "", nullcontext(file)
    try:
        if isinstance(file, Path):
            name = f"{file.name}: "
            # With a file name, Pillow would read some rotated TIFFs wrong (it maps the file).
            stream = file.open("rb")
        with stream as data, Image.open(data) as image:
            pages = getattr(image, "n_frames", 1)
            if pages > 1 and image.format != "MPO":  # an MPO is a photo with its preview
                raise ValueError(f"this {image.format} has {pages} pages; save one page alone")
            yield image
    except ValueError as error:
        raise ValueError(f"{name}{error}") from None
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, EOFError and others, by format
        if isinstance(file, Path) and is_pointer(file):
            why = f"only a git-lfs pointer; run `git lfs pull` in {file.parent}"
            raise ValueError(f"{name}{why}") from None
        why = str(error).replace(f" {stream!r}", "")
        raise ValueError(
            f"{name}not a readable picture ({why}); save a new or smaller copy as PNG or JPEG"
        ) from None


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says. Broken EXIF is ignored, broken pixels are not."""
    image.load()  # damaged pixels raise an error at the first try, and only then
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # Pillow raises anything for broken EXIF
        return image


def open_picture(file) -> Image.Image:
    """Read a picture in RGB, turned as its EXIF says. `file` is a path or an open file."""
    with opened(file) as image:
        if max(image.size) > 100 * min(image.size):
            raise ValueError(
                f"a picture of {image.width} x {image.height} pixels; one side is over 100 times the other"
            )
        image = upright(image)
        if image.mode[0] in "IF":
            return from_deep_grey(np.asarray(image, float))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def from_deep_grey(grey: np.ndarray) -> Image.Image:
    """Convert grey values of 12, 16 or 32 bits [H, W] to RGB.

    Pillow's own conversion makes all values above 255 white.
    """
    grey = np.nan_to_num(grey).clip(0)
    white = grey.max()
    for depth in (65535, 4095, 255, 1):
        if grey.max() <= depth:
            white = depth
    return Image.fromarray((grey / white * 255).astype(np.uint8)).convert("RGB")


@dataclass
class Header:
    """The size, orientation and format of a picture file."""

    size: Size  # after the turn by EXIF
    turned: bool  # EXIF turns or mirrors the picture
    sideways: bool  # EXIF exchanges width and height
    format: str
    lossy: bool  # its compression changes pixels


LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "jpeg", "tiff_jpeg", "webp")


def read_header(file) -> Header:
    """Read the header of a picture file. The pixels are not decoded."""
    with opened(file) as image:
        orientation, size = orientation_of(image), image.size
        sideways = orientation >= 5
        if sideways and image.format != "TIFF":  # Pillow exchanges a TIFF's sides itself
            size = size[::-1]
        compression = image.info.get("compression")  # inside a TIFF
        lossy = image.format in LOSSY or compression in LOSSY
        return Header(size, orientation > 1, sideways, image.format, lossy)


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation: 1 is upright, 5 to 8 exchange width and height."""
    places = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
    if image.format == "PNG" and not any(place in image.info for place in places):
        return 1  # to find EXIF behind the pixels, Pillow would decode all pixels
    with suppress(Exception):  # Pillow raises anything for broken EXIF
        orientation = image.getexif().get(ORIENTATION)
        if orientation in range(1, 9):
            return orientation
    return 1
