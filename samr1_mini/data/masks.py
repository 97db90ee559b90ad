"""True masks as data files write them: PNG files, COCO's RLE, polygons, rows of 0 and 1, and boxes.

`check_truth` finds all faults that can be detected from the line and the picture size. `read_mask`
returns pixels.
"""

import math
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from .pictures import Head, inside, opened, read_head, upright

TOLERANCE = 5  # pixels by which annotators' coordinates may leave the picture
FORMS = "the path of a PNG file, a COCO RLE, polygons, or rows of 0 and 1"


# ---------------------------------------------------------------------------------------------------- check


def check_truth(row: dict, size: tuple[int, int] | None = None, may_be_empty: bool = False) -> None:
    """Check the mask or box of a line, and its undecided pixels. Raises ValueError.

    `size` is the picture's width and height. Without a size the range of coordinates is not
    checked.
    """
    if has_box(row):
        check_box(row["box"], size)
    else:
        check_mask(row.get("mask"), size, may_be_empty)
    if row.get("ignore"):
        check_mask(row["ignore"], size, may_be_empty=True)


def has_box(row: dict) -> bool:
    """Return whether a line has a box instead of a mask."""
    return is_absent(row.get("mask")) and not is_absent(row.get("box"))


def is_absent(value) -> bool:
    """Return whether a value stands for nothing: null, an empty text, or NaN, as pandas writes."""
    return value is None or value == "" or value != value


def check_box(box, size: tuple[int, int] | None = None) -> None:
    """Refuse a box that is not [x1, y1, x2, y2] in pixels of a picture of this size."""
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        raise ValueError("the box is not a list of four numbers x1, y1, x2, y2")
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        raise ValueError(
            f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} is reversed or empty; write x1, y1, x2, y2"
        )
    check_range(box, size)
    if round(x1) == round(x2) or round(y1) == round(y2):
        raise ValueError(
            f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} holds no pixel; make the box larger"
        )


def check_mask(value, size: tuple[int, int] | None = None, may_be_empty: bool = False) -> None:
    """Refuse a mask that cannot be drawn, or that holds no pixel.

    The pixels of a PNG are not read here.
    """
    if isinstance(value, str):
        return
    if isinstance(value, dict):
        pixels = check_rle(value, size)
    elif is_rows(value, size):
        pixels = int(np.count_nonzero(value))
        if size and np.shape(value) != size[::-1]:
            has = f"{len(value[0])} x {len(value)}"
            raise ValueError(f"the mask's rows are {has}, the picture {size[0]} x {size[1]}")
    else:
        pixels = check_polygons(value, size)
    if not pixels and not may_be_empty:
        raise ValueError("the mask is empty; remove the line if the picture has no such object")


def check_rle(rle: dict, size: tuple[int, int] | None) -> int:
    """Check a COCO RLE and return its number of pixels."""
    if not {"size", "counts"} <= set(rle):
        raise ValueError("the mask's RLE needs size and counts")
    sides = rle["size"]
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(is_whole, sides)):
        raise ValueError("the size of the mask's RLE is not [height, width]")
    if size and tuple(sides) != size[::-1]:
        raise ValueError(
            f"the mask is {sides[1]} x {sides[0]}, the picture {size[0]} x {size[1]} "
            "(write an RLE's size as [height, width])"
        )
    runs = rle_runs(rle)
    if not all(is_whole(run) for run in runs) or sum(runs) != math.prod(sides):
        raise ValueError("the counts of the mask's RLE must add up to height x width")
    return sum(runs[1::2])


def check_polygons(value, size: tuple[int, int] | None) -> int:
    """Check polygons and return their pixel count. Return 1 if the picture size is unknown."""
    polygons = as_polygons(value)
    check_range([number for polygon in polygons for number in polygon], size)
    if not size:
        return 1
    return int(coco.area(coco.frPyObjects(polygons, size[1], size[0])).sum())


def check_range(numbers: list[float], size: tuple[int, int] | None) -> None:
    """Refuse normalised coordinates (fractions of width and height) and coordinates outside the
    picture. `numbers` are x, y, x, y, ...
    """
    if max(numbers) < 2:  # shares, or shares that rounding has lifted above 1
        raise ValueError("no coordinate reaches 2; write pixels, not fractions of width and height")
    if not size:
        return
    right, bottom = max(numbers[::2]), max(numbers[1::2])
    if min(numbers) < -TOLERANCE or right > size[0] + TOLERANCE or bottom > size[1] + TOLERANCE:
        raise ValueError(
            f"coordinates from {min(numbers):g} to {right:g}, {bottom:g} are outside the picture of "
            f"{size[0]} x {size[1]}; write pixels of this picture"
        )


# ---------------------------------------------------------------------------------------------------- forms


def are_numbers(values: list) -> bool:
    """Return whether all values of a list are finite numbers. Booleans do not count as numbers."""
    return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))


def is_whole(value) -> bool:
    """Tell whether a JSON value is a whole number from 0 on."""
    return type(value) is int and value >= 0


def as_polygons(value) -> list[list[float]]:
    """Return polygons as COCO writes them: lists x1, y1, x2, y2, ...

    A single polygon does not need an outer list.

    Points may be pairs: [[x, y], [x, y], ...]. Parts without three points are dropped if others are
    left.
    """
    if not isinstance(value, list):
        raise ValueError(f"the mask is none of these: {FORMS}")
    if not value:
        raise ValueError(
            "the mask is an empty list; remove the line if the picture has no such object"
        )
    if not isinstance(value[0], list) or is_point(value[0]):
        value = [value]
    polygons = [flat_polygon(polygon) for polygon in value]
    whole = [polygon for polygon in polygons if len(set(zip(polygon[::2], polygon[1::2]))) > 2]
    if not whole:
        raise ValueError("no polygon of the mask has three points or more")
    return whole


def is_point(value) -> bool:
    """Return whether a value is [x, y]."""
    return isinstance(value, list) and len(value) == 2 and are_numbers(value)


def flat_polygon(polygon) -> list[float]:
    """Convert a flat list or a list of pairs to one flat polygon [x1, y1, x2, y2, ...]."""
    if isinstance(polygon, list) and polygon and all(map(is_point, polygon)):
        return [number for point in polygon for number in point]
    if isinstance(polygon, list) and len(polygon) % 2 == 0 and are_numbers(polygon):
        return polygon
    raise ValueError("a polygon of the mask is not a list of x, y pairs")


def is_rows(value, size: tuple[int, int] | None) -> bool:
    """Return whether a mask is a list of rows of pixels.

    If the rows do not have the picture's size, they may hold only 0 and one other value.


    """
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], list):
        return False
    width = len(value[0])
    if width < 3 or not all(isinstance(row, list) and len(row) == width for row in value):
        return False
    if not all(set(map(type, row)) <= {int, float, bool} for row in value):
        return False
    if size and (width, len(value)) == size:
        return True
    if size and (width, len(value)) == size[::-1]:
        return True  # the sides are exchanged, as an error will tell
    numbers = set().union(*value)
    return numbers <= {0, 1} or (0 in numbers and len(numbers) <= 2 and len(value) > 2)


def rle_runs(rle: dict) -> list[int]:
    """Return the lengths of an RLE's runs of 0 and 1, in turn."""
    counts = rle["counts"]
    if isinstance(counts, list):
        return counts
    if isinstance(counts, str):
        counts = counts.encode()
    return run_lengths(counts)


def run_lengths(counts: bytes) -> list[int]:
    """Read COCO's compressed runs. A run that is cut off or too long becomes -1.

    Each character holds five bits, and the lowest bits come first. From the fourth run on, each
    number is the difference from the run two places earlier.
    """
    runs, value, bits = [], 0, 0
    for sign in counts:
        sign -= 48
        value |= (sign & 31) << bits
        bits += 5
        if bits > 60:  # no run is that long
            return [-1]
        if sign & 32:  # the number continues
            continue
        if value >> (bits - 1):  # its highest bit is its sign
            value -= 1 << bits
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
        value, bits = 0, 0
    if bits:
        runs.append(-1)
    return runs


def to_rle(mask: np.ndarray) -> dict:
    """Return a mask bool [H, W] as a COCO RLE that JSON can hold."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


# ---------------------------------------------------------------------------------------------------- pixels


def read_mask(value, folder: Path, height: int, width: int) -> np.ndarray:
    """Read a mask bool [H, W] from any of the forms above. Raises OSError or ValueError."""
    if isinstance(value, str):
        mask = read_mask_file(inside(folder, value))
    else:
        check_mask(value, (width, height), may_be_empty=True)
        mask = draw_mask(value, height, width)
    if mask.shape != (height, width):
        has = f"{mask.shape[1]} x {mask.shape[0]}"
        raise ValueError(f"the mask is {has}, the picture {width} x {height}")
    return mask


def draw_mask(value, height: int, width: int) -> np.ndarray:
    """Draw a checked RLE, rows or polygons as bool [H, W]."""
    if isinstance(value, dict):
        runs = rle_runs(value)
        ones = np.arange(len(runs)) % 2 == 1
        return np.repeat(ones, runs).reshape(width, height).T  # column after column
    if is_rows(value, (width, height)):
        return np.asarray(value) > 0
    polygons = coco.frPyObjects(as_polygons(value), height, width)
    return coco.decode(coco.merge(polygons)).astype(bool)


def read_mask_file(file: Path) -> np.ndarray:
    """Read a mask bool [H, W] from a picture: all that is not black.

    0/1, 0/255 and floats are fine.
    """
    refuse_lossy(read_head(file), file.name)
    with opened(file) as image:
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema() != (255, 255):
                raise ValueError("a mask with transparent parts; save it in black and white")
        image = upright(image)
        if image.mode not in ("1", "L") and image.mode[0] not in "IF":
            image = image.convert("RGB")  # a palette may have black anywhere
        pixels = np.asarray(image)
    if pixels.ndim == 3:
        return pixels.any(-1)
    return pixels > 0


def refuse_lossy(head: Head, name: str) -> None:
    """Refuse a mask whose compression changes pixels."""
    if head.lossy:
        raise ValueError(f"{name}: {head.format} may blur a mask's border; save it as PNG")
